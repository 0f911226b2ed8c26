"""Inception score: confident and varied class predictions."""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax

from ganclean.exceptions import MetricError
from ganclean.metrics.base import FeatureMetric
from ganclean.metrics.extractors import InceptionV3, extract_features


class InceptionScore(FeatureMetric):
    """exp(E KL(p(y|x) ‖ p(y))) of a classifier's predictions on generated samples; higher is better.

    Parameters
    ----------
    classifier : module or callable, optional
        From samples to class logits; default Inception-v3.
    n_splits : int, default=1
        Average over so many consecutive parts of the samples; published scores use 10.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000.

    References
    ----------
    Salimans et al., Improved techniques for training GANs, 2016, section 4.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import InceptionScore
    >>> logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    >>> InceptionScore(classifier=torch.nn.Identity()).fit(logits)(logits)
    tensor(2., dtype=torch.float64)
    """

    greater_is_better = True

    def __init__(self, classifier=None, n_splits=1, n_samples=None):
        self.classifier = classifier
        self.n_splits = n_splits
        self.n_samples = n_samples

    def fit(self, reference, y=None):
        """Prepare the classifier; the reference data only set the number of samples.

        Parameters
        ----------
        reference : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
        y : ignored
        """
        super(FeatureMetric, self).fit(reference)
        if self.classifier is None:
            self.extractor_ = InceptionV3("logits")
        elif isinstance(self.classifier, torch.nn.Module):
            self.extractor_ = self.classifier.eval()
        else:
            self.extractor_ = self.classifier
        return self

    def extract(self, samples):
        """Return class logits, shape (n, n_classes), float64."""
        logits = extract_features(self.extractor_, samples)
        if logits.shape[1] < 2:
            raise MetricError("The classifier of InceptionScore must return the logits of at least 2 classes.")
        return logits

    def reduce(self, features):
        scores = []
        for part in log_softmax(features, dim=1).chunk(self.n_splits):
            marginal = part.exp().mean(dim=0, keepdim=True).log()
            scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp())
        return torch.stack(scores).mean()
