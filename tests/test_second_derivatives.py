"""The secant traces networks that have no second derivative; the exact scheme refuses them."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from ganclean import GANTrainer
from ganclean.backends import ITD
from ganclean.exceptions import NetworkError
from ganclean.losses import R1, GradientPenalty
from ganclean.metrics import FID, DiscriminatorLoss
from tests.practice import perceptrons as normalised
from tests.reference.finite_differences import finite_difference_influences, largest_error
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

X = toy_data()
SECANT = ITD(derivative="secant", delta=1e-4)
EXACT = ITD(derivative="exact")


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(GANTrainer, "train", lambda *_, **__: pytest.fail("training has begun"))


class Tanh(Function):
    """As custom kernels are written: a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class TanhInTwoParts(Function):
    """The same, in the form that `torch.func` allows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    backward = Tanh.backward


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class Attention(nn.Module):
    """Fused attention has a first derivative on a CPU and no second."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.project, self.last = nn.Linear(n_in, 32), nn.Linear(32, n_out)

    def forward(self, x):
        heads = self.project(x).view(len(x), 1, 4, 8)
        return self.last(nn.functional.scaled_dot_product_attention(heads, heads, heads).flatten(1))


class Checkpointed(nn.Module):
    """Keeps no activations, but computes them again in the backward pass."""

    def __init__(self, module, use_reentrant=False):
        super().__init__()
        self.module = module
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


def perceptrons(activation):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 6), activation, nn.Linear(6, 2))
    discriminator = nn.Sequential(nn.Linear(2, 6), activation, nn.Linear(6, 1))
    return generator.double(), discriminator.double()


def attentive():
    torch.manual_seed(0)
    return Attention(3, 2).double(), Attention(2, 1).double()


def metrics():
    return {"fid": FID(n_samples=60), "discriminator_loss": DiscriminatorLoss(n_samples=60)}


def influences(networks, backend=SECANT, **settings):
    settings = {"optimizer": OPTIMIZERS["adam"]} | settings
    return toy_cleanser(networks, metric=metrics(), backend=backend, **settings).fit(X).influences_


@pytest.mark.parametrize("function", [Tanh, TanhInTwoParts])
@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_functions_of_ones_own_that_are_differentiable_once_are_traced(function, update):
    expected = influences(perceptrons(nn.Tanh()), EXACT, update=update)
    assert largest_error(influences(perceptrons(Applied(function)), update=update), expected) < 1e-5


def test_fused_attention_in_both_networks_is_traced():
    cleanser = toy_cleanser(attentive(), metric=metrics(), backend=SECANT, n_epochs=2).fit(X)
    rows = [0, 7, 12]
    expected = finite_difference_influences(cleanser, torch.from_numpy(X), rows=rows)
    assert largest_error({name: found[rows] for name, found in cleanser.influences_.items()}, expected) < 1e-3


def test_outsiders_of_fused_attention_are_scored_like_the_drawn():
    cleanser = toy_cleanser(attentive(), backend=SECANT, batch_size=16).fit(X)
    assert largest_error({"": cleanser.score_samples(X)}, {"": cleanser.harmfulness_}) < 1e-6


@pytest.mark.parametrize("place", ["generator", "discriminator", "both"])
def test_checkpointed_networks_are_traced(place):
    generator, discriminator = toy_networks()
    networks = (
        Checkpointed(generator) if place != "discriminator" else generator,
        Checkpointed(discriminator) if place != "generator" else discriminator,
    )
    assert largest_error(influences(networks), influences(toy_networks())) < 1e-9


NORMALISED = {
    "batch": {"norm_g": nn.BatchNorm1d, "norm_d": nn.BatchNorm1d},
    "spectral": {"normalize_d": parametrizations.spectral_norm},
    "spectral, hook": {"normalize_d": spectral_norm},
}


@pytest.mark.parametrize("norms", NORMALISED.values(), ids=NORMALISED)
def test_checkpointed_normalisations_are_refused_before_training(norms, no_training):
    # Their buffers are not those of the call any more when it is computed again.
    torch.manual_seed(0)
    with pytest.raises(NetworkError, match="normalisation inside activation checkpointing"):
        influences(map(Checkpointed, normalised(**norms)))


@pytest.mark.parametrize("norms", NORMALISED.values(), ids=NORMALISED)
def test_normalisations_beside_what_is_checkpointed_are_traced(norms):
    def make(change):
        torch.manual_seed(0)
        generator, discriminator = normalised(**norms)
        for network in (generator, discriminator):
            network.insert(1, change(nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()))
        return generator, discriminator

    assert largest_error(influences(make(Checkpointed)), influences(make(lambda module: module))) < 1e-9


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_networks_are_traced(backend):
    networks = [torch.compile(network, backend=backend) for network in toy_networks()]
    assert largest_error(influences(networks), influences(toy_networks())) < 1e-6


def test_networks_that_compile_themselves_are_traced():
    networks = toy_networks()
    for network in networks:
        network.compile(backend="aot_eager")
    assert largest_error(influences(networks), influences(toy_networks())) < 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: perceptrons(Applied(Tanh)), "once_differentiable"),
        (lambda: perceptrons(Applied(TanhInTwoParts)), "once_differentiable"),
        (attentive, "scaled_dot_product"),
    ],
    ids=["function", "function in two parts", "attention"],
)
def test_the_exact_scheme_names_what_has_no_second_derivative_before_training(make, message, no_training):
    hint = r"use ITD\(derivative='secant'\)"
    with pytest.raises(NetworkError, match=rf"(?s)cannot be run and traced: .*{message}.*{hint}"):
        influences(make(), EXACT)


@pytest.mark.parametrize("penalty", [R1(), GradientPenalty()])
def test_a_penalty_on_what_has_no_second_derivative_is_refused_before_training(penalty, no_training):
    with pytest.raises(NetworkError, match=r"(?s)cannot be run and traced: .*scaled_dot_product"):
        influences(attentive(), penalty=penalty)


@pytest.mark.parametrize("backend", [SECANT, EXACT], ids=["secant", "exact"])
def test_reentrant_checkpoints_are_refused_before_training(backend, no_training):
    generator, discriminator = toy_networks()
    with pytest.raises(NetworkError, match="cannot be run and traced"):
        influences((Checkpointed(generator, True), Checkpointed(discriminator, True)), backend)
