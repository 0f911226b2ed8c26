"""Where the steps and states of a recorded run are kept: in memory or in a folder."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ganclean.dynamics.record import StepRecord, moved, packed, unpacked
from ganclean.dynamics.state import TrainingState, empty_parts, flatten_state, unflatten_state
from ganclean.exceptions import TrajectoryError
from ganclean.runs.tensorfile import UNFINISHED, read_tensors, to_json, write_file, write_tensors

FORMAT = 3
DESCRIBED = {"run", "n_steps", "steps_per_epoch", "data", "parameters", "modules", "settings"}
SEGMENTS_IN_MEMORY = 2


class MemoryStore:
    """Keeps steps and states as the tensors they are. A run that is interrupted is lost."""

    on_disk = False

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._states: dict[int, TrainingState] = {}
        self._kept: list[int] = []

    def __repr__(self) -> str:
        return "memory"

    def on(self, device: torch.device | str) -> MemoryStore:
        """Return the store itself: its tensors are where they were made."""
        return self

    def holds_run(self) -> bool:
        """Return whether a run was begun here."""
        return bool(self._kept)

    def start(self, description: Mapping[str, Any], state: TrainingState) -> None:
        """Begin a run with its first state."""
        self.checkpoint(0, state)

    def finish(self, description: Mapping[str, Any]) -> None:
        """Note what the run was, where that was not known when it began."""

    def add(self, record: StepRecord) -> None:
        """Note what the next step drew."""
        self._records.append(replace(record, labels=None))

    def checkpoint(self, index: int, state: TrainingState) -> None:
        """Keep the state before step `index`, which all steps before it have led to."""
        if index not in self._states:
            insort(self._kept, index)
        self._states[index] = state

    def discard(self, index: int) -> None:
        """Forget a state."""
        self._kept.remove(index)
        del self._states[index]

    def n_steps(self) -> int:
        """Return how many steps are there."""
        return len(self._records)

    def record(self, index: int) -> StepRecord:
        """Return what a step drew, as it was given."""
        return self._records[index]

    def kept(self) -> Sequence[int]:
        """Return the numbers of the kept states, in ascending order."""
        return self._kept

    def state(self, index: int) -> TrainingState:
        """Return a kept state."""
        return self._states[index]

    def save_progress(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Do nothing: memory does not survive what progress is saved for."""

    def load_progress(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return None: there is no saved progress."""
        return None

    def discard_progress(self, key: str) -> None:
        """Do nothing."""


class FolderStore:
    """Keeps steps and states in safetensors files, each written atomically, so that a kill at any moment loses little.

    ``manifest.json`` says what the run was, ``state-00000042.safetensors`` is the state before step 42, and
    ``steps-00000036-00000042.safetensors`` is what the steps 36 to 41 drew. A checkpoint writes the steps since the
    last one before the state that they led to: where a state is, the way to it is there too. Steps since the last
    checkpoint are in memory.

    Parameters
    ----------
    folder : path
    device : torch.device or str, default="cpu"
        Where states and latents are loaded to.
    """

    on_disk = True

    def __init__(self, folder: str | os.PathLike, device: torch.device | str = "cpu"):
        self.folder = Path(folder)
        self.device = device
        self._description: dict[str, Any] | None = None
        self._run: str | None = None
        self._pending: list[StepRecord] = []
        self._cache: dict[tuple[int, int], list[StepRecord]] = {}
        self._kept: list[int] = []
        self._segments: list[tuple[int, int]] = []
        self._list_files()

    def __repr__(self) -> str:
        return str(self.folder)

    def on(self, device: torch.device | str) -> FolderStore:
        """Return a view of the same folder that loads to another device."""
        if torch.device(device) == torch.device(self.device):
            return self
        view = copy.copy(self)
        view.device = device
        return view

    def holds_run(self) -> bool:
        """Return whether there is a manifest, readable or not."""
        return (self.folder / "manifest.json").exists()

    def start(self, description: Mapping[str, Any], state: TrainingState) -> None:
        """Begin a run with its first state."""
        if self._segments or any(self._kept):
            raise TrajectoryError(
                f"The folder {self.folder} holds steps of a recorded run without its manifest.json. Choose another "
                "folder, or delete this one."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = uuid4().hex
        self.checkpoint(0, state)
        self.finish(description)

    def finish(self, description: Mapping[str, Any]) -> None:
        """Note what the run was, where that was not known when it began."""
        manifest = to_json({"format": FORMAT, "run": self._identity(), **description}, indent=1)
        write_file(self.folder / "manifest.json", lambda path: path.write_text(manifest))
        self._description = dict(description)

    def resume(self) -> int:
        """Return the number of steps that are complete, up to the last state; what a kill left beyond is removed."""
        for unfinished in self.folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        done = self.n_steps()
        if 0 not in self._kept:
            raise self._damaged("its first state is missing")
        if done == self.description()["n_steps"]:
            return done
        last = max(index for index in self._kept if index <= done)
        for path in [self._state_path(index) for index in self._kept if index > last] + [
            self._segment_path(*segment) for segment in self._segments if segment[1] > last
        ]:
            path.unlink()
        self._list_files()
        return last

    def add(self, record: StepRecord) -> None:
        """Note what the next step drew; in memory until the next checkpoint."""
        self._pending.append(replace(record, labels=None))

    def checkpoint(self, index: int, state: TrainingState) -> None:
        """Write the steps that led to the state before step `index`, and then the state."""
        records = [record for record in self._pending if record.index < index]
        if records:
            self._write_segment(records, (records[0].index, index))
            self._pending = self._pending[len(records) :]
        self._write(self._state_path(index), flatten_state(state), {"empty": empty_parts(state)})
        if index not in self._kept:
            insort(self._kept, index)

    def discard(self, index: int) -> None:
        """Delete a state."""
        self._kept.remove(index)
        self._state_path(index).unlink(missing_ok=True)

    def description(self) -> dict[str, Any]:
        """Return what the manifest says.

        Raises
        ------
        TrajectoryError
            If there is none, or one of another version.
        """
        if self._description is None:
            self._description = self._read_manifest()
            self._run = self._description.pop("run")
        return self._description

    def n_steps(self) -> int:
        """Return how many steps are there, without a gap."""
        done = 0
        for first, end in self._segments:
            if first > done:
                raise self._damaged(f"the file of step {done} is missing")
            done = max(done, end)
        return done + len(self._pending)

    def record(self, index: int) -> StepRecord:
        """Return what a step drew, as it was given."""
        if self._pending and index >= self._pending[0].index:
            return self._pending[index - self._pending[0].index]
        place = bisect_right(self._segments, index, key=lambda segment: segment[0]) - 1
        if place < 0 or index >= self._segments[place][1]:
            raise self._damaged(f"the file of step {index} is missing")
        first, end = self._segments[place]
        if (first, end) not in self._cache:
            # Reading goes forwards and backwards over the border of two segments.
            while len(self._cache) >= SEGMENTS_IN_MEMORY:
                del self._cache[next(iter(self._cache))]
            self._cache[first, end] = self._read_segment(first, end)
        return moved(self._cache[first, end][index - first], self.device)

    def kept(self) -> Sequence[int]:
        """Return the numbers of the kept states, in ascending order."""
        return self._kept

    def state(self, index: int) -> TrainingState:
        """Read a kept state."""
        path = self._state_path(index)
        try:
            tensors, metadata = self._read(path)
            return unflatten_state(tensors, metadata["empty"])
        except KeyError as error:
            raise self._damaged(f"{path.name} holds no state ({error})") from error

    def save_progress(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write how far something has come, in place of what was saved under the same key."""
        self._write(self._progress_path(key), tensors, metadata)

    def load_progress(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and metadata that were saved under a key, or None; a damaged file is ignored."""
        path = self._progress_path(key)
        if not path.exists():
            return None
        try:
            return self._read(path)
        except TrajectoryError:
            warnings.warn(f"{path} is damaged and ignored: the interrupted work begins anew.", stacklevel=3)
            return None

    def discard_progress(self, key: str) -> None:
        """Delete what was saved under a key."""
        self._progress_path(key).unlink(missing_ok=True)

    def _identity(self) -> str:
        """Return what tells the files of this run from those of another."""
        if self._run is None:
            self.description()
        assert self._run is not None
        return self._run

    def _list_files(self) -> None:
        names = sorted(path.name for path in self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        self._kept = sorted(int(m[1]) for name in names if (m := re.fullmatch(r"state-(\d+)\.safetensors", name)))
        matches = (re.fullmatch(r"steps-(\d+)-(\d+)\.safetensors", name) for name in names)
        self._segments = sorted((int(m[1]), int(m[2])) for m in matches if m)

    def _read_manifest(self) -> dict[str, Any]:
        try:
            description = json.loads((self.folder / "manifest.json").read_text())
            version = description.pop("format")
            if version == FORMAT and not description.keys() >= DESCRIBED:
                raise KeyError(*sorted(DESCRIBED - description.keys()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrajectoryError(
                f"The folder {self.folder} holds no recorded trajectory ({error}). Expected a folder that "
                "GANTrainer(store=...) wrote."
            ) from error
        if version != FORMAT:
            raise TrajectoryError(
                f"The trajectory in {self.folder} has a format that this version does not read. Train again into "
                "another folder."
            )
        return description

    def _write_segment(self, records: Sequence[StepRecord], place: tuple[int, int]) -> None:
        self._write(self._segment_path(*place), *packed(records))
        if place not in self._segments:
            insort(self._segments, place)

    def _read_segment(self, first: int, end: int) -> list[StepRecord]:
        path = self._segment_path(first, end)
        try:
            records = unpacked(*self._read(path, "cpu"))
        except (KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"{path.name} holds no steps ({error})") from error
        if [record.index for record in records] != list(range(first, end)):
            raise self._damaged(f"{path.name} does not hold the steps {first} to {end - 1}")
        return records

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        write_tensors(path, tensors, {"run": self._identity(), **metadata})

    def _read(self, path: Path, device: torch.device | str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            tensors, metadata = read_tensors(path, self.device if device is None else device)
        except ValueError as error:
            raise self._damaged(f"{path.name} cannot be read ({error})") from error
        if metadata.pop("run", None) != self._identity():
            raise self._damaged(f"{path.name} belongs to another run")
        return tensors, metadata

    def _damaged(self, what: str) -> TrajectoryError:
        return TrajectoryError(
            f"The trajectory in {self.folder} is damaged: {what}. Train again into a new folder; a state other than "
            "the first can also be deleted, it is then recomputed."
        )

    def _state_path(self, index: int) -> Path:
        return self.folder / f"state-{index:08d}.safetensors"

    def _segment_path(self, first: int, end: int) -> Path:
        return self.folder / f"steps-{first:08d}-{end:08d}.safetensors"

    def _progress_path(self, key: str) -> Path:
        return self.folder / f"progress-{key}.safetensors"
