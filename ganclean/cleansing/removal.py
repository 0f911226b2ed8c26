"""What removal really does: of nothing, which proves the record, and of so many of the most harmful instances."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from ganclean.dynamics.state import TrainingState
from ganclean.metrics.base import Metric
from ganclean.metrics.evaluation import Evaluator
from ganclean.runs.replay import Replay, proven_end, weights_without
from ganclean.runs.trajectory import Trajectory

# By how much of itself a metric may differ after a replay of the run as it was.
REPLAYED = 1e-3
RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def values_after_removal(
    trajectory: Trajectory,
    harmfulness: np.ndarray,
    metric: Metric,
    evaluator: Evaluator,
    last_epochs: int | None,
) -> dict[int, float]:
    """Return the metric after really removing so many of the most harmful instances and retraining.

    Parameters
    ----------
    trajectory : Trajectory
    harmfulness : ndarray of shape (n_samples,)
    metric : Metric
        Fitted to validation data.
    evaluator : Evaluator
        With latents that the influence was not computed on.
    last_epochs : int or None
        Retrain so many epochs, those that the influence was traced through.

    Returns
    -------
    dict of int to float
        By the number of removed instances: 0 and the counts that `RATES` stand for.
    """
    n_samples = len(harmfulness)
    order = np.argsort(-harmfulness, kind="stable")
    counts = sorted({round(rate * n_samples) for rate in RATES})
    replay = Replay.of(trajectory, trajectory.start_of_last(last_epochs))

    def value(state: TrainingState, run: int) -> float:
        return evaluator.value(metric, state)

    weights = weights_without([order[:n] for n in counts], n_samples)
    return dict(zip(counts, replay.map(value, weights, renormalize=True)))


def best_count(values: dict[int, float], metric: Metric) -> int:
    """Return the number of removed instances with the best metric; among equals the smallest."""
    finite = {n: value for n, value in values.items() if np.isfinite(value)}
    return min(finite, key=lambda n: (-finite[n] if metric.greater_is_better else finite[n], n), default=0)


def check_replayed(
    trajectory: Trajectory,
    window: int | None,
    metrics: Mapping[str, Metric],
    values: Mapping[str, float],
    evaluator: Evaluator,
) -> None:
    """Replay the last epochs without any removal, and warn where a metric is not the recorded one.

    Raises
    ------
    ReplayMismatchError
        If the replay ends elsewhere.
    """
    end = proven_end(trajectory, trajectory.start_of_last(window))
    for name, metric in metrics.items():
        replayed = evaluator.value(metric, end)
        if not abs(replayed - values[name]) <= REPLAYED * abs(values[name]):
            warnings.warn(
                f"Replaying the traced epochs without any removal gives {replayed:.6g} for the metric {name!r}, not "
                f"the recorded {values[name]:.6g}: rounding grows so much on the way that smaller effects of a removal "
                "cannot be told from it. Trace fewer epochs (last_epochs), or train in float64.",
                stacklevel=3,
            )
