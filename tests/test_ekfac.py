"""EK-FAC: its inverses against explicit matrices, AID by it against GMRES, and what it does with other layers."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.base import clone
from torch import nn
from torch.func import functional_call, hessian, jacrev

from ganclean import GANTrainer, Update
from ganclean.backends import AID
from ganclean.backends.ekfac import CurvatureInverse, GameInverse
from ganclean.backends.game import Game, draw_chunks
from ganclean.backends.solvers import Settings, solve
from ganclean.data import DataSource
from ganclean.dynamics.network import Call, Network
from ganclean.dynamics.state import ravel, unravel
from ganclean.exceptions import MissingExtraError
from ganclean.losses import LOSSES
from ganclean.metrics import SampleMean
from ganclean.optim import SGD
from ganclean.recipes.adversarial import adversarial_loss, gan

from .toy_gans import toy_cleanser, toy_data, toy_networks

pytest.importorskip("curvlinops")


def game_of(generator, discriminator, X=None, latent_dim=3, batch_size=6, **settings):
    source = DataSource(torch.from_numpy(toy_data()) if X is None else X)
    trainer = GANTrainer(latent_dim=latent_dim, batch_size=batch_size, **settings)
    step = trainer.make_step(generator, discriminator)
    return Game(step, step.initial_state(), source, draw_chunks(step, len(source), batch_size))


def gauss_newton(game, player):
    """The matrix itself: Jacobian of the discriminator's outputs, |ℓ''| between."""
    step, state = game.step, game.state
    theta, loss = state.params[player], adversarial_loss(step.updates)
    total, n = 0.0, len(game.source)

    def outputs(flat, samples, latents):
        params = unravel(flat, theta)
        if player == "G":
            samples = functional_call(step.generator, params, latents)
            params = state.discriminator
        return functional_call(step.discriminator, params, samples).flatten()

    for record in game.records:
        record = step.drawn(record, game.source)
        fake = functional_call(step.generator, state.generator, record.latents_d)
        if player == "G":
            parts = [(None, record.latents_g, loss.generator)]
        else:
            parts = [(game.source[record.indices], None, loss.real), (fake, None, loss.fake)]
        for samples, latents, term in parts:
            output = outputs(ravel(theta), samples, latents)
            bend = hessian(lambda o, term=term: term(o).sum())(output).diagonal().abs()
            if not bend.any():
                bend = jacrev(lambda o, term=term: term(o).sum())(output).square()
            rows = jacrev(outputs)(ravel(theta), samples, latents)
            total = total + rows.T @ (bend[:, None] * rows) / n
    return total.detach()


def affine_pair():
    """Both factorise: in a linear discriminator all gradients of outputs are the same, in a generator with one
    output they are multiples of each other."""
    torch.manual_seed(0)
    return nn.Linear(3, 2, bias=False).double(), nn.Linear(2, 1).double()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_inverse_of_a_single_layer_is_exact_in_the_eigenbasis(loss):
    game = game_of(*affine_pair(), loss=loss)
    for player in ("G", "D"):
        matrix = gauss_newton(game, player)
        block = GameInverse(game, damping=0.3).blocks[player]
        inverse = torch.stack([block(column) for column in torch.eye(len(matrix)).double()])
        torch.testing.assert_close(inverse, inverse.T, rtol=1e-6, atol=1e-8)
        # One direction of gradients with respect to the layer's output: all but the eigenvectors of its inputs is
        # exact. Those are exact where all weights |ℓ''| are the same.
        same = loss in ("least_squares", "wasserstein")
        shift = 0.3 + 1e-3 * float(matrix.trace()) / len(matrix)
        expected = torch.linalg.inv(matrix + shift * torch.eye(len(matrix)).double())
        torch.testing.assert_close(inverse, expected, rtol=1e-5 if same else 0.2, atol=1e-6 if same else 0.05)
        torch.testing.assert_close(
            torch.linalg.eigvalsh(inverse).min(), 1 / (torch.linalg.eigvalsh(matrix).max() + shift), rtol=0.05, atol=0
        )


def test_curvature_of_deep_linear_network_on_one_sample_is_exact_by_layer():
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 1)).double())
    theta = {name: p.detach() for name, p in network.module.named_parameters()}
    x = torch.randn(1, 3).double()
    block = CurvatureInverse(network, theta, [lambda t: network(t, {}, Call((x,)))[0].flatten()], damping=0.5)
    assert block.by_layers == list(theta) and not block.by_diagonal
    slope = ravel(jacrev(lambda t: functional_call(network.module, t, x).sum())(theta))
    sizes = [16, 10, 3]
    shift = 0.5 + 1e-3 * float(slope.square().sum()) / len(slope)
    matrix = torch.block_diag(*(torch.outer(part, part) for part in slope.split(sizes)))
    v = torch.randn(len(slope)).double()
    expected = torch.linalg.solve(matrix + shift * torch.eye(len(v)).double(), v)
    torch.testing.assert_close(block(v), expected, rtol=1e-6, atol=1e-9)


def test_strong_damping_leaves_a_multiple_of_the_identity_and_the_sweep_is_triangular():
    game = game_of(*toy_networks())
    v = torch.randn(sum(game.sizes)).double()
    torch.testing.assert_close(GameInverse(game, damping=1e8)(v) * 1e8, v, rtol=1e-5, atol=1e-5)
    inverse = GameInverse(game, damping=0.5)
    u_g, u_d = inverse(v).split(game.sizes)
    v_g, v_d = v.split(game.sizes)
    torch.testing.assert_close(u_g, inverse.blocks["G"](v_g))
    torch.testing.assert_close(u_d, inverse.blocks["D"](v_d - game.products("G", u_g)["D"]))
    uncoupled = GameInverse(game, damping=0.5, coupled=False)(v)
    torch.testing.assert_close(uncoupled[game.sizes[0] :], inverse.blocks["D"](v_d))


def test_weight_decay_is_part_of_the_curvature():
    game = game_of(*toy_networks(), optimizer=SGD(lr=0.1, weight_decay=1e8))
    v = torch.randn(sum(game.sizes)).double()
    torch.testing.assert_close(GameInverse(game, coupled=False)(v) * 1e8, v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["gmres", "ekfac"])
def test_solution_is_that_of_the_explicit_system(solver):
    game = game_of(*toy_networks())
    n = sum(game.sizes)
    exact = replace(game, derivative="exact")
    matrix = torch.stack([exact.rmatvec(e) for e in torch.eye(n).double()], dim=1)
    b = torch.randn(n).double()
    u, info = solve(solver, game, b, Settings(damping=0.2, tol=1e-5))
    torch.testing.assert_close(u, torch.linalg.solve(matrix + 0.2 * torch.eye(n).double(), b), rtol=1e-3, atol=1e-3)
    assert info["converged"]


@pytest.fixture(scope="module")
def trained():
    cleanser = toy_cleanser(
        metric=SampleMean(n_samples=100),
        backend=AID(damping=0.05, tol=1e-6),
        n_epochs=150,
        optimizer=SGD(lr=0.1, weight_decay=1e-3),
    )
    # A run whose game has no negative curvature of the size of the damping.
    return cleanser.set_params(random_state=1).fit(toy_data(40))


def test_few_products_rank_instances_as_gmres_does_when_it_has_converged(trained):
    backend = AID(solver="ekfac", damping=0.05, tol=1e-9, max_iter=6)
    with pytest.warns(UserWarning, match="did not converge"):
        backend.fit(trained.trajectory_, trained.gradients_)
    assert spearmanr(backend.influences_["SampleMean"], trained.influence_)[0] > 0.95


def test_converged_influence_is_that_of_gmres_and_the_residual_is_reported(trained):
    backend = AID(solver="ekfac", damping=0.05, tol=1e-5)
    cleanser = clone(trained).set_params(backend=backend)
    assert cleanser.get_params()["backend__solver"] == "ekfac"
    cleanser.fit(toy_data(40), trajectory=trained.trajectory_)
    info = cleanser.backend_.solver_info_["SampleMean"]
    assert info["converged"] and info["damped_residual"] < 1e-5 < info["residual"] and info["iterations"] > 1
    np.testing.assert_allclose(cleanser.influence_, trained.influence_, rtol=1e-2, atol=1e-4)
    scores = cleanser.score_samples(toy_data(40)) * (1 if cleanser.metric_.greater_is_better else -1)
    np.testing.assert_allclose(np.abs(scores), np.abs(cleanser.influence_), rtol=1e-6)


class LowRank(nn.Module):
    """A frozen Linear layer and a trained correction of low rank."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def low_rank_networks():
    generator, discriminator = toy_networks()
    for network in (generator, discriminator):
        for i in (0, 2):
            network[i] = LowRank(network[i]).double()
    return generator, discriminator


def test_low_rank_corrections_alone_are_solved_for():
    generator, discriminator = low_rank_networks()
    game = game_of(generator, discriminator)
    inverse = GameInverse(game, damping=0.1)
    for player, block in inverse.blocks.items():
        names = ["0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"]
        assert block.by_layers == names and not block.by_diagonal, player
    cleanser = toy_cleanser(
        low_rank_networks(), metric=SampleMean(n_samples=60), backend=AID(solver="ekfac", damping=1.0)
    ).fit(toy_data())
    assert cleanser.backend_.solver_info_["SampleMean"]["converged"] and np.ptp(cleanser.influence_) > 0


class Twice(nn.Module):
    """A layer that is called twice, an embedding, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.place = nn.Embedding(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(3, 8)

    def forward(self, z):
        z = self.layer(torch.tanh(self.layer(z))) + self.place(z.argmax(1))
        return self.out(z * self.scale).view(-1, 2, 2, 2)


def test_layers_that_are_not_supported_have_a_diagonal_block():
    torch.manual_seed(0)
    generator = nn.Sequential(
        Twice(), nn.ConvTranspose2d(2, 4, 2, stride=2), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1)
    ).double()
    discriminator = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 4)),
        nn.SiLU(),
        nn.Linear(4, 1),
    ).double()
    X = torch.randn(12, 1, 4, 4).double()
    game = game_of(generator, discriminator, X)
    inverse = GameInverse(game, damping=0.1)
    assert inverse.blocks["G"].by_layers == ["0.out.weight", "0.out.bias", "4.weight", "4.bias"]
    assert inverse.blocks["D"].by_layers == ["0.weight", "0.bias", "7.weight", "7.bias"]
    b = torch.randn(sum(game.sizes)).double()
    settings = Settings(damping=3.0, max_iter=30)
    u, info = solve("ekfac", game, b, settings)
    assert info["converged"]
    torch.testing.assert_close(u, solve("gmres", game, b, settings)[0], rtol=0.05, atol=0.01)


def test_diagonal_is_that_of_the_matrix():
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 1)).double())
    theta = {name: p.detach() for name, p in network.module.named_parameters() if name.startswith("2.")}
    x = torch.randn(40, 3).double()

    def outputs(params, rows=slice(None)):
        return functional_call(network.module, params, x[rows]).flatten()

    chunks = [lambda t, i=i: network(t, {}, Call((x[i : i + 2],)))[0].flatten() for i in range(0, 40, 2)]
    block = CurvatureInverse(network, theta, chunks, damping=1e-6)
    true = ravel({name: rows.square().sum(0) for name, rows in jacrev(outputs)(theta).items()}).detach()
    estimate = 1 / block(torch.ones(8).double())
    torch.testing.assert_close(estimate, true, rtol=0.5, atol=0.1 * float(true.mean()))
    assert spearmanr(estimate, true)[0] > 0.9


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    cleanser = toy_cleanser(metric=SampleMean(n_samples=60), backend=AID(solver="ekfac"))
    with pytest.raises(MissingExtraError, match=r"curvlinops-for-pytorch.*ganclean\[ekfac\]"):
        cleanser.fit(toy_data())


def test_an_update_that_is_seldom_due_has_as_little_curvature():
    networks = toy_networks()
    rare, always = game_of(*networks, n_critic=2), game_of(*networks)
    v = torch.randn(always.sizes[0]).double()
    rare, always = GameInverse(rare, damping=0.1), GameInverse(always, damping=0.2)
    torch.testing.assert_close(rare.blocks["G"](v), 2 * always.blocks["G"](v), rtol=1e-6, atol=1e-9)


def test_other_objectives_are_refused_before_training():
    def own(nets, batch, weights):
        return (weights * nets.D(batch.x).flatten()).mean() - nets.D(nets.G(batch.latents)).mean()

    updates = [Update("D", own, SGD()), *gan()[1:]]
    cleanser = toy_cleanser(updates=updates, optimizer=None, backend=AID(solver="ekfac"))
    with pytest.raises(ValueError, match=r"the update 'D' has an objective of its own. Choose solver='gmres'"):
        cleanser.fit(toy_data())
