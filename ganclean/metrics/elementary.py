"""Metrics without a model of quality behind them: means, losses, functions of one's own."""

from __future__ import annotations

from ganclean.data import as_source
from ganclean.losses import resolve_loss
from ganclean.metrics.base import FeatureMetric, Metric


class SampleMean(FeatureMetric):
    """Mean feature of the generated samples: a smooth quantity to check influence with, or to steer.

    Parameters
    ----------
    feature_extractor : module, callable, "inception" or "pixels", default="pixels"
        From samples to vectors, averaged over their entries and over the samples.
    greater_is_better : bool, default=True
    n_samples : int, default=1000

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import SampleMean
    >>> SampleMean().fit(torch.zeros(1, 2))(torch.ones(3, 2))
    tensor(1., dtype=torch.float64)
    """

    def __init__(self, feature_extractor="pixels", greater_is_better=True, n_samples=1000):
        self.feature_extractor = feature_extractor
        self.greater_is_better = greater_is_better
        self.n_samples = n_samples

    def reduce(self, features):
        return features.mean()


class FunctionMetric(Metric):
    """Any differentiable function of the samples.

    Parameters
    ----------
    function : callable
        From a tensor of samples, shape (n, *sample_shape), to a differentiable scalar tensor.
    greater_is_better : bool, default=True
    n_samples : int, default=1000

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import FunctionMetric
    >>> FunctionMetric(torch.var, greater_is_better=False).fit(torch.zeros(1))(torch.tensor([1.0, 3.0]))
    tensor(2.)
    """

    def __init__(self, function, greater_is_better=True, n_samples=1000):
        self.function = function
        self.greater_is_better = greater_is_better
        self.n_samples = n_samples

    def __call__(self, samples):
        return self.function(samples)


class DiscriminatorLoss(Metric):
    """The discriminator's loss on reference and generated samples; lower is better.

    It does not tell how good the samples are. Influence on it is the baseline that ordinary influence functions give
    (Terashita et al., 2021, section 5.2).

    Parameters
    ----------
    loss : str or AdversarialLoss, default="non_saturating"
    n_samples : int, default=1000
        Generated samples, and at most so many reference instances.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import DiscriminatorLoss
    >>> metric = DiscriminatorLoss("least_squares").fit(torch.ones(4))
    >>> metric(torch.ones(3), lambda samples: samples)
    tensor(0.5000)
    """

    greater_is_better = False
    uses_discriminator = True

    def __init__(self, loss="non_saturating", n_samples=1000):
        self.loss = loss
        self.n_samples = n_samples

    def fit(self, reference, y=None):
        """Keep the first `n_samples` reference instances.

        Parameters
        ----------
        reference : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
        y : ignored
        """
        super().fit(reference)
        self.loss_ = resolve_loss(self.loss)
        self.reference_ = as_source(reference)[list(range(min(self.n_samples, self.n_reference_)))]
        return self

    def __call__(self, samples, discriminator):
        real = self.loss_.real(discriminator(self.reference_.to(samples))).mean()
        return real + self.loss_.fake(discriminator(samples)).mean()
