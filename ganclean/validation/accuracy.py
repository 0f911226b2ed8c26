"""How well influence predicts what retraining really does (theory, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import kendalltau, pearsonr
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ganclean.validation.counterfactual import counterfactual_retrain

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence


@dataclass(frozen=True)
class EstimationAccuracy:
    """Predicted against true changes of a metric.

    Parameters
    ----------
    predicted, true : ndarray of shape (n_removals,), float64
        The change of the metric on removal, by summed influence and by retraining.
    removals : list of ndarray of int64
        The removed rows.
    kendall_tau, pearson : float
        Rank and linear correlation.
    jaccard : float
        Mean Jaccard index of the tenths of the removals with the lowest and with the highest change.
    """

    predicted: np.ndarray
    true: np.ndarray
    removals: list[np.ndarray]
    kendall_tau: float
    pearson: float
    jaccard: float


def estimation_accuracy(
    cleaner: GANInfluence,
    n_instances: int = 100,
    last_epochs: int | None = None,
    *,
    group_size: int = 1,
    random_state=0,
    **retraining,
) -> EstimationAccuracy:
    """Compare influence with really retraining without random instances, or random groups of them.

    Parameters
    ----------
    cleaner : GANInfluence
        Fitted. Where its back-end traced another number of epochs than `last_epochs`, influence is computed anew.
    n_instances : int, default=100
        How many removals to try.
    last_epochs : int, optional
        Retrain so many epochs; default the whole run.
    group_size : int, default=1
        Instances in one removal; their influences are summed.
    random_state : int, RandomState instance or None, default=0
        Draws the removals.
    **retraining
        Passed to `counterfactual_retrain`.

    Returns
    -------
    EstimationAccuracy

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import estimation_accuracy
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleaner = GANInfluence(trainer=GANTrainer(n_epochs=20), random_state=0).fit(X)
    >>> estimation_accuracy(cleaner, n_instances=20).kendall_tau > 0.9
    True
    """
    check_is_fitted(cleaner)
    n_samples = len(cleaner.influence_)
    rng = check_random_state(random_state)
    if group_size == 1:
        removals = list(rng.permutation(n_samples)[:n_instances, None])
    else:
        removals = [rng.permutation(n_samples)[:group_size] for _ in range(n_instances)]
    influence = predicted_influence(cleaner, last_epochs)
    predicted = np.array([influence[rows].sum() for rows in removals])
    values = counterfactual_retrain(cleaner, [[], *removals], last_epochs, **retraining)
    true = values[1:] - values[0]
    return EstimationAccuracy(
        predicted=predicted,
        true=true,
        removals=removals,
        kendall_tau=float(kendalltau(predicted, true).statistic),
        pearson=float(pearsonr(predicted, true).statistic),
        jaccard=extremes_jaccard(predicted, true),
    )


def predicted_influence(cleaner: GANInfluence, last_epochs: int | None) -> np.ndarray:
    """Return a fitted cleaner's influence over the last epochs, traced anew where it traced another window."""
    backend = cleaner.backend_
    if backend.traced_epochs() == last_epochs or "last_epochs" not in backend.get_params():
        return cleaner.influence_
    backend = clone(backend).set_params(last_epochs=last_epochs)
    gradient = {"": cleaner.gradients_[cleaner.metric_name_]}
    return backend.fit(cleaner.trajectory_, gradient).influences_[""]


def extremes_jaccard(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1) -> float:
    """Return the mean Jaccard index of the lowest and of the highest `fraction` of two vectors."""
    n = max(1, round(fraction * len(true)))

    def index(a: np.ndarray, b: np.ndarray) -> float:
        both = np.intersect1d(a, b).size
        return both / (2 * n - both)

    by_predicted, by_true = np.argsort(predicted, kind="stable"), np.argsort(true, kind="stable")
    return (index(by_predicted[:n], by_true[:n]) + index(by_predicted[-n:], by_true[-n:])) / 2
