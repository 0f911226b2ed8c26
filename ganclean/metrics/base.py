"""What 'better' means: metrics of generated samples, and their gradient in the generator (theory, section 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from ganclean.data import as_source
from ganclean.metrics.extractors import extract_features, resolve_extractor


class Metric(BaseEstimator):
    """Base class of the metrics: a differentiable function of generated samples.

    A metric of one's own subclasses this (or `FeatureMetric`), sets `greater_is_better` and defines `__call__`.

    Attributes
    ----------
    greater_is_better : bool
        Whether a larger value means better samples.
    is_differentiable : bool
        Whether `__call__` has a gradient in the samples. A metric without one is for evaluation only: influence on it
        is not defined.
    uses_discriminator : bool
        Whether `__call__` takes the discriminator as a second argument: a function from samples to one output each.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import Metric
    >>> class Spread(Metric):
    ...     greater_is_better = True
    ...     def __call__(self, samples):
    ...         return samples.std()
    >>> Spread().fit(torch.zeros(4, 2))(torch.tensor([[0.0, 2.0]]))
    tensor(1.4142)
    """

    greater_is_better: bool = False
    is_differentiable: bool = True
    uses_discriminator: bool = False

    def fit(self, reference, y=None) -> Metric:
        """Cache what the metric needs of the reference data, and return self.

        Parameters
        ----------
        reference : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
        y : ignored
        """
        self.n_reference_ = len(as_source(reference))
        return self

    def __call__(self, samples: Tensor, *discriminator: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the metric of some samples, shape (n, *sample_shape), as a differentiable scalar.

        Where `uses_discriminator`, the second argument is the discriminator.
        """
        raise NotImplementedError

    @property
    def sample_size(self) -> int:
        """How many generated samples the metric is computed from.

        `n_samples` where it is given, else as many as there are reference instances, at most 5,000: Fréchet
        distances of different sample counts do not compare.
        """
        return getattr(self, "n_samples", None) or min(getattr(self, "n_reference_", 1000), 5000)


class FeatureMetric(Metric):
    """Base class of metrics that are a function of per-sample features.

    The gradient in the generator then takes two passes over the samples in chunks, and memory does not grow with
    their number. A metric of one's own defines `reduce` and, unless it has a parameter `feature_extractor`, `extract`.

    Attributes
    ----------
    extractor_ : callable
        The fitted feature extractor.
    """

    def fit(self, reference, y=None) -> FeatureMetric:
        """Extract the features of the reference data and cache their statistics.

        Parameters
        ----------
        reference : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
        y : ignored

        Raises
        ------
        NetworkError
            If the feature extractor cannot be had or does not return one vector per sample.
        """
        source = as_source(reference)
        self.n_reference_ = len(source)
        self.extractor_ = resolve_extractor(getattr(self, "feature_extractor", None), source.sample_shape)
        with torch.no_grad():
            self.fit_features(torch.cat([self.extract(batch) for batch in source.batches()]))
        return self

    def fit_features(self, features: Tensor) -> None:
        """Cache statistics of the reference's features, shape (n_reference, n_features), float64."""

    def extract(self, samples: Tensor) -> Tensor:
        """Return one feature vector per sample, shape (n, n_features), float64."""
        return extract_features(self.extractor_, samples)

    def reduce(self, features: Tensor) -> Tensor:
        """Return the metric of the features of all samples as a differentiable scalar."""
        raise NotImplementedError

    def __call__(self, samples: Tensor, *discriminator: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the metric of some samples, shape (n, *sample_shape), as a differentiable scalar."""
        return self.reduce(self.extract(samples))
