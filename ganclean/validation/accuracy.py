"""How well influence predicts what retraining really does (theory, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import bootstrap, kendalltau, pearsonr, spearmanr
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ganclean.validation.counterfactual import counterfactual_retrain

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence


@dataclass(frozen=True)
class Agreement:
    """Predicted against true changes of a metric.

    Parameters
    ----------
    predicted, true : ndarray of shape (n_removals,), float64
        The change of the metric on removal, by summed influence and by retraining.
    removals : list of ndarray of int64
        The removed rows.
    """

    predicted: np.ndarray
    true: np.ndarray
    removals: list[np.ndarray]

    def interval(
        self, statistic: str | None = None, level: float = 0.95, n_resamples: int = 1000, random_state=0
    ) -> tuple[float, float]:
        """Return the bootstrap confidence interval of a statistic: removals are drawn with replacement.

        Parameters
        ----------
        statistic : {"kendall_tau", "pearson", "spearman", "jaccard"}, optional
            Default what the agreement is named for: Kendall's τ, or Spearman's ρ of a linear datamodelling score.
        level : float, default=0.95
        n_resamples : int, default=1000
        random_state : int, RandomState instance or None, default=0

        Returns
        -------
        low, high : float
            Percentiles of the bootstrap distribution.
        """
        statistic = self._main if statistic is None else statistic
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {list(STATISTICS)}; got {statistic!r}.")
        result = bootstrap(
            (self.predicted, self.true),
            STATISTICS[statistic],
            paired=True,
            vectorized=False,
            confidence_level=level,
            n_resamples=n_resamples,
            # Jackknife corrections are not defined for statistics that are constant under it, as τ = 1 is.
            method="percentile",
            random_state=check_random_state(random_state),
        )
        return float(result.confidence_interval.low), float(result.confidence_interval.high)

    _main = "kendall_tau"


@dataclass(frozen=True)
class EstimationAccuracy(Agreement):
    """How well influence predicts removals.

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

    kendall_tau: float
    pearson: float
    jaccard: float


@dataclass(frozen=True)
class LinearDatamodelingScore(Agreement):
    """How well summed influence ranks random subsets of the data by what training on them gives.

    Parameters
    ----------
    predicted, true : ndarray of shape (n_subsets,), float64
        The change of the metric where only the subset is trained on; with several seeds, the mean of the true ones.
    removals : list of ndarray of int64
        What each subset lacks.
    spearman : float
        The score.
    true_by_seed : ndarray of shape (n_seeds, n_subsets), float64
        Each seed's own change.
    """

    spearman: float
    true_by_seed: np.ndarray
    _main = "spearman"


def estimation_accuracy(
    cleanser: GANInfluence,
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
    cleanser : GANInfluence
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
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=20), random_state=0).fit(X)
    >>> accuracy = estimation_accuracy(cleanser, n_instances=20)
    >>> accuracy.kendall_tau > 0.9
    True
    >>> low, high = accuracy.interval("kendall_tau")
    >>> low <= accuracy.kendall_tau <= high
    True
    """
    check_is_fitted(cleanser)
    n_samples = len(cleanser.influence_)
    rng = check_random_state(random_state)
    if group_size == 1:
        removals = list(rng.permutation(n_samples)[:n_instances, None])
    else:
        removals = [rng.permutation(n_samples)[:group_size] for _ in range(n_instances)]
    predicted = _summed(predicted_influence(cleanser, last_epochs), removals)
    values = np.asarray(counterfactual_retrain(cleanser, [[], *removals], last_epochs, **retraining))
    true = values[1:] - values[0]
    return EstimationAccuracy(
        predicted,
        true,
        removals,
        *(STATISTICS[name](predicted, true) for name in ("kendall_tau", "pearson", "jaccard")),
    )


def linear_datamodeling_score(
    cleanser: GANInfluence,
    n_subsets: int = 50,
    last_epochs: int | None = None,
    *,
    fraction: float = 0.5,
    seeds: Sequence[int] | None = None,
    influence: np.ndarray | None = None,
    random_state=0,
    **retraining,
) -> LinearDatamodelingScore:
    """Rank random subsets of the data by summed influence, and by what training on them really gives.

    Parameters
    ----------
    cleanser : GANInfluence
        Fitted. Where its back-end traced another number of epochs than `last_epochs`, influence is computed anew.
    n_subsets : int, default=50
    last_epochs : int, optional
        Retrain so many epochs of the recorded run; default all.
    fraction : float, default=0.5
        Share of the data in each subset.
    seeds : sequence of int, optional
        Train anew with each of these seeds instead: other initial weights, batches and latents. It shows what
        influence says about the data rather than about one run.
    influence : ndarray of shape (n_samples,), optional
        Scores to judge; default the cleanser's influence.
    random_state : int, RandomState instance or None, default=0
        Draws the subsets.
    **retraining
        Passed to `counterfactual_retrain`.

    Returns
    -------
    LinearDatamodelingScore

    References
    ----------
    Park, Georgiev, Ilyas, Leclerc, Madry, TRAK: Attributing model behavior at scale, ICML 2023, definition 2.3.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import linear_datamodeling_score
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=5), random_state=0).fit(X)
    >>> linear_datamodeling_score(cleanser, n_subsets=20).spearman > 0.8
    True
    """
    check_is_fitted(cleanser)
    n_samples = len(cleanser.influence_)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1; got {fraction!r}.")
    rng, n_removed = check_random_state(random_state), n_samples - max(1, round(fraction * n_samples))
    removals = [np.sort(rng.permutation(n_samples)[:n_removed]) for _ in range(n_subsets)]
    if influence is None:
        influence = cleanser.influence_ if seeds is not None else predicted_influence(cleanser, last_epochs)
    elif np.shape(influence) != (n_samples,):
        raise ValueError(f"influence must have one value for each of the {n_samples} instances.")
    predicted = _summed(influence, removals)
    values = counterfactual_retrain(cleanser, [[], *removals], last_epochs, seeds=seeds, **retraining)
    by_seed = np.atleast_2d(np.asarray(values))
    by_seed = by_seed[:, 1:] - by_seed[:, :1]
    true = by_seed.mean(axis=0)
    return LinearDatamodelingScore(predicted, true, removals, _spearman(predicted, true), by_seed)


def predicted_influence(cleanser: GANInfluence, last_epochs: int | None) -> np.ndarray:
    """Return a fitted cleanser's influence over the last epochs, traced anew where it traced another window."""
    backend = cleanser.backend_
    if backend.traced_epochs() == last_epochs or "last_epochs" not in backend.get_params():
        return cleanser.influence_
    backend = clone(backend).set_params(last_epochs=last_epochs)
    gradient = {"": cleanser.gradients_[cleanser.metric_name_]}
    return backend.fit(cleanser.trajectory_, gradient).influences_[""]


def extremes_jaccard(predicted: np.ndarray, true: np.ndarray, fraction: float = 0.1) -> float:
    """Return the mean Jaccard index of the lowest and of the highest `fraction` of two vectors."""
    n = max(1, round(fraction * len(true)))

    def index(a: np.ndarray, b: np.ndarray) -> float:
        both = np.intersect1d(a, b).size
        return both / (2 * n - both)

    by_predicted, by_true = np.argsort(predicted, kind="stable"), np.argsort(true, kind="stable")
    return (index(by_predicted[:n], by_true[:n]) + index(by_predicted[-n:], by_true[-n:])) / 2


def _summed(influence: np.ndarray, removals: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([influence[rows].sum() for rows in removals])


def _spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(spearmanr(predicted, true).statistic)


STATISTICS = {
    "kendall_tau": lambda predicted, true: float(kendalltau(predicted, true).statistic),
    "pearson": lambda predicted, true: float(pearsonr(predicted, true).statistic),
    "spearman": _spearman,
    "jaccard": extremes_jaccard,
}
