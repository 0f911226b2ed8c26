"""The Jacobian of a game as an operator, and the scores of instances."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.functional import softplus

from ganclean import Average, GANTrainer, Update
from ganclean.backends.game import Game, draw_chunks
from ganclean.data import DataSource
from ganclean.dynamics.network import Call
from ganclean.dynamics.record import mapped
from ganclean.dynamics.state import map_state
from ganclean.optim import SGD, Adam, AdamW, Clipped, Grouped, Projected
from tests.reference.game_jacobian import explicit_game, flat, game_jacobian, instance_losses
from tests.toy_games import GAMES, X, make_game, moved_game, random_networks
from tests.toy_gans import toy_networks


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_products_are_those_of_the_explicit_jacobian(name, derivative):
    make, settings = GAMES[name]
    networks = make()
    game = make_game(networks, derivative, **settings)
    decay = 0.3 if name == "weight decay" else 0.0
    J, gradient = game_jacobian(*networks, game.records, game.source, settings.get("penalty"), decay)
    v = torch.randn(len(J), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n_g, tolerance = game.sizes[0], {"rtol": 0, "atol": (1e-11 if derivative == "exact" else 1e-6) * float(J.norm())}
    torch.testing.assert_close(game.rmatvec(v), J.T @ v, **tolerance)
    v_g, v_d = v.split(game.sizes)
    by_g, by_d = game.products("G", v_g), game.products("D", v_d)
    torch.testing.assert_close(by_g["G"], J[:n_g, :n_g].T @ v_g, **tolerance)
    torch.testing.assert_close(by_g["D"], J[:n_g, n_g:].T @ v_g, **tolerance)
    torch.testing.assert_close(by_d["D"], J[n_g:, n_g:].T @ v_d, **tolerance)
    torch.testing.assert_close(by_d["G"], J[n_g:, :n_g].T @ v_d, **tolerance)
    for player, v_p, both in (("G", v_g, by_g), ("D", v_d, by_d)):
        for other in ("G", "D"):
            torch.testing.assert_close(game.products(player, v_p, into=[other]), {other: both[other]})
    torch.testing.assert_close(torch.cat(list(game.gradients().values())), gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["dropout", "batch norm", "spectral norm"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_whatever_networks_do_in_training_is_part_of_a_fixed_linear_map(kind, derivative):
    game = make_game(random_networks(kind), derivative)
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randn(sum(game.sizes), generator=generator, dtype=torch.float64) for _ in range(2))
    h = 1e-5

    def both(sign):
        at = game
        for player, move in game.split(w).items():
            at = moved_game(at, player, sign * h * move)
        return torch.cat(list(at.gradients().values()))

    expected = float(v @ (both(1) - both(-1)) / (2 * h))
    assert float(game.rmatvec(v) @ w) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(game.rmatvec(v), game.rmatvec(v))
    assert float(game.rmatvec(2 * v + w) @ w) == pytest.approx(float((2 * game.rmatvec(v) + game.rmatvec(w)) @ w), 1e-5)


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


def test_activations_that_are_computed_anew_are_those_of_the_moved_parameters():
    plain, checkpointed = make_game(), make_game([Checkpointed(net) for net in toy_networks()])
    v = torch.randn(sum(plain.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(checkpointed.rmatvec(v), plain.rmatvec(v), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(checkpointed.gradients(), plain.gradients())


def test_running_statistics_and_averages_pass_their_cotangent_to_the_parameters():
    networks = random_networks("batch norm")
    game = make_game(networks, ema_decay=0.9)
    state = game.state
    gradient = map_state(torch.zeros_like, game.step.differentiable(state))
    gradient = gradient._replace(averages=map_state(torch.ones_like, state).averages)
    assert torch.equal(game.cotangent(gradient), torch.cat([torch.ones(game.sizes[0]), torch.zeros(game.sizes[1])]))
    c = {n: torch.randn_like(b) for n, b in gradient.buffers["G"].items()}
    found = game.cotangent(gradient._replace(averages={}, buffers={**gradient.buffers, "G": c}))

    def settled(sign, move):
        at, total = moved_game(game, "G", sign * 1e-5 * move), 0
        for record in at.records:
            after = at.state.buffers["G"]
            for latents in (record.latents_d, record.latents_g):
                after = at.step.networks["G"](at.state.generator, after, Call((latents,)))[1]
            # Each call makes b' = 0.9 b + 0.1 s, so that after two it settles at a mean.
            for name, piece in c.items():
                s = (after[name] - 0.81 * state.buffers["G"][name]) / 0.19
                total += float((piece * s).sum()) * len(record.indices) / 16
        return total

    move = torch.randn(game.sizes[0], dtype=torch.float64)
    expected = (settled(1, move) - settled(-1, move)) / 2e-5
    assert float(found[: game.sizes[0]] @ move) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "batch norm", "spectral norm"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_single_precision_gives_what_double_precision_gives(kind, derivative):
    networks = toy_networks() if kind == "plain" else random_networks(kind)
    double = replace(make_game(networks, derivative), delta=1e-3)
    records = tuple(mapped(record, torch.Tensor.float) for record in double.records)
    single = replace(make_game([net.float() for net in networks], derivative), delta=1e-3)
    single = replace(single, source=double.source.cast(torch.float32, None), records=records)
    v = torch.randn(sum(double.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = single.rmatvec(v), double.rmatvec(v)
    assert found.dtype == torch.float64
    assert (found - expected).norm() < 2e-3 * expected.norm()
    found, expected = (game.along(v) for game in (single, double))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        (Adam(weight_decay=0.2), 0.2),
        (AdamW(weight_decay=0.2), 0.0),
        (Projected(Clipped(SGD(weight_decay=0.2), max_norm=1.0), dict), 0.2),
        (Grouped({"*.2.*": AdamW(), "*.bias": SGD(), "*": Adam(weight_decay=0.2)}), [0.2, 0.0, 0.0, 0.0]),
    ],
)
def test_decay_that_is_no_part_of_the_gradient_is_no_part_of_the_game(rule, decay):
    game, plain = make_game(optimizer=rule), make_game()
    v = torch.ones(game.sizes[0], dtype=torch.float64)
    sizes = torch.tensor([p.numel() for p in game.state.generator.values()])
    expected = plain.products("G", v)["G"] + torch.tensor(decay).expand(4).repeat_interleave(sizes) * v
    torch.testing.assert_close(game.products("G", v)["G"], expected)


@pytest.mark.parametrize("name", ["plain", "R1", "gradient penalty", "conditional gradient penalty", "frozen"])
def test_scores_are_inner_products_with_the_gradients_of_single_instances(name):
    make, settings = GAMES[name]
    networks = make()
    game = make_game(networks, "exact", **settings)
    v = torch.randn(game.sizes[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    discriminator, parts = networks[1], []
    for record in game.records:
        draws, mixing = record.of("D").draws, record.of("D").draws.get("mixing")
        inputs = (record.latents_d, *([draws["labels"]] if "labels" in draws else []))
        fake = game.step.networks["G"](game.state.generator, {}, Call(inputs))[0]
        real = game.source[record.indices]

        def loss(theta, i, record=record, fake=fake, real=real, mixing=mixing):
            labels = None if record.labels is None else record.labels[i : i + 1]
            mixing = None if mixing is None else mixing[i : i + 1]
            row = slice(i, i + 1)
            penalty = settings.get("penalty")
            return instance_losses(discriminator, theta, real[row], labels, fake[row], mixing, penalty)[0]

        gradients = [torch.func.grad(loss)(flat(discriminator), i) for i in range(len(record.indices))]
        parts += [float(g @ v) for g in gradients]
    v = torch.cat([torch.randn(game.sizes[0], dtype=torch.float64), v])
    np.testing.assert_allclose(game.along(v).numpy(), parts, rtol=1e-10, atol=1e-13)
    errors = []
    for delta in (2e-2, 1e-2, 1e-3):
        found = replace(game, derivative="secant", delta=delta).along(v).numpy()
        errors.append(np.abs(found - parts).max() / np.abs(parts).max())
    assert errors[1] < 0.3 * errors[0] and errors[2] < 1e-4


def own_discriminator(nets, batch, weights):
    with torch.no_grad():
        fake = nets.G(batch.latents)
    return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(fake)).mean()


def own_generator(nets, batch, weights):
    return softplus(-nets.D(nets.G(batch.latents))).mean()


@pytest.mark.parametrize("kind", ["plain", "dropout", "batch norm", "spectral norm"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_objectives_of_ones_own_make_the_game_of_the_recipe(kind, derivative):
    networks = toy_networks() if kind == "plain" else random_networks(kind)
    recipe = make_game(networks, derivative)
    updates = [Update("D", own_discriminator, SGD()), Update("G", own_generator, SGD())]
    own = replace(recipe, step=GANTrainer(updates=updates, latent_dim=3).make_step(*networks))
    v = torch.randn(sum(own.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(own.gradients(), recipe.gradients(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own.rmatvec(v), recipe.rmatvec(v), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(own.along(v), recipe.along(v), rtol=1e-8, atol=1e-10)
    gradient = map_state(torch.ones_like, own.step.differentiable(own.state))
    torch.testing.assert_close(own.cotangent(gradient), recipe.cotangent(gradient), rtol=1e-8, atol=1e-10)


def judge_against_mean(nets, batch, weights):
    """Coupled by a mean over the instances, in which they have their weights."""
    real = nets.D(batch.x).flatten()
    fake = nets.D(nets.G(batch.latents)).flatten()
    mean = (weights * real).sum() / weights.sum()
    return (weights * softplus(-real)).mean() + softplus(fake - mean).mean()


def recover_latents(nets, batch, weights):
    """Q recovers latents, and says of the instances what it says of others now."""
    fake = nets.G(batch.latents)
    recovered = (nets.Q(fake) - batch.latents[:, :2]).square().mean()
    target = nets.Q(0.9 * batch.x).detach() + nets.D(fake.detach()).mean()
    return recovered + (weights[:, None] * (nets.Q(batch.x) - target).square()).mean()


THREE = {
    "D": (
        ["D"],
        1.0,
        lambda live, still, x, z, w: (
            (w * softplus(-live("D", x).flatten())).mean()
            + softplus(live("D", live("G", z)).flatten() - (w * live("D", x).flatten()).sum() / w.sum()).mean()
        ),
    ),
    "G": (["G"], 1.0, lambda live, still, x, z, w: softplus(-live("D", live("G", z))).mean()),
    "G+Q": (
        ["G", "Q"],
        0.5,
        lambda live, still, x, z, w: (
            (live("Q", live("G", z)) - z[:, :2]).square().mean()
            + (w[:, None] * (live("Q", x) - still("Q", 0.9 * x) - live("D", still("G", z)).mean()).square()).mean()
        ),
    ),
}


def three_players(derivative):
    G, D = toy_networks()
    Q = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    updates = [
        Update("D", judge_against_mean, SGD()),
        Update("G", own_generator, SGD()),
        Update(("G", "Q"), recover_latents, SGD(), due=2),
    ]
    step, source = GANTrainer(updates=updates, latent_dim=3).make_step(G, D, {"Q": Q}), DataSource(X)
    noise = torch.Generator().manual_seed(0)
    chunks = [
        replace(chunk, updates=tuple(replace(done, draws={"latents": normal(noise, chunk)}) for done in chunk.updates))
        for chunk in draw_chunks(step, 16, 5)
    ]
    game = Game(step, step.initial_state(), source, tuple(chunks), derivative, 1e-4)
    return game, explicit_game({"G": G, "D": D, "Q": Q}, THREE, chunks, source)


def normal(noise, chunk):
    return torch.randn(len(chunk.indices), 3, generator=noise, dtype=torch.float64)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_the_jacobian_of_three_players_is_the_explicit_one(derivative):
    game, (J, in_weights, gradient) = three_players(derivative)
    assert game.players == ("G", "D", "Q") and game.frequencies == {"D": 1.0, "G": 1.0, "G+Q": 0.5}
    torch.testing.assert_close(torch.cat(list(game.gradients().values())), gradient, rtol=1e-10, atol=1e-13)
    v = torch.randn(len(J), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tolerance = {"rtol": 0, "atol": (1e-11 if derivative == "exact" else 1e-6) * float(J.norm())}
    torch.testing.assert_close(game.rmatvec(v), J.T @ v, **tolerance)
    for player, part in game.split(v).items():
        rows = [i for p, own in game.split(torch.arange(len(J))).items() for i in own.tolist() if p == player]
        expected = game.split(J[rows].T @ part)
        torch.testing.assert_close(game.products(player, part), expected, **tolerance)
        for other in game.players:
            torch.testing.assert_close(game.products(player, part, into=[other]), {other: expected[other]}, **tolerance)
    torch.testing.assert_close(game.along(v), in_weights.T @ v, **tolerance)


def test_updates_count_as_often_as_they_are_due():
    rare, always = make_game(n_critic=4), make_game()
    v = torch.ones(always.sizes[0], dtype=torch.float64)
    torch.testing.assert_close(rare.products("G", v), {p: u / 4 for p, u in always.products("G", v).items()})
    torch.testing.assert_close(rare.gradients()["G"], always.gradients()["G"] / 4)
    never = Update("D", own_discriminator, SGD(), due=lambda t: t > 1e6)
    with pytest.raises(ValueError, match=r"The update 'D' is not due .* Update\(due=...\) with a number"):
        replace(always, step=replace(always.step, updates=(never,))).gradients()


def test_averages_of_running_statistics_pass_on_what_these_do():
    average = {"G": Average(0.9, buffers="averaged")}
    game = make_game(random_networks("batch norm"), ema_decay=average)
    zero = map_state(torch.zeros_like, game.step.differentiable(game.state))
    c = {n: torch.randn_like(b) for n, b in zero.buffers["G"].items()}
    expected = game.cotangent(zero._replace(buffers={**zero.buffers, "G": c}))
    averages = {"G": {**zero.averages["G"], **c}}
    assert expected.any() and torch.equal(game.cotangent(zero._replace(averages=averages)), expected)
