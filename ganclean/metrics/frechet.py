"""FID: the Fréchet distance between Gaussians fitted to features."""

from __future__ import annotations

import torch
from torch import Tensor

from ganclean.exceptions import MetricError
from ganclean.metrics.base import FeatureMetric


class FID(FeatureMetric):
    """Fréchet distance between the features of generated and of reference samples; lower is better.

    Parameters
    ----------
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors. Keep the
        number of features below the number of samples: beyond it the distance is almost all bias.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000.

    Attributes
    ----------
    mean_ : Tensor of shape (n_features,), float64
    covariance_ : Tensor of shape (n_features, n_features), float64
        Of the reference's features.

    References
    ----------
    Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium, 2017, equation 6.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import FID
    >>> X = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    >>> round(float(FID().fit(X)(X + 1)), 6)
    2.0
    """

    greater_is_better = False

    def __init__(self, feature_extractor=None, n_samples=None):
        self.feature_extractor = feature_extractor
        self.n_samples = n_samples

    def fit_features(self, features):
        if len(features) < 2:
            raise MetricError(
                f"FID needs at least 2 reference instances to estimate a covariance; got {len(features)}."
            )
        self.mean_, self.covariance_ = features.mean(dim=0), features.T.cov()
        self.covariance_ = self.covariance_.reshape(features.shape[1], features.shape[1])
        values, vectors = torch.linalg.eigh(self.covariance_)
        self._root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def reduce(self, features):
        mean = features.mean(dim=0)
        centred = features - mean
        covariance = centred.T @ centred / (len(features) - 1)
        root = self._root.to(features)
        # The eigenvalues of Σ₁Σ₂ are those of the symmetric Σ₂^½ Σ₁ Σ₂^½, whose derivative is well defined even
        # where they coincide.
        product = trace_of_root(root @ covariance @ root)
        distance = (mean - self.mean_.to(features)).square().sum()
        return distance + covariance.trace() + self.covariance_.to(features).trace() - 2 * product


def trace_of_root(matrix: Tensor) -> Tensor:
    """Return Tr(M^½) of a symmetric positive semi-definite matrix, differentiable where M is singular.

    Eigenvalues at the level of rounding are dropped: the square root's derivative there is infinite, and what they
    would add is noise.
    """
    values = torch.linalg.eigvalsh(matrix)
    significant = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(significant, torch.where(significant, values, 1.0).sqrt(), 0.0).sum()
