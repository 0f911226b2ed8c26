"""Average log-likelihood of held-out data under a kernel density estimate of the generated samples."""

from __future__ import annotations

import math

from ganclean.metrics.base import FeatureMetric


class AverageLogLikelihood(FeatureMetric):
    """Mean log-density of the reference under a Gaussian kernel at each generated sample; higher is better.

    Parameters
    ----------
    bandwidth : float, default=1.0
        Standard deviation of the kernel, in units of the features.
    n_samples : int, default=1000
        Generated samples: the centres of the kernels.
    feature_extractor : module, callable, "inception" or "pixels", default="pixels"
        From samples to vectors; the default takes the values themselves.

    References
    ----------
    Terashita et al., Influence estimation for generative adversarial networks, 2021, section 5.1.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import AverageLogLikelihood
    >>> round(float(AverageLogLikelihood().fit(torch.zeros(1, 2))(torch.zeros(5, 2))), 4)
    -1.8379
    """

    greater_is_better = True

    def __init__(self, bandwidth=1.0, n_samples=1000, feature_extractor="pixels"):
        self.bandwidth = bandwidth
        self.n_samples = n_samples
        self.feature_extractor = feature_extractor

    def fit_features(self, features):
        self.features_ = features

    def reduce(self, features):
        reference = self.features_.to(features)
        squares = (
            reference.square().sum(dim=1, keepdim=True) - 2 * reference @ features.T + features.square().sum(dim=1)
        )
        normaliser = features.shape[1] / 2 * math.log(2 * math.pi * self.bandwidth**2) + math.log(len(features))
        return (-squares / (2 * self.bandwidth**2)).logsumexp(dim=1).mean() - normaliser
