"""What an influence back-end takes and gives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.base import BaseEstimator

from ganclean.data import DataSource
from ganclean.dynamics.state import TrainingState
from ganclean.progress import Progress
from ganclean.runs.trajectory import Trajectory


class InfluenceBackend(BaseEstimator):
    """Base class of the back-ends: from a recorded run and metric gradients to influences.

    A back-end of one's own defines `fit` and `score_samples`. A package can offer it by name through the entry-point
    group ``ganclean.backends``.

    Attributes
    ----------
    influences_ : dict of str to ndarray of shape (n_samples,), float64
        For each metric, the predicted change of its value if an instance were removed.
    predicts : bool
        Whether `influences_` and `score_samples` are such changes. A back-end that ranks instances without predicting
        anything says False; its numbers are harmfulness then: high for what should be removed first.
    needs_run : bool
        Whether it reads more of the trajectory than its end. A back-end that says False works from a trained model
        alone too, ``GANInfluence.fit(X, trained=True)``.
    """

    predicts = True
    needs_run = True

    def traced_epochs(self) -> int | None:
        """How many of the run's last epochs the back-end looks at; None for all."""
        return None

    def passes(self) -> int:
        """How often the back-end goes through these epochs, at most; what `GANInfluence.estimate_cost` counts with."""
        return 1

    def fit(
        self, trajectory: Trajectory, gradients: Mapping[str, TrainingState], progress: Progress | None = None
    ) -> InfluenceBackend:
        """Compute the influence of every training instance on every metric.

        Parameters
        ----------
        trajectory : Trajectory
        gradients : dict of str to TrainingState
            The gradient of each metric in the final state.
        progress : callable, optional
            Called with (what is done, steps done, steps in all).
        """
        raise NotImplementedError

    def score_samples(self, trajectory: Trajectory, gradient: TrainingState, samples: DataSource) -> np.ndarray:
        """Return the influence that instances outside the training set would have, shape (n,), float64."""
        raise NotImplementedError
