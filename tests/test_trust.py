"""What a back-end says about how far it can be trusted: width, growth, self-check, noise."""

import numpy as np
import pytest
import torch
from torch import nn

from ganclean.backends import ITD
from ganclean.exceptions import NonFiniteError
from ganclean.metrics import FID, SampleMean
from ganclean.validation import counterfactual_retrain
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

X = toy_data(40)


def fitted(networks=None, n_epochs=4, metric=None, **backend):
    settings = {"optimizer": OPTIMIZERS["adam"], "batch_size": 8, "n_epochs": n_epochs}
    return toy_cleanser(networks, metric=metric or FID(n_samples=60), backend=ITD(**backend), **settings).fit(X)


def kinked():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    return generator, discriminator


def test_the_width_is_the_one_that_best_predicts_real_removals():
    cleanser = fitted(kinked(), metric=SampleMean(n_samples=200), last_epochs=1, delta="auto")
    backend = cleanser.backend_
    assert backend.delta_ == max(backend.calibration_, key=backend.calibration_.get)
    # The same by hand, with the metric itself in place of its gradient.
    rng, groups = np.random.RandomState(0), []
    for _ in range(10):
        groups.append(rng.permutation(len(X))[:2])
    true = counterfactual_retrain(cleanser, groups, last_epochs=1)
    for width, correlation in backend.calibration_.items():
        influence = fitted(kinked(), metric=SampleMean(n_samples=200), last_epochs=1, delta=width).influence_
        predicted = [influence[rows].sum() for rows in groups]
        assert np.corrcoef(predicted, true)[0, 1] == pytest.approx(correlation, abs=0.05)


def test_a_calibrated_width_gives_what_the_same_number_gives():
    automatic = fitted(kinked(), delta="auto")
    assert np.array_equal(automatic.influence_, fitted(kinked(), delta=automatic.backend_.delta_).influence_)


def test_an_adjoint_that_grows_beyond_all_bounds_stops_the_trace():
    def rough(**backend):
        settings = {"optimizer": OPTIMIZERS["momentum"], "update": "simultaneous", "batch_size": 8, "n_epochs": 30}
        return toy_cleanser(backend=ITD(**backend), **settings).fit(X).backend_

    growth = rough().growth_["FID"]
    assert growth > 10
    assert rough(max_growth=growth * 1.001).growth_["FID"] == growth
    with pytest.raises(NonFiniteError, match=r"metric 'FID' grew \d\.\de\+\d\d-fold at step \d+ of 150.*last_epochs"):
        rough(max_growth=growth / 2)


def test_a_run_that_explodes_is_not_given_numbers():
    generator, discriminator = kinked()
    with pytest.raises(NonFiniteError):
        # A kink in a narrow secant is a spike, and the recursion multiplies spikes.
        settings = {"optimizer": OPTIMIZERS["adam"].at({"lr": 0.3, "eps": 1e-8}), "n_epochs": 40, "batch_size": 8}
        toy_cleanser((generator, discriminator), backend=ITD(delta=1e-6), **settings).fit(X)


def test_the_self_check_is_the_distance_of_both_schemes_in_the_last_step():
    assert fitted(delta=1e-4).backend_.deviation_ < 1e-5
    assert fitted(delta=1e-2).backend_.deviation_ == pytest.approx(
        1e4 * fitted(delta=1e-4).backend_.deviation_, rel=0.2
    )
    assert fitted(kinked(), delta=0.1).backend_.deviation_ > 0.1 > fitted(delta=0.1).backend_.deviation_
    assert np.isnan(fitted(derivative="exact").backend_.deviation_)


def test_the_self_check_measures_the_first_step_that_has_contributions():
    exact, secant = (fitted(last_epochs=1, n_epochs=1, derivative=d, delta=0.03) for d in ("exact", "secant"))
    rows = secant.trajectory_[len(secant.trajectory_) - 1].indices.numpy()
    a, b = exact.influence_[rows], secant.influence_[rows]
    assert secant.backend_.deviation_ == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)


def test_noise_averages_secants_from_perturbed_parameters():
    plain = fitted().influence_
    assert np.allclose(fitted(n_perturbations=2, perturbation=1e-9).influence_, plain, rtol=1e-5)
    noisy = fitted(n_perturbations=2, perturbation=0.05).influence_
    assert not np.allclose(noisy, plain, rtol=1e-3) and np.corrcoef(noisy, plain)[0, 1] > 0.9
    assert np.array_equal(noisy, fitted(n_perturbations=2, perturbation=0.05).influence_)


def test_averaging_over_noise_brings_kinked_networks_closer_to_their_smooth_selves():
    """Of a smooth network nothing is averaged away: the second-order effect of the noise is small."""
    smooth = fitted(toy_networks())
    averaged = fitted(toy_networks(), n_perturbations=8, perturbation=0.02)
    assert np.linalg.norm(averaged.influence_ - smooth.influence_) < 0.1 * np.linalg.norm(smooth.influence_)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_perturbations": -1}, "n_perturbations must be an integer from 0; got -1"),
        ({"n_perturbations": 1.5}, "n_perturbations must be an integer"),
        ({"perturbation": 0}, "perturbation must be a positive number"),
        ({"max_growth": None}, "max_growth must be a positive number"),
        ({"delta": "best"}, "delta must be a positive number or 'auto'; got 'best'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        fitted(**parameters)
