"""What happened at each step of a training run, in memory or in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ganclean.data import DataSource
from ganclean.exceptions import TrajectoryError
from ganclean.training.state import TrainingState, flatten_state, unflatten_state
from ganclean.training.record import StepRecord
from ganclean.training.step import TrainingStep

FORMAT = 1
DESCRIBED = {"n_steps", "steps_per_epoch", "data", "parameters", "modules", "settings"}


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

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> X = np.random.default_rng(0).normal(size=(32, 2))
    >>> cleaner = GANInfluence(trainer=GANTrainer(n_epochs=2, batch_size=16), random_state=0).fit(X)
    >>> trajectory = cleaner.trajectory_
    >>> len(trajectory), trajectory.steps_per_epoch, len(trajectory[0].indices)
    (4, 2, 16)
    >>> sorted(trajectory.state(4).generator)[:2]
    ['0.bias', '0.weight']
    """

    def __init__(self, description: dict[str, Any], store: MemoryStore | FolderStore | None = None):
        self.description = description
        self.store = MemoryStore() if store is None else store
        self._step: TrainingStep | None = None
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
        trajectory = cls(store.read_manifest(), store)
        trajectory.check_complete()
        return trajectory

    def __len__(self) -> int:
        return self.description["n_steps"]

    def __getitem__(self, index: int) -> StepRecord:
        """Return what step `index` drew."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"step {index} of a trajectory of {len(self)} steps")
        record = self.store.record(index % len(self))
        return record if self._step is None else self._step.drawn(record, self.source)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in one pass over the data."""
        return self.description["steps_per_epoch"]

    def bind(self, step: TrainingStep, source: DataSource) -> Trajectory:
        """Attach the step and the data that states are recomputed with, and return self."""
        self._step, self._source = step, source
        self.store.device = next(step.generator.parameters()).device
        return self

    @property
    def step(self) -> TrainingStep:
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
        assert self._source is not None
        return self._source

    def start_of_last(self, epochs: int | None) -> int:
        """Return the first step of the last `epochs` epochs; of the whole run for None."""
        if epochs is None:
            return 0
        n_epochs = -(-len(self) // self.steps_per_epoch)
        if not isinstance(epochs, Integral) or not 0 < epochs <= n_epochs:
            raise ValueError(
                f"last_epochs must be None (the whole run) or from 1 to the {n_epochs} trained epochs; got {epochs!r}."
            )
        return max(0, len(self) - int(epochs) * self.steps_per_epoch)

    def state(self, index: int) -> TrainingState:
        """Return the state before step `index`; ``len(trajectory)`` is the end."""
        if not 0 <= index <= len(self):
            raise IndexError(f"state {index} of a trajectory of {len(self)} steps")
        kept = self._kept_before(index)
        state = self.store.state(kept)
        for t in range(kept, index):
            state = self.replay(state, t)
        return state

    def replay(self, state: TrainingState, index: int) -> TrainingState:
        """Return the state after step `index`, recomputed from the state before it."""
        record = self[index]
        return self.step(state, record, self.source[record.indices])

    def backwards(self, start: int) -> Iterator[tuple[StepRecord, TrainingState, TrainingState]]:
        """Yield (what a step drew, state before, state after) from the last step back to step `start`.

        States that were not kept are recomputed segment by segment, so that at most one segment is in memory.
        """
        end = len(self)
        after = self.state(end)
        while end > start:
            begin = self._kept_before(end - 1)
            states = [self.store.state(begin)]
            for t in range(begin, end - 1):
                states.append(self.replay(states[-1], t))
            for t in range(end - 1, max(begin, start) - 1, -1):
                before = states.pop()
                yield self[t], before, after
                after = before
            end = max(begin, start)

    def check_complete(self) -> None:
        """Raise `TrajectoryError` where a crash truncated the record."""
        done = self.store.n_steps()
        if done < len(self):
            raise TrajectoryError(
                f"The trajectory in {self.store} is truncated: {done} of {len(self)} steps are there, probably since "
                "training was interrupted. Train again into a new folder."
            )

    def check_matches(self, description: dict[str, Any]) -> None:
        """Raise `TrajectoryError` where the record is of another model, other data or other training settings."""
        reasons = {
            "parameters": "another model: the names or shapes of its parameters differ",
            "modules": "another model: its modules differ",
            "data": "other data: the content of X differs from what was trained on",
            "settings": "other training settings",
        }
        for key, reason in reasons.items():
            recorded, expected = self.description[key], description[key]
            if recorded != expected:
                difference = ""
                if isinstance(recorded, dict):
                    names = sorted(k for k in {*recorded, *expected} if recorded.get(k) != expected.get(k))
                    difference = f" ({names[0]}: recorded {recorded.get(names[0])}, given {expected.get(names[0])})"
                raise TrajectoryError(
                    f"The trajectory is of {reason}{difference}. Pass the networks, trainer and data that it was "
                    "recorded with, or train anew."
                )

    def _kept_before(self, index: int) -> int:
        for kept in range(index, -1, -1):
            if self.store.has_state(kept):
                return kept
        raise TrajectoryError(
            f"The trajectory in {self.store} is damaged: its first state is missing. Train again into a new folder."
        )


class MemoryStore:
    """Keeps steps and states as the tensors they are."""

    def __init__(self) -> None:
        self.device: torch.device | str = "cpu"
        self._records: list[StepRecord] = []
        self._states: dict[int, TrainingState] = {}

    def __repr__(self) -> str:
        return "memory"

    def start(self, description: dict[str, Any], state: TrainingState) -> None:
        self._states[0] = state

    def append(self, record: StepRecord, state: TrainingState | None) -> None:
        self._records.append(record)
        if state is not None:
            self._states[record.index + 1] = state

    def n_steps(self) -> int:
        return len(self._records)

    def record(self, index: int) -> StepRecord:
        return self._records[index]

    def has_state(self, index: int) -> bool:
        return index in self._states

    def state(self, index: int) -> TrainingState:
        return self._states[index]


class FolderStore:
    """Keeps steps and states in safetensors files, each written atomically.

    ``manifest.json`` says what the run was, ``state-00000042.safetensors`` is the state before step 42 and
    ``step-00000042.safetensors`` what that step drew. A step's file is written after the state that it led to, so that
    a step whose file is there is complete.
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device | str = "cpu"):
        self.folder = Path(folder)
        self.device = device

    def __repr__(self) -> str:
        return str(self.folder)

    def start(self, description: dict[str, Any], state: TrainingState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "manifest.json").exists():
            raise TrajectoryError(
                f"The folder {self.folder} holds a recorded trajectory already, and it is not overwritten. Choose "
                "another folder, delete this one, or reuse it: GANInfluence.fit(X, trajectory=folder)."
            )
        self._save(self._path("state", 0), flatten_state(state))
        manifest = self.folder / "manifest.json"
        unfinished = manifest.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"format": FORMAT, **description}, indent=1))
        os.replace(unfinished, manifest)

    def append(self, record: StepRecord, state: TrainingState | None) -> None:
        if state is not None:
            self._save(self._path("state", record.index + 1), flatten_state(state))
        tensors = {"indices": record.indices, "latents_d": record.latents_d, "seed": torch.tensor(record.seed)}
        if record.latents_g is not record.latents_d:
            tensors["latents_g"] = record.latents_g
        self._save(self._path("step", record.index), tensors)

    def read_manifest(self) -> dict[str, Any]:
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
            raise TrajectoryError(f"The trajectory in {self.folder} has a format that this version does not read.")
        return description

    def n_steps(self) -> int:
        done = 0
        while self._path("step", done).exists():
            done += 1
        return done

    def record(self, index: int) -> StepRecord:
        tensors = self._load(self._path("step", index))
        latents = tensors["latents_d"]
        return StepRecord(index, tensors["indices"], latents, tensors.get("latents_g", latents), int(tensors["seed"]))

    def has_state(self, index: int) -> bool:
        return self._path("state", index).exists()

    def state(self, index: int) -> TrainingState:
        return unflatten_state(self._load(self._path("state", index)))

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:08d}.safetensors"

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        unfinished = path.with_suffix(".unfinished")
        # Clones, since parameters can be views of one vector, which the format does not allow. It does not keep the
        # order either, which vectors of all parameters depend on.
        clones = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(clones, unfinished, metadata={"order": json.dumps(list(clones))})
        os.replace(unfinished, path)

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                return {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise TrajectoryError(
                f"The trajectory in {self.folder} is damaged: {path.name} cannot be read ({error}). Train again into a "
                "new folder."
            ) from error
