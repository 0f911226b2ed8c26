"""What tells a run from another: all that decides what is trained, and nothing else."""

import copy
import functools
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import sklearn
import torch
from torch import nn
from torch.nn.functional import leaky_relu, softplus

from ganclean import GANTrainer, Update
from ganclean.exceptions import TrajectoryError
from ganclean.losses import R1
from ganclean.optim import SGD, Adam, Clipped
from ganclean.runs.identity import describe_step, difference, identity
from ganclean.runs.trajectory import Trajectory
from tests.toy_gans import toy_cleanser, toy_networks, toy_trainer

LOSS = """
def discriminator_loss(nets, batch, weights):
    real = {name}(-nets.D(batch.x).flatten())
    return (weights * real).mean() + softplus(nets.D(nets.G(batch.latents))).mean()


def generator_loss(nets, batch, weights):
    return softplus(-nets.D(nets.G(batch.latents))).mean()
"""


def described(trainer, networks=None, players=None):
    return describe_step(trainer.make_step(*(toy_networks() if networks is None else networks), players))


def ramp_up(t):
    return min(0.9, (1 + t) / (10 + t))


def late_start(t):
    return 0.9 if t > 3 else 0.0


def settings(**changes):
    return described(toy_trainer(**changes))["settings"]


def written(tmp_path, monkeypatch, name="softplus", module="losses_of_mine"):
    """The updates of a file of one's own."""
    (tmp_path / f"{module}.py").write_text("from torch.nn.functional import softplus, elu\n" + LOSS.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, module, raising=False)
    __import__("linecache").clearcache()
    __import__("importlib").invalidate_caches()
    losses = __import__(module)
    return [Update("D", losses.discriminator_loss, SGD(lr=0.1)), Update("G", losses.generator_loss, SGD(lr=0.1))]


def test_a_description_survives_json():
    trainer = toy_trainer(optimizer=Clipped(Adam(), max_norm=1.0), penalty=R1(), ema_decay=lambda t: min(t, 0.9))
    before = described(trainer)
    assert json.loads(json.dumps(before)) == before == described(trainer)


@pytest.mark.parametrize("changed_only", [True, False])
def test_how_settings_are_printed_does_not_matter(changed_only):
    before = settings(optimizer=SGD(lr=0.05, momentum=0.8))
    with sklearn.config_context(print_changed_only=not changed_only):
        assert settings(optimizer=SGD(lr=0.05, momentum=0.8)) == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"optimizer": Adam(eps=1e-8)}, {"optimizer": Adam(eps=1.0000001e-8)}),
        ({"penalty": R1(gamma=1.0)}, {"penalty": R1(gamma=1.0 + 1e-12)}),
        ({"optimizer": Clipped(SGD(lr=0.1), max_norm=1.0)}, {"optimizer": Clipped(SGD(lr=0.1), max_value=1.0)}),
        ({"optimizer": SGD(nesterov=np.bool_(False))}, {"optimizer": SGD(nesterov=np.bool_(True))}),
        ({"update": "alternating"}, {"update": "simultaneous"}),
        ({"n_critic": 1}, {"n_critic": 2}),
        ({"ema_decay": ramp_up}, {"ema_decay": late_start}),
        ({"latents": torch.rand}, {"latents": torch.randn}),
        ({"carried": {"k": 0.0}}, {"carried": {"k": 0.1}}),
        ({"sampler": None}, {"sampler": lambda nets, latents, labels: nets.G(latents)}),
    ],
)
def test_all_parameters_are_compared(one, other):
    assert settings(**one) == settings(**copy.deepcopy(one))
    assert settings(**one) != settings(**other)


def test_a_scheduler_is_compared_by_what_it_does():
    def decayed(gamma):
        return lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    def schedule(gamma):
        trainer = toy_trainer(scheduler=decayed(gamma))
        return trainer.describe(trainer.make_step(*toy_networks()), 16, "")["settings"]["schedule"]

    assert schedule(0.9) == schedule(0.9) != schedule(0.8)


def test_a_loss_whose_body_changed_is_another_run(X, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def cleanser(name):
        updates = written(tmp_path, monkeypatch, name)
        given = GANTrainer(updates=updates, n_epochs=1, batch_size=8, latent_dim=3, store=folder)
        return toy_cleanser().set_params(trainer=given, metric="fid")

    influence = cleanser("softplus").fit(X).influence_
    assert np.array_equal(cleanser("softplus").fit(X, trajectory=folder).influence_, influence)
    for trajectory in (folder, None):
        with pytest.raises(TrajectoryError, match=r"other training settings \(update D, objective, source: recorded"):
            cleanser("elu").fit(X, trajectory=trajectory)


def test_what_a_function_holds_is_compared():
    def closing(scale):
        return lambda nets, batch, weights: scale * nets.D(batch.x).mean()

    def defaulting(scale):
        return lambda nets, batch, weights, scale=scale: scale * nets.D(batch.x).mean()

    def partially(scale):
        return functools.partial(pow, scale)

    for make in (closing, defaulting, partially):
        assert identity(make(1.0)) == identity(make(1.0)) != identity(make(2.0))


def test_a_function_may_refer_to_what_has_no_value_yet():
    def outer():
        def inner():
            return later

        described = identity(inner)
        later = 1
        return described, later

    assert outer()[0]["source"]


class Losses:
    """Objectives as methods of an object that holds all else besides."""

    def __init__(self, scale=1.0, seed=0):
        self.scale = scale
        self.G, self.D = toy_networks(seed)
        self.optimizer = torch.optim.Adam(self.G.parameters())
        self.updates = [Update("D", self.of_d, SGD(lr=0.1)), Update("G", self.of_g, SGD(lr=0.1))]

    def of_d(self, nets, batch, weights):
        real = softplus(-nets.D(batch.x).flatten())
        return self.scale * (weights * real).mean() + softplus(nets.D(nets.G(batch.latents))).mean()

    def of_g(self, nets, batch, weights):
        return softplus(-nets.D(nets.G(batch.latents))).mean()


def test_an_object_that_holds_its_own_updates_is_described():
    losses = Losses()
    before = identity(losses.updates)
    assert before == identity(Losses().updates) != identity(Losses(scale=2.0).updates)
    assert json.loads(json.dumps(before)) == before


def test_networks_that_train_and_their_optimisers_are_not_part_of_an_objective():
    losses = Losses()
    before = identity(losses.of_d)
    losses.G(torch.ones(2, 3).double()).sum().backward()
    losses.optimizer.step()
    assert identity(losses.of_d) == before


def test_the_values_of_a_network_that_does_not_train_are():
    class Perceptual:
        def __init__(self, seed):
            self.features = toy_networks(seed)[1].eval()

    assert identity(Perceptual(0)) == identity(Perceptual(0)) != identity(Perceptual(1))


def test_what_a_dataclass_does_not_compare_does_not_matter():
    @dataclass
    class Objective:
        scale: float
        seen: list = field(default_factory=list, compare=False)

    assert identity(Objective(1.0)) == identity(Objective(1.0, [3])) != identity(Objective(2.0))


@pytest.mark.parametrize(
    ("one", "other"),
    [(b"a", b"b"), (1j, 2j), (range(3), range(4)), (torch.float32, torch.float64), (np.float64(1.0), 1.5), (True, 1.5)],
)
def test_plain_values_are_told_apart(one, other):
    assert identity(one) == identity(copy.deepcopy(one)) != identity(other)


class Sloped(nn.Module):
    """Has a parameter that it does not print."""

    def __init__(self, slope=0.2):
        super().__init__()
        self.slope = slope
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return leaky_relu(self.layer(x), self.slope)


def test_plain_attributes_of_ones_own_modules_are_compared():
    def modules(slope):
        torch.manual_seed(0)
        return described(toy_trainer(), (Sloped(slope).double(), toy_networks()[1]))["modules"]

    one, other = modules(0.2), modules(0.1)
    assert one == modules(0.2) and one["D"] == other["D"] and one["G"] != other["G"]


def test_the_source_of_ones_own_modules_is_compared(tmp_path, monkeypatch):
    body = "from torch import nn, tanh\nclass Mine(nn.Module):\n    def forward(self, x):\n        return {}\n"

    def module(text):
        (tmp_path / "modules_of_mine.py").write_text(body.format(text))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "modules_of_mine", raising=False)
        __import__("linecache").clearcache()
        __import__("importlib").invalidate_caches()
        return identity(__import__("modules_of_mine").Mine())

    assert module("tanh(x)") == module("tanh(x)") != module("x * x")


def test_the_mode_that_a_module_is_given_in_does_not_matter():
    generator, discriminator = toy_networks()
    before = described(toy_trainer(), (generator.eval(), discriminator))
    assert described(toy_trainer(), (generator.train(), discriminator)) == before


def test_a_difference_is_found_where_it_is():
    one, other = ({"a": [1, {"class": "A", "b": 2}], "c": 3} for _ in range(2))
    assert difference(one, other) is None
    other["a"][1] |= {"b": 5, "class": "B"}
    assert difference(one, other) == (("a", "1", "class"), "A", "B")
    other["a"][1]["class"] = "A"
    assert difference(one, other) == (("a", "1", "b"), 2, 5)
    del other["a"][1]["b"]
    assert difference(one, other) == (("a", "1", "b"), 2, None)
    assert difference(one, {**one, "a": [1]}) == (("a",), one["a"], [1])


def test_nothing_is_said_of_versions_where_none_are_known(recwarn):
    Trajectory({"n_steps": 1}).check_matches({"version": "1"})
    assert not recwarn.list
