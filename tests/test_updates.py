"""Updates, averages and players: what may be said with them, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import softplus

from ganclean import Average, GANInfluence, GANTrainer, Update
from ganclean.dynamics.network import Network
from ganclean.dynamics.players import Players
from ganclean.dynamics.randomness import stream
from ganclean.dynamics.record import StepRecord, UpdateRecord, packed, unpacked
from ganclean.exceptions import GANCleanError, NetworkError
from ganclean.metrics import SampleMean
from ganclean.optim import SGD, Adam
from tests.shapes import critic, deceiver
from tests.toy_gans import toy_data, toy_networks

X = toy_data()
RULE = SGD(lr=0.05)


def trainer_of(updates, **settings):
    return GANTrainer(updates=updates, n_epochs=2, batch_size=8, latent_dim=3, **settings)


def fitted(updates, networks=None, **settings):
    generator, discriminator = networks or toy_networks()
    cleanser = GANInfluence(generator, discriminator, trainer=trainer_of(updates, **settings), random_state=0)
    return cleanser.set_params(metric=SampleMean(n_samples=30)).fit(X)


def usual(**settings):
    return [Update("D", critic, RULE, **settings), Update("G", deceiver, RULE)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trains": ()}, "trains must be a player's name"),
        ({"objective": 3}, r"objective must be a function \(nets, batch, weights\)"),
        ({"optimizer": torch.optim.SGD}, "optimizer must be a rule of ganclean.optim"),
        ({"due": 0}, "due must be a positive integer"),
        ({"micro": 1.5}, "micro must be a positive integer"),
        ({"after": "clip"}, "after must be a function"),
        ({"meets": "later"}, r"meets must be one of \['now', 'before'\]"),
    ],
)
def test_an_update_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Update(**({"trains": "D", "objective": critic, "optimizer": RULE} | arguments))


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([], "updates must be a list of ganclean.Update"),
        ([critic], "updates must be a list of ganclean.Update"),
        ([Update("D", critic, RULE), Update("D", critic, RULE)], "Updates need names of their own"),
        ([Update("D", critic, "G"), Update("G", deceiver, "D")], "shares the optimiser of 'G'"),
        ([Update("Q", critic, RULE)], "trains 'Q', but the players are G, D"),
        ([Update("D.9", critic, RULE)], "has no trainable parameter in 9"),
    ],
)
def test_a_list_of_updates_that_makes_no_sense_is_refused(updates, message):
    with pytest.raises((ValueError, NetworkError), match=message):
        fitted(updates)


def test_optimisers_beside_updates_are_refused():
    with pytest.raises(ValueError, match="leave optimizer, penalty out"):
        fitted(usual(), optimizer=RULE, penalty=object())


def vector_loss(nets, batch, weights):
    return softplus(-nets.D(batch.x))


def unknown_player(nets, batch, weights):
    return nets.Q(batch.x).mean()


def evaluating(nets, batch, weights):
    nets.D.eval()
    return nets.D(batch.x).mean()


def carrying(nets, batch, weights):
    batch.carried["new"] = torch.ones(())
    return nets.D(batch.x).mean()


def without_labels(nets, batch, weights):
    return nets.D(batch.x).gather(1, batch.y[:, None]).mean()


def of_another_shape(nets, batch, weights):
    return nets.D(batch.x[:, :1]).mean()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (vector_loss, r"of the update 'D' must return a scalar tensor; it returned a tensor of shape \(8, 1\)"),
        (unknown_player, "There is no player 'Q'; the players are G, D"),
        (evaluating, r"A player has no eval\(\)"),
        (carrying, r"carries \['new'\], which have no first value"),
        (without_labels, "batch.y is None, since no labels were given"),
        (of_another_shape, r"An objective fails on 8 instances of shape \(2,\)"),
    ],
)
def test_an_objective_that_fails_says_why_before_anything_long(objective, message):
    with pytest.raises((ValueError, GANCleanError, AttributeError), match=message):
        fitted([Update("D", objective, RULE), Update("G", deceiver, RULE)])


def test_an_optimiser_is_shared_with_its_moments_and_its_count():
    def half(nets, batch, weights):
        return critic(nets, batch, weights) / 2

    together = fitted([Update("D", half, Adam(lr=1e-2)), Update("D", half, "D", name="again"), *usual()[1:]])
    record = together.trajectory_[1]
    assert [(done.name, done.number) for done in record.updates] == [("D", 3), ("again", 4), ("G", 2)]
    assert set(together.trajectory_.state(1).moments) == {"D", "G"}


@given(t=st.integers(0, 100), every=st.integers(1, 5))
def test_an_average_follows_in_every_so_many_steps(t, every):
    assert Average(0.9, every=every).decay_at(t) == (0.9 if (t + 1) % every == 0 else 1.0)


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}, {"buffers": "all"}])
def test_an_average_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Average(**arguments)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        Average(lambda t: 2.0).decay_at(0)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.scale, self.size = nn.Parameter(torch.ones(2)), 7
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, depth=2):
        for block in self.blocks[:depth]:
            x = block(x)
        return {"image": x * self.scale, "depth": depth}

    def twice(self, x):
        return self.forward(self.forward(x)["image"])["image"]


def test_a_player_is_called_as_the_module_is():
    torch.manual_seed(0)
    module, x = Body(), torch.randn(3, 2)
    network = Network(module)
    moved = {name: p.detach() + 1 for name, p in module.named_parameters()}
    nets = Players({"G": network}, {"G": moved}, {"G": moved}, {"G": network.buffers()}, seed_of=lambda *_: 0)
    with torch.no_grad():
        for p in module.parameters():
            p += 1
    for found, expected in [
        (nets.G(x)["image"], module(x)["image"]),
        (nets["G"](x, depth=1)["image"], module(x, depth=1)["image"]),
        (nets.G.forward(x)["image"], module(x)["image"]),
        (nets.G.blocks[1](x), module.blocks[1](x)),
        (next(iter(nets.G.blocks))(x), module.blocks[0](x)),
        (nets.G.twice(x), module.twice(x)),
        (nets.G.scale, module.scale),
        (nets.G.blocks[0].weight, module.blocks[0].weight),
        (nets.G.count, module.count),
    ]:
        torch.testing.assert_close(found, expected)
    assert nets.G.size == 7 and len(nets.G.blocks) == 2 and "G" in nets and "D" not in nets
    assert nets.G.requires_grad_(False) is not None
    assert sum(p.numel() for p in nets.G.parameters()) == 14
    with pytest.raises(AttributeError, match="no player 'D'"):
        nets.D(x)


@given(seed=st.integers(0, 2**31), names=st.lists(st.sampled_from(["D", "G", 0, 1, "objective"]), min_size=1))
def test_streams_of_other_names_are_others(seed, names):
    own = stream(seed, *names)
    assert own == stream(seed, *names) and 0 <= own < 2**63
    assert own != stream(seed, *names, 0) and own != stream(seed + 1, *names)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.just("tensor"),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text("ab", min_size=1), children, max_size=2)
        | st.tuples(children, children)
    ),
    max_leaves=6,
)


@given(tree=VALUES, number=st.integers(1, 9))
def test_a_record_is_read_back_as_it_was(tree, number):
    def filled(node):
        if node == "tensor":
            return torch.arange(3.0)
        if isinstance(node, dict):
            return {key: filled(child) for key, child in node.items()}
        return type(node)(map(filled, node)) if isinstance(node, (list, tuple)) else node

    latents = torch.randn(2, 3)
    done = UpdateRecord("D", number, {"lr": 0.1, "betas": (0.5, 0.9)}, {"inputs": filled(tree), "latents": latents})
    other = UpdateRecord("G", 1, {}, {"latents": latents}, 0, {"D": 0}, ("real", "fake"), {"D": (0, 2)})
    record = StepRecord(4, torch.arange(2), 7, (done, other), shifts={"G/0.mean": torch.ones(1)})
    tensors, rest = packed([record])
    (found,) = unpacked(tensors, rest)
    assert found.latents_d is found.latents_g and torch.equal(found.latents_d, latents)
    assert found.updates[0].settings == {"lr": 0.1, "betas": (0.5, 0.9)} and found.updates[0].number == number
    assert found.updates[1].meets == {"D": 0} and found.updates[1].calls == {"D": (0, 2)}

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return a == b

    given_inputs = filled(tree)
    assert given_inputs is None or same(given_inputs, found.updates[0].draws["inputs"])


def test_what_is_detached_is_followed():
    """A consistency target depends on what is trained: its gradient is stopped, its influence is not."""

    def consistent(nets, batch, weights):
        target = nets.D(batch.x).detach().flatten()
        moved = nets.D(batch.x + 0.3).flatten()
        return critic(nets, batch, weights) + (weights * (moved - target).square()).mean()

    def quiet(nets, batch, weights):
        with torch.no_grad():
            target = nets.D(batch.x).flatten() * 1.0
        moved = nets.D(batch.x + 0.3).flatten()
        return critic(nets, batch, weights) + (weights * (moved - target).square()).mean()

    found = [fitted([Update("D", one, RULE), *usual()[1:]]).influence_ for one in (consistent, quiet)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
