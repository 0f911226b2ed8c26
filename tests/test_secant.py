"""The secant is the exact derivative up to δ², whatever the sizes of parameters and adjoints."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ganclean.backends import ITD
from ganclean.dynamics.adjoint import exact_adjoint, secant_adjoint
from ganclean.dynamics.derivative import Secant, secant_width
from ganclean.dynamics.record import mapped
from ganclean.dynamics.state import flatten_state, map_state, ravel, unravel
from ganclean.optim import Adam, RMSprop
from ganclean.optim.base import _moving
from tests.practice import PRACTICE, perceptrons, practised
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_trainer

X = toy_data()


def relative_error(found, expected):
    return float(np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_secant_agrees_with_the_exact_scheme_to_second_order_in_delta(optimizer, update):
    def influence(backend):
        settings = {"optimizer": OPTIMIZERS[optimizer], "update": update}
        return toy_cleanser(backend=backend, **settings).fit(X).influence_

    exact = influence(ITD(derivative="exact"))
    wide, half = (np.abs(influence(ITD(delta=delta)) - exact).max() for delta in (4e-2, 2e-2))
    assert wide / half == pytest.approx(4, rel=0.05)


@given(scale=st.floats(1e-150, 1e150), delta=st.floats(1e-4, 1e-1))
def test_the_secant_moves_the_parameters_by_the_same_part_whatever_the_size_of_the_cotangent(scale, delta):
    theta, v = torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, -1.0]).double()
    width = secant_width(theta, scale * v, delta)
    assert width * float((scale * v).norm()) == pytest.approx(delta * 5, rel=1e-9)


def test_without_a_direction_any_width_will_do():
    theta = torch.ones(3)
    assert 0 < secant_width(theta, torch.zeros(3), 0.1) < np.inf
    assert 0 < secant_width(torch.zeros(3), theta, 0.1) < np.inf


@pytest.fixture(scope="module")
def feature(request):
    """What both schemes need of the fifth step of a run with some feature, and its two states."""
    networks, data, y, settings = practised(request.param)
    cleanser = toy_cleanser(networks, **{"n_epochs": 2, **settings}).fit(data, y)
    trajectory = cleanser.trajectory_
    record = trajectory[5]
    return trajectory.step, trajectory.state(5), trajectory.state(6), record, trajectory.source[record.indices]


def random_cotangent(step, state, seed=0):
    """Any cotangent, but for tensors that only rounding errors move, which the secant leaves out by intention."""
    generator = torch.Generator().manual_seed(seed)
    noise = map_state(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), step.differentiable(state))
    for player in ("G", "D"):
        square = state.moments[player].get("square", {})
        if square:
            params = noise.params[player]
            noise.params[player] = unravel(ravel(params) * _moving(square), params)
    return noise


def assert_alike(args, cotangents, secant, tolerance):
    """Every tensor relative to its own size, unless that is negligible."""
    for pair in zip(exact_adjoint(*args, cotangents), secant_adjoint(*args, cotangents, secant=secant), strict=True):
        exact, found = ({**flatten_state(a.cotangent), "weights": a.weights, **dict(zip("DG", a.pushes))} for a in pair)
        largest = max(float(t.abs().max()) for t in exact.values())
        for name, expected in exact.items():
            size = max(float(expected.abs().max()), 1e-6 * largest)
            torch.testing.assert_close(found[name], expected, rtol=0, atol=tolerance * size, msg=name)


def both_schemes(test):
    return pytest.mark.parametrize("feature", PRACTICE, indirect=True)(test)


@both_schemes
def test_no_cotangent_has_no_adjoint(feature):
    nothing = map_state(torch.zeros_like, feature[0].differentiable(feature[1]))
    (adjoint,) = secant_adjoint(*feature, [nothing])
    assert not any(bool(t.any()) for t in (*flatten_state(adjoint.cotangent).values(), adjoint.weights))


@both_schemes
@pytest.mark.parametrize("secant", [Secant(1e-4), Secant(1e-4, spread=10.0), Secant(1e-4, spread=1.0)])
def test_both_schemes_pull_any_cotangents_back_alike(feature, secant):
    step, _, after, _, _ = feature
    assert_alike(feature, [random_cotangent(step, after, seed) for seed in (0, 1)], secant, 1e-5)


@both_schemes
@pytest.mark.parametrize("kept", ["params", "averages", "buffers", "moments"])
def test_both_schemes_pull_parts_of_a_cotangent_back_alike(feature, kept):
    step, _, after, _, _ = feature
    cotangent = random_cotangent(step, after)
    zero = map_state(torch.zeros_like, cotangent)
    parts = {kept: getattr(cotangent, kept)}
    assert_alike(feature, [zero._replace(**parts), zero], Secant(1e-4), 1e-5)


def test_an_adjoint_keeps_no_graph(cleanser):
    trajectory = cleanser.trajectory_
    record, states = trajectory[5], (trajectory.state(5), trajectory.state(6))
    for cotangent in (cleanser.gradients_["FID"], random_cotangent(trajectory.step, states[1])):
        args = trajectory.step, *states, record, trajectory.source[record.indices], [cotangent]
        for adjoint in (exact_adjoint, secant_adjoint):
            (one,) = adjoint(*args)
            tensors = [one.weights, *one.pushes, *flatten_state(one.cotangent).values()]
            assert not any(t.requires_grad for t in [*tensors, *flatten_state(cotangent).values()])


def test_the_secant_is_exact_for_quadratic_losses_however_wide():
    torch.manual_seed(0)
    networks = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
    settings = {"loss": "least_squares", "optimizer": OPTIMIZERS["adam"]}
    exact, wide = (
        toy_cleanser(networks, backend=backend, **settings).fit(X).influence_
        for backend in (ITD(derivative="exact"), ITD(delta=1.0))
    )
    np.testing.assert_allclose(wide, exact, rtol=1e-8)


def test_perturbations_repeat_and_vanish_with_their_size():
    def influence(**settings):
        return toy_cleanser(backend=ITD(delta=1e-4, **settings)).fit(X).influence_

    plain, noisy = influence(), influence(n_perturbations=2)
    assert np.array_equal(influence(n_perturbations=2), noisy)
    errors = [
        relative_error(influence(n_perturbations=2, perturbation=size), plain) for size in (1e-1, 1e-2, 1e-3, 1e-12)
    ]
    assert 1e-4 < errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1] and errors[3] < 1e-7


def test_perturbations_average_out():
    def influence(n, perturbation=0.05):
        return toy_cleanser(backend=ITD(1, n_perturbations=n, perturbation=perturbation)).fit(X).influence_

    plain = toy_cleanser(backend=ITD(1)).fit(X).influence_
    assert relative_error(influence(64), plain) < 0.5 * relative_error(influence(1), plain)


class Scaled(nn.Module):
    """A layer with parameters of another size that computes the same."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.size = layer, size
        for p in layer.parameters():
            p.data *= size

    def forward(self, x):
        return self.layer(x) / self.size


class Faint(nn.Module):
    """A branch that hardly contributes, so that its gradients are tiny."""

    def __init__(self, main, branch, size):
        super().__init__()
        self.main, self.branch, self.size = main, branch, size

    def forward(self, x):
        return self.main(x) + self.size * self.branch(x)


class Blind(nn.Module):
    """Hardly sees the second coordinate."""

    def __init__(self, module, size):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x):
        return self.module(torch.stack([x[:, 0], self.size * x[:, 1]], dim=1))


def perceptron(n_in, n_out, activation, sizes=(1.0, 1.0)):
    layers = Scaled(nn.Linear(n_in, 6), sizes[0]), activation, Scaled(nn.Linear(6, n_out), sizes[1])
    return nn.Sequential(*layers)


def pair(sizes_g=(1.0, 1.0), sizes_d=(1.0, 1.0)):
    torch.manual_seed(0)
    return perceptron(3, 2, nn.Tanh(), sizes_g), perceptron(2, 1, nn.Softplus(), sizes_d)


def with_faint_branches():
    torch.manual_seed(0)
    generator = Faint(perceptron(3, 2, nn.Tanh()), perceptron(3, 2, nn.Tanh()), 1e-8)
    return generator, Faint(perceptron(2, 1, nn.Softplus()), perceptron(2, 1, nn.Softplus()), 1e-8)


def with_dead_units():
    generator, discriminator = pair()
    generator[0].layer.bias.data[:2] += 12
    discriminator[0].layer.bias.data[:3] -= 25
    return generator, discriminator


def adam(size=1.0):
    return Adam(lr=1e-2 * size, betas=(0.5, 0.9), eps=1e-15)


# Pairs whose gradients, parameters or adjoints differ by orders of magnitude, and an optimiser that normalises.
SIZES = {
    "small parameters": (partial(pair, (1e-3, 1e-3), (1e-3, 1e-3)), adam(1e-3)),
    "large parameters": (partial(pair, (1e3, 1e3), (1e3, 1e3)), adam(1e3)),
    "faint branches": (with_faint_branches, adam()),
    "dead units": (with_dead_units, adam()),
}


def traced(cleanser, adjoint):
    """Influences, and the cotangent of the first state, as vectors."""
    trajectory, cotangent = cleanser.trajectory_, cleanser.gradients_["FID"]
    influence = torch.zeros(len(trajectory.source), dtype=torch.float64)
    for t in reversed(range(len(trajectory))):
        record, real = trajectory[t], trajectory.source[trajectory[t].indices]
        (one,) = adjoint(trajectory.step, trajectory.state(t), trajectory.state(t + 1), record, real, [cotangent])
        influence[record.indices] -= one.weights.double()
        cotangent = one.cotangent
    return influence, torch.cat([ravel(cotangent.generator), ravel(cotangent.discriminator)]).detach().double()


def errors(make, optimizer, dtype, *secants):
    """For each secant, the relative errors of influences and cotangents against the exact derivative."""
    networks = [network.to(dtype) for network in make()]
    cleanser = toy_cleanser(networks, backend=ITD(1), optimizer=optimizer, n_epochs=4).fit(X)
    exact = traced(cleanser, exact_adjoint)
    found = [traced(cleanser, partial(secant_adjoint, secant=secant)) for secant in secants]
    return [max(map(relative_error, one, exact)) for one in found]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 2e-3), (torch.float32, 3e-3)], ids=["double", "single"]
)
@pytest.mark.parametrize(("make", "optimizer"), SIZES.values(), ids=SIZES)
def test_parameters_and_gradients_may_have_any_size(make, optimizer, dtype, tolerance):
    assert max(errors(make, optimizer, dtype, Secant(1e-3), Secant(1e-3, spread=1e3))) < tolerance


@pytest.mark.parametrize("size", [1e-4, 1e-8])
def test_an_adjoint_may_be_large_where_the_loss_hardly_depends_on_the_parameters(size):
    def make():
        generator, discriminator = pair()
        return generator, Blind(discriminator, size)

    assert errors(make, adam(), torch.float64, Secant(1e-2))[0] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_layers_of_different_sizes_are_looked_at_in_turn(dtype):
    make = partial(pair, (1e-3, 1e3), (1e3, 1e-3))
    together, in_turn = errors(make, adam(1e-3), dtype, Secant(1e-2, spread=math.inf), Secant(1e-2, spread=1e3))
    assert in_turn < 2e-3 and together > 0.1


def with_needless_biases():
    """Batch normalisation removes the biases before it: their gradients are rounding errors."""
    torch.manual_seed(0)
    return perceptrons(norm_g=nn.BatchNorm1d, norm_d=nn.BatchNorm1d)


@pytest.mark.parametrize("optimizer", [Adam(lr=1e-3, betas=(0.5, 0.99)), RMSprop(lr=1e-3)], ids=["adam", "rmsprop"])
def test_gradients_that_are_rounding_errors_do_not_drown_the_others(optimizer):
    settings = {"optimizer": optimizer, "n_epochs": 4}
    networks = [network.float() for network in with_needless_biases()]
    cleanser = toy_cleanser(networks, backend=ITD(1), **settings).fit(X)
    # The truth: exact derivatives at the same states in double precision, where the errors are far smaller than the
    # moments that single precision has left.
    step = toy_trainer(**settings).make_step(*with_needless_biases())
    trajectory, cotangent = cleanser.trajectory_, map_state(in_double, cleanser.gradients_["FID"])
    exact = torch.zeros(len(X), dtype=torch.float64)
    for t in reversed(range(len(trajectory))):
        record = trajectory[t]
        record = mapped(record, in_double)
        states = (map_state(in_double, trajectory.state(i)) for i in (t, t + 1))
        (one,) = exact_adjoint(step, *states, record, torch.from_numpy(X[record.indices.numpy()]), [cotangent])
        exact[record.indices] -= one.weights
        cotangent = one.cotangent
    for delta in (1e-2, 1e-3):
        found = traced(cleanser, partial(secant_adjoint, secant=Secant(delta)))[0]
        assert relative_error(found, exact) < 0.05, delta


def in_double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor
