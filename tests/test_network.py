"""A network as a pure function does what the module itself does, and its derivatives are those of the module."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn.utils import parametrizations, spectral_norm

from ganclean.dynamics.network import Call, Network, copied, loaded
from ganclean.dynamics.randomness import seeded
from ganclean.exceptions import NetworkError
from ganclean.training.probe import check_purity

BOTH_FORMS = [parametrizations.spectral_norm, spectral_norm]
LINES, IMAGES, VOLUMES = (5, 3), (5, 3, 4, 4), (4, 3, 2, 2, 2)


class FrozenNorm(nn.Module):
    """Its normalisation stays in evaluation mode, whatever the rest does."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.norm(self.layer(x))


class Tied(nn.Module):
    """Encodes and decodes with one weight, and normalises twice by one normalisation."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.decode(torch.tanh(self.norm(self.encode(x)))))


class Twice(nn.Module):
    """Passes through one layer two times."""

    def __init__(self, normalize):
        super().__init__()
        self.layer = normalize(nn.Linear(3, 3))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Words(nn.Module):
    def __init__(self, normalize):
        super().__init__()
        self.embed = normalize(nn.Embedding(4, 3))

    def forward(self, x):
        return x + self.embed(x.mul(10).long() % 4).sum(dim=1)


class Doubled(nn.BatchNorm1d):
    """A batch normalisation of one's own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Remembers(nn.Module):
    """Writes into its buffers by a rule of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(dim=0))
        return x + self.mean


def normal(norm, **settings):
    return nn.Sequential(nn.Linear(3, 3), norm(3, **settings), nn.Tanh(), nn.Linear(3, 2))


def convolved(norm, conv=nn.Conv2d, **settings):
    return nn.Sequential(conv(3, 2, 1), norm(2, **settings), nn.Tanh())


def spectral(make, normalize, **settings):
    return nn.Sequential(normalize(make(), **settings), nn.Tanh())


def both(normalize):
    return nn.Sequential(
        normalize(nn.Conv2d(3, 4, 3, padding=1)),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Flatten(),
        normalize(nn.Linear(64, 2), n_power_iterations=2),
    )


# What the module is: a function that makes it, and the shape of its inputs.
BATCH_NORMS = {
    "1d": (partial(normal, nn.BatchNorm1d), LINES),
    "1d, of sequences": (partial(convolved, nn.BatchNorm1d, conv=nn.Conv1d), (4, 3, 5)),
    "2d": (partial(convolved, nn.BatchNorm2d, eps=1e-2), IMAGES),
    "3d": (partial(convolved, nn.BatchNorm3d, conv=nn.Conv3d), VOLUMES),
    "not affine": (partial(convolved, nn.BatchNorm2d, affine=False), IMAGES),
    "fast": (partial(normal, nn.BatchNorm1d, momentum=0.7), LINES),
    "cumulative": (partial(normal, nn.BatchNorm1d, momentum=None), LINES),
    "without running statistics": (partial(normal, nn.BatchNorm1d, track_running_stats=False), LINES),
    "frozen": (FrozenNorm, LINES),
    "shared": (Tied, LINES),
}
WEIGHTS = {
    "linear": (lambda: nn.Linear(3, 4), LINES, {}),
    "linear, three iterations": (lambda: nn.Linear(3, 4), LINES, {"n_power_iterations": 3}),
    "linear, other dimension": (lambda: nn.Linear(3, 4), LINES, {"dim": 1, "eps": 1e-8}),
    "convolution": (lambda: nn.Conv2d(3, 2, 3), IMAGES, {}),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 3), IMAGES, {}),
    "convolution, other dimension": (lambda: nn.Conv2d(3, 2, 3), IMAGES, {"dim": 2, "n_power_iterations": 2}),
    "sequence": (lambda: nn.Conv1d(3, 2, 2), (4, 3, 5), {}),
}
SPECTRAL_NORMS = {
    f"{name}, {form}": (partial(spectral, make, normalize, **settings), shape)
    for name, (make, shape, settings) in WEIGHTS.items()
    for form, normalize in zip(("parametrised", "hook"), BOTH_FORMS)
}
SPECTRAL_NORMS |= {
    "embedding, parametrised": (partial(Words, parametrizations.spectral_norm), LINES),
    "embedding, hook": (partial(Words, spectral_norm), LINES),
    "with batch normalisation, parametrised": (partial(both, parametrizations.spectral_norm), IMAGES),
    "with batch normalisation, hook": (partial(both, spectral_norm), IMAGES),
}
KNOWN = BATCH_NORMS | SPECTRAL_NORMS
UNKNOWN = {
    "written in place": (lambda: nn.Sequential(nn.Linear(3, 3), Remembers(), nn.Linear(3, 1)), LINES),
    "of instances": (partial(convolved, nn.InstanceNorm2d, track_running_stats=True), IMAGES),
    "of one's own": (partial(normal, Doubled), LINES),
    "none": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.GroupNorm(1, 3)), LINES),
}


def made(make, shape):
    """A network, its state, a real module in that state, and inputs."""
    torch.manual_seed(0)
    module = make().double()
    network, truth = Network(module), copy.deepcopy(module)
    with torch.no_grad():
        for p in truth.parameters():
            p += 0.3 * torch.randn_like(p)
        for name, b in truth.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b += torch.rand_like(b)
        inputs = torch.randn(4, *shape, dtype=torch.float64)
        # Spectral vectors that have nothing to do with the weights would divide by a number near zero.
        truth(inputs[3])
    theta = {name: p.detach().clone() for name, p in truth.named_parameters()}
    buffers = {name: b.clone() for name, b in truth.named_buffers()}
    return network, theta, buffers, truth, inputs[:3]


def call(network, theta, buffers, x, seed=0):
    """One call in training mode with its power iteration."""
    with seeded(seed):
        return network(theta, {**buffers, **network.iterate(theta, buffers)}, Call((x,)))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_outputs_and_buffers_are_those_of_the_module_call_after_call(make, shape):
    network, theta, buffers, truth, inputs = made(make, shape)
    for seed, x in enumerate(inputs):
        output, buffers = call(network, theta, buffers, x, seed)
        with seeded(seed):
            assert_equal(output, truth.train()(x))
        assert_equal(buffers, dict(truth.named_buffers()))
        assert_equal(network.evaluate(theta, buffers, Call((2 * x,))), truth.eval()(2 * x))
        assert_equal(buffers, dict(truth.named_buffers()))


@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_the_users_module_is_left_as_it_was(make, shape):
    torch.manual_seed(0)
    module = make().double().eval()
    module(torch.randn(shape, dtype=torch.float64))

    def condition():
        hooks = [list(m._forward_pre_hooks.items()) for m in module.modules()]
        return [(type(m), m.training) for m in module.modules()], hooks

    before, values = condition(), {name: t.clone() for name, t in module.state_dict().items()}
    network = Network(module)
    theta = {name: p.detach() + 1 for name, p in module.named_parameters()}
    _, buffers = call(network, theta, network.buffers(), torch.randn(shape, dtype=torch.float64))
    network.evaluate(theta, buffers, Call((torch.randn(shape, dtype=torch.float64),)))
    assert condition() == before
    assert all(torch.equal(t, values[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_a_call_leaves_the_state_that_it_is_given_alone(make, shape):
    network, theta, buffers, _, inputs = made(make, shape)
    before = copy.deepcopy((theta, buffers))
    call(network, theta, buffers, inputs[0])
    network.evaluate(theta, buffers, Call((inputs[1],)))
    assert all(torch.equal(t, then[name]) for now, then in zip((theta, buffers), before) for name, t in now.items())


@pytest.mark.parametrize(("make", "shape"), KNOWN.values(), ids=KNOWN)
def test_the_known_buffers_are_traced_except_for_counters(make, shape):
    network, _, buffers, _, _ = made(make, shape)
    assert set(network.traced) == {name for name in buffers if not name.endswith("num_batches_tracked")}


def test_unknown_buffers_are_carried_along_and_not_traced():
    network, theta, buffers, _, inputs = made(*UNKNOWN["written in place"])
    assert network.traced == ()
    _, after = call(network, theta, buffers, inputs[0])
    assert after["1.count"] == buffers["1.count"] + 1 and not torch.equal(after["1.mean"], buffers["1.mean"])


def directional(network, theta, buffers, x, evaluation):
    """The derivatives of random functions of all results along random directions of all that is traced."""

    def results(theta, traced):
        everything = {**buffers, **traced}
        if evaluation:
            return [network.evaluate(theta, everything, Call((x,)))]
        output, after = call(network, theta, everything, x)
        return [output, *network.trace(after).values()]

    point = theta, network.trace(buffers)
    directions = tuple({name: torch.randn_like(t) for name, t in tensors.items()} for tensors in point)
    return directions, torch.func.jvp(results, point, directions)[1]


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize(("make", "shape"), KNOWN.values(), ids=KNOWN)
def test_derivatives_are_those_of_the_module_with_its_power_iteration(make, shape, evaluation):
    network, theta, buffers, truth, inputs = made(make, shape)
    directions, derivatives = directional(network, theta, buffers, inputs[0], evaluation)

    def results(change):
        module = copy.deepcopy(truth).train(not evaluation)
        with torch.no_grad():
            for tensors, moves in zip((module.named_parameters(), module.named_buffers()), directions):
                for name, tensor in tensors:
                    if name in moves:
                        tensor += change * moves[name]
            output = module(inputs[0])
        return [output] if evaluation else [output, *network.trace(dict(module.named_buffers())).values()]

    width = 1e-4
    values = [results(factor * width) for factor in (-2, -1, 1, 2)]
    for derivative, (two_below, below, above, two_above) in zip(derivatives, zip(*values), strict=True):
        expected = (8 * (above - below) - (two_above - two_below)) / (12 * width)
        torch.testing.assert_close(derivative, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("make", "shape"), KNOWN.values(), ids=KNOWN)
def test_backward_derivatives_agree_with_forward_ones(make, shape):
    network, theta, buffers, _, inputs = made(make, shape)
    directions, derivatives = directional(network, theta, buffers, inputs[0], False)
    leaves = [
        {n: t.clone().requires_grad_() for n, t in tensors.items()} for tensors in (theta, network.trace(buffers))
    ]
    output, after = call(network, leaves[0], {**buffers, **leaves[1]}, inputs[0])
    results = [output, *network.trace(after).values()]
    cotangents = [torch.randn_like(result) for result in results]
    sources = [t for tensors in leaves for t in tensors.values()]
    gradients = torch.autograd.grad(results, sources, cotangents, materialize_grads=True)
    forward = sum((c * d).sum() for c, d in zip(cotangents, derivatives))
    backward = sum((g * d).sum() for g, d in zip(gradients, [d for tensors in directions for d in tensors.values()]))
    torch.testing.assert_close(backward, forward, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalize", BOTH_FORMS)
def test_the_gradient_of_a_call_takes_the_spectral_vectors_for_constants_as_the_module_does(normalize):
    network, theta, buffers, truth, inputs = made(partial(both, normalize), IMAGES)
    truth(inputs[0]).square().sum().backward()
    expected = {name: p.grad for name, p in truth.named_parameters()}
    leaves = {name: p.requires_grad_() for name, p in theta.items()}
    played = {name: t.detach() for name, t in network.iterate(leaves, buffers).items()}
    output, _ = network(leaves, {**buffers, **played}, Call((inputs[0],)))
    gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    torch.testing.assert_close(dict(zip(leaves, gradients)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_stacked_states_give_what_each_gives_alone(make, shape):
    network, theta, buffers, _, inputs = made(make, shape)
    states = [
        ({n: t + 0.1 * i * torch.randn_like(t) for n, t in theta.items()}, {n: b + i for n, b in buffers.items()})
        for i in range(3)
    ]
    stacked = [{n: torch.stack([state[k][n] for state in states]) for n in states[0][k]} for k in (0, 1)]
    output, after = vmap(lambda t, b: call(network, t, b, inputs[0]), randomness="same")(*stacked)
    for i, (theta, buffers) in enumerate(states):
        alone, changed = call(network, theta, buffers, inputs[0])
        assert_equal(output[i], alone)
        assert_equal({name: b[i] for name, b in after.items()}, changed)


@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_calls_leave_the_initial_buffers_alone(make, shape):
    network, theta, buffers, _, inputs = made(make, shape)
    before = network.buffers()
    call(network, theta, buffers, inputs[0])
    network.evaluate(theta, buffers, Call((inputs[1],)))
    assert all(torch.equal(b, before[name]) for name, b in network.buffers().items())


def test_tied_parameters_stay_tied_where_they_are_installed():
    network, theta, buffers, truth, inputs = made(*BATCH_NORMS["shared"])
    pull = torch.randn_like(inputs[0])
    (truth(inputs[0]) * pull).sum().backward()
    leaves = {name: p.requires_grad_() for name, p in theta.items()}
    with network.installed(theta):
        output, _ = network(leaves, buffers, Call((inputs[0],)))
        gradients = torch.autograd.grad((output * pull).sum(), list(leaves.values()))
    assert_equal(dict(zip(leaves, gradients)), {name: p.grad for name, p in truth.named_parameters()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_what_can_be_replayed_is_found_so(make, shape, dtype):
    torch.manual_seed(0)
    module = make().to(dtype).eval()
    x = torch.randn(2, *shape[1:], dtype=dtype)
    module(x)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    check_purity("generator", module, Network(module), Call((x,)))
    assert not module.training and all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


class Jitter(nn.Module):
    def forward(self, x):
        return x + np.random.default_rng().normal()


class Holding(nn.Linear):
    """Reaches its weight past its parameters."""

    def __init__(self):
        super().__init__(3, 3)
        self.held = [self.weight]

    def forward(self, x):
        return nn.functional.linear(x, self.held[0], self.bias)


IMPURE = {
    "normalised layer called twice, parametrised": partial(Twice, parametrizations.spectral_norm),
    "normalised layer called twice, hook": partial(Twice, spectral_norm),
    "random numbers of NumPy": lambda: nn.Sequential(nn.Linear(3, 3), Jitter()),
    "weight in a plain attribute": lambda: nn.Sequential(nn.Linear(3, 3), Holding()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("make", IMPURE.values(), ids=IMPURE)
def test_what_cannot_be_replayed_is_refused(make, dtype):
    torch.manual_seed(0)
    module = make().to(dtype)
    with pytest.raises(NetworkError, match=r"(?s)The generator, called with given .*deviates by .*use two layers"):
        check_purity("generator", module, Network(module), Call((torch.randn(2, 3, dtype=dtype),)))


class Labelled(nn.Module):
    """Asks its parts for what they know."""

    def __init__(self, compiled):
        super().__init__()
        self.inner = compiled(normal(nn.BatchNorm1d))

    def forward(self, x):
        return self.inner(x) * self.inner.get_submodule("3").out_features


@pytest.mark.parametrize("place", ["whole", "part"])
def test_a_compiled_module_follows_its_parameters_call_after_call(place):
    compiled = partial(torch.compile, backend="eager")
    _, _, buffers, truth, inputs = made(partial(Labelled, lambda module: module), LINES)
    torch.manual_seed(0)
    module = compiled(copy.deepcopy(truth)) if place == "whole" else Labelled(compiled).double()
    network, names = Network(copied(module)), [name for name, _ in module.named_parameters()]
    renamed = dict(zip((name.replace("_orig_mod.", "") for name in names), names))
    state = {name.replace("_orig_mod.", ""): name for name, _ in module.named_buffers()}
    buffers = {state[name]: b for name, b in buffers.items()}
    for seed, x in enumerate(inputs):
        with torch.no_grad():
            for p in truth.parameters():
                p += 0.1
        leaves = {renamed[n]: p.detach().clone().requires_grad_() for n, p in truth.named_parameters()}
        with seeded(seed):
            output, after = network(leaves, buffers, Call((x,)))
        expected = truth.train()(x)
        assert_equal(output, expected)
        gradients = [
            torch.autograd.grad((o**3).sum(), [*p])
            for o, p in ((output, leaves.values()), (expected, truth.parameters()))
        ]
        assert_equal(*gradients)
        buffers = {name: b.detach() for name, b in after.items()}
        assert_equal({n: buffers[state[n]] for n, _ in truth.named_buffers()}, dict(truth.named_buffers()))
        assert_equal(network.evaluate(leaves, buffers, Call((x,))), truth.eval()(x))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(3)], ids=["stateless", "with buffers"])
def test_randomness_repeats_with_the_seed_and_leaves_the_global_generator_alone(norm):
    make = partial(nn.Sequential, nn.Linear(3, 3), norm, nn.Dropout(0.5))
    network, theta, buffers, truth, inputs = made(make, LINES)
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def drawn(seed):
        with seeded(seed):
            return network(theta, buffers, Call((inputs[0],)))[0]

    first, again, other = (drawn(seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(7)
    assert_equal(first, truth(inputs[0]))


def test_the_global_generator_is_restored_after_a_failure():
    network, x = Network(nn.Sequential(nn.Dropout(), nn.Linear(3, 1))), torch.zeros(2, 5)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(3):
        network({}, {}, Call((x,)))
    assert torch.equal(torch.get_rng_state(), before)


def test_synchronised_batch_normalisation_is_that_of_one_process():
    network, theta, buffers, truth, inputs = made(*BATCH_NORMS["2d"])
    network = Network(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(truth)))
    output, after = call(network, theta, buffers, inputs[0])
    assert_equal(output, truth(inputs[0]))
    assert_equal(after, dict(truth.named_buffers()))


def test_a_module_in_training_mode_keeps_the_modes_of_its_parts():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3)).double().train()
    module[0].eval(), module[1].eval()
    network, x = Network(module), torch.randn(LINES, dtype=torch.float64)
    for _ in range(2):
        output, buffers = network({}, network.buffers(), Call((x,)))
        assert not buffers["0.running_mean"].any() and buffers["2.running_mean"].any()
        assert_equal(output, copy.deepcopy(module)(x))
        network.evaluate({}, buffers, Call((x,)))


@pytest.mark.parametrize("normalize", BOTH_FORMS)
@pytest.mark.parametrize("copying", [copied, lambda module: Network(module).module], ids=["copied", "network"])
def test_a_module_is_copied_whatever_graph_its_last_call_left_behind(copying, normalize):
    torch.manual_seed(0)
    module = both(normalize).double()
    expected = module(torch.randn(IMAGES, dtype=torch.float64))
    copy_ = copying(module)
    assert not {t.data_ptr() for t in module.state_dict().values()} & {
        t.data_ptr() for t in copy_.state_dict().values()
    }
    assert all(torch.equal(t, copy_.state_dict()[name]) for name, t in module.state_dict().items())
    expected.sum().backward()
    assert all(p.grad is None for p in copy_.parameters())


@pytest.mark.parametrize(("make", "shape"), (KNOWN | UNKNOWN).values(), ids=KNOWN | UNKNOWN)
def test_a_loaded_copy_evaluates_like_the_state(make, shape):
    network, theta, buffers, truth, inputs = made(make, shape)
    _, after = call(network, theta, buffers, inputs[0])
    result = loaded(truth, {**after, **theta})
    assert not result.training
    assert_equal(result(inputs[1]), network.evaluate(theta, after, Call((inputs[1],))))
    assert result is not truth and torch.equal(next(truth.parameters()), theta[next(iter(theta))])
