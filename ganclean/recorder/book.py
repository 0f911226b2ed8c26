"""Writes a user's loop down while it runs: what each step drew, the states between steps, and the proof."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from ganclean.data import DataSource, batch_hash
from ganclean.dynamics.network import copied
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import Tensors, TrainingState
from ganclean.dynamics.step import Step
from ganclean.exceptions import ReplayMismatchError, TrajectoryError
from ganclean.recorder.declared import Declared
from ganclean.recorder.epochs import EpochLength
from ganclean.recorder.loop import Loop, Marks
from ganclean.recorder.samples import SamplesAt, inputs_as_recorded, is_standard_normal, spread
from ganclean.recorder.watch import Watch
from ganclean.recorder.watched import Watched
from ganclean.runs.checkpoints import size_of
from ganclean.runs.identity import describe_step
from ganclean.runs.proof import Seen, check_step
from ganclean.runs.store import FolderStore, MemoryStore
from ganclean.runs.trajectory import Trajectory

# A step that leads to a checkpoint is replayed, but no more than one in so many.
CHECKED_EVERY = 50


class Book:
    """The record of a loop that is under way.

    Parameters
    ----------
    loop : Loop
    door : Watched or Declared
        Says what the updates are.
    store : MemoryStore or FolderStore
    latents, sampler, latent_shape
        How metrics sample the generator, as of `Step`; None and () where that is to be found out.
    data, store_x, checkpoint_every, memory_budget, steps_per_epoch, n_checked, random_state
        As of `Recorder`.

    Attributes
    ----------
    n_steps : int
    step : Step or None
        Made when the first step begins.
    numbers : dict of str to int
        How often each optimiser has stepped, by update.
    """

    def __init__(
        self,
        loop: Loop,
        door: Watched | Declared,
        store: MemoryStore | FolderStore,
        *,
        latents: Callable | None,
        sampler: Callable | None,
        latent_shape: tuple[int, ...],
        data: Any,
        store_x: bool,
        checkpoint_every: int | str,
        memory_budget: int,
        steps_per_epoch: int | None,
        n_checked: int,
        random_state: Any,
    ):
        self._loop, self._door, self._store = loop, door, store
        self._latents, self._sampler, self._latent_shape = latents, sampler, latent_shape
        self._data = None if data is None else DataSource(data)
        self._store_x = store_x
        self._every = checkpoint_every
        self._budget = memory_budget
        self._spacing = 1 if checkpoint_every == "auto" else int(checkpoint_every)
        self._epoch = EpochLength(steps_per_epoch)
        self._n_checked = n_checked
        self._random = check_random_state(random_state)
        self.step: Step | None = None
        self.n_steps = 0
        self.numbers: dict[str, int] = {}
        self._described: dict[str, Any] = {}
        self._begun, self._begun_at = False, 0
        self._hashes: dict[str, str] = {}
        self._label_hashes: dict[str, str] = {}
        self._left: dict[str, Tensors] = {}
        self._marks: Marks | None = None
        self._takes_labels = True

    def begin(self, x: Tensor, index, y: Tensor | None) -> tuple[StepRecord, TrainingState | None]:
        """Return the beginnings of a step's record, and the state where the step will be replayed."""
        if len(index) != len(x):
            raise ValueError(f"index names {len(index)} rows, but x holds {len(x)} instances; expected as many.")
        rows = torch.as_tensor(np.asarray(index), dtype=torch.int64).reshape(-1).cpu()
        if self.step is None:
            self._build()
        marks = self._loop.marks()
        if self._marks is not None:
            self._loop.check_untouched(self._marks, marks, self.n_steps)
        self._compare_data(x, rows)
        first = not self.n_steps and not self._begun
        before = self._loop.state() if first or self.is_checked(self.n_steps) else None
        if first:
            assert before is not None
            if isinstance(self._store, FolderStore) and self._store.holds_run():
                raise TrajectoryError(
                    f"The folder {self._store} holds a recorded run already, and it is not overwritten. Choose another "
                    "one; or call recorder.resume() to go on with it, recorder.load() to use it."
                )
            self._store.start(self._description(), before)
            self._begun = True
        self._marks = marks
        record = StepRecord(
            self.n_steps,
            rows,
            self._draw_seed(),
            x=x.detach().clone().to(self._loop.like) if self._store_x else None,
            shifts=self._loop.shifts(self._left),
        )
        return record, before

    def end(self, record: StepRecord, before: TrainingState | None, x: Tensor, watch: Watch) -> None:
        step = self.complete(record.labels is not None, watch.inputs)
        keeps = (record.index + 1) % self._spacing == 0
        self._left = self._loop.buffers() if watch.buffers is None else watch.buffers
        after = self._loop.state(self._left) if keeps or before is not None else None
        if before is not None and after is not None:
            # The state already holds what was done to the buffers before the step.
            real = x.detach().to(step.like)
            drawn = step.drawn(replace(record, shifts={}), DataSource(real))
            seen = Seen([one.gradients for one in watch.steps], watch.leftover, watch.random, watch.notes())
            check_step(step, before, after, drawn, real, seen)
        assert self._marks is not None
        moved = {pair for done in record.updates for pair in step.names[done.name]}
        marks = self._loop.marks()
        self._loop.check_resting(self._marks, marks, moved, record.index)
        self._marks = marks
        self._store.add(record)
        self.n_steps += 1
        self._note(record)
        if record.index - self._begun_at < self._n_checked and not self._store_x:
            self._hashes[str(record.index)] = batch_hash(x)
        if record.index - self._begun_at < self._n_checked and record.labels is not None:
            self._label_hashes[str(record.index)] = batch_hash(record.labels)
        if keeps and after is not None:
            self._store.checkpoint(self.n_steps, after)
            self._thin(after)

    def complete(self, conditional: bool, inputs: tuple[Tensor, ...]) -> Step:
        """Return the step, which learns from the first one whether there are labels, and what a latent is."""
        assert self.step is not None
        if self.n_steps and conditional != self.step.conditional:
            raise TrajectoryError(
                f"Step {self.n_steps} has {'' if conditional else 'no '}labels, but the steps before had "
                f"{'none' if conditional else 'some'}; expected the same in all steps."
            )
        learns = bool(inputs) and not self._latent_shape
        if learns:
            self._latent_shape = tuple(inputs[0].shape[1:])
            if self._latents is None and self._sampler is None and not is_standard_normal(inputs[0]):
                warnings.warn(
                    "The generator's first input does not look standard normal, but metrics will sample it on standard "
                    "normal latents. Pass how the loop draws them, Recorder(latents=lambda n: ...), or how samples are "
                    "made, Recorder(sampler=lambda nets, latents, labels: ...).",
                    stacklevel=5,
                )
            self._takes_labels = len(inputs) > 1
        if learns or conditional != self.step.conditional:
            self._fill_in(conditional)
            self._store.finish(self._description())
        return self.step

    def is_checked(self, index: int) -> bool:
        """Return whether a step is replayed: the first ones, and now and then one that leads to a checkpoint."""
        spacing = max(self._spacing, CHECKED_EVERY)
        return index - self._begun_at < self._n_checked or (index + 1) % (spacing - spacing % self._spacing) == 0

    def finish(self) -> Trajectory:
        """End the record and return the trajectory, for ``GANInfluence.fit(X, trajectory=...)``."""
        if self.step is None or not self.n_steps:
            raise TrajectoryError("Nothing was recorded: put each update of the loop inside recorder.step(x, index).")
        if self.n_steps not in self._store.kept():
            if self._marks is not None:
                self._loop.check_untouched(self._marks, self._loop.marks(), self.n_steps)
            self._store.checkpoint(self.n_steps, self._loop.state(self._left))
        description = self._description() | {
            "n_steps": self.n_steps,
            "steps_per_epoch": self._epoch.steps or self.n_steps,
        }
        self._store.finish(description)
        return Trajectory(description, self._store, self._budget).bind(self._sampling(self.step), None)

    def load(self) -> Trajectory:
        """Return a trajectory that was recorded into the folder before, with the same networks and optimisers."""
        if not isinstance(self._store, FolderStore):
            raise TrajectoryError("There is nothing to load: give the Recorder the folder, store=...")
        self._build()
        trajectory = Trajectory(self._store.description(), self._store)
        trajectory.check_matches(self._described)
        trajectory.check_complete()
        self.n_steps = len(trajectory)
        self._completed_as(self._store.description())
        assert self.step is not None
        return trajectory.bind(self._sampling(self.step), None)

    def resume(self) -> int:
        """Go on with an interrupted recording: put networks, average and optimisers back to its last checkpoint.

        Returns
        -------
        int
            The number of recorded steps, from which the loop has to continue; 0 where the folder holds none.
        """
        if not isinstance(self._store, FolderStore) or not self._store.holds_run():
            return 0
        self._build()
        description = self._store.description()
        Trajectory(description, self._store).check_matches(self._described)
        self._store.device = self._loop.like.device
        self.n_steps = self._begun_at = self._store.resume()
        self._begun = True
        self._completed_as(description)
        for t in range(self.n_steps):
            record = self._store.record(t)
            self._draw_seed()
            self._note(record)
        self._loop.restore(self._store.state(self.n_steps), self.numbers)
        return self.n_steps

    def _build(self) -> None:
        """Copy the networks as they are and read the optimisers' rules."""
        self._loop.read_rules()
        self.step = Step(
            {player: copied(module) for player, module in self._loop.modules.items()},
            self._door.updates(self._loop.rules, False),
            {player: average for player, (_, average) in self._loop.averages.items()},
            self._loop.carried,
            self._sampler,
            self._latents,
            self._latent_shape,
            trained=self._loop.trained,
        )
        self._described = describe_step(self.step)

    def _fill_in(self, conditional: bool) -> None:
        """Make the step one with or without labels."""
        assert self.step is not None
        sampler = self._sampler
        if sampler is None and conditional and isinstance(self._door, Declared) and not self._takes_labels:
            sampler = SamplesAt((), labelled=False)
        self.step = replace(
            self.step,
            updates=self._door.updates(self._loop.rules, conditional),
            conditional=conditional,
            latent_shape=self._latent_shape,
            sampler=sampler,
        )

    def _completed_as(self, description: Mapping[str, Any]) -> None:
        """Complete the step as the steps of an earlier recording have."""
        self._hashes, self._label_hashes = dict(description["batches"]), dict(description["labels"])
        self._latent_shape, self._takes_labels = tuple(description["latent_shape"]), description["takes_labels"]
        self._fill_in(description["conditional"])

    def _description(self) -> dict[str, Any]:
        """Return what identifies the run, and what it is known to be."""
        assert self.step is not None
        unknown: dict[str, Any] = {"n_steps": None, "steps_per_epoch": None, "data": None}
        unknown |= {"batches": self._hashes, "labels": self._label_hashes}
        learnt = {
            "conditional": self.step.conditional,
            "latent_shape": list(self._latent_shape),
            "takes_labels": self._takes_labels,
        }
        return {**unknown, **learnt, **self._described}

    def _sampling(self, step: Step) -> Step:
        """Return the step with what metrics sample the generator on."""
        if isinstance(self._door, Declared) or self._latents is not None or self._sampler is not None:
            return step
        size = max(len(self._store.record(0).indices), 1)
        records = [self._store.record(t) for t in spread(self.n_steps, size)]
        inputs = inputs_as_recorded(records, step.conditional)
        return replace(step, **inputs._asdict())

    def _compare_data(self, x: Tensor, rows: Tensor) -> None:
        if self._data is None or self._store_x:
            return
        expected = self._data[rows].to(x)
        if x.shape != expected.shape or not torch.equal(x, expected):
            raise ReplayMismatchError(
                f"The instances of step {self.n_steps} are not the rows of data that index names: the loop augments "
                "or scales them, or data are others. Influence is that of rows which are the same whenever they are "
                "drawn. Augment inside the discriminator, or keep each step's instances as they were: "
                "Recorder(store_x=True)."
            )

    def _thin(self, state: TrainingState) -> None:
        """Keep every second state only, once all do not fit in the budget any more."""
        room = max(self._budget // max(size_of(state), 1), 4)
        while self._every == "auto" and len(self._store.kept()) > room:
            self._spacing *= 2
            for index in [i for i in self._store.kept() if i % self._spacing]:
                # The last one is where an interrupted recording goes on; it goes with the next thinning.
                if index != self.n_steps:
                    self._store.discard(index)

    def _note(self, record: StepRecord) -> None:
        """Take in how often optimisers have stepped, and find out how long an epoch is."""
        assert self.step is not None
        for done in record.updates:
            self.numbers[self.step.update_named(done.name).slot] = done.number
        self._epoch.note(record.indices)

    def _draw_seed(self) -> int:
        return int(self._random.randint(2**31))
