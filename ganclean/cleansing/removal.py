"""How many of the most harmful instances to remove: what really helps on validation data."""

from __future__ import annotations

import numpy as np

from ganclean.dynamics.state import TrainingState
from ganclean.metrics.base import Metric
from ganclean.metrics.evaluation import Evaluator
from ganclean.runs.replay import Replay, weights_without
from ganclean.runs.trajectory import Trajectory

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
