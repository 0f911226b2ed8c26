"""KID: the squared maximum mean discrepancy of features under a polynomial kernel."""

from __future__ import annotations

import torch
from sklearn.utils import check_random_state
from torch import Tensor
from torchmetrics.image.kid import poly_kernel

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
        xx, yy, xy = self._kernel(x, x), self._kernel(y, y), self._kernel(x, y)
        within = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy))
        return within - 2 * xy.mean()

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return poly_kernel(x, y, self.degree, self.gamma, self.coef)
