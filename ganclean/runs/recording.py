"""Writes a run down while it happens, and goes on with one that was interrupted."""

from __future__ import annotations

from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState
from ganclean.runs.checkpoints import CheckpointPlan
from ganclean.runs.store import FolderStore
from ganclean.runs.trajectory import Trajectory


class Recording:
    """The record of a run that is under way.

    As a context manager it sees to it that a run in a folder loses nothing by a KeyboardInterrupt: what was reached
    becomes a checkpoint. A run that is killed loses what was done since the last one.

    Parameters
    ----------
    trajectory : Trajectory
        Where to write. If its folder holds the beginning of the same run already, the recording goes on from there.
    initial : TrainingState
        The state before the first step.
    plan : CheckpointPlan

    Attributes
    ----------
    index : int
        The number of steps that are there.
    state : TrainingState
        The state after them.

    Raises
    ------
    TrajectoryError
        If the folder holds another run, or a damaged one.
    """

    def __init__(self, trajectory: Trajectory, initial: TrainingState, plan: CheckpointPlan):
        self.trajectory, self.store, self.plan = trajectory, trajectory.store, plan
        index = 0
        if isinstance(self.store, FolderStore) and self.store.holds_run():
            Trajectory(self.store.description(), self.store).check_matches(trajectory.description, same_run=True)
            index = self.store.resume()
        else:
            self.store.start(trajectory.description, initial)
        # One attribute, so that an interrupt finds both of the same step.
        self._reached = index, trajectory.state(index)
        self._checkpoint = index

    @property
    def index(self) -> int:
        return self._reached[0]

    @property
    def state(self) -> TrainingState:
        return self._reached[1]

    def add(self, record: StepRecord, state: TrainingState) -> None:
        """Note what a step drew and the state that it led to."""
        self.store.add(record)
        self._reached = record.index + 1, state
        if self.plan.keeps(self.index) or self.plan.passes(self.index):
            self._keep()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.index > self._checkpoint:
            self._keep()

    def _keep(self) -> None:
        index, state = self._reached
        self.store.checkpoint(index, state)
        last, self._checkpoint = self._checkpoint, index
        if not self.plan.keeps(last):
            self.store.discard(last)
