"""How wide the secant should be: the width that best predicts a few removals that are really replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from sklearn.utils import check_random_state

from ganclean.dynamics.state import TrainingState, flatten_state
from ganclean.exceptions import NonFiniteError
from ganclean.runs.replay import retrained_states
from ganclean.runs.trajectory import Trajectory

WIDTHS = (1e-2, 3e-3, 3e-2, 1e-3)
N_GROUPS = 10
FRACTION = 0.05


def calibrate_width(
    influences_at: Callable[[float], Mapping[str, np.ndarray]],
    trajectory: Trajectory,
    gradients: Mapping[str, TrainingState],
    last_epochs: int,
    random_state=0,
) -> dict[float, float]:
    """Return how well each width of the secant predicts the removal of random groups.

    The truth is the metric's gradient times the change of the final state, which needs no evaluation of the metric: the
    width has to do with training alone.

    Parameters
    ----------
    influences_at : callable
        From a width to the influences on each metric over the last epochs.
    trajectory : Trajectory
    gradients : dict of str to TrainingState
        The gradient of each metric in the final state.
    last_epochs : int
        Replay so many epochs.
    random_state : int, RandomState instance or None, default=0
        Draws the groups.

    Returns
    -------
    dict of float to float
        For each width, the correlation of predicted and true changes, the mean over the metrics; NaN where the adjoint
        explodes.
    """
    rng, n_samples = check_random_state(random_state), len(trajectory.source)
    size = max(1, round(FRACTION * n_samples))
    groups = [rng.permutation(n_samples)[:size] for _ in range(N_GROUPS)]
    final = trajectory.state(len(trajectory))
    changed = list(retrained_states(trajectory, groups, last_epochs))
    true = {name: [_directed(gradient, state, final) for state in changed] for name, gradient in gradients.items()}

    def correlation(width: float) -> float:
        try:
            influences = influences_at(width)
        except NonFiniteError:
            return float("nan")
        predicted = {name: [influence[rows].sum() for rows in groups] for name, influence in influences.items()}
        return float(np.mean([np.corrcoef(predicted[name], true[name])[0, 1] for name in gradients]))

    return {width: correlation(width) for width in WIDTHS}


def best_width(correlations: Mapping[float, float]) -> float:
    """Return the width with the highest correlation; the first of them, the usual one, where none is a number."""
    return max(correlations, key=lambda width: np.nan_to_num(correlations[width], nan=-np.inf))


def _directed(gradient: TrainingState, state: TrainingState, final: TrainingState) -> float:
    """Return the inner product of a gradient with a change of the state."""
    there, here = flatten_state(state), flatten_state(final)
    products = (
        torch.sum(g.double() * (there[path] - here[path]).double()) for path, g in flatten_state(gradient).items()
    )
    return float(sum(products))
