"""How far a backward pass has come, kept in the folder of its trajectory so that an interrupted one can go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ganclean._version import __version__
from ganclean.backends.base import InfluenceBackend
from ganclean.dynamics.state import TrainingState, empty_parts, flatten_state, unflatten_state
from ganclean.runs.tensorfile import content_hash
from ganclean.runs.trajectory import Trajectory


class Reached(NamedTuple):
    """All that a backward pass needs to go on.

    Parameters
    ----------
    end : int
        The steps before this one are yet to be traced.
    cotangents : dict of str to TrainingState
        Of each metric, in the state after them.
    influences : dict of str to ndarray of shape (n_samples,), float64
        What the traced steps have added up to.
    notes : dict
        What else was found out on the way: numbers by name, in dicts perhaps.
    """

    end: int
    cotangents: dict[str, TrainingState]
    influences: dict[str, np.ndarray]
    notes: Mapping[str, Any]

    @classmethod
    def beginning(cls, trajectory: Trajectory, gradients: Mapping[str, TrainingState]) -> Reached:
        """Return where a backward pass begins."""
        influences = {name: np.zeros(len(trajectory.source)) for name in gradients}
        return cls(len(trajectory), dict(gradients), influences, {})

    @classmethod
    def load(cls, trajectory: Trajectory, key: str) -> Reached | None:
        """Return what was saved under a key, or None."""
        saved = trajectory.store.load_progress(key)
        if saved is None:
            return None
        tensors, metadata = saved
        cotangents, influences = {}, {}
        for number, name in enumerate(metadata["metrics"]):
            prefix = f"{number}/cotangent/"
            influences[name] = tensors[f"{number}/influence"].cpu().numpy()
            cotangents[name] = unflatten_state(
                {path.removeprefix(prefix): tensor for path, tensor in tensors.items() if path.startswith(prefix)},
                metadata["empty"],
            )
        return cls(metadata["end"], cotangents, influences, metadata["notes"])

    def save(self, trajectory: Trajectory, key: str) -> None:
        """Save it under a key."""
        tensors = {}
        for number, (name, cotangent) in enumerate(self.cotangents.items()):
            tensors[f"{number}/influence"] = torch.from_numpy(self.influences[name])
            for path, tensor in flatten_state(cotangent).items():
                tensors[f"{number}/cotangent/{path}"] = tensor
        empty = empty_parts(next(iter(self.cotangents.values())))
        metadata = {"end": self.end, "metrics": list(self.cotangents), "notes": self.notes, "empty": empty}
        trajectory.store.save_progress(key, tensors, metadata)


def progress_key(backend: InfluenceBackend, start: int, gradients: Mapping[str, TrainingState]) -> str:
    """Return what tells a backward pass from others over the same trajectory."""
    parameters = sorted(backend.get_params().items())
    content = {name: content_hash(flatten_state(gradient)) for name, gradient in gradients.items()}
    return content_hash(repr((__version__, type(backend).__qualname__, parameters, start, content)))
