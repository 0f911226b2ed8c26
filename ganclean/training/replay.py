"""The recorded run once more, without some instances (theory, section 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from ganclean.training.state import TrainingState, map_state
from ganclean.training.trajectory import Trajectory


def retrained_states(
    trajectory: Trajectory,
    removals: Sequence[Sequence[int]],
    last_epochs: int | None = None,
    *,
    renormalize: bool = False,
    vectorize: bool | str = "auto",
    chunk_size: int = 100,
) -> Iterator[TrainingState]:
    """Yield the final state after replaying the last epochs without each set of instances.

    Parameters
    ----------
    trajectory : Trajectory
    removals : sequence of sequences of int
        Rows to remove together.
    last_epochs : int, optional
        Replay so many epochs; default the whole run.
    renormalize, vectorize, chunk_size
        As of `ganclean.validation.counterfactual_retrain`.
    """
    automatic = vectorize == "auto"
    if automatic:
        modules = [*trajectory.step.generator.modules(), *trajectory.step.discriminator.modules()]
        vectorize = not any(isinstance(module, nn.modules.conv._ConvNd) for module in modules)
    start = trajectory.start_of_last(last_epochs)
    first = trajectory.state(start)
    for begin in range(0, len(removals), chunk_size):
        kept = torch.ones(len(removals[begin : begin + chunk_size]), len(trajectory.source), dtype=torch.bool)
        for row, removal in zip(kept, removals[begin:]):
            row[_rows(removal, len(row))] = False
        if vectorize:
            try:
                yield from _together(trajectory, first, start, kept, renormalize)
                continue
            except RuntimeError:
                # Not every module that trains can be transformed by torch.func.
                if not automatic:
                    raise
                vectorize = False
        yield from (_alone(trajectory, first, start, row, renormalize) for row in kept)


def _rows(removal: Sequence[int], n_samples: int) -> Tensor:
    rows = np.asarray(removal)
    if rows.size == 0:
        return torch.empty(0, dtype=torch.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n_samples:
        raise ValueError(f"A removal must be a sequence of rows from 0 to {n_samples - 1}; got {removal!r}.")
    return torch.from_numpy(rows.astype(np.int64))


def _together(
    trajectory: Trajectory, state: TrainingState, start: int, kept: Tensor, renormalize: bool
) -> Iterator[TrainingState]:
    states = map_state(lambda tensor: tensor.expand(len(kept), *tensor.shape), state)
    for t in range(start, len(trajectory)):
        record = trajectory[t]
        real = trajectory.source[record.indices]

        def advance(state: TrainingState, weights: Tensor, record=record, real=real) -> TrainingState:
            return trajectory.step(
                state, record, real, weights, divisor=_divisor(weights, renormalize), functional=True
            )

        states = vmap(advance, randomness="same")(states, kept[:, record.indices].to(real))
    for i in range(len(kept)):
        yield map_state(lambda tensor, i=i: tensor[i], states)


def _alone(trajectory: Trajectory, state: TrainingState, start: int, kept: Tensor, renormalize: bool) -> TrainingState:
    for t in range(start, len(trajectory)):
        record = trajectory[t]
        real = trajectory.source[record.indices]
        weights = kept[record.indices].to(real)
        state = trajectory.step(state, record, real, weights, divisor=_divisor(weights, renormalize))
    return state


def _divisor(weights: Tensor, renormalize: bool) -> Any:
    return weights.sum().clamp(min=1) if renormalize else None
