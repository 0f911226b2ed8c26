"""The score of an instance that was not trained on is what its removal would do, had it been drawn like the others."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, spectral_norm

from ganclean.backends import ITD
from ganclean.losses import R1, GradientPenalty
from ganclean.metrics import FID, DiscriminatorLoss
from ganclean.optim import Clipped
from tests.practice import perceptrons
from tests.reference.finite_differences import finite_difference_outsiders, largest_error
from tests.toy_gans import OPTIMIZERS, toy_cleaner, toy_data

X = toy_data()
OUTSIDERS = np.array([[0.0, 0.0], [3.0, -2.0], [-1.0, 4.0]])
SCHEMES = [("exact", 1e-5), ("secant", 1e-3)]
ADAM = OPTIMIZERS["adam"]

TRAINING = {
    "plain": {},
    "simultaneous": {"update": "simultaneous", "optimizer": ADAM},
    "r1": {"penalty": R1(gamma=2.0)},
    "r1, lazy, simultaneous": {"penalty": R1(gamma=2.0, every=2), "update": "simultaneous"},
    "gradient penalty": {"penalty": GradientPenalty(weight=2.0), "optimizer": ADAM},
    "gradient penalty, critic": {"penalty": GradientPenalty(every=2), "n_critic": 2, "loss": "wasserstein"},
    "n_critic": {"n_critic": 3, "optimizer": ADAM},
    "moving average": {"ema_decay": 0.8, "loss": "least_squares"},
    "clipping": {"optimizer": Clipped(OPTIMIZERS["momentum"], max_norm=0.3)},
}
NETWORKS = {
    "spectral norm": (parametrizations.spectral_norm, {}),
    "spectral norm, r1": (parametrizations.spectral_norm, {"penalty": R1()}),
    "spectral norm by hook, gradient penalty": (spectral_norm, {"penalty": GradientPenalty(), "n_critic": 2}),
}


def networks(normalize=lambda layer: layer):
    torch.manual_seed(0)
    return perceptrons(normalize_d=normalize)


def expected_scores(cleaner, start=0, width=1e-3):
    """From finite differences: on the scale of what one instance does in as many steps as draw it."""
    total = finite_difference_outsiders(
        cleaner, torch.from_numpy(X), torch.from_numpy(OUTSIDERS), start=start, width=width
    )
    n_traced = len(cleaner.trajectory_) - start
    draws = n_traced // cleaner.trajectory_.steps_per_epoch
    return {name: derivative / n_traced * draws for name, derivative in total.items()}


def assert_scores(make=networks, last_epochs=None, start=0, **settings):
    expected = None
    for derivative, tolerance in SCHEMES:
        metric = {"fid": FID(n_samples=60), "loss": DiscriminatorLoss(n_samples=60)}
        backend = ITD(last_epochs, derivative, delta=1e-4)
        for selected in metric:
            settings = {"n_epochs": 2} | settings
            cleaner = toy_cleaner(make(), metric=metric, backend=backend, select=selected, **settings).fit(X)
            # Clipping has kinks, which a narrow difference does not meet.
            expected = expected or expected_scores(cleaner, start, width=3e-4)
            sign = 1 if cleaner.metric_.greater_is_better else -1
            scores = {selected: sign * cleaner.score_samples(OUTSIDERS)}
            assert largest_error(scores, {selected: expected[selected]}) < tolerance, (derivative, selected)


@pytest.mark.parametrize("settings", TRAINING.values(), ids=TRAINING)
def test_the_score_of_an_outsider_is_the_derivative_in_its_weight_in_every_batch(settings):
    assert_scores(**settings)


@pytest.mark.parametrize(("normalize", "settings"), NETWORKS.values(), ids=NETWORKS)
def test_an_outsider_is_scored_with_the_spectral_norms_of_the_step(normalize, settings):
    assert_scores(partial(networks, normalize), **settings)


def test_only_the_traced_epochs_count():
    assert_scores(last_epochs=2, start=6, n_epochs=4)


@pytest.mark.parametrize("derivative", ["exact", "secant"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"update": "simultaneous", "optimizer": ADAM}, {"penalty": R1(), "n_critic": 2}],
    ids=["plain", "simultaneous", "r1"],
)
def test_where_every_step_draws_every_instance_scores_equal_harmfulness(settings, derivative):
    cleaner = toy_cleaner(backend=ITD(derivative=derivative), batch_size=16, **settings).fit(X)
    np.testing.assert_allclose(cleaner.score_samples(X), cleaner.harmfulness_, rtol=1e-6)
    np.testing.assert_allclose(cleaner.score_samples(X[3:5]), cleaner.harmfulness_[3:5], rtol=1e-6)


@pytest.mark.parametrize("derivative", ["exact", "secant"])
def test_outsiders_are_scored_alike_whatever_number_is_scored_at_once(derivative):
    cleaner = toy_cleaner(networks(parametrizations.spectral_norm), backend=ITD(1, derivative)).fit(X)
    many = np.random.default_rng(3).normal(size=(600, 2))
    together = cleaner.score_samples(many)
    np.testing.assert_allclose(together[[0, 299, 599]], cleaner.score_samples(many[[0, 299, 599]]), rtol=1e-9)
