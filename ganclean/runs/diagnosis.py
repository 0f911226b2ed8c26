"""Why a user's loop does not do what was declared: what the difference looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ganclean.dynamics.randomness import continued, random_states
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import Tensors, TrainingState, ravel
from ganclean.dynamics.step import Step, spoken
from ganclean.losses import LOSSES, R1, AdversarialLoss, Minimax, NonSaturating
from ganclean.optim import Clipped, Optimizer

# What is left of a gradient where a guess explains it, relative to the gradient.
EXPLAINED = 1e-3
# Factors that a loss scaler begins with.
SCALED = 2.0**8
Pair = tuple[str, str]


class Seen(NamedTuple):
    """What a recorder has seen of a step, beside its record.

    Parameters
    ----------
    gradients : list of dict of (str, str) to Tensor
        What each optimiser was given; empty where that is not known.
    leftover : dict of (str, str) to Tensor
        The gradients that were there when the step began.
    random : dict of str to Tensor
        Where torch's random generators were when the last optimiser stepped.
    notes : tuple of str
        What else seemed strange.
    """

    gradients: list[dict[Pair, Tensor]]
    leftover: dict[Pair, Tensor]
    random: dict[str, Tensor]
    notes: tuple[str, ...] = ()


class Diagnosis:
    """Replays a step of a user's loop, and says in words what a deviation looks like.

    Parameters
    ----------
    step, before, recorded, record, x, seen
        As of `check_step`.
    """

    def __init__(
        self,
        step: Step,
        before: TrainingState,
        recorded: TrainingState,
        record: StepRecord,
        x: Tensor,
        seen: Seen,
    ):
        self.step, self.before, self.recorded, self.record, self.x, self.seen = step, before, recorded, record, x, seen

    @cached_property
    def _replayed(self) -> tuple[list[TrainingState], list[Mapping[str, Tensor]]]:
        return self.step.states(self.before, self.record, self.x)

    @property
    def states(self) -> list[TrainingState]:
        """The replayed states around all updates."""
        return self._replayed[0]

    def gradients(self) -> Iterator[tuple[Tensors, Tensors]]:
        """Yield what each optimiser was given, and what the replay gives it, by names such as ``G.0.weight``."""
        for k, given in enumerate(self.seen.gradients):
            found = self._clipped(k, self._gradient(k))
            yield {name: _named(given).get(name, torch.zeros_like(g)) for name, g in found.items()}, found

    def __call__(self, path: str, update: int | None) -> str:
        """Return what to make of a deviation.

        Parameters
        ----------
        path : str
            The tensor that deviates.
        update : int or None
            The update whose gradient deviates, where it is a gradient.
        """
        if update is not None:
            words = self._of_gradient(update)
        elif path.startswith("averages/"):
            words = self._of_average(path.split("/")[1])
        elif path.startswith("params/"):
            words = self._of_params(path.split("/")[1])
        elif path.startswith("buffers/"):
            words = (
                "Running statistics and spectral norms change with each call in training mode: the networks were "
                "called in another order or number than the declared updates call them."
            )
        elif path.startswith("carried/"):
            words = (
                "The loop keeps the carried value elsewhere, or updates it in another way: pass a dict that it keeps "
                "up to date, or a function that returns one, Recorder(carried=...)."
            )
        else:
            words = "The gradients are as declared, the optimiser's moments are not: something changes them elsewhere."
        return " ".join([words, *self.seen.notes])

    def _gradient(self, k: int, step: Step | None = None, weights: Tensor | None = None) -> Tensors:
        states, randoms = self._replayed
        done = self.record.updates[k]
        weights = self.x.new_ones(len(self.x)) if weights is None else weights
        point = self.step.point(k, states, done, weights)
        found, _ = (step or self.step).gradient(k, self.record, self.x, point, random=randoms[k] or None)
        return _named(found)

    def _clipped(self, k: int, gradient: Tensors) -> Tensors:
        """Return a gradient as the optimiser gets it."""
        return _clipped(self.step.rule_of(self.record.updates[k]), gradient)

    def _told(self, k: int) -> str:
        done = self.record.updates[k]
        passes = f" and judges {', '.join(done.passes)}" if done.passes else ""
        return f"It is update {k + 1} of the step's {len(self.record.updates)}, which trains {done.name!r}{passes}."

    def _of_gradient(self, k: int) -> str:
        given, expected = _named(self.seen.gradients[k]), self._clipped(k, self._gradient(k))
        names = [name for name in expected if name in given]
        loop, replay = (torch.cat([t[n].double().reshape(-1) for n in names]) for t in (given, expected))
        guesses = (self._factor, self._leftover, self._decay, self._other_loss, self._terms, self._order, self._random)
        for guess in guesses:
            words = guess(k, loop, replay, names)
            if words:
                return f"{self._told(k)} {words}"
        share = float((loop - replay).norm() / loop.norm().clamp(min=1e-300))
        if share < 3e-2 and loop.dtype != torch.float64:
            words = (
                f"The gradients differ by {share:.2g} of their size, as lower precision would make it (TF32, bfloat16, "
                "autocast inside a network), or a small term of the loss that was not declared."
            )
        else:
            words = (
                f"The gradients differ by {share:.2g} of their size, by no factor and in no direction that is known: "
                "a term of the loss was not declared (another loss, a penalty, noise on labels, a regulariser), or "
                "numbers are drawn that the record does not hold. Declare what the loop minimises: "
                "Recorder(players={...}, optimizers={...}, updates=[...])."
            )
        return f"{self._told(k)} {words}"

    def _factor(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        factor = float(loop @ replay / (replay @ replay).clamp(min=1e-300))
        if not _explains(loop, factor * replay) or not factor:
            return ""
        name = self.record.updates[k].name
        norm = float(loop.norm())
        rounded = float(f"{norm:.2g}")
        if factor < 1 and abs(norm - rounded) < 1e-5 * norm:
            return f"Its norm is {rounded:g}, as after clipping: pass clip_norm={rounded:g}."
        if factor >= SCALED and abs(math.log2(factor) - round(math.log2(factor))) < 1e-6:
            return (
                f"It is {factor:g} times the declared one, as a GradScaler makes it for mixed precision: train in "
                "float32, or unscale the gradients before the optimiser steps."
            )
        by_size = {len(self.x): "a sum in place of a mean", 1 / len(self.x): "a mean that was divided once more"}
        why = next((f" ({words})" for n, words in by_size.items() if abs(factor / n - 1) < 1e-6), "")
        what = f"scale={{{name!r}: {factor:.6g}}}" if name != "D" else f"scale={factor:.6g}"
        if not hasattr(self.step.update_named(name).objective, "scale"):
            what = "multiply its objective by it"
            return f"The loop's gradient is {factor:.6g} times the declared one{why}: {what}."
        return (
            f"The loop's gradient is {factor:.6g} times the declared one{why}: pass {what}. Where the factor differs "
            "from step to step, gradients are clipped: clip_norm=."
        )

    def _leftover(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        left = _named(self.seen.leftover)
        if not all(name in left for name in names):
            return ""
        before = torch.cat([left[n].double().reshape(-1) for n in names])
        if not float(before.norm()) or not _explains(loop, replay + before):
            return ""
        return (
            "The gradient that was there before the step has been added to it: the loop accumulates over several "
            "steps, or calls zero_grad after the block. Call it before backward(); slices of one batch are declared, "
            "Update(..., micro=n)."
        )

    def _decay(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        params = self.states[k].params
        theta = torch.cat([params[n.partition(".")[0]][n.partition(".")[2]].double().reshape(-1) for n in names])
        factor = float((loop - replay) @ theta / (theta @ theta).clamp(min=1e-300))
        if not _explains(loop, replay + factor * theta):
            return ""
        return (
            f"The difference is {factor:.4g} times the parameters: the loss holds a penalty on their squares. Give it "
            f"to the optimiser, weight_decay={factor:.4g}, or declare it in an objective."
        )

    def _terms(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        """Explain the gradient by the terms of a discriminator's loss, each with a factor of its own."""
        done = self.record.updates[k]
        objective: Any = self.step.update_named(done.name).objective
        if not hasattr(objective, "penalty") or not getattr(objective, "weighted", False):
            return ""

        def of(part: Any, weights: Tensor | None = None) -> Tensor:
            return _flat(self._gradient(k, self._with(done.name, part), weights), names)

        fake = of(objective, self.x.new_zeros(len(self.x)))
        own = replay - fake
        candidates = {"the real instances' terms": own, "the generated samples' terms": fake}
        found = _fit(loop, candidates)
        if found and min(found.values()) > 0:
            return (
                f"{_spelt(found)} Noise on labels and weighted terms look like that: write the loss as an objective, "
                "updates=[...]."
            )
        swapped = of(replace(objective, loss=_Swapped(objective.loss), penalty=None))
        found = _fit(loop, candidates | {"real instances labelled as generated": swapped})
        if found and min(found.values()) > 0 and max(found.values()) < 1.5:
            return f"{_spelt(found)} Smoothed labels look like that: write the loss as an objective, updates=[...]."
        if objective.penalty is None and "real" in done.passes:
            try:
                slope = of(replace(objective, penalty=R1(gamma=1.0))) - replay
            except RuntimeError:
                return ""
            found = _fit(loop, candidates | {"R1(gamma=1)": slope})
            if found and min(found.values()) > 0:
                return f"{_spelt(found)} The loop adds a penalty: pass penalty=R1(gamma={found['R1(gamma=1)']:.4g})."
        return ""

    def _other_loss(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        name = self.record.updates[k].name
        objective: Any = self.step.update_named(name).objective
        if not hasattr(objective, "loss"):
            return ""
        kinds = [(repr(key), kind()) for key, kind in LOSSES.items()]
        kinds += [
            (f"{kind.__name__}(outputs='probabilities')", kind("probabilities")) for kind in (NonSaturating, Minimax)
        ]
        for words, loss in kinds:
            try:
                other = _flat(self._gradient(k, self._with(name, replace(objective, loss=loss))), names)
            except RuntimeError:
                # Logarithms of what is no probability.
                continue
            factor = float(loop @ other / (other @ other).clamp(min=1e-300))
            if factor and _explains(loop, factor * other):
                scaled = "" if abs(factor - 1) < EXPLAINED else f", times {factor:.4g}"
                return f"It is the gradient of another loss{scaled}: pass loss={words}."
        return ""

    def _order(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        """Explain the gradient by other versions of the networks."""
        done = self.record.updates[k]
        for version in range(k):
            trained = {player for player, _ in self.step.names[done.name]}
            meets = {player: version for player in self.step.players if player not in trained}
            record = replace(
                self.record,
                updates=(*self.record.updates[:k], replace(done, meets=meets), *self.record.updates[k + 1 :]),
            )
            other = Diagnosis(self.step, self.before, self.recorded, record, self.x, self.seen)
            other.__dict__["_replayed"] = self._replayed
            if _explains(loop, _flat(other._gradient(k), names)):
                return (
                    "It is the gradient with the other networks as they were "
                    f"{'before the step' if not version else 'then'}: declare the order, Update(..., meets='before'), "
                    "or compute the loss after the earlier update."
                )
        return ""

    def _random(self, k: int, loop: Tensor, replay: Tensor, names: list[str]) -> str:
        if not self.record.random or not self.seen.random:
            return ""
        randoms = self._replayed[1]
        last = len(self.record.updates) - 1
        point = self.step.point(last, self.states, self.record.updates[last], self.x.new_ones(len(self.x)))
        with continued(randoms[last]):
            self.step.gradient(last, self.record, self.x, point)
            end = random_states(self.x.device)
        if all(torch.equal(end[device], state) for device, state in self.seen.random.items()):
            return ""
        return (
            "When the last optimiser stepped, torch's random generator was not where the objectives leave it: the "
            "loop draws other random numbers, in another order, or before the block. Draw all of them inside the "
            "block, in the order of the objectives; or let recorder.run(x, index) do the updates."
        )

    def _with(self, name: str, objective: Any) -> Step:
        """Return the step with another objective of one update."""
        updates = tuple(replace(u, objective=objective) if u.name == name else u for u in self.step.updates)
        return replace(self.step, updates=updates)

    def _of_average(self, player: str) -> str:
        old, new = self.before.averages[player], self.recorded.params[player]
        own = {name: tensor for name, tensor in self.recorded.averages[player].items() if name in new}
        there = _flat(own, list(own)) - _flat(new, list(own))
        apart = _flat(old, list(own)) - _flat(new, list(own))
        decay = float(there @ apart / (apart @ apart).clamp(min=1e-300))
        declared = self.step.averages[player].decay_at(self.record.index)
        if _explains(there, decay * apart):
            return f"The loop's average has a decay of {decay:.6g} in this step; declared is {declared:.6g}."
        return (
            "The loop's average is no mixture of the old one and the new parameters: it is updated outside of the "
            "block, more than once in it, or in another way (every so many steps, with buffers: "
            "ema_decay=Average(...))."
        )

    def _of_params(self, player: str) -> str:
        there, here = self.recorded.params[player], self.states[-1].params[player]
        bound = max((float(p.abs().max()) for p in there.values() if p.numel()), default=0.0)
        inside = all(torch.allclose(p, here[name].clamp(-bound, bound)) for name, p in there.items())
        words = "The gradients are as declared, but something moves the parameters beside the optimiser's rule"
        if bound and inside:
            return (
                f"{words}: the loop clips the {spoken(player)}'s weights to ±{bound:.6g} after the step. Declare it: "
                f"after=lambda params: {{n: p.clamp(-{bound:.6g}, {bound:.6g}) for n, p in params.items()}}."
            )
        return f"{words}: a projection, which after=... declares, a further optimiser, or a change of weights by hand."


class _Swapped(AdversarialLoss):
    """Takes real instances for generated ones, and leaves generated ones out."""

    def __init__(self, loss):
        self.loss = loss

    def real(self, output):
        return self.loss.fake(output)

    def fake(self, output):
        return 0 * output


def _clipped(rule: Optimizer, gradient: Tensors) -> Tensors:
    while not isinstance(rule, Clipped):
        inner = getattr(rule, "optimizer", None)
        if not isinstance(inner, Optimizer):
            return gradient
        rule = inner
    if rule.max_value is not None:
        gradient = {name: g.clamp(-rule.max_value, rule.max_value) for name, g in gradient.items()}
    if rule.max_norm is not None:
        factor = (rule.max_norm / (torch.linalg.vector_norm(ravel(gradient)) + 1e-6)).clamp(max=1.0)
        gradient = {name: g * factor for name, g in gradient.items()}
    return gradient


def _explains(found: Tensor, guess: Tensor) -> bool:
    return float((found - guess).norm()) <= EXPLAINED * float(found.norm())


def _fit(loop: Tensor, candidates: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the factors with which candidates add up to a gradient; empty where they do not."""
    matrix = torch.stack(list(candidates.values()), dim=1)
    factors = torch.linalg.lstsq(matrix, loop[:, None]).solution[:, 0]
    return dict(zip(candidates, factors.tolist())) if _explains(loop, matrix @ factors) else {}


def _spelt(factors: Mapping[str, float]) -> str:
    return f"It consists of {', '.join(f'{factor:.4g} times {what}' for what, factor in factors.items())}."


def _named(gradient: Mapping[Pair, Tensor]) -> Tensors:
    return {f"{player}.{name}": g for (player, name), g in gradient.items()}


def _flat(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in names])
