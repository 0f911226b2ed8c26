"""Four criteria of data valuation for generative models: same class, same attributes, outliers, and time.

The first two say more about the generator and the labels than about the valuator: any method that credits neighbours
does well on samples that are like their class. The third needs outliers that the generator did not learn. None of them
says what removal would do to the generator; retraining does (`ganclean.validation`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.utils.validation import check_array, check_consistent_length, column_or_1d

from ganclean.valuation.credit import top_contributors


class ClassAgreement(NamedTuple):
    """How often contributors are of their sample's class.

    Attributes
    ----------
    share : float
        The part of the k top contributors that have the sample's class, averaged over samples.
    chance : float
        What contributors that are drawn at random from the training data would reach.
    per_sample : ndarray of shape (n_gen,), float64
        Of which `share` is the mean.
    """

    share: float
    chance: float
    per_sample: np.ndarray


def identical_class(attributions, y, y_gen, k: int = 10) -> ClassAgreement:
    """Return how often the top contributors of generated samples are of the sample's class.

    Parameters
    ----------
    attributions : CSR matrix of shape (n_gen, n_train)
        As of `GMValuator.attribute`.
    y : array-like of shape (n_train,)
        Classes of the training instances.
    y_gen : array-like of shape (n_gen,)
        Classes of the samples: what a conditional generator made them for, or what a classifier says. Leave out the
        rows that it is not sure of.
    k : int, default=10

    Raises
    ------
    ValueError
        If the shapes do not agree or a sample has fewer than k contributors.

    References
    ----------
    Hanawa et al., Evaluation of similarity-based explanations, ICLR 2021; for generative models Yang et al.,
    GMValuator, ICLR 2025 (arXiv 2304.10701).

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse import csr_array
    >>> from ganclean.valuation import identical_class
    >>> attributions = csr_array(np.array([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]]))
    >>> agreement = identical_class(attributions, ["cat", "dog", "dog"], ["cat", "dog"], k=2)
    >>> agreement.share, agreement.chance
    (0.75, 0.5)
    """
    y, y_gen = column_or_1d(y), column_or_1d(y_gen)
    _check_lengths(attributions, y, y_gen)
    rows, _ = top_contributors(attributions, k)
    per_sample = (y[rows] == y_gen[:, None]).mean(axis=1)
    chance = np.mean([(y == label).mean() for label in y_gen])
    return ClassAgreement(float(per_sample.mean()), float(chance), per_sample)


class AttributeAgreement(NamedTuple):
    """How often contributors have the attributes of their samples.

    Attributes
    ----------
    share : ndarray of shape (n_attributes,), float64
        The part of the k top contributors that have an attribute, averaged over the samples that have it; NaN where
        none has.
    base_rate : ndarray of shape (n_attributes,), float64
        The part of the training instances that have it.
    lift : ndarray of shape (n_attributes,), float64
        `share` over `base_rate`: 1 is chance.
    """

    share: np.ndarray
    base_rate: np.ndarray
    lift: np.ndarray


def identical_attributes(attributions, attributes, attributes_gen, k: int = 10) -> AttributeAgreement:
    """Return how often the top contributors of samples with an attribute have it too, beside its base rate.

    Parameters
    ----------
    attributions : CSR matrix of shape (n_gen, n_train)
        As of `GMValuator.attribute`.
    attributes : array-like of shape (n_train, n_attributes), bool
    attributes_gen : array-like of shape (n_gen, n_attributes), bool
    k : int, default=10

    Raises
    ------
    ValueError
        If the shapes do not agree, an attribute is neither 0 nor 1, or a sample has fewer than k contributors.

    References
    ----------
    Yang et al., GMValuator, ICLR 2025 (arXiv 2304.10701).

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse import csr_array
    >>> from ganclean.valuation import identical_attributes
    >>> attributions = csr_array(np.array([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]]))
    >>> identical_attributes(attributions, [[1], [1], [0], [0]], [[1], [0]], k=2)
    AttributeAgreement(share=array([1.]), base_rate=array([0.5]), lift=array([2.]))
    """
    training, made = _attributes(attributes, "attributes"), _attributes(attributes_gen, "attributes_gen")
    _check_lengths(attributions, training, made)
    if training.shape[1] != made.shape[1]:
        raise ValueError(
            f"attributes has {training.shape[1]} columns and attributes_gen {made.shape[1]}; expected as many."
        )
    rows, _ = top_contributors(attributions, k)
    agreeing = training[rows].mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (agreeing * made).sum(axis=0) / made.sum(axis=0)
        base_rate = training.mean(axis=0)
        return AttributeAgreement(share, base_rate, share / base_rate)


class OutlierDetection(NamedTuple):
    """How well low values tell outliers.

    Attributes
    ----------
    roc_auc : float
        The chance that an outlier has a lower value than another instance, ties counted half.
    precision_at_n : float
        The part of outliers among the n instances of lowest value, where n is the number of outliers.
    """

    roc_auc: float
    precision_at_n: float


def out_of_distribution(values, is_outlier) -> OutlierDetection:
    """Return how well low values tell the instances that do not belong to the training data.

    Parameters
    ----------
    values : array-like of shape (n_train,)
        High is worth keeping. The ``-valuator.harmfulness_`` of a `GMValuator` are its values without ties among the
        instances that have no credit.
    is_outlier : array-like of shape (n_train,), bool

    Raises
    ------
    ValueError
        If the lengths differ, or all or none of the instances are outliers.

    References
    ----------
    Yang et al., GMValuator, ICLR 2025 (arXiv 2304.10701).

    Examples
    --------
    >>> from ganclean.valuation import out_of_distribution
    >>> out_of_distribution([0.9, 0.1, 0.8, 0.2, 0.3], [False, True, False, False, True])
    OutlierDetection(roc_auc=0.8333333333333334, precision_at_n=0.5)
    """
    values, outlier = column_or_1d(values), column_or_1d(is_outlier).astype(bool)
    check_consistent_length(values, outlier)
    n = int(outlier.sum())
    if n in (0, len(outlier)):
        raise ValueError(f"Expected outliers and others; {n} of {len(outlier)} instances are outliers.")
    lowest = np.argsort(values, kind="stable")[:n]
    return OutlierDetection(float(roc_auc_score(outlier, -values)), float(outlier[lowest].mean()))


class Efficiency(NamedTuple):
    """How long valuation takes, by the clock on the wall.

    Attributes
    ----------
    seconds : float
        The median over the runs.
    seconds_per_sample : float
        The same for one of the samples.
    runs : tuple of float
        Seconds of each run in turn. The first one may hold what is done once, such as loading weights.
    """

    seconds: float
    seconds_per_sample: float
    runs: tuple[float, ...]


def efficiency(function: Callable[[], Any], n_samples: int, n_repeats: int = 3) -> Efficiency:
    """Run a function several times and return how long it takes.

    Parameters
    ----------
    function : callable
        Without arguments, such as ``lambda: valuator.attribute(X_gen)`` for samples, or ``lambda: valuator.fit(X,
        X_gen=X_gen)`` for the whole data set.
    n_samples : int
        What it values, by which the time is divided.
    n_repeats : int, default=3

    References
    ----------
    Yang et al., GMValuator, ICLR 2025 (arXiv 2304.10701).

    Examples
    --------
    >>> import time
    >>> from ganclean.valuation import efficiency
    >>> efficiency(lambda: time.sleep(0.02), n_samples=2, n_repeats=1).seconds_per_sample >= 0.01
    True
    """
    if n_samples < 1 or n_repeats < 1:
        raise ValueError(f"n_samples and n_repeats must be at least 1; got {n_samples!r} and {n_repeats!r}.")
    runs = []
    for _ in range(n_repeats):
        begin = time.perf_counter()
        function()
        runs.append(time.perf_counter() - begin)
    seconds = float(np.median(runs))
    return Efficiency(seconds, seconds / n_samples, tuple(runs))


def _attributes(values: Any, name: str) -> np.ndarray:
    checked = check_array(values, dtype=np.float64, input_name=name)
    if not np.isin(checked, (0, 1)).all():
        raise ValueError(f"{name} must be 0 or 1, one column for each attribute.")
    return checked


def _check_lengths(attributions: Any, training: np.ndarray, made: np.ndarray) -> None:
    if attributions.shape != (len(made), len(training)):
        raise ValueError(
            f"The attributions have shape {attributions.shape}, for {len(made)} samples and {len(training)} training "
            f"instances; expected ({len(made)}, {len(training)})."
        )
