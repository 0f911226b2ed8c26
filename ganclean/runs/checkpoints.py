"""Which states of a run are kept, and how many more the backward pass holds while it recomputes the others."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import comb, isqrt
from typing import Literal

from ganclean.dynamics.state import TrainingState, flatten_state

# No step is recomputed more often than this, whatever it takes of memory.
MOST_RECOMPUTATIONS = 5
# What a backward pass holds beside the recomputed states that it waits with: the state at the start of the segment, the
# state after the traced step, and the one that is being recomputed.
IN_USE = 3


@dataclass(frozen=True)
class CheckpointPlan:
    """Which states of a run are kept, and what that takes.

    The first state of the run, the first of its traced part, every so many states from there, and the last are kept.
    Between two kept states, the backward pass recomputes.

    Parameters
    ----------
    every : int
        The number of steps between two kept states of the traced part.
    n_steps, start : int
        The length of the run, and the first traced step.
    state_bytes : int
        The size of one state.
    on_disk : bool
        Whether states are kept in a folder, or else in memory.
    memory_budget : int
        How many bytes there should be for the kept states, and for what the backward pass holds: in memory for both
        together, with a folder for each.
    """

    every: int
    n_steps: int
    start: int
    state_bytes: int
    on_disk: bool
    memory_budget: int

    @property
    def n_kept(self) -> int:
        """The number of kept states."""
        return (self.start > 0) + -(-(self.n_steps - self.start) // self.every) + 1

    @property
    def n_held(self) -> int:
        """The number of states that the backward pass holds, beyond those that a memory store keeps."""
        if self.every == 1:
            return 2 if self.on_disk else 0
        # The state at the start of a segment is one of those that a memory store keeps.
        return self.slots + IN_USE - (not self.on_disk)

    @property
    def slots(self) -> int:
        """The number of recomputed states that the backward pass waits with."""
        in_memory = 0 if self.on_disk else self.n_kept - 1
        return slots_for(self.every, self.memory_budget // max(self.state_bytes, 1) - in_memory)

    @property
    def recomputations(self) -> int:
        """How often a step of the traced part is recomputed at most."""
        return next(r for r in range(self.every) if comb(self.slots + r, r) >= self.every)

    @property
    def bytes_kept(self) -> int:
        """What the kept states take, in memory or on disk."""
        return self.n_kept * self.state_bytes

    @property
    def bytes_held(self) -> int:
        """What the backward pass takes of memory, beyond what is kept there."""
        return self.n_held * self.state_bytes

    @property
    def bytes_needed(self) -> int:
        """The smallest budget that would have room for this plan."""
        return max(self.bytes_kept, self.bytes_held) if self.on_disk else self.bytes_kept + self.bytes_held

    @property
    def fits(self) -> bool:
        """Whether the budget has room for it."""
        return self.bytes_needed <= self.memory_budget

    def keeps(self, index: int) -> bool:
        """Return whether the state before step `index` is kept for good."""
        traced = index >= self.start and (index - self.start) % self.every == 0
        return traced or index in (0, self.n_steps)

    def passes(self, index: int) -> bool:
        """Return whether the state is kept until the next one is, so that an interrupted training can go on."""
        return self.on_disk and index < self.start and index % max(self.every, isqrt(self.n_steps)) == 0


def plan_checkpoints(
    every: int | Literal["auto"], *, n_steps: int, start: int, state_bytes: int, memory_budget: int, on_disk: bool
) -> CheckpointPlan:
    """Return which states to keep.

    "auto" keeps every state where the budget has room for all of them. Otherwise it makes each step be recomputed as
    rarely as the budget allows, and among equals keeps the most states. Where the budget allows nothing, it is what
    needs least. Parameters as in `CheckpointPlan`.

    Examples
    --------
    >>> run = {"n_steps": 1000, "start": 0, "state_bytes": 10, "on_disk": False}
    >>> plan = plan_checkpoints("auto", memory_budget=2000, **run)
    >>> plan.every, plan.n_kept, plan.n_held, plan.recomputations
    (6, 168, 7, 1)
    >>> plan_checkpoints("auto", memory_budget=100_000, **run).every
    1
    """

    def plan(n: int) -> CheckpointPlan:
        return CheckpointPlan(n, n_steps, start, state_bytes, on_disk, memory_budget)

    if every != "auto":
        return plan(every)
    traced = n_steps - start
    root = isqrt(traced)
    # Among those that keep equally many states, only the one with the shortest segments matters.
    lengths = {*range(1, root + 1), *(-(-traced // pieces) for pieces in range(1, root + 2))}
    plans = [plan(n) for n in sorted(lengths)]
    fitting = [p for p in plans if p.fits]
    if fitting:
        return min(fitting, key=lambda p: (p.recomputations, p.every))
    return min(plans, key=lambda p: (p.bytes_needed, p.every))


def slots_for(length: int, room: int) -> int:
    """Return how many recomputed states to wait with between two kept ones `length` steps apart.

    Parameters
    ----------
    length : int
    room : int
        The number of states that there is memory for, those in use included; what `MOST_RECOMPUTATIONS` needs is taken
        in any case.
    """
    fewest = bisect_left(range(length), length, key=lambda slots: comb(slots + MOST_RECOMPUTATIONS, slots))
    return min(length - 1, max(room - IN_USE, fewest))


def stride(distance: int, slots: int) -> int:
    """Return how far ahead to keep the next recomputed state, on the way to one that is `distance` steps away.

    With s slots, the states of C(s + r, r) − 1 steps can be visited backwards such that no step is recomputed more than
    r times (Griewank and Walther, Algorithm 799, 2000): from the new state on with one slot fewer, and then up to it
    with all slots again and one recomputation fewer.
    """
    if slots >= distance:
        return 1
    r = next(r for r in range(1, distance + 1) if comb(slots + r, r) > distance)
    return max(distance + 1 - comb(slots - 1 + r, r), comb(slots + r - 2, slots))


def size_of(state: TrainingState) -> int:
    """Return how many bytes a state takes."""
    return sum(tensor.nbytes for tensor in flatten_state(state).values())
