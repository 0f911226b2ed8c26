"""Influence by brute force: replay the run with one example's weight a little higher and a little lower."""

import numpy as np
import torch


def weighted_value(cleaner, metric, weights, start=0):
    """The metric after replaying a run from step `start` with example weights, shape (n_samples,)."""
    trajectory = cleaner.trajectory_
    state = trajectory.state(start)
    for t in range(start, len(trajectory)):
        record = trajectory[t]
        state = trajectory.step(state, record, trajectory.source[record.indices], weights[record.indices])
    return cleaner._evaluator(metric.sample_size).value(metric, state)


def finite_difference_influence(cleaner, metric, rows, start=0, width=1e-4):
    """Minus the central difference of the metric in each row's weight: weight 0 removes an instance."""
    influence = []
    for row in rows:
        values = []
        for sign in (1, -1):
            weights = torch.ones(len(cleaner.influence_), dtype=torch.float64)
            weights[row] += sign * width
            values.append(weighted_value(cleaner, metric, weights, start))
        influence.append((values[1] - values[0]) / (2 * width))
    return np.array(influence)
