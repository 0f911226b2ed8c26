"""The Jacobian of a game as an operator, and the scores of instances."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from ganclean.optim import Adam, AdamW
from ganclean.training.state import map_state
from tests.reference.game_jacobian import flat, game_jacobian, instance_losses
from tests.toy_games import GAMES, make_game, moved_game, random_networks
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
    torch.testing.assert_close(game.own("generator", v_g), J[:n_g, :n_g].T @ v_g, **tolerance)
    torch.testing.assert_close(game.cross("generator", v_g), J[:n_g, n_g:].T @ v_g, **tolerance)
    torch.testing.assert_close(game.own("discriminator", v_d), J[n_g:, n_g:].T @ v_d, **tolerance)
    torch.testing.assert_close(game.cross("discriminator", v_d), J[n_g:, :n_g].T @ v_d, **tolerance)
    found = torch.cat([game.gradient("generator"), game.gradient("discriminator")])
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["dropout", "batch norm", "spectral norm"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_whatever_networks_do_in_training_is_part_of_a_fixed_linear_map(kind, derivative):
    game = make_game(random_networks(kind), derivative)
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randn(sum(game.sizes), generator=generator, dtype=torch.float64) for _ in range(2))
    h = 1e-5

    def both(sign):
        at = game
        for player, move in zip(("generator", "discriminator"), w.split(game.sizes)):
            at = moved_game(at, player, sign * h * move)
        return torch.cat([at.gradient("generator"), at.gradient("discriminator")])

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
    torch.testing.assert_close(checkpointed.gradient("generator"), plain.gradient("generator"))


def test_running_statistics_and_averages_pass_their_cotangent_to_the_parameters():
    networks = random_networks("batch norm")
    game = make_game(networks, ema_decay=0.9)
    state = game.state
    gradient = map_state(torch.zeros_like, game.step.differentiable(state))
    gradient = gradient._replace(average=map_state(torch.ones_like, state).average)
    assert torch.equal(game.cotangent(gradient), torch.cat([torch.ones(game.sizes[0]), torch.zeros(game.sizes[1])]))
    c = {n: torch.randn_like(b) for n, b in gradient.buffers_generator.items()}
    found = game.cotangent(gradient._replace(average={}, buffers_generator=c))

    def settled(sign, move):
        at, total = moved_game(game, "generator", sign * 1e-5 * move), 0
        for record in at.records:
            after = at.step.generate(at.state.generator, at.state.buffers_generator, record)[1]
            # b' = 0.9 b + 0.1 s, so that it settles at s.
            for name, piece in c.items():
                s = (after[name] - 0.9 * state.buffers_generator[name]) / 0.1
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
    records = tuple(replace(r, latents_d=r.latents_d.float(), latents_g=r.latents_g.float()) for r in double.records)
    single = replace(make_game([net.float() for net in networks], derivative), delta=1e-3)
    single = replace(single, source=double.source.cast(torch.float32, None), records=records)
    v = torch.randn(sum(double.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = single.rmatvec(v), double.rmatvec(v)
    assert found.dtype == torch.float64
    assert (found - expected).norm() < 2e-3 * expected.norm()
    found, expected = (game.along(v.split(game.sizes)[1]) for game in (single, double))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("rule", [Adam(weight_decay=0.2), AdamW(weight_decay=0.2)])
def test_decay_that_is_no_part_of_the_gradient_is_no_part_of_the_game(rule):
    game, plain = make_game(optimizer=rule), make_game()
    v = torch.ones(game.sizes[0], dtype=torch.float64)
    expected = plain.own("generator", v) + (0.0 if isinstance(rule, AdamW) else 0.2) * v
    torch.testing.assert_close(game.own("generator", v), expected)


@pytest.mark.parametrize("name", ["plain", "R1", "gradient penalty", "conditional gradient penalty", "frozen"])
def test_scores_are_inner_products_with_the_gradients_of_single_instances(name):
    make, settings = GAMES[name]
    networks = make()
    game = make_game(networks, "exact", **settings)
    v = torch.randn(game.sizes[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    discriminator, parts = networks[1], []
    for record in game.records:
        fake = game.step.generate(game.state.generator, {}, record)[0]
        real = game.source[record.indices]

        def loss(theta, i, record=record, fake=fake, real=real):
            labels = None if record.labels is None else record.labels[i : i + 1]
            mixing = None if record.mixing is None else record.mixing[i : i + 1]
            row = slice(i, i + 1)
            penalty = settings.get("penalty")
            return instance_losses(discriminator, theta, real[row], labels, fake[row], mixing, penalty)[0]

        gradients = [torch.func.grad(loss)(flat(discriminator), i) for i in range(len(record.indices))]
        parts += [float(g @ v) for g in gradients]
    np.testing.assert_allclose(game.along(v).numpy(), parts, rtol=1e-10, atol=1e-13)
    errors = []
    for delta in (2e-2, 1e-2, 1e-3):
        found = replace(game, derivative="secant", delta=delta).along(v).numpy()
        errors.append(np.abs(found - parts).max() / np.abs(parts).max())
    assert errors[1] < 0.3 * errors[0] and errors[2] < 1e-4
