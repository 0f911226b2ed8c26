"""Paired comparisons over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class PairedComparison:
    """Whether one treatment is better than another over paired runs.

    Parameters
    ----------
    improvement : float
        Mean of the paired improvements; positive is better.
    low, high : float
        Confidence interval of the mean, of this comparison alone.
    p_value : float
        One-sided paired t-test of an improvement above zero; corrected where several comparisons were made.
    n : int
        Number of pairs.
    level : float
        Confidence of the interval.
    n_compared : int
        The number of comparisons that `p_value` is corrected for.
    """

    improvement: float
    low: float
    high: float
    p_value: float
    n: int
    level: float = 0.95
    n_compared: int = 1

    @property
    def significant(self) -> bool:
        """Whether the improvement is above zero in a two-sided test at this level.

        For a single comparison, that is whether the whole confidence interval lies above zero.
        """
        return self.p_value < (1 - self.level) / 2


def paired_comparison(improvements, level: float = 0.95) -> PairedComparison:
    """Return the paired t-test of improvements, one for each seed.

    Parameters
    ----------
    improvements : array-like of shape (n_seeds,)
        At least two.
    level : float, default=0.95

    Examples
    --------
    >>> from ganclean.validation import paired_comparison
    >>> comparison = paired_comparison([1.0, 2.0, 3.0])
    >>> round(comparison.improvement, 3), round(comparison.p_value, 3)
    (2.0, 0.037)
    """
    values = np.asarray(improvements, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ValueError(f"A paired test needs at least 2 seeds; got {n}.")
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(n))
    if error == 0:
        return PairedComparison(mean, mean, mean, 0.0 if mean > 0 else 1.0, n, level)
    half = float(student.ppf((1 + level) / 2, n - 1)) * error
    return PairedComparison(mean, mean - half, mean + half, float(student.sf(mean / error, n - 1)), n, level)


def corrected(comparisons: Sequence[PairedComparison]) -> list[PairedComparison]:
    """Return comparisons with p-values that are corrected for their number, by Holm's method.

    Parameters
    ----------
    comparisons : sequence of PairedComparison

    References
    ----------
    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics, 1979.

    Examples
    --------
    >>> from ganclean.validation.significance import corrected, paired_comparison
    >>> both = corrected([paired_comparison([1.0, 2.0, 3.0]), paired_comparison([-1.0, 1.0, 2.0])])
    >>> [round(comparison.p_value, 3) for comparison in both]
    [0.074, 0.264]
    """
    n = len(comparisons)
    result = list(comparisons)
    worst = 0.0
    for rank, i in enumerate(sorted(range(n), key=lambda i: comparisons[i].p_value)):
        worst = max(worst, min(1.0, (n - rank) * comparisons[i].p_value))
        result[i] = replace(comparisons[i], p_value=worst, n_compared=n)
    return result
