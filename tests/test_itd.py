from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from torch import nn

from ganclean import GANTrainer
from ganclean.backends import ITD, InfluenceBackend, resolve_backend
from ganclean.dynamics.state import map_state, ravel
from ganclean.exceptions import NonFiniteError
from ganclean.losses import LOSSES
from ganclean.metrics import FID, KID, AverageLogLikelihood, DiscriminatorLoss, SampleMean
from ganclean.optim import SGD, Optimizer
from tests.reference.finite_differences import (
    finite_difference_influences,
    largest_error,
)
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

X = toy_data()
SCHEMES = {"exact": 1e-5, "secant": 1e-3}


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(GANTrainer, "train", lambda *_, **__: pytest.fail("training has begun"))


def itd(derivative, last_epochs=None):
    return ITD(last_epochs, derivative, delta=1e-4)


def metrics():
    return {"fid": FID(n_samples=60), "discriminator_loss": DiscriminatorLoss(n_samples=60)}


def assert_exact(networks=None, schemes=SCHEMES, start=0, last_epochs=None, **settings):
    """Both schemes against the same finite differences; returns the last fitted cleanser."""
    expected = None
    for derivative, tolerance in schemes.items():
        cleanser = toy_cleanser(networks, metric=metrics(), backend=itd(derivative, last_epochs), **settings).fit(X)
        expected = expected or finite_difference_influences(cleanser, torch.from_numpy(X), start)
        assert largest_error(cleanser.influences_, expected) < tolerance, derivative
    return cleanser


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_influence_is_exact_for_every_loss(loss):
    generator, discriminator = toy_networks()
    discriminator[2].weight.data *= 0.3
    cleanser = assert_exact((generator, discriminator), loss=loss, optimizer=SGD(lr=0.03, momentum=0.5))
    instances = torch.cat([torch.from_numpy(X), torch.from_numpy(cleanser.sample(100)[0])])
    assert loss != "hinge" or cleanser.discriminator_(instances).abs().max() < 0.9, "a kink of the hinge is near"


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_influence_is_exact_through_a_moving_average(update):
    assert_exact(ema_decay=0.8, update=update, optimizer=OPTIMIZERS["adam"])


@pytest.mark.parametrize(("last_epochs", "start"), [(1, 9), (2, 6), (4, 0)])
def test_the_last_epochs_predict_a_removal_from_their_first_step_on(last_epochs, start):
    cleanser = assert_exact(start=start, last_epochs=last_epochs, optimizer=OPTIMIZERS["adam"], n_epochs=4)
    assert len(cleanser.trajectory_) == 12


def test_influence_is_exact_for_two_optimizers_of_different_kinds():
    assert_exact(optimizer_generator=OPTIMIZERS["adam"], optimizer_discriminator=OPTIMIZERS["nesterov"])


def test_influence_is_exact_with_frozen_parameters_and_leaves_them_out():
    generator, discriminator = toy_networks()
    generator[0].weight.requires_grad_(False)
    discriminator[2].bias.requires_grad_(False)
    cleanser = assert_exact((generator, discriminator))
    state = cleanser.trajectory_.state(9)
    assert "0.weight" not in state.generator and "2.bias" not in state.discriminator
    assert torch.equal(cleanser.generator_[0].weight, generator[0].weight)
    assert not torch.equal(cleanser.generator_[2].weight, generator[2].weight)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_influence_is_exact_with_dropout_since_every_weighting_drops_the_same_units(update):
    generator, discriminator = toy_networks()
    networks = generator.insert(1, nn.Dropout(0.3)), discriminator.insert(1, nn.Dropout(0.3))

    def value(cleanser, row, change):
        trajectory, weights = cleanser.trajectory_, torch.ones(16, dtype=torch.float64)
        weights[row] += change
        state = trajectory.state(0)
        for t in range(len(trajectory)):
            record = trajectory[t]
            state = trajectory.step(state, record, trajectory.source[record.indices], weights[record.indices])
        return cleanser.evaluator(60).value(cleanser.metric_, state)

    for derivative, tolerance in SCHEMES.items():
        cleanser = toy_cleanser(networks, backend=itd(derivative), update=update).fit(X)
        expected = [(value(cleanser, row, -1e-4) - value(cleanser, row, 1e-4)) / 2e-4 for row in (0, 7)]
        np.testing.assert_allclose(cleanser.influence_[[0, 7]], expected, rtol=tolerance)


@pytest.mark.parametrize("derivative", ["exact", "secant"])
def test_several_metrics_in_one_pass_equal_single_passes(derivative):
    together = {"fid": FID(n_samples=60), "kid": KID(n_samples=60), "ll": AverageLogLikelihood(n_samples=60)}
    backend = ITD(derivative=derivative)
    cleanser = toy_cleanser(metric=together, backend=backend, optimizer=OPTIMIZERS["adam"], ema_decay=0.9).fit(X)
    for name, metric in together.items():
        alone = toy_cleanser(metric=metric, backend=backend, optimizer=OPTIMIZERS["adam"], ema_decay=0.9).fit(X)
        np.testing.assert_allclose(cleanser.influences_[name], alone.influence_, rtol=1e-9, atol=1e-15)
        assert cleanser.metric_values_[name] == pytest.approx(alone.metric_value_, rel=1e-12)


def test_influence_is_linear_in_the_metric(cleanser):
    gradient = cleanser.gradients_["FID"]
    tripled = map_state(lambda t: 3 * t, gradient)
    influences = ITD(derivative="exact").fit(cleanser.trajectory_, {"one": gradient, "three": tripled}).influences_
    np.testing.assert_allclose(influences["three"], 3 * influences["one"], rtol=1e-10)


def test_tracing_reports_its_progress(cleanser):
    calls = []
    ITD(last_epochs=2).fit(cleanser.trajectory_, cleanser.gradients_, lambda *args: calls.append(args))
    assert calls == [("tracing", done, 6) for done in range(1, 7)]


def test_kinks_do_not_break_the_default_scheme():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    influence = toy_cleanser((generator, discriminator), backend="itd").fit(X).influence_
    assert influence.dtype == np.float64
    assert np.isfinite(influence).all() and influence.any()


@pytest.mark.parametrize("derivative", ["exact", "secant"])
def test_an_adjoint_that_overflows_names_metric_and_step(derivative):
    cleanser = toy_cleanser(optimizer=SGD(lr=20.0), n_epochs=10).fit(X)
    sound = cleanser.gradients_["FID"]
    factor = 1e308 / float(ravel(sound.generator).abs().max())
    gradients = {"sound": sound, "loud": map_state(lambda t: factor * t, sound)}
    with pytest.raises(NonFiniteError, match=r"adjoint of the metric 'loud' became NaN or infinite at step \d+ of 30"):
        ITD(derivative=derivative).fit(cleanser.trajectory_, gradients)


@pytest.mark.parametrize("factor", [2.0**80, 2.0**-80], ids=["large", "small"])
@pytest.mark.parametrize("derivative", ["exact", "secant"])
def test_an_adjoint_whose_norm_does_not_fit_single_precision_is_not_taken_for_zero(derivative, factor):
    networks = [network.float() for network in toy_networks()]
    cleanser = toy_cleanser(networks, backend=ITD(derivative=derivative)).fit(X)
    scaled = {"scaled": map_state(lambda t: factor * t, cleanser.gradients_["FID"])}
    influence = ITD(derivative=derivative).fit(cleanser.trajectory_, scaled).influences_["scaled"]
    np.testing.assert_allclose(influence, factor * cleanser.influence_, rtol=1e-3)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (ITD(derivative="forward"), r"derivative must be one of \['secant', 'exact'\]; got 'forward'"),
        (ITD(delta=0), "delta must be a positive number or 'auto'; got 0"),
        (ITD(delta=-1e-2), "delta must be a positive number or 'auto'; got -0.01"),
        (ITD(delta=None), "delta must be a positive number or 'auto'; got None"),
        (ITD(delta=float("nan")), "delta must be a positive number or 'auto'; got nan"),
        (ITD(delta=float("inf")), "delta must be a positive number or 'auto'; got inf"),
        ("adi", r"backend must be one of \['aid', .*'itd'.*\] or an InfluenceBackend object; got 'adi'"),
        (ITD, "or an InfluenceBackend object; got <class"),
    ],
)
def test_a_backend_that_makes_no_sense_is_refused_before_training(backend, message, no_training):
    with pytest.raises(ValueError, match=message):
        toy_cleanser(backend=backend).fit(X)


class FirstCoordinate(InfluenceBackend):
    """Takes the first coordinate for the influence."""

    def traced_epochs(self):
        return 1

    def fit(self, trajectory, gradients, progress=None):
        rows = trajectory.source[list(range(len(trajectory.source)))]
        self.influences_ = {name: rows[:, 0].double().numpy() for name in gradients}
        return self

    def score_samples(self, trajectory, gradient, samples):
        return np.concatenate([batch[:, 0].double().numpy() for batch in samples.batches()])


def test_a_backend_of_ones_own_takes_part():
    cleanser = toy_cleanser(backend=FirstCoordinate(), metric=SampleMean(n_samples=20), n_remove=4).fit(X)
    assert np.array_equal(cleanser.influence_, X[:, 0])
    assert set(np.flatnonzero(~cleanser.support_)) == set(np.argsort(X[:, 0])[-4:])
    assert np.array_equal(cleanser.score_samples(X + 1), X[:, 0] + 1)
    assert cleanser.estimate_cost(X).n_traced == 3


def test_a_backend_is_found_by_the_name_of_its_entry_point(monkeypatch):
    offered = EntryPoint(name="first", value="tests.test_itd:FirstCoordinate", group="ganclean.backends")
    monkeypatch.setattr("ganclean.backends.entry_points", lambda group: [offered] * (group == offered.group))
    assert isinstance(resolve_backend("first"), FirstCoordinate)
    assert np.array_equal(toy_cleanser(backend="first").fit(X).influence_, X[:, 0])
    with pytest.raises(ValueError, match=r"backend must be one of \[.*'first', .*'itd'.*\]"):
        toy_cleanser(backend="second").fit(X)


def mirrored(batch):
    return batch * torch.tensor([-1.0, 1.0], dtype=batch.dtype)


class Pushed(Optimizer):
    """A rule that adds to the gradient."""

    def __init__(self, rule, push):
        self.inner, self.push = rule, push

    def at(self, settings):
        return Pushed(self.inner.at(settings), self.push)

    def update(self, params, grads, moments, step):
        return self.inner.update(params, {n: g + self.push[n] for n, g in grads.items()}, moments, step)


def pushed_metric(cleanser, row, copies, size):
    """The metric after a run in which the mean loss of copies of an instance is added, with a small weight, to each
    step that draws it."""
    trajectory, discriminator = cleanser.trajectory_, cleanser.trajectory_.step.discriminator
    state = trajectory.state(0)
    for t in range(len(trajectory)):
        record, step = trajectory[t], trajectory.step
        x = trajectory.source[record.indices]
        if row in record.indices:
            theta = {name: p.detach().requires_grad_() for name, p in state.discriminator.items()}
            judged = torch.func.functional_call(discriminator, theta, (copies,))
            loss = nn.functional.softplus(-judged).mean() * size / len(record.indices)
            gradient = torch.autograd.grad(loss, list(theta.values()))
            of_d, of_g = step.updates
            push = {f"D.{name}": g for name, g in zip(theta, gradient)}
            step = replace(step, updates=(replace(of_d, optimizer=Pushed(of_d.optimizer, push)), of_g))
        state = step(state, record, x)
    return cleanser.evaluator(60).value(cleanser.metric_, state)


@pytest.mark.parametrize("derivative", SCHEMES)
def test_influence_is_averaged_over_augmentations(derivative):
    backend = ITD(derivative=derivative, delta=1e-4, augmentation=mirrored, n_augmentations=2)
    cleanser = toy_cleanser(backend=backend, optimizer=OPTIMIZERS["adam"]).fit(X)
    for row in (0, 7, 15):
        x = torch.from_numpy(X[[row]])
        copies, size = torch.cat([x, mirrored(x), mirrored(x)]), 1e-4
        up, down = (pushed_metric(cleanser, row, copies, sign * size) for sign in (1, -1))
        assert cleanser.influence_[row] == pytest.approx(-(up - down) / (2 * size), rel=SCHEMES[derivative])


def test_copies_that_change_nothing_leave_the_influence():
    plain = toy_cleanser().fit(X)
    copied = toy_cleanser(backend=ITD(augmentation=torch.clone)).fit(X)
    np.testing.assert_allclose(copied.influence_, plain.influence_, rtol=1e-9, atol=1e-14)


def test_augmentations_are_repeatable_and_leave_the_random_numbers_alone():
    def jittered(batch):
        return batch + 0.1 * torch.randn_like(batch)

    fitted = [toy_cleanser(backend=ITD(augmentation=jittered, n_augmentations=n)).fit(X) for n in (3, 3, 1)]
    assert np.array_equal(fitted[0].influence_, fitted[1].influence_)
    assert not np.allclose(fitted[0].influence_, fitted[2].influence_, rtol=1e-6)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fitted[0].backend_.fit(fitted[0].trajectory_, fitted[0].gradients_)
    assert torch.equal(torch.rand(3), expected)


def test_an_augmentation_keeps_the_shape():
    with pytest.raises(ValueError, match=r"keep the shape of a batch, \(4, 2\); it returned \(4, 1\)"):
        toy_cleanser(backend=ITD(augmentation=lambda batch: batch[:, :1])).fit(X)


@pytest.mark.parametrize("settings", [{"augmentation": "flip"}, {"augmentation": torch.clone, "n_augmentations": 0}])
def test_impossible_augmentations_are_refused_before_training(settings, no_training):
    with pytest.raises(ValueError, match="augmentation"):
        toy_cleanser(backend=ITD(**settings)).fit(X)
