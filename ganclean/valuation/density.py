"""Instance selection: train on where the data are dense, and gain fidelity for variety."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf, ShrunkCovariance
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d

from ganclean.cleansing._base import Cleanser
from ganclean.data import as_source, fingerprint, labels_in, take
from ganclean.metrics.extractors import features_of, resolve_extractor

DENSITIES = ("gaussian", "ppca", "knn")


class DensitySelector(Cleanser):
    """Keeps the instances in the dense regions of the data, before any GAN is trained.

    A density is fitted to features of the data, and the densest instances are kept. What is rare goes, whether it is
    foreign, mislabelled or merely unusual: a GAN trained on the rest makes samples of higher precision and lower
    recall. Training is not looked at; `GANInfluence` finds what harms a given metric.

    Parameters
    ----------
    retention : float, default=0.5
        The fraction of the instances to keep, in (0, 1]; of every class where `per_class`.
    density : {"gaussian", "ppca", "knn"}, default="gaussian"
        How typical an instance is: its log-density under a Gaussian, under probabilistic PCA, or the negative distance
        to its k-th nearest neighbour, which orders instances as that density does.
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From instances to vectors. None takes Inception-v3 for images and the values themselves for vectors. What the
        features do not show cannot be found.
    shrinkage : "ledoit_wolf", float in [0, 1] or None, default="ledoit_wolf"
        How the Gaussian's covariance is kept regular: by the Ledoit–Wolf estimate, which suits classes with fewer
        instances than features; by shrinking that far towards a multiple of the identity; or, for None, by adding 1e-5
        to the diagonal as in the paper.
    per_class : bool, default=False
        Whether each class, by the labels of `fit`, has a density of its own.
    k : int, default=5
        Which neighbour ``density="knn"`` looks at, the instance itself not counted.
    explained_variance : float, default=0.95
        The part of the variance, in (0, 1), that the components of ``density="ppca"`` explain.

    Attributes
    ----------
    values_ : ndarray of shape (n_samples,), float64
        The log-density, or negative distance; large values are worth keeping.
    harmfulness_ : ndarray of shape (n_samples,), float64
        ``-values_``.
    objective_ : str
        ``"fidelity"``: what a large value is good for.
    densities_ : dict
        By class the fitted density, with a method `score_samples`; the only key is None without `per_class`.
    thresholds_ : dict of float
        By class the highest harmfulness among the kept instances; `transform` drops new ones above it.
    threshold_ : float
        The highest of `thresholds_`.
    support_ : ndarray of shape (n_samples,), bool
        The kept instances.
    sample_indices_ : ndarray of shape (n_kept,), int64
        Their rows.
    sample_weight_ : ndarray of shape (n_samples,), float64
        1 for kept and 0 for dropped instances.
    extractor_ : callable
        The feature extractor.
    n_features_in_ : int
        Number of values in one instance.

    Notes
    -----
    Exactly ``round(retention * n)`` of n instances are kept, and at least one; of equal values the last ones are kept.
    `score_samples` of the data of `fit` gives `harmfulness_`, except for "knn", which then takes each instance for its
    own nearest neighbour.

    Foreign instances that are all alike are dense too, and bend a Gaussian that is fitted to all of them: such a group
    may be kept.

    References
    ----------
    DeVries, Drozdzal, Taylor, Instance selection for GANs, 2020, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.valuation import DensitySelector
    >>> X = np.r_[np.random.default_rng(0).normal(size=(99, 2)), [[9.0, 9.0]]]
    >>> selector = DensitySelector(retention=0.9).fit(X)
    >>> selector.transform(X).shape, int(selector.values_.argmin())
    ((90, 2), 99)
    """

    def __init__(
        self,
        retention=0.5,
        *,
        density="gaussian",
        feature_extractor=None,
        shrinkage="ledoit_wolf",
        per_class=False,
        k=5,
        explained_variance=0.95,
    ):
        self.retention = retention
        self.density = density
        self.feature_extractor = feature_extractor
        self.shrinkage = shrinkage
        self.per_class = per_class
        self.k = k
        self.explained_variance = explained_variance

    def fit(self, X, y=None):
        """Fit the densities and choose the instances to keep.

        Parameters
        ----------
        X : array-like, Tensor or map-style Dataset of shape (n_samples, *sample_shape)
        y : array-like of shape (n_samples,), optional
            The classes for `per_class`; a Dataset's items can hold them too. Otherwise ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter or the data are not as expected, or a class is too small for its density.
        NetworkError
            If the feature extractor cannot be had or does not return one vector per instance.
        """
        data = self._check_data(X, reset=True)
        self._check_parameters()
        self._classes = self._required(self._classes_of(data, y))
        if self._classes is not None:
            check_classification_targets(self._classes)
        self._fingerprint = fingerprint(data)
        self.extractor_ = resolve_extractor(self.feature_extractor, tuple(as_source(data).sample_shape))
        features = features_of(as_source(data), self.extractor_)
        values, support = np.empty(len(features)), np.zeros(len(features), dtype=bool)
        self.densities_, self.thresholds_ = {}, {}
        for label, rows in _rows_of(self._classes, len(features)).items():
            self.densities_[label], values[rows] = self._fitted(features[rows], label)
            n_kept = max(1, round(self.retention * len(rows)))
            kept = rows[np.argsort(values[rows], kind="stable")[len(rows) - n_kept :]]
            support[kept] = True
            self.thresholds_[label] = float(-values[kept].min())
        self.values_, self.objective_ = values, "fidelity"
        self._keep(-values, support)
        return self

    def _check_parameters(self) -> None:
        if not _is_number(self.retention) or not 0 < self.retention <= 1:
            raise ValueError(f"retention must be a fraction in (0, 1]; got {self.retention!r}.")
        if self.density not in DENSITIES:
            raise ValueError(f"density must be one of {list(DENSITIES)}; got {self.density!r}.")
        named = self.shrinkage is None or self.shrinkage == "ledoit_wolf"
        if not named and not (_is_number(self.shrinkage) and 0 <= self.shrinkage <= 1):
            raise ValueError(f"shrinkage must be 'ledoit_wolf', None or in [0, 1]; got {self.shrinkage!r}.")
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1; got {self.k!r}.")
        if not _is_number(self.explained_variance) or not 0 < self.explained_variance < 1:
            raise ValueError(f"explained_variance must be in (0, 1); got {self.explained_variance!r}.")

    def _classes_of(self, data: Any, y: Any) -> np.ndarray | None:
        """Return the classes of instances, given or in a Dataset; None where there are none."""
        if not self.per_class:
            return None
        if y is None:
            held = labels_in(data)
            return None if held is None else held.numpy()
        classes = column_or_1d(y)
        check_consistent_length(data, classes)
        return classes

    def _fitted(self, features: np.ndarray, label: Any) -> tuple[Density, np.ndarray]:
        """Return a density and the values of the instances that it is fitted to."""
        needed = self.k + 1 if self.density == "knn" else 2
        whose = "The data" if label is None else f"The class {label!r}"
        if len(features) < needed:
            raise ValueError(
                f"{whose} must hold at least {needed} instances for density={self.density!r}; got {len(features)}."
            )
        if self.density == "knn":
            neighbours = NeighbourDistance(features, self.k)
            return neighbours, neighbours.values_
        if not np.ptp(features, axis=0).any():
            raise ValueError(f"{whose} must hold different instances; the features of all {len(features)} are equal.")
        try:
            density: Density
            if self.density == "ppca":
                density = principal_components(features, self.explained_variance)
            elif self.shrinkage is None:
                density = GaussianMixture(1, reg_covar=1e-5, random_state=0).fit(features)
            elif self.shrinkage == "ledoit_wolf":
                density = Gaussian(LedoitWolf().fit(features))
            else:
                density = Gaussian(ShrunkCovariance(shrinkage=self.shrinkage).fit(features))
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"{whose} have features in fewer dimensions than there are, so that density={self.density!r} with "
                f"shrinkage={self.shrinkage!r} is not defined. Take density='gaussian' with shrinkage='ledoit_wolf'."
            ) from error
        return density, density.score_samples(features)

    def _is_training_data(self, data, y=None) -> bool:
        classes = self._classes_of(data, y)
        same = classes is None or np.array_equal(classes, self._classes)
        return same and super()._is_training_data(data)

    def _transform(self, X, y=None):
        data = self._check_data(X)
        if self._is_training_data(data, y):
            return take(X, self.sample_indices_)
        harmfulness, thresholds = self._judged(data, y)
        return take(X, np.flatnonzero(harmfulness <= thresholds))

    def _harmfulness_of(self, data, y=None) -> np.ndarray:
        return self._judged(data, y)[0]

    def _judged(self, data: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the harmfulness of checked instances, and the highest that would be kept of each one's class."""
        classes = self._required(self._classes_of(data, y))
        features = features_of(as_source(data), self.extractor_)
        harmfulness, thresholds = np.empty(len(features)), np.empty(len(features))
        for label, rows in _rows_of(classes, len(features)).items():
            if label not in self.densities_:
                raise ValueError(f"y holds the class {label!r}, which fit has not seen: {list(self.densities_)}.")
            harmfulness[rows] = -self.densities_[label].score_samples(features[rows])
            thresholds[rows] = self.thresholds_[label]
        return harmfulness, thresholds

    def _required(self, classes: np.ndarray | None) -> np.ndarray | None:
        if self.per_class and classes is None:
            raise ValueError(
                "per_class=True needs the class of every instance: give y, as in fit(X, y), score_samples(X, y) and "
                "transform(X, y), or a Dataset whose items hold it."
            )
        return classes


class Density(Protocol):
    """What is fitted to features and tells how typical further ones are."""

    def score_samples(self, X) -> np.ndarray:
        """Return the log-density, or what orders as it does, of features of shape (n, n_features)."""


class Gaussian:
    """The Gaussian of a fitted covariance estimate.

    Parameters
    ----------
    estimate : fitted covariance estimator of scikit-learn
        With `location_` and `covariance_`.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the covariance is singular.
    """

    def __init__(self, estimate):
        self.estimate = estimate
        self._normal = multivariate_normal(estimate.location_, estimate.covariance_)

    def score_samples(self, X) -> np.ndarray:
        """Return the log-density of features, shape (n, n_features)."""
        return np.atleast_1d(self._normal.logpdf(X))


class NeighbourDistance:
    """The negative distance to the k-th nearest of given features.

    Parameters
    ----------
    features : ndarray of shape (n_samples, n_features)
    k : int

    Attributes
    ----------
    values_ : ndarray of shape (n_samples,)
        Of the given features themselves, each not counted as its own neighbour.
    """

    def __init__(self, features, k):
        self.neighbours = NearestNeighbors(n_neighbors=k).fit(features)
        self.values_ = -self.neighbours.kneighbors()[0][:, -1]

    def score_samples(self, X) -> np.ndarray:
        """Return the value of further features, shape (n, n_features)."""
        return -self.neighbours.kneighbors(X)[0][:, -1]


def principal_components(features: np.ndarray, explained_variance: float) -> PCA:
    """Return probabilistic PCA with the fewest components that explain so much of the variance.

    Raises
    ------
    numpy.linalg.LinAlgError
        If these components explain all of the variance in fewer dimensions than there are.
    """
    pca = PCA(explained_variance, svd_solver="full").fit(features)
    noise = np.finfo(features.dtype).eps * pca.explained_variance_[0]
    if pca.n_components_ < features.shape[1] and pca.noise_variance_ <= noise:
        raise np.linalg.LinAlgError("no variance beside the principal components")
    return pca


def _rows_of(classes: np.ndarray | None, n_samples: int) -> dict[Any, np.ndarray]:
    """Return the rows of each class; those of all instances under None where there are no classes."""
    if classes is None:
        return {None: np.arange(n_samples)}
    return {label: np.flatnonzero(classes == label) for label in np.unique(classes).tolist()}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
