"""The score of an instance that was not trained on is what its removal would do, had it been drawn like the others."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils import parametrizations, spectral_norm

from ganclean import Update
from ganclean.backends import ITD
from ganclean.losses import R1, GradientPenalty
from ganclean.metrics import FID, DiscriminatorLoss
from ganclean.optim import Clipped
from tests.practice import perceptrons
from tests.reference.finite_differences import finite_difference_outsiders, largest_error
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data

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


def expected_scores(cleanser, start=0, width=1e-3):
    """From finite differences: on the scale of what one instance does in as many steps as draw it."""
    total = finite_difference_outsiders(
        cleanser, torch.from_numpy(X), torch.from_numpy(OUTSIDERS), start=start, width=width
    )
    n_traced = len(cleanser.trajectory_) - start
    draws = n_traced // cleanser.trajectory_.steps_per_epoch
    return {name: derivative / n_traced * draws for name, derivative in total.items()}


def assert_scores(make=networks, last_epochs=None, start=0, **settings):
    expected = None
    for derivative, tolerance in SCHEMES:
        metric = {"fid": FID(n_samples=60), "loss": DiscriminatorLoss(n_samples=60)}
        backend = ITD(last_epochs, derivative, delta=1e-4)
        for selected in metric:
            settings = {"n_epochs": 2} | settings
            cleanser = toy_cleanser(make(), metric=metric, backend=backend, select=selected, **settings).fit(X)
            # Clipping has kinks, which a narrow difference does not meet.
            expected = expected or expected_scores(cleanser, start, width=3e-4)
            sign = 1 if cleanser.metric_.greater_is_better else -1
            scores = {selected: sign * cleanser.score_samples(OUTSIDERS)}
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
    cleanser = toy_cleanser(backend=ITD(derivative=derivative), batch_size=16, **settings).fit(X)
    np.testing.assert_allclose(cleanser.score_samples(X), cleanser.harmfulness_, rtol=1e-6)
    np.testing.assert_allclose(cleanser.score_samples(X[3:5]), cleanser.harmfulness_[3:5], rtol=1e-6)


@pytest.mark.parametrize("derivative", ["exact", "secant"])
def test_outsiders_are_scored_alike_whatever_number_is_scored_at_once(derivative):
    cleanser = toy_cleanser(networks(parametrizations.spectral_norm), backend=ITD(1, derivative)).fit(X)
    many = np.random.default_rng(3).normal(size=(600, 2))
    together = cleanser.score_samples(many)
    np.testing.assert_allclose(together[[0, 299, 599]], cleanser.score_samples(many[[0, 299, 599]]), rtol=1e-9)


def batch_normal(**settings):
    """A cleanser whose discriminator sees how an instance compares with its batch."""
    torch.manual_seed(0)
    pair = perceptrons(norm_g=nn.BatchNorm1d, norm_d=nn.BatchNorm1d)
    settings = {"optimizer": ADAM, "penalty": R1(gamma=0.5)} | settings
    return toy_cleanser(pair, **settings).fit(X)


MANY = np.random.default_rng(4).normal(size=(300, 2)) * 2 + 0.5
BATCH_NORMAL = {
    "exact": {"backend": ITD(derivative="exact"), "penalty": None},
    "secant": {"backend": ITD()},
    "perturbed": {"backend": ITD(n_perturbations=2)},
    "gradient penalty": {"penalty": GradientPenalty(weight=0.5)},
    "simultaneous": {"update": "simultaneous"},
    "n_critic": {"n_critic": 2},
}


@pytest.mark.parametrize("settings", BATCH_NORMAL.values(), ids=BATCH_NORMAL)
def test_with_batch_statistics_the_score_of_a_row_does_not_depend_on_its_company(settings):
    cleanser = batch_normal(**settings)
    together = cleanser.score_samples(MANY)
    assert together.shape == (300,) and np.isfinite(together).all() and len(set(together.tolist())) == 300
    tolerance = {"rtol": 1e-9, "atol": 1e-12 * np.abs(together).max()}
    np.testing.assert_allclose(cleanser.score_samples(MANY[:257]), together[:257], **tolerance)
    np.testing.assert_allclose(cleanser.score_samples(MANY[:1]), together[:1], **tolerance)
    followed = np.concatenate([MANY[:7], 50 * MANY[7:]])
    np.testing.assert_allclose(cleanser.score_samples(followed)[:7], together[:7], **tolerance)
    if isinstance(settings.get("penalty"), GradientPenalty):
        # The places at which it looks serve newcomers in turn.
        return
    np.testing.assert_allclose(cleanser.score_samples(np.concatenate([50 * MANY[:8], MANY]))[8:], together, **tolerance)
    for row in (100, 299):
        np.testing.assert_allclose(cleanser.score_samples(MANY[[row]]), together[[row]], **tolerance)


def test_with_batch_statistics_the_order_of_the_rows_does_not_matter():
    cleanser = batch_normal()
    order = np.random.default_rng(0).permutation(300)
    found, expected = cleanser.score_samples(MANY[order]), cleanser.score_samples(MANY)[order]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def mean_of(weights, terms):
    return (weights * terms).mean()


def sum_of(weights, terms):
    return 0.1 * (weights * terms).sum()


def share_of(weights, terms):
    return (weights * terms).sum() / weights.sum()


def one_by_one(nets, x, fake):
    return nets.D(x).flatten(), nets.D(fake).flatten()


def in_one_call(nets, x, fake):
    return nets.D(torch.cat([x, fake])).flatten().split([len(x), len(fake)])


def own_updates(reduce, judge, micro=1):
    """The usual losses as objectives of one's own."""

    def of_d(nets, batch, weights):
        real, fake = judge(nets, batch.x, nets.G(batch.latents))
        return reduce(weights, softplus(-real)) + softplus(fake).mean()

    def of_g(nets, batch, weights):
        return softplus(-nets.D(nets.G(batch.latents))).mean()

    return [Update("D", of_d, OPTIMIZERS["momentum"], micro=micro), Update("G", of_g, OPTIMIZERS["momentum"])]


@pytest.mark.parametrize("derivative", ["exact", "secant"])
@pytest.mark.parametrize("judge", [one_by_one, in_one_call])
@pytest.mark.parametrize("reduce", [mean_of, sum_of, share_of])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d])
def test_newcomers_are_scored_like_drawn_instances_however_an_objective_weighs_them(norm, reduce, judge, derivative):
    torch.manual_seed(0)
    pair = perceptrons(norm_g=norm, norm_d=norm)
    settings = {"updates": own_updates(reduce, judge), "optimizer": None, "batch_size": 16}
    cleanser = toy_cleanser(pair, backend=ITD(derivative=derivative), **settings).fit(X)
    np.testing.assert_allclose(cleanser.score_samples(X), cleanser.harmfulness_, rtol=1e-6)
    np.testing.assert_allclose(cleanser.score_samples(X[3:5]), cleanser.harmfulness_[3:5], rtol=1e-6)
    np.testing.assert_allclose(cleanser.score_samples(np.tile(X, (20, 1)))[-16:], cleanser.harmfulness_, rtol=1e-6)


@pytest.mark.parametrize("reduce", [mean_of, sum_of])
def test_how_an_objective_weighs_them_is_seen_only_where_the_metric_depends_on_it(reduce):
    of_d, of_g = own_updates(reduce, one_by_one)
    # By the last update of D nothing that the metric looks at has come.
    settings = {"updates": [replace(of_g, meets="before"), of_d], "optimizer": None, "batch_size": 16}
    cleanser = toy_cleanser(**settings).fit(X)
    np.testing.assert_allclose(cleanser.score_samples(X), cleanser.harmfulness_, rtol=1e-6)


def test_a_mean_and_a_sum_in_one_step_are_told_apart():
    (mean, of_g), (total, _) = own_updates(mean_of, one_by_one), own_updates(sum_of, one_by_one)
    updates = [mean, replace(total, name="sum"), of_g]
    cleanser = toy_cleanser(updates=updates, optimizer=None, batch_size=16).fit(X)
    np.testing.assert_allclose(cleanser.score_samples(X[3:5]), cleanser.harmfulness_[3:5], rtol=1e-6)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_randomness_in_the_discriminator_does_not_change_the_scale_of_scores(dropout):
    torch.manual_seed(0)
    cleanser = toy_cleanser(perceptrons(dropout=dropout), n_epochs=20).fit(X)
    few, many = cleanser.score_samples(X), cleanser.score_samples(np.tile(X, (40, 1)))
    # Masks differ from row to row; that which is the larger of two batches is 20 times as large.
    sizes = [np.abs(cleanser.harmfulness_).mean(), np.abs(few).mean(), np.abs(many).mean()]
    assert max(sizes) < 1.5 * min(sizes)


def test_a_batch_in_slices_is_met_as_a_whole():
    torch.manual_seed(0)
    settings = {"optimizer": None, "batch_size": 16}
    sliced = toy_cleanser(updates=own_updates(mean_of, one_by_one, micro=4), **settings).fit(X)
    np.testing.assert_allclose(sliced.score_samples(X), sliced.harmfulness_, rtol=1e-6)
    np.testing.assert_allclose(sliced.score_samples(X[3:5]), sliced.harmfulness_[3:5], rtol=1e-6)
    pair = perceptrons(norm_d=nn.BatchNorm1d)
    cleanser = toy_cleanser(pair, updates=own_updates(mean_of, one_by_one, micro=4), **settings).fit(X)
    together = cleanser.score_samples(MANY)
    np.testing.assert_allclose(cleanser.score_samples(MANY[5:9]), together[5:9], rtol=1e-9)
