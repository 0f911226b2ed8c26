"""Copying, which distances between distributions cannot see: samples against training data and unseen test data."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from ganclean.data import as_source
from ganclean.distances import check_features, nearest
from ganclean.exceptions import MetricError
from ganclean.metrics.base import FeatureMetric


class MemorisationMetric(FeatureMetric):
    """Base class of the metrics that compare samples with training data and with test data. For evaluation only.

    The training data are a parameter and the test data the reference of `fit`, so that these metrics can stand wherever
    a metric is cloned and fitted to a reference, as in `ganclean.validation.cleansing_curve`. A subclass has the
    parameters `train` and `feature_extractor` and defines `reduce`.

    Attributes
    ----------
    train_features_ : Tensor of shape (n_train, n_features), float64
    features_ : Tensor of shape (n_reference, n_features), float64
        Of the test data.
    """

    greater_is_better = True
    is_differentiable = False
    train: Any

    def fit(self, reference, y=None):
        """Extract the features of the test data and of the training data.

        Parameters
        ----------
        reference : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
            Test data: of the distribution of the training data, but not trained on.
        y : ignored

        Raises
        ------
        ValueError
            If a parameter is not as expected.
        MetricError
            If the training and the test data do not fit together, or are too few.
        NetworkError
            If the feature extractor cannot be had or does not return one vector per sample.
        NonFiniteError
            If a feature is NaN or infinite.
        """
        return super().fit(reference)

    def fit_features(self, features):
        training = torch.cat([self.extract(batch) for batch in as_source(self.train).batches()])
        if training.shape[1] != features.shape[1]:
            raise MetricError(
                f"The training data `train` have {training.shape[1]} features and the reference data "
                f"{features.shape[1]}. Give both in the same form."
            )
        check_features(training, 1, "training instances")
        check_features(features, 0, "reference instances")
        self.train_features_, self.features_ = training, features

    @torch.no_grad()
    def __call__(self, samples, *discriminator):
        """Return the metric of some samples, shape (n, *sample_shape), as a scalar without gradient."""
        return super().__call__(samples)


class CTTest(MemorisationMetric):
    """Data-copying statistic C_T: are samples nearer to the training data than test data are? For evaluation only.

    In each cell of a k-means partition of the training data, a Mann–Whitney test compares the distances of samples and
    of test instances to their nearest training instance. C_T is the average of its z-scores, weighted by the test
    instances in the cells. Near 0 the distances are alike; far below 0 the samples are copies, far above it they miss
    the distribution. Greater counts as better here, which is true below 0.

    Parameters
    ----------
    train : array-like, Tensor or Dataset of shape (n_train, *sample_shape)
        What the generator was trained on.
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors.
    n_cells : int, default=3
        Cells of the partition. Within a cell, more samples than test instances in a dense region, where distances are
        small, do not look like copies.
    min_cell_size : int, default=20
        Cells with fewer samples are left out.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000. The statistic grows with their number.
    random_state : int, RandomState instance or None, default=0
        Of k-means.

    Attributes
    ----------
    train_features_ : Tensor of shape (n_train, n_features), float64
    features_ : Tensor of shape (n_reference, n_features), float64
        Of the test data.
    kmeans_ : KMeans
        The partition.

    Notes
    -----
    The z-score is (U − nm/2) / √(nm(n + m + 1)/12), with U the number of pairs in which the sample is farther away
    than the test instance, ties counted half; there is no correction for continuity.

    References
    ----------
    Meehan, Chaudhuri, Dasgupta, A non-parametric test to detect data-copying in generative models, 2020, section 4.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import CTTest
    >>> X = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> train, test, fresh = X.split(100)
    >>> metric = CTTest(train, n_cells=1).fit(test)
    >>> round(float(metric(train)), 2), bool(abs(metric(fresh)) < 2)
    (-12.22, True)
    """

    def __init__(self, train, feature_extractor=None, n_cells=3, min_cell_size=20, n_samples=None, random_state=0):
        self.train = train
        self.feature_extractor = feature_extractor
        self.n_cells = n_cells
        self.min_cell_size = min_cell_size
        self.n_samples = n_samples
        self.random_state = random_state

    def fit_features(self, features):
        for name in ("n_cells", "min_cell_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")
        super().fit_features(features)
        training = self.train_features_
        if len(training) < self.n_cells:
            raise MetricError(f"n_cells={self.n_cells} cells need as many training instances; got {len(training)}.")
        from sklearn.cluster import KMeans  # imported here, as it brings half of scikit-learn along

        self.kmeans_ = KMeans(self.n_cells, random_state=self.random_state).fit(training.cpu().numpy())
        self._train_cells = [training[rows] for rows in self._cells(training)]
        tests = [features[rows] for rows in self._cells(features)]
        self._test_distances = [
            nearest(test, train)[0] if len(train) else features.new_empty(0)
            for test, train in zip(tests, self._train_cells)
        ]

    @torch.no_grad()
    def reduce(self, features):
        check_features(features, 0, "generated samples")
        scores, weights = [], []
        for rows, train, test in zip(self._cells(features), self._train_cells, self._test_distances):
            if len(test) and int(rows.sum()) >= self.min_cell_size:
                distances, _ = nearest(features[rows], train.to(features))
                scores.append(mann_whitney_z(distances, test))
                weights.append(len(test))
        if not weights:
            raise MetricError(
                f"None of the {self.n_cells} cells holds test instances and at least {self.min_cell_size} of the "
                f"{len(features)} samples. Give more samples, or a smaller n_cells."
            )
        return features.new_tensor(sum(z * w for z, w in zip(scores, weights)) / sum(weights))

    def _cells(self, features: Tensor) -> list[Tensor]:
        """Return for each cell which instances lie in it."""
        cells = torch.from_numpy(self.kmeans_.predict(features.cpu().numpy())).to(features.device)
        return [cells == cell for cell in range(self.n_cells)]


class Authenticity(MemorisationMetric):
    """Fraction of the samples that are no copies of a training instance. For evaluation only.

    A sample is authentic where its nearest training instance is farther from it than from every other training
    instance. Samples like fresh data have about the authenticity of these, often near 0.5; copies have 0, noise has 1.
    Fit it to test data, and compare with the value of further test data. Higher counts as better here.

    Parameters
    ----------
    train : array-like, Tensor or Dataset of shape (n_train, *sample_shape)
        What the generator was trained on. Of an instance that it holds twice, only equal samples count as copies.
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000.

    Attributes
    ----------
    train_features_ : Tensor of shape (n_train, n_features), float64
    features_ : Tensor of shape (n_reference, n_features), float64
        Of the test data, which authenticity itself does not depend on.

    References
    ----------
    Alaa et al., How faithful is your synthetic data? Sample-level metrics for evaluating and auditing generative
    models, 2022, section 3.3.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import Authenticity
    >>> train = torch.tensor([[0.0], [1.0], [5.0]])
    >>> metric = Authenticity(train).fit(train)
    >>> float(metric(torch.tensor([[0.1], [2.5], [7.0], [-3.0]])))
    0.5
    """

    def __init__(self, train, feature_extractor=None, n_samples=None):
        self.train = train
        self.feature_extractor = feature_extractor
        self.n_samples = n_samples

    @torch.no_grad()
    def reduce(self, features):
        check_features(features, 0, "generated samples")
        training = self.train_features_.to(features)
        distances, rows = nearest(features, training)
        # Only what is somebody's nearest instance needs a neighbour of its own.
        chosen, position = rows.unique(return_inverse=True)
        to_others, _ = nearest(training[chosen], training, itself=chosen)
        return (distances > to_others[position]).double().mean()


def mann_whitney_z(x: Tensor, y: Tensor) -> float:
    """Return how far values x lie above values y, as the z-score of the Mann–Whitney statistic.

    Parameters
    ----------
    x : Tensor of shape (n,)
    y : Tensor of shape (m,)
    """
    n, m = len(x), len(y)
    u = mannwhitneyu(x.cpu().numpy(), y.cpu().numpy(), method="asymptotic").statistic
    return float((u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))
