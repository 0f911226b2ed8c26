"""What happened at each step of a training run, and the way back through it."""

from __future__ import annotations

import copy
import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from numbers import Integral
from typing import Any

from torch import Tensor

from ganclean.data import DataSource, batch_hash
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState
from ganclean.exceptions import TrajectoryError
from ganclean.runs.checkpoints import IN_USE, size_of, slots_for, stride
from ganclean.runs.identity import difference
from ganclean.runs.proof import check_replay, check_segment
from ganclean.runs.store import FolderStore, MemoryStore

MEMORY_BUDGET = 2**30


class Trajectory:
    """A recorded training run: what each step drew, and the states between the steps.

    Some or all states are kept; any other is recomputed from the nearest kept one before it, bit for bit on the same
    machine, since a step is a pure function of the state and of what it drew.

    Parameters
    ----------
    description : dict
        What the run was: ``n_steps``, ``steps_per_epoch``, the shapes of the parameters, the training settings and
        the fingerprint of the data.
    store : MemoryStore or FolderStore, optional
        Where steps and states are kept; default in memory.
    memory_budget : int, default=2**30
        How many bytes the states may take that `backwards` holds, and those that a store in memory keeps.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> X = np.random.default_rng(0).normal(size=(32, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2, batch_size=16), random_state=0).fit(X)
    >>> trajectory = cleanser.trajectory_
    >>> len(trajectory), trajectory.steps_per_epoch, len(trajectory[0].indices)
    (4, 2, 16)
    >>> sorted(trajectory.state(4).generator)[:2]
    ['0.bias', '0.weight']
    """

    def __init__(
        self,
        description: dict[str, Any],
        store: MemoryStore | FolderStore | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ):
        self.description = description
        self.store = MemoryStore() if store is None else store
        self.memory_budget = memory_budget
        self._step: AnyStep | None = None
        self._source: DataSource | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Trajectory:
        """Open a trajectory that was recorded into a folder.

        Raises
        ------
        TrajectoryError
            If the folder holds none, or one that was truncated by a crash.
        """
        store = FolderStore(folder)
        trajectory = cls(store.description(), store)
        trajectory.check_complete()
        return trajectory

    @classmethod
    def without_run(cls, step: AnyStep, source: DataSource, batch_size: int) -> Trajectory:
        """Return a trajectory of no steps, whose only state is the networks as they are: a trained model alone."""
        description = {"n_steps": 0, "steps_per_epoch": -(-len(source) // batch_size), "batch_size": batch_size}
        trajectory = cls(description)
        trajectory.store.start(description, step.initial_state())
        return trajectory.bind(step, source)

    def __len__(self) -> int:
        if self.description["n_steps"] is None:
            raise TrajectoryError(
                f"The recording in {self.store} was not finished. Go on with recorder.resume(), or call "
                "recorder.finish() when the loop ends."
            )
        return self.description["n_steps"]

    def __getitem__(self, index: int) -> StepRecord:
        """Return what step `index` drew; once networks and data are attached, with what its seed determines."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"step {index} of a trajectory of {len(self)} steps")
        record = self.store.record(index % len(self))
        return record if self._step is None or self._source is None else self._step.drawn(record, self._source)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in one pass over the data."""
        return self.description["steps_per_epoch"]

    @property
    def batch_size(self) -> int:
        """The number of instances in a full batch."""
        return self.description["batch_size"] if "batch_size" in self.description else len(self[0].indices)

    def bind(self, step: AnyStep, source: DataSource | None) -> Trajectory:
        """Return a view of the same record with the step and the data that states are recomputed with."""
        view = copy.copy(self)
        view._step, view._source = step, source
        view.store = self.store.on(step.like.device)
        return view

    @property
    def step(self) -> AnyStep:
        """The training step that was run."""
        if self._step is None:
            raise TrajectoryError(
                "This trajectory was opened from a folder and knows neither networks nor data yet. Pass it to "
                "GANInfluence.fit(X, trajectory=...), which attaches them."
            )
        return self._step

    @property
    def source(self) -> DataSource:
        """The data that the run was trained on."""
        self.step  # noqa: B018 - raises where nothing is attached
        if self._source is None:
            raise TrajectoryError(
                "This trajectory knows no data yet. Pass it to GANInfluence.fit(X, trajectory=...), which attaches X."
            )
        return self._source

    def start_of_last(self, epochs: int | None) -> int:
        """Return the first step of the last `epochs` epochs; of the whole run for None."""
        self.check_run()
        if epochs is None:
            return 0
        n_epochs = -(-len(self) // self.steps_per_epoch)
        if not isinstance(epochs, Integral) or not 0 < epochs <= n_epochs:
            raise ValueError(
                f"last_epochs must be None (the whole run) or from 1 to the {n_epochs} trained epochs; got {epochs!r}."
            )
        return max(0, len(self) - int(epochs) * self.steps_per_epoch)

    def is_kept(self, index: int) -> bool:
        """Return whether the state before step `index` is kept, so that it need not be recomputed."""
        return self._kept_before(index) == index

    def state(self, index: int) -> TrainingState:
        """Return the state before step `index`; ``len(trajectory)`` is the end."""
        if not 0 <= index <= len(self):
            raise IndexError(f"state {index} of a trajectory of {len(self)} steps")
        kept = self._kept_before(index)
        return self._replayed(self.store.state(kept), kept, index)

    def replay(self, state: TrainingState, index: int) -> TrainingState:
        """Return the state after step `index`, recomputed from the state before it."""
        record = self[index]
        return self.step(state, record, self.instances(record))

    def instances(self, record: StepRecord) -> Tensor:
        """Return the instances that a step drew: as they were recorded, or from the data."""
        return self.source[record.indices] if record.x is None else record.x

    def backwards(
        self, start: int, end: int | None = None, *, max_states: int | None = None
    ) -> Iterator[tuple[StepRecord, TrainingState, TrainingState]]:
        """Yield (what a step drew, state before, state after) from step `end` − 1 back to step `start`.

        States that were not kept are recomputed, segment by segment between the kept ones. Where memory does not hold a
        whole segment, some of its states are held, and the others recomputed from these when they are needed.

        Parameters
        ----------
        start : int
        end : int, optional
            Default the end of the run.
        max_states : int, optional
            How many states to hold at a time, beyond those that a store in memory keeps; at least 4, and one more for a
            caller who does not let go of the state after a step. Default what `memory_budget` has room for, though
            enough for no step to be recomputed more than five times.

        Raises
        ------
        ReplayMismatchError
            If recomputation ends in another state than the kept one; for the record of a user's own loop, whose sums
            are rounded in another way, if it ends far from it.
        """
        if max_states is not None and max_states <= IN_USE:
            raise ValueError(f"max_states must be at least {IN_USE + 1}; got {max_states!r}.")
        end = len(self) if end is None else end
        after = self.state(end)
        to_be_checked = self.is_kept(end)
        while end > start:
            begin = max(self._kept_before(end - 1), start)
            slots = self._slots(end - begin, after, max_states)
            held = [(begin, self.state(begin))]
            while held:
                t, state = held[-1]
                while t < end - 1:
                    ahead = t + stride(end - 1 - t, slots + 1 - len(held))
                    state = self._replayed(state, t, ahead)
                    t = ahead
                    held.append((t, state))
                if to_be_checked and t > begin:
                    if self.is_of_own_loop:
                        check_segment(held[0][1], after, self.replay(state, t), end)
                    else:
                        check_replay(after, self.replay(state, t), end)
                to_be_checked = False
                held.pop()
                yield self[t], state, after
                after, end = state, t
                del state
            to_be_checked = True

    def check_complete(self) -> None:
        """Raise `TrajectoryError` where a crash truncated the record."""
        done = self.store.n_steps()
        if done < len(self):
            raise TrajectoryError(
                f"The trajectory in {self.store} is truncated: {done} of {len(self)} steps are there, probably since "
                "training was interrupted. To resume it, fit with the same GANTrainer(store=...), data and "
                "random_state, without trajectory=."
            )

    def check_run(self) -> None:
        """Raise `TrajectoryError` where there is no run to be traced or replayed, but a trained model alone."""
        if not len(self):
            raise TrajectoryError(
                "This needs a recorded run to trace or replay, but the cleanser was fitted to a trained model alone "
                "(trained=True). Leave trained out, so that fit trains and records, or record your own loop with a "
                "Recorder."
            )

    @property
    def is_of_own_loop(self) -> bool:
        """Whether a Recorder recorded it from a training loop that is not `GANTrainer`'s."""
        return "batches" in self.description

    def check_batches(self, source: DataSource) -> None:
        """Raise `TrajectoryError` where the first batches of a user's own loop are not found in the data."""
        for t, expected in self.description["batches"].items():
            indices = self.store.record(int(t)).indices
            if int(indices.max()) >= len(source) or batch_hash(source[indices]) != expected:
                raise TrajectoryError(
                    f"The trajectory is of other data: the instances of step {t} are not what the loop trained on. "
                    "Pass the same data in the same order and on the same scale; a Dataset must return the same "
                    "instance for the same row (augmentation belongs into the discriminator)."
                )

    def check_matches(self, description: dict[str, Any], *, same_run: bool = False) -> None:
        """Raise `TrajectoryError` where the record is of another model, other data or other training settings.

        Where other versions of the libraries made it, warn.

        Parameters
        ----------
        description : dict
        same_run : bool, default=False
            Whether the random numbers and the initial weights must agree too, as they must to go on with a run.
        """
        reasons = {
            "parameters": "another model: the names or shapes of its parameters differ",
            "modules": "another model: its modules differ",
            "frozen": "another model: the values of parameters that are not trained differ",
            "data": "other data: the content of X differs from what was trained on",
            "settings": "other training settings",
        }
        advice = "Pass the networks, trainer and data that it was recorded with, or train anew."
        if same_run:
            reasons |= {
                "random_state": "another random_state: None draws a new one in every fit, a number repeats it",
                "initial": "other initial weights of the networks",
            }
            advice = (
                f"Choose another folder than {self.store}, or give what this one was recorded with. To trace what it "
                "holds, without training: GANInfluence.fit(X, trajectory=folder)."
            )
        for key, reason in reasons.items():
            recorded, expected = self.description.get(key), description.get(key)
            if recorded != expected:
                found = difference(recorded, expected) if isinstance(recorded, dict) else None
                where = "" if found is None else f" ({', '.join(found[0])}: recorded {found[1]}, given {found[2]})"
                raise TrajectoryError(f"The trajectory is of {reason}{where}. {advice}")
        for key, name in {"version": "ganclean", "torch": "PyTorch"}.items():
            recorded, running = self.description.get(key), description.get(key)
            if recorded is not None and running is not None and recorded != running:
                warnings.warn(
                    f"The trajectory was recorded with {name} {recorded}, and this is {running}. What is recomputed "
                    "may differ by rounding; replay finds out where it is more than that.",
                    stacklevel=3,
                )

    def _kept_before(self, index: int) -> int:
        kept = self.store.kept()
        place = bisect_right(kept, index) - 1
        if place < 0:
            raise TrajectoryError(
                f"The trajectory in {self.store} is damaged: its first state is missing. Train again into a new folder."
            )
        return kept[place]

    def _replayed(self, state: TrainingState, index: int, end: int) -> TrainingState:
        for t in range(index, end):
            state = self.replay(state, t)
        return state

    def _slots(self, length: int, state: TrainingState, max_states: int | None) -> int:
        """Return how many recomputed states to hold in a segment of so many steps."""
        if max_states is not None:
            return min(length - 1, max_states - IN_USE)
        in_memory = 0 if self.store.on_disk else len(self.store.kept()) - 1
        return slots_for(length, self.memory_budget // max(size_of(state), 1) - in_memory)
