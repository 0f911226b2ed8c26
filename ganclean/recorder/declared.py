"""The door for any loop whose objectives are declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ganclean.dynamics.network import assign
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.step import Step
from ganclean.dynamics.update import Update
from ganclean.exceptions import NetworkError
from ganclean.optim import Optimizer
from ganclean.recorder.loop import Loop
from ganclean.recorder.torch_optimizers import n_updates, settings_of
from ganclean.recorder.watch import PRECISION, SeenStep, Watch


class Declared:
    """Says what the updates of a loop are whose objectives are declared.

    Parameters
    ----------
    updates : sequence of Update or of (str, callable)
        As of `Recorder`.
    optimizers : dict of str to torch.optim.Optimizer
        By the names of updates.
    """

    reseeds = False

    def __init__(self, updates: Sequence[Any], optimizers: Mapping[str, torch.optim.Optimizer]):
        self._updates = [_as_update(one) for one in ([updates] if isinstance(updates, Update) else updates)]
        names = [update.name for update in self._updates]
        missing = [u.name for u in self._updates if u.name not in optimizers and not isinstance(u.optimizer, str)]
        unknown = sorted(set(optimizers) - set(map(str, names)))
        if not names or missing or unknown:
            raise ValueError(
                f"Each update needs its optimiser under its name; got the updates {names} and the optimisers "
                f"{list(optimizers)}. An update that shares another's says so: Update(..., optimizer='D')."
            )

    def check(self, loop: Loop) -> None:
        """Find out which parameters each update trains: those that its optimiser moves."""
        self._trains: dict[str, tuple[str, ...]] = {}
        for name, pairs in loop.names.items():
            of_players = {player: [own for p, own in pairs if p == player] for player, _ in pairs}
            parts: list[str] = []
            for player, own in of_players.items():
                whole = list(loop.trained[player]) == own
                parts += [player] if whole else [f"{player}.{n}" for n in own]
            self._trains[name] = tuple(parts)

    def updates(self, rules: Mapping[str, Optimizer], conditional: bool) -> tuple[Update, ...]:
        """Return the updates that steps are made of."""
        made = []
        for update in self._updates:
            slot = update.slot
            rule = update.optimizer if isinstance(update.optimizer, str) and update.name != slot else rules[slot]
            made.append(replace(update, trains=self._trains[slot], optimizer=rule))
        return tuple(made)

    def seen(self, watch: Watch, index: int, y: Tensor | None) -> tuple[tuple[UpdateRecord, ...], Tensor | None]:
        """Return which updates happened, and the labels of the instances."""
        if not watch.steps:
            raise NetworkError(
                "No optimiser of the declared updates stepped in the step; expected those of at least one. Where a "
                "GradScaler left it out: " + PRECISION.format("a step was skipped")
            )
        drawing = [str(u.name) for u in self._updates if hasattr(u.objective, "draw")]
        if drawing:
            raise NetworkError(
                f"The objectives of {', '.join(drawing)} are the library's and draw for themselves, which a loop of "
                "one's own does not follow. Call recorder.run(x, index), or declare the loss: Recorder(G, D, opt_g, "
                "opt_d, loss=...)."
            )
        done: list[UpdateRecord] = []
        for step in watch.steps:
            done.append(UpdateRecord(self._of(step, done, index), step.number, dict(step.settings)))
        records = []
        for k, one in enumerate(done):
            before = next(u for u in self._updates if u.name == one.name).meets == "before" and k > 0
            moved = {part.split(".")[0] for part in self._trains[self._slot(one.name)]}
            meets = {player: 0 for player in watch.loop.modules if player not in moved} if before else {}
            records.append(replace(one, meets=meets))
        return tuple(records), y

    def _of(self, step: SeenStep, done: list[UpdateRecord], index: int) -> str:
        """Return the name of the update that a step of an optimiser belongs to."""
        sharing = [update for update in self._updates if update.slot == step.name]
        if len(sharing) == 1:
            return step.name
        before = [one.name for one in done]
        left = [update for update in sharing if update.is_due(index) and update.name not in before]
        if not left:
            raise NetworkError(
                f"The optimiser of {step.name!r} stepped more often in step {index} than its updates "
                f"{[update.name for update in sharing]} are due. Say when they are: Update(..., due=...)."
            )
        return str(left[0].name)

    def _slot(self, name: str) -> str:
        return next(update.slot for update in self._updates if update.name == name)


def run_updates(
    step: Step,
    loop: Loop,
    before: TrainingState,
    record: StepRecord,
    x: Tensor,
    clip: tuple[float | None, float | None],
) -> None:
    """Do the updates of a step with the loop's own optimisers, from the gradients of the objectives.

    Parameters
    ----------
    step : Step
    loop : Loop
    before : TrainingState
    record : StepRecord
        Complete.
    x : Tensor of shape (batch_size, *sample_shape)
    clip : tuple of two floats or None
        The largest norm of a gradient, and the largest value of its entries.
    """
    states = [before]
    for k, done in enumerate(record.updates):
        update = step.update_named(done.name)
        point = step.point(k, states, done, x.new_ones(len(x)))
        gradient, left = step.gradient(k, record, x, point)
        optimizer = loop.optimizers[update.slot]
        optimizer.zero_grad(set_to_none=True)
        params = {pair: loop.modules[pair[0]].get_parameter(pair[1]) for pair in step.names[done.name]}
        for pair, p in params.items():
            p.grad = gradient[pair].clone()
        norm, value = clip
        if value is not None:
            nn.utils.clip_grad_value_(params.values(), value)
        if norm is not None:
            nn.utils.clip_grad_norm_(params.values(), norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if update.after is not None:
            _project(update, params)
        moved = loop.state({player: dict(tensors) for player, tensors in left.buffers.items()})
        states.append(moved._replace(averages=before.averages, carried=left.carried))
    for player, tensors in states[-1].buffers.items():
        assign(loop.modules[player], tensors)
    for player, tensors in step.averaged(before.averages, states[-1], record).items():
        assign(loop.averages[player][0], tensors)
    loop.carry(states[-1].carried)


def due_updates(step: Step, loop: Loop, index: int, counts: Mapping[str, int]) -> tuple[UpdateRecord, ...]:
    """Return the updates that are due in a step, as the optimisers stand."""
    numbers = {
        name: n_updates(optimizer) if not isinstance(optimizer, torch.optim.SGD) else counts.get(name, 0)
        for name, optimizer in loop.optimizers.items()
    }
    planned, _ = step.plan(index, numbers, lambda slot, _: settings_of(loop.optimizers[slot], loop.rules[slot]))
    if not planned:
        raise ValueError(f"No update is due in step {index}; expected at least one. See Update(..., due=...).")
    return planned


def _project(update: Update, params: Mapping[tuple[str, str], nn.Parameter]) -> None:
    prefix = f"{update.trains[0]}." if len(update.trains) == 1 else ""
    named = {f"{player}.{name}".removeprefix(prefix): p for (player, name), p in params.items()}
    with torch.no_grad():
        for name, value in update.after({name: p.detach() for name, p in named.items()}).items():  # type: ignore[misc]
            named[name].copy_(value)


def _as_update(given: Any) -> Update:
    if isinstance(given, Update):
        return given
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], str) and callable(given[1]):
        # The rule is read off the optimiser of that name.
        return Update(given[0], given[1], Optimizer(), name=given[0])
    raise ValueError(f"updates must be a list of (name, objective) or ganclean.Update; got {given!r}.")
