"""Invalidity: how often a generator produces what it should not, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Invalidity:
    """The share of invalid samples with Wilson's 95% confidence interval; all NaN where nothing was judged.

    Parameters
    ----------
    rate, low, high : float
    n_samples : int
        How many samples were judged.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.redaction.invalidity import Invalidity
    >>> print(Invalidity.of(np.arange(4000) >= 20))
    0.50% [0.32%, 0.77%]
    """

    rate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n_samples: int = 0

    @classmethod
    def of(cls, is_valid: np.ndarray) -> Invalidity:
        """Return the invalidity of judged samples, shape (n,), bool."""
        n = len(is_valid)
        if not n:
            return cls()
        test = binomtest(n - int(np.sum(is_valid)), n)
        interval = test.proportion_ci(method="wilson")
        return cls(test.statistic, float(interval.low), float(interval.high), n)

    def __float__(self) -> float:
        return float(self.rate)

    def __str__(self) -> str:
        if math.isnan(self.rate):
            return "not measured"
        return f"{self.rate:.2%} [{self.low:.2%}, {self.high:.2%}]"


def residual_invalidity(share: float, lam: float) -> float:
    """Return the invalidity that remains at the optimum where the training data are not sifted.

    Parameters
    ----------
    share : float
        The invalid share π of the training data, which the redacted samples are distributed like.
    lam : float
        The weight λ of generated samples among the fakes.

    Returns
    -------
    float
        (π − (1 − λ)) / λ, or 0 where that is negative: the generator that makes λ p_G + (1 − λ) p_redacted equal to
        the data's distribution, which is the minimum of their Jensen-Shannon divergence.

    Examples
    --------
    >>> from ganclean.redaction.invalidity import residual_invalidity
    >>> round(residual_invalidity(0.3, lam=0.9), 4), residual_invalidity(0.3, lam=0.5)
    (0.2222, 0.0)
    """
    return max(0.0, (share - (1 - lam)) / lam)
