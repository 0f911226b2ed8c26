"""The recorded run once more, with other example weights (theory, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.func import vmap

from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.dispatch import is_dispatch_bound
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState, map_state
from ganclean.runs.checkpoints import size_of
from ganclean.runs.proof import check_segment
from ganclean.runs.trajectory import Trajectory

Result = TypeVar("Result")

MEMORY_BUDGET = 2**30


@dataclass(frozen=True)
class Replay:
    """A recorded run from one of its steps on, to be run again with other weights of the examples.

    Parameters
    ----------
    step : AnyStep
    source : DataSource
    record_of : callable
        Returns what a step drew, by its number, as it was stored.
    steps : range
        The steps to run.
    first : TrainingState
        The state before the first of them.
    """

    step: AnyStep
    source: DataSource
    record_of: Callable[[int], StepRecord]
    steps: range
    first: TrainingState

    @classmethod
    def of(cls, trajectory: Trajectory, start: int = 0) -> Replay:
        """Return the replay of a trajectory from step `start` on."""
        if not isinstance(start, Integral) or not 0 <= start <= len(trajectory):
            raise ValueError(f"The first step must be from 0 to {len(trajectory)}; got {start!r}.")
        steps = range(int(start), len(trajectory))
        return cls(trajectory.step, trajectory.source, trajectory.store.record, steps, trajectory.state(steps.start))

    def portable(self) -> Replay:
        """Return a copy that holds no more than it needs: what is sent to another process."""
        records = {t: self.record_of(t) for t in self.steps}
        return replace(self, record_of=partial(_record_in, records))

    def record(self, t: int) -> StepRecord:
        """Return what step `t` drew, complete."""
        return self.step.drawn(self.record_of(t), self.source)

    def instances(self, record: StepRecord) -> Tensor:
        """Return the instances that a step drew."""
        return self.source[record.indices] if record.x is None else record.x

    def map(
        self,
        function: Callable[[TrainingState, int], Result],
        weights: Tensor,
        *,
        renormalize: bool = False,
        vectorize: bool | str = "auto",
        chunk_size: int | str = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> list[Result]:
        """Return a function of the final state of a run for each row of weights.

        Runs are alike until the first step that draws an instance whose weight is not 1: up to there, all are one.

        Parameters
        ----------
        function : callable
            Called with the state and the number of its row as soon as a run is finished, so that states need not be
            kept.
        weights : Tensor of shape (n_runs, n_samples)
            1 for an instance that stays, 0 for one that is removed.
        renormalize, vectorize, chunk_size, memory_budget
            As of `ganclean.validation.counterfactual_retrain`.
        """
        if vectorize not in (True, False, "auto"):
            raise ValueError(f"vectorize must be True, False or 'auto'; got {vectorize!r}.")
        results: list[Any] = [None] * len(weights)
        departures = self._departures(weights)
        order = departures.argsort(stable=True)
        automatic = vectorize == "auto"
        if automatic:
            # A compiled step is one call, and several runs one after another are faster than a stack of plain steps.
            several = len(weights) > 1 and len(self.steps) > 0 and self.step.plain is self.step
            vectorize = several and self._is_dispatch_bound()
        size = self._chunk_size(chunk_size, memory_budget) if vectorize else 1
        state, t = self.first, self.steps.start
        while len(order):
            # The part that all remaining runs have in common.
            begin = int(departures[order[0]])
            state, t = self._advance(state, t, begin), begin
            chunk = order[:size]
            if vectorize:
                try:
                    states = self._together(state, departures[chunk], weights[chunk], renormalize)
                except RuntimeError:
                    # Not every module that trains can be transformed by torch.func.
                    if not automatic:
                        raise
                    vectorize, size = False, 1
                    continue
            else:
                states = iter([self._alone(state, t, weights[chunk[0]], renormalize)])
            for run, final in zip(chunk.tolist(), states):
                results[run] = function(final, run)
            order = order[size:]
        return results

    def _departures(self, weights: Tensor) -> Tensor:
        """Return the first step of each run that is not as recorded; the end where none is."""
        departures = torch.full((len(weights),), self.steps.stop)
        changed = weights != 1
        for t in reversed(self.steps):
            departures[changed[:, self.record_of(t).indices].any(1)] = t
        return departures

    def _advance(self, state: TrainingState, begin: int, end: int) -> TrainingState:
        for t in range(begin, end):
            record = self.record(t)
            state = self.step(state, record, self.instances(record))
        return state

    def _alone(self, state: TrainingState, begin: int, weights: Tensor, renormalize: bool) -> TrainingState:
        for t in range(begin, self.steps.stop):
            record = self.record(t)
            x = self.instances(record)
            state = self.step(state, record, x, _scaled(weights[record.indices].to(self.step.like), renormalize))
        return state

    def _together(
        self, state: TrainingState, departures: Tensor, weights: Tensor, renormalize: bool
    ) -> Iterator[TrainingState]:
        """Run from the first of the departures, given in ascending order, the runs that have departed stacked."""
        states: TrainingState | None = None
        n_running = 0
        for t in range(int(departures[0]), self.steps.stop):
            states, n_running = _joined(states, state, n_running, int((departures <= t).sum()))
            record = self.record(t)
            x = self.instances(record)

            def advance(state: TrainingState, own: Tensor, record=record, x=x) -> TrainingState:
                return self.step(state, record, x, _scaled(own, renormalize), functional=True)

            own = weights[:n_running, record.indices].to(self.step.like)
            states = vmap(advance, randomness="same")(states, own)
            if n_running < len(departures):
                state = self._advance(state, t, t + 1)
        finals, _ = _joined(states, state, n_running, len(departures))
        return (map_state(lambda tensor, i=i: tensor[i], finals) for i in range(len(departures)))

    def _is_dispatch_bound(self) -> bool:
        record = self.record(self.steps.start)
        return is_dispatch_bound(self.step.plain, self.first, record, self.instances(record))

    def _chunk_size(self, chunk_size: int | str, memory_budget: int) -> int:
        if chunk_size != "auto":
            if not isinstance(chunk_size, Integral) or isinstance(chunk_size, bool) or chunk_size < 1:
                raise ValueError(f"chunk_size must be a positive integer or 'auto'; got {chunk_size!r}.")
            return int(chunk_size)
        if not len(self.steps):
            return 1
        saved = _SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            record = self.record(self.steps.start)
            self.step.plain(self.first, record, self.instances(record))
        # A run holds its state before and after the step, the gradients, and what the backward pass needs.
        return max(1, memory_budget // (4 * size_of(self.first) + saved.n_bytes))


def _record_in(records: dict[int, StepRecord], t: int) -> StepRecord:
    return records[t]


class _SavedBytes:
    """Adds up what autograd saves for the backward pass."""

    n_bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.n_bytes += tensor.nbytes
        return tensor


def _joined(
    states: TrainingState | None, state: TrainingState, n_running: int, n_wanted: int
) -> tuple[TrainingState, int]:
    """Return a stack of states with copies of another one appended to it, and how many it holds."""
    if states is not None and n_running == n_wanted:
        return states, n_running
    copies = map_state(lambda tensor: tensor.expand(n_wanted - n_running, *tensor.shape), state)
    return copies if states is None else map_state(lambda *both: torch.cat(both), states, copies), n_wanted


def _scaled(weights: Tensor, renormalize: bool) -> Tensor:
    """Return the weights; renormalised, such that a mean over the batch is one over what remains of it."""
    return weights * (len(weights) / weights.sum().clamp(min=1)) if renormalize else weights


def weights_without(removals: Sequence[ArrayLike], n_samples: int) -> Tensor:
    """Return the example weights of runs without each set of instances, shape (n_runs, n_samples).

    Raises
    ------
    ValueError
        If a removal holds what is no row of the data.
    """
    weights = torch.ones(len(removals), n_samples, dtype=torch.float64)
    for row, removal in zip(weights, removals):
        rows = np.asarray(removal)
        if not rows.size:
            continue
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n_samples:
            raise ValueError(f"A removal must be a sequence of rows from 0 to {n_samples - 1}; got {removal!r}.")
        row[torch.from_numpy(rows.astype(np.int64))] = 0
    return weights


def retrained_states(
    trajectory: Trajectory, removals: Sequence[ArrayLike], last_epochs: int | None = None, **settings
) -> list[TrainingState]:
    """Return the final states after replaying the last epochs without each set of instances."""
    replay = Replay.of(trajectory, trajectory.start_of_last(last_epochs))
    return replay.map(lambda state, _: state, weights_without(removals, len(trajectory.source)), **settings)


def proven_end(trajectory: Trajectory, start: int) -> TrainingState:
    """Return the final state of a replay from step `start` on without any removal, which must be the recorded one.

    Raises
    ------
    ReplayMismatchError
        If it ended elsewhere; the message names the player.
    """
    replay = Replay.of(trajectory, start)
    (end,) = replay.map(lambda state, _: state, torch.ones(1, len(trajectory.source)))
    check_segment(replay.first, trajectory.state(len(trajectory)), end, len(trajectory))
    return end
