"""Counterfactual retraining: the recorded run once more, without some instances (theory, section 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.func import vmap

from ganclean.training.state import TrainingState, map_state
from ganclean.training.trajectory import Trajectory

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence
    from ganclean.metrics import Metric


def counterfactual_retrain(
    cleaner: GANInfluence,
    removals: Sequence[Sequence[int]],
    last_epochs: int | None = None,
    *,
    metric: Metric | None = None,
    renormalize: bool = False,
    vectorize: bool | str = "auto",
    chunk_size: int = 100,
) -> np.ndarray:
    """Return the metric after really retraining without each set of instances.

    The recorded run is replayed from the start of the last epochs, with the same batches, latents and seeds.

    Parameters
    ----------
    cleaner : GANInfluence
        Fitted.
    removals : sequence of sequences of int
        Rows to remove together; an empty one replays the run as it was.
    last_epochs : int, optional
        Replay so many epochs; default the whole run.
    metric : Metric, optional
        Fitted; default the cleaner's own.
    renormalize : bool, default=False
        Whether the discriminator's mean is taken over the remaining instances of a batch; by default the sum is still
        divided by the batch size, which is what influence predicts (theory, section 1).
    vectorize : bool or "auto", default="auto"
        Whether to run the counterfactuals at once by `torch.func.vmap`, which pays where networks are so small that
        calling an operation takes longer than computing it. "auto" takes it where there is no convolution; for small
        convolutions True can be faster.
    chunk_size : int, default=100
        How many run at once.

    Returns
    -------
    ndarray of shape (n_removals,), float64

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import counterfactual_retrain
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleaner = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X)
    >>> values = counterfactual_retrain(cleaner, [[], [3], [5, 9]])
    >>> bool(np.isclose(values[0], cleaner.metric_value_)), values.shape
    (True, (3,))
    """
    check_is_fitted(cleaner)
    metric = cleaner.metric_ if metric is None else metric
    evaluator = cleaner._evaluator(metric.sample_size)
    states = retrained_states(
        cleaner.trajectory_,
        removals,
        last_epochs,
        renormalize=renormalize,
        vectorize=vectorize,
        chunk_size=chunk_size,
    )
    return np.array([evaluator.value(metric, state) for state in states])


def retrained_states(
    trajectory: Trajectory,
    removals: Sequence[Sequence[int]],
    last_epochs: int | None = None,
    *,
    renormalize: bool = False,
    vectorize: bool | str = "auto",
    chunk_size: int = 100,
) -> Iterator[TrainingState]:
    """Yield the final state after retraining without each set of instances; as `counterfactual_retrain`."""
    if vectorize == "auto":
        modules = [*trajectory.step.generator.modules(), *trajectory.step.discriminator.modules()]
        vectorize = not any(isinstance(module, nn.modules.conv._ConvNd) for module in modules)
    start = trajectory.start_of_last(last_epochs)
    first = trajectory.state(start)
    for begin in range(0, len(removals), chunk_size):
        kept = torch.ones(len(removals[begin : begin + chunk_size]), len(trajectory.source), dtype=torch.bool)
        for row, removal in zip(kept, removals[begin:]):
            row[_rows(removal, len(row))] = False
        if vectorize:
            yield from _together(trajectory, first, start, kept, renormalize)
        else:
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
            return trajectory.step(state, record, real, weights, divisor=_divisor(weights, renormalize), functional=True)

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
