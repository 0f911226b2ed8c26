"""Loops of every shape, recorded with their objectives declared: the loop stays, or the recorder does the updates."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ganclean import Average, GANInfluence, Recorder
from ganclean.backends import ITD
from ganclean.metrics import SampleMean
from ganclean.runs.replay import Replay
from ganclean.validation import counterfactual_retrain
from tests.reference.eager_training import TORCH_OPTIMIZERS
from tests.reference.eager_updates import EagerPlayers, follow
from tests.shapes import BATCH, LATENT, SHAPES
from tests.test_loops_declared import features

# Objectives of the library draw for themselves, which a loop of one's own cannot follow.
OWN = [name for name in SHAPES if name != "gradient penalty"]


class Loop:
    """A training loop as a user has it: modules, optimisers of torch, an average, and what is carried."""

    def __init__(self, shape):
        torch.manual_seed(0)
        self.shape, self.modules = shape, shape.players()
        X, y = shape.data()
        self.X, self.y = torch.from_numpy(X), None if y is None else torch.from_numpy(y)
        self.optimizers = {u.name: self.optimizer(u) for u in shape.updates if not isinstance(u.optimizer, str)}
        carried = dict(shape.settings.get("carried", {}))
        for update in shape.updates:
            carried |= getattr(update.objective, "carries", {})
        self.carried = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in carried.items()}
        self.averages = {}
        if "ema_decay" in shape.settings:
            decay = shape.settings["ema_decay"]
            average = decay if isinstance(decay, Average) else Average(decay)
            self.averages["G"] = (copy.deepcopy(self.modules["G"]), average)
        self.latent_dim = shape.settings.get("latent_dim", LATENT)

    def parameters(self, update):
        for part in update.trains:
            player, _, path = part.partition(".")
            for name, p in self.modules[player].named_parameters():
                if not path or f"{name}.".startswith(f"{path}."):
                    yield f"{player}.{name}", p

    def optimizer(self, update):
        rule = update.optimizer
        held = {n: p for u in self.shape.updates if u.slot == update.name for n, p in self.parameters(u)}
        if hasattr(rule, "rules"):
            groups = [{"params": list(part.values()), **own.get_params()} for own, part in rule._parts(held)]
            return TORCH_OPTIMIZERS[type(next(iter(rule.rules.values())))](groups)
        return TORCH_OPTIMIZERS[type(rule)](held.values(), **rule.get_params())

    def recorder(self, **settings):
        sampler = self.shape.settings.get("sampler")
        if sampler is None:
            sampler = next((u.objective.sampler for u in self.shape.updates if hasattr(u.objective, "sampler")), None)
        return Recorder(
            players=self.modules,
            optimizers=self.optimizers,
            updates=self.shape.updates,
            averages=self.averages,
            carried=self.carried,
            latent_dim=self.latent_dim,
            sampler=sampler,
            random_state=0,
            **settings,
        )

    def losses(self, update, index):
        """Yield the loss of each slice of a batch."""
        n = len(index)
        for i in range(update.micro):
            rows = index[n * i // update.micro : n * (i + 1) // update.micro]
            y = None if self.y is None else self.y[rows]
            batch = Batch(self, x=self.X[rows], y=y, index=rows, number=self.t, carried=self.carried)
            ones = torch.ones(len(rows), dtype=torch.float64)
            yield update.objective(EagerPlayers(**self.modules), batch, ones) * len(rows) / n

    def step(self, index):
        due = [update for update in self.shape.updates if update.is_due(self.t)]
        together = any(update.meets == "before" for update in due)
        gradients = [self.differentiate(update, index) for update in due] if together else []
        for k, update in enumerate(due):
            found = gradients[k] if together else self.differentiate(update, index)
            optimizer = self.optimizers[update.slot]
            optimizer.zero_grad()
            for (_, p), gradient in zip(self.parameters(update), found):
                p.grad = gradient
            optimizer.step()
            if update.after is not None:
                with torch.no_grad():
                    for p in self.modules["D"].parameters():
                        p.clamp_(-0.3, 0.3)
        for player, (average, decay) in self.averages.items():
            values = {name: value.clone() for name, value in average.state_dict().items()}
            follow(values, self.modules[player], decay, self.t)
            average.load_state_dict(values)

    def differentiate(self, update, index):
        params = [p for _, p in self.parameters(update)]
        total = [torch.zeros_like(p) for p in params]
        for loss in self.losses(update, index):
            for sum_, gradient in zip(total, torch.autograd.grad(loss, params, allow_unused=True)):
                sum_ += 0 if gradient is None else gradient
            for name, value in self.carried.items():
                self.carried[name] = torch.as_tensor(value, dtype=torch.float64).detach()
        return total

    def train(self, recorder, runs, n_epochs=3):
        batches = [index for _ in range(n_epochs) for index in torch.randperm(len(self.X)).split(BATCH)]
        for t, index in enumerate(batches):
            self.t = t
            x, y = self.X[index], None if self.y is None else self.y[index]
            if runs:
                recorder.run(x, index, y=y)
            else:
                with recorder.step(x, index, y=y):
                    self.step(index)
        return recorder.finish()


class Batch(SimpleNamespace):
    """A batch whose latents are drawn when they are first asked for."""

    def __init__(self, loop, **values):
        super().__init__(**values)
        self._loop = loop

    @property
    def latents(self):
        if "_latents" not in vars(self):
            self._latents = torch.randn(len(self.x), self._loop.latent_dim, dtype=torch.float64)
        return self._latents


@pytest.mark.parametrize("runs", [False, True], ids=["step", "run"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_declared_loop_is_recorded_and_replayed(name, runs):
    if not runs and name not in OWN:
        pytest.skip("the library's objectives draw for themselves")
    loop = Loop(SHAPES[name])
    trajectory = loop.train(loop.recorder(), runs)
    metric = {"mean": SampleMean(features, n_samples=40)}
    backend = ITD(derivative="exact")
    cleanser = GANInfluence(metric=metric, backend=backend, random_state=0)
    cleanser.fit(loop.X.numpy(), None if loop.y is None else loop.y.numpy(), trajectory=trajectory)
    for player, module in loop.modules.items():
        for own, tensor in cleanser.trajectory_.state(len(trajectory)).params[player].items():
            torch.testing.assert_close(tensor, module.get_parameter(own).detach())
    assert counterfactual_retrain(cleanser, [[]])[0] == pytest.approx(cleanser.metric_value_, rel=1e-6)
    assert np.isfinite(cleanser.influence_).all() and cleanser.influence_.any()
    # One instance, weighted a little more and a little less in a replay.
    row = int(np.abs(cleanser.influence_).argmax())
    replay, evaluator = Replay.of(cleanser.trajectory_), cleanser.evaluator(40)
    weights = torch.ones(2, len(loop.X), dtype=torch.float64)
    weights[:, row] += torch.tensor([1e-4, -1e-4])
    up, down = replay.map(lambda state, _: evaluator.value(cleanser.metric_, state), weights, vectorize=False)
    assert cleanser.influence_[row] == pytest.approx(-(up - down) / 2e-4, rel=1e-4)
