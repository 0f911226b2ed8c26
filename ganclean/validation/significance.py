"""Paired comparisons over seeds."""

from __future__ import annotations

from dataclasses import dataclass

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
        Confidence interval of the mean.
    p_value : float
        One-sided paired t-test of an improvement above zero.
    n : int
        Number of pairs.
    level : float
        Confidence of the interval.
    """

    improvement: float
    low: float
    high: float
    p_value: float
    n: int
    level: float = 0.95

    @property
    def significant(self) -> bool:
        """Whether the whole confidence interval lies above zero: stricter than the one-sided test at that level."""
        return self.low > 0


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
