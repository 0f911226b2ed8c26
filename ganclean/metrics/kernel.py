"""KID and MMD: the squared maximum mean discrepancy of features under a polynomial or a Gaussian kernel."""

from __future__ import annotations

import math
from numbers import Real

import torch
from sklearn.utils import check_random_state
from torch import Tensor

from ganclean.exceptions import MetricError
from ganclean.metrics.base import FeatureMetric


class KID(FeatureMetric):
    """Unbiased squared MMD between the features of generated and of reference samples; lower is better.

    Parameters
    ----------
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors.
    degree : int, default=3
    gamma : float, optional
        Default 1 / n_features.
    coef : float, default=1.0
        The kernel is (gamma ⟨x, y⟩ + coef) ** degree.
    n_subsets : int, optional
        Average over so many random subsets, as published code does; default one estimate from all samples, which has
        the same mean and less variance.
    subset_size : int, default=1000
        Instances in a subset; used with `n_subsets`.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000.
    random_state : int, RandomState instance or None, default=0
        Draws the subsets, anew from the same seed at every call, so that the metric is a function.

    References
    ----------
    Bińkowski et al., Demystifying MMD GANs, 2018, section 4.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import KID
    >>> X = torch.eye(2)
    >>> round(float(KID().fit(X)(X + 1)), 3)
    16.625
    """

    greater_is_better = False

    def __init__(
        self,
        feature_extractor=None,
        degree=3,
        gamma=None,
        coef=1.0,
        n_subsets=None,
        subset_size=1000,
        n_samples=None,
        random_state=0,
    ):
        self.feature_extractor = feature_extractor
        self.degree = degree
        self.gamma = gamma
        self.coef = coef
        self.n_subsets = n_subsets
        self.subset_size = subset_size
        self.n_samples = n_samples
        self.random_state = random_state

    def fit_features(self, features):
        if len(features) < 2:
            raise MetricError(f"KID needs at least 2 reference instances; got {len(features)}.")
        self.features_ = features

    def reduce(self, features):
        reference = self.features_.to(features)
        if self.n_subsets is None:
            return self._mmd(reference, features)
        if self.subset_size > min(len(reference), len(features)):
            raise MetricError(
                f"subset_size={self.subset_size} is larger than the {len(reference)} reference or the {len(features)} "
                "generated samples."
            )
        rng = check_random_state(self.random_state)
        values = [
            self._mmd(
                *(x[torch.from_numpy(rng.permutation(len(x))[: self.subset_size])] for x in (reference, features))
            )
            for _ in range(self.n_subsets)
        ]
        return torch.stack(values).mean()

    def _mmd(self, x: Tensor, y: Tensor) -> Tensor:
        return squared_mmd(self._kernel(x, x), self._kernel(y, y), self._kernel(x, y))

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        from torchmetrics.image.kid import poly_kernel  # imported here, as it brings torchvision and the compiler along

        return poly_kernel(x, y, self.degree, self.gamma, self.coef)


class MMD(FeatureMetric):
    """Squared MMD between the features of generated and of reference samples under a Gaussian kernel; lower is better.

    The kernel is bounded: a few outlying samples cannot dominate, as they can in `KID` and `FID`.

    Parameters
    ----------
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors.
    bandwidth : float or "median", default="median"
        Standard deviation of the kernel, in units of the features; features that differ by much more or much less are
        not told apart. "median" takes the median distance between reference instances, of 1,000 spread evenly over the
        rows where there are more.
    unbiased : bool, default=True
        Whether an instance's similarity with itself is left out. The estimate is then right on average, and below zero
        at times; otherwise it is never negative, and too high by up to 1 / n for each side.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000.

    Attributes
    ----------
    features_ : Tensor of shape (n_reference, n_features), float64
        Of the reference.
    bandwidth_ : float
        The kernel's standard deviation.

    References
    ----------
    Gretton et al., A kernel two-sample test, 2012, equations 3 and 5.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import MMD
    >>> X = torch.eye(2)
    >>> round(float(MMD(bandwidth=1.0).fit(X)(X + 1)), 6)
    0.232544
    """

    greater_is_better = False

    def __init__(self, feature_extractor=None, bandwidth="median", unbiased=True, n_samples=None):
        self.feature_extractor = feature_extractor
        self.bandwidth = bandwidth
        self.unbiased = unbiased
        self.n_samples = n_samples

    def fit_features(self, features):
        if len(features) < 2:
            raise MetricError(f"MMD needs at least 2 reference instances; got {len(features)}.")
        self.bandwidth_ = median_distance(features) if self.bandwidth == "median" else self.bandwidth
        if not isinstance(self.bandwidth_, Real) or not 0 < self.bandwidth_ < math.inf:
            raise MetricError(
                f"bandwidth must be 'median' or a positive number; got {self.bandwidth!r}"
                + (f", which is {self.bandwidth_} here. Give a number." if self.bandwidth == "median" else ".")
            )
        self.features_ = features

    def reduce(self, features):
        reference = self.features_.to(features)
        # Distances do not change, and the smaller the vectors are the less the differences of products lose.
        centre = reference.mean(dim=0)
        x, y = reference - centre, features - centre
        return squared_mmd(*(self._kernel(*pair) for pair in ((x, x), (y, y), (x, y))), unbiased=self.unbiased)

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1, keepdim=True) - 2 * x @ y.T + y.square().sum(dim=1)
        return (-squares / (2 * self.bandwidth_**2)).exp()


def squared_mmd(xx: Tensor, yy: Tensor, xy: Tensor, unbiased: bool = True) -> Tensor:
    """Return the squared MMD from the kernel's values within and between two samples."""
    if not unbiased:
        return xx.mean() + yy.mean() - 2 * xy.mean()
    if min(xy.shape) < 2:
        raise MetricError(f"An unbiased MMD needs at least 2 samples on either side; got {min(xy.shape)}.")
    within = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return within - 2 * xy.mean()


def median_distance(features: Tensor, n: int = 1000) -> float:
    """Return the median distance between the rows, of n spread evenly over all where there are more."""
    rows = torch.arange(min(n, len(features))) * len(features) // min(n, len(features))
    return float(torch.pdist(features[rows]).quantile(0.5))
