"""GMValuator: credit of training instances for what a generator makes, by nearness alone."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ganclean.cleansing._base import Cleanser
from ganclean.data import DataSource, as_source, checked_data, fingerprint
from ganclean.distances import check_features, distances, rows_at_once
from ganclean.metrics.extractors import features_of, resolve_extractor
from ganclean.training.preparation import labels_for
from ganclean.valuation.credit import credit_matrix, credits, median_temperature
from ganclean.valuation.quality import quality_of, realism, small_balls
from ganclean.valuation.recall import RECALLS, NeighbourIndex
from ganclean.valuation.rerank import reranked, resolve_rerank
from ganclean.valuation.samples import generated, trained

REALISM_K = 3


class GMValuator(Cleanser):
    """Credits training instances for the generated samples that lie near them.

    Each generated sample has a credit of 1, or its quality, to give. Its k nearest training instances share it by a
    softmax of their distances, and an instance's value is what it gets from all samples. No training is looked at.

    Parameters
    ----------
    generator : torch.nn.Module or estimator, optional
        What makes the samples where `fit` is given none: a trained module from latents (n, `latent_dim`) to samples,
        or an estimator with a method `sample`, such as a fitted `GANInfluence`. Of an estimator that is not fitted
        yet, a clone is fitted on X. Wrap a fitted one in `sklearn.frozen.FrozenEstimator` to keep it through `clone`.
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to the vectors whose Euclidean distance is nearness. None takes Inception-v3 for images and the
        values themselves for vectors.
    k : int, default=10
        How many training instances share a sample's credit; all where there are fewer.
    n_candidates : int, optional
        How many are recalled before the k nearest of them are chosen; default the larger of 4k and 50. Only an
        approximate recall and `rerank` look at it.
    recall : {"exact", "pq", "hnsw"}, default="exact"
        How candidates are found: by comparing all, by product quantisation, or by a navigable graph. The last two need
        faiss (``pip install "ganclean[similarity]"``). Distances of candidates are exact in any case.
    rerank : {"l2", "lpips"}, callable or None, default=None
        Chooses and credits among the candidates by another distance: "l2" between the values of the samples, "lpips"
        between images in [−1, 1] as people see them, or a function of a sample, shape (1, *sample_shape), and its
        candidates, shape (n_candidates, *sample_shape), that returns n_candidates distances.
    temperature : "median" or float, default="median"
        By how much farther the second of two instances is if it gets 1/e of what the first one gets. "median" is the
        median over samples of the distance from the first contributor to the last. Published GMValuator has 1, with
        which shares depend on the unit of the distances.
    quality : "realism", callable or None, default=None
        How much credit a sample has to give: a function of samples, shape (n, *sample_shape), that returns n values of
        at least zero, such as `DiscriminatorQuality`; "realism" is the realism score in feature space (of the third
        neighbour) of generated samples, at most 1, among the real data `X_ref` or, without these, X.
    query : {"generated", "reference"}, default="generated"
        Whose credit is given: that of generated samples, or that of the real instances `X_ref`. The latter says which
        training instances held-out data resemble, and nothing about a generator.
    n_generated : int, optional
        How many samples `generator` makes; default as many as there are training instances, so that each gets credit
        from k samples on average.
    latent_dim : int or tuple of int, default=32
        Of the standard normal latents of a module.
    conditional : bool, default=False
        Whether a module takes labels as its second input. They are drawn from y, or from those that a Dataset holds.
    n_remove : float or int, default=0.05
        How many of the instances of least value to drop: a fraction in [0, 1) or a count.
    random_state : int, RandomState instance or None
        Determines latents, labels, and the quantiser of "pq".

    Attributes
    ----------
    values_ : ndarray of shape (n_samples,), float64
        Each instance's credit; high is worth keeping. They sum to the sum of `quality_`.
    attributions_ : csr_array of shape (n_gen, n_samples), float64
        The credit that each sample gives, k entries in each row. `top_contributors` reads them.
    objective_ : str
        What values mean: "credit", or "credit:reference" with ``query="reference"``.
    temperature_ : float
        In the unit of the distances.
    quality_ : ndarray of shape (n_gen,), float64
        What each sample had to give.
    samples_ : array, Tensor or Dataset of shape (n_gen, *sample_shape)
        The samples that gave credit.
    sample_labels_ : Tensor, ndarray or None
        What `generator` made them for.
    generator_ : module, estimator or None
        What made them.
    extractor_ : callable
        The fitted feature extractor.
    harmfulness_ : ndarray of shape (n_samples,), float64
        −`values_` where there is credit; else the distance to the nearest sample, in feature space. Instances without
        any credit thus come first, the farthest first.
    support_, sample_indices_, sample_weight_, threshold_
        What is kept, as of `GANInfluence`.
    n_features_in_ : int
        Number of values in one instance.

    Notes
    -----
    Credit is not harm or help: an instance that nothing generated resembles has none, which may mean that it is an
    outlier or that the generator misses what it stands for. And an outlier that the generator has learned has as much
    as any instance, unless `quality` takes it from the samples.

    Duplicates share what one of them would get, if k leaves room for them. `score_samples` answers what an unseen
    instance would get if it alone joined the training data, at the same temperature: it takes the place of the last
    contributor of the samples that it is nearer to. With `rerank`, it must first be among the candidates.

    References
    ----------
    Yang et al., GMValuator: similarity-based data valuation for generative models, ICLR 2025 (arXiv 2304.10701).

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.valuation import GMValuator
    >>> X = np.array([[0.0], [1.0], [5.0], [50.0]])
    >>> valuator = GMValuator(k=1, n_remove=1).fit(X, X_gen=np.array([[0.1], [0.2], [4.0]]))
    >>> valuator.values_
    array([2., 0., 1., 0.])
    >>> valuator.harmfulness_
    array([-2. ,  0.8, -1. , 46. ])
    >>> valuator.transform(X).ravel()
    array([0., 1., 5.])
    """

    def __init__(
        self,
        generator=None,
        *,
        feature_extractor=None,
        k=10,
        n_candidates=None,
        recall="exact",
        rerank=None,
        temperature="median",
        quality=None,
        query="generated",
        n_generated=None,
        latent_dim=32,
        conditional=False,
        n_remove=0.05,
        random_state=None,
    ):
        self.generator = generator
        self.feature_extractor = feature_extractor
        self.k = k
        self.n_candidates = n_candidates
        self.recall = recall
        self.rerank = rerank
        self.temperature = temperature
        self.quality = quality
        self.query = query
        self.n_generated = n_generated
        self.latent_dim = latent_dim
        self.conditional = conditional
        self.n_remove = n_remove
        self.random_state = random_state

    def fit(self, X, y=None, *, X_gen=None, X_ref=None):
        """Credit the training instances for samples.

        Parameters
        ----------
        X : array-like, Tensor or map-style Dataset of shape (n_samples, *sample_shape)
            The training data, on the scale of the generator's output.
        y : array-like of shape (n_samples, ...), optional
            What the labels of a conditional generator are drawn from; given to an estimator that is fitted here.
        X_gen : array-like, Tensor or Dataset of shape (n_gen, *sample_shape), optional
            Generated samples; default those that `generator` makes.
        X_ref : array-like, Tensor or Dataset of shape (n_ref, *sample_shape), optional
            Real data that were not trained on: what gives credit with ``query="reference"``, and otherwise what
            ``quality="realism"`` is judged by.

        Raises
        ------
        ValueError
            If a parameter or the data are not as expected, or there is nothing to make samples.
        NetworkError
            If the generator, the feature extractor or LPIPS cannot be had or return something else than expected.
        NonFiniteError
            If a feature is NaN or infinite.
        MissingExtraError
            If the recall needs faiss and it is not installed.
        """
        data = self._check_data(X, reset=True)
        n_remove = self._count_to_remove(len(data))
        self._check_parameters()
        rng = check_random_state(self.random_state)
        self._fingerprint = fingerprint(data)
        self._source = as_source(data)
        self.extractor_ = resolve_extractor(self.feature_extractor, tuple(self._source.sample_shape))
        self._distance = resolve_rerank(self.rerank)
        samples, self.sample_labels_ = self._samples(data, y, X_gen, X_ref, rng)
        source = self._checked_samples(samples, "X_ref" if self.query == "reference" else "X_gen")
        self.samples_ = source.data
        features = self._features(self._source, "training instances")
        self._index = NeighbourIndex(features, self.recall, rng.randint(2**31))
        if self.quality == "realism":
            judges = features
            if self.query == "generated" and X_ref is not None:
                judges = self._features(self._checked_samples(X_ref, "X_ref"), "reference instances")
            self._balls = small_balls(torch.from_numpy(judges), REALISM_K)
        self._queries = self._features(source, "samples")
        self._distances, rows, self._reach = self._contributors(source, self._queries)
        self.quality_ = self._quality_of(source, self._queries)
        fixed = self.temperature != "median"
        self.temperature_ = float(self.temperature) if fixed else median_temperature(self._distances)
        self.attributions_ = credit_matrix(self._distances, rows, self.temperature_, self.quality_, len(features))
        self.values_ = self.attributions_.sum(axis=0)
        self.objective_ = "credit" if self.query == "generated" else "credit:reference"
        self._drop(self._without_ties(self.values_, features), n_remove)
        return self

    def attribute(self, X_gen):
        """Return the credit that samples give, at the fitted temperature.

        Parameters
        ----------
        X_gen : array-like, Tensor or Dataset of shape (n_gen, *sample_shape)

        Returns
        -------
        csr_array of shape (n_gen, n_samples), float64
            k entries in each row, which sum to the sample's quality.
        """
        check_is_fitted(self)
        source = self._checked_samples(X_gen, "X_gen")
        features = self._features(source, "samples")
        between, rows, _ = self._contributors(source, features)
        quality = self._quality_of(source, features)
        return credit_matrix(between, rows, self.temperature_, quality, len(self.values_))

    def kneighbors(self, X_gen):
        """Return the training instances that share the credit of samples, and how far they are.

        Parameters
        ----------
        X_gen : array-like, Tensor or Dataset of shape (n_gen, *sample_shape)

        Returns
        -------
        distances : ndarray of shape (n_gen, k), float64
            In feature space, or those of `rerank`; nearest first.
        rows : ndarray of shape (n_gen, k), int64
        """
        check_is_fitted(self)
        source = self._checked_samples(X_gen, "X_gen")
        return self._contributors(source, self._features(source, "samples"))[:2]

    def _samples(self, data: Any, y: Any, X_gen: Any, X_ref: Any, rng: np.random.RandomState) -> tuple[Any, Any]:
        """Return what gives credit, and what it was made for."""
        self.generator_ = None
        if self.query == "reference":
            if X_ref is None or X_gen is not None:
                raise ValueError("With query='reference', real data give the credit: call fit(X, X_ref=...).")
            return X_ref, None
        if X_gen is not None:
            return X_gen, None
        if self.generator is None:
            raise ValueError("There are no samples to give credit: call fit(X, X_gen=...), or give a generator.")
        n = len(data) if self.n_generated is None else self.n_generated
        labels = labels_for(data, y, self.conditional)
        if self.conditional:
            if labels is None:
                raise ValueError("A conditional generator needs labels: call fit(X, y), or give a Dataset of pairs.")
            labels = labels[torch.from_numpy(rng.randint(len(labels), size=n))]
        shape = (self.latent_dim,) if isinstance(self.latent_dim, Integral) else tuple(self.latent_dim)
        self.generator_ = trained(self.generator, data, y)
        return generated(self.generator_, n, shape, labels, rng)

    def _contributors(self, source: DataSource, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the distances and rows of the contributors, and how near an instance must be to be a candidate."""
        n_train = len(self._index.items)
        k = min(self.k, n_train)
        n_candidates = max(4 * k, 50) if self.n_candidates is None else self.n_candidates
        # An exact search needs no candidates to spare.
        n = k if self._distance is None and self.recall == "exact" else min(n_candidates, n_train)
        near, rows = self._index.search(features, n)
        reach = np.full(len(features), np.inf) if n == n_train else near[:, -1]
        if self._distance is None:
            return near[:, :k], rows[:, :k], reach
        both = zip(range(len(source)), rows)
        near = np.stack([reranked(self._distance, source[[j]], self._source[row.tolist()]) for j, row in both])
        order = np.argsort(near, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(near, order, 1), np.take_along_axis(rows, order, 1), reach

    def _quality_of(self, source: DataSource, features: np.ndarray) -> np.ndarray:
        if self.quality is None:
            return np.ones(len(source))
        if self.quality == "realism":
            # A copy of a real instance has infinite realism; within the real data, one sample counts like another.
            return realism(torch.from_numpy(features), *self._balls).clamp(max=1).numpy()
        return quality_of(source, self.quality)

    def _harmfulness_of(self, data, y=None) -> np.ndarray:
        source = as_source(data)
        features = self._features(source, "instances")
        return self._without_ties(self._credit_beside(source, features), features)

    def _credit_beside(self, source: DataSource, features: np.ndarray) -> np.ndarray:
        """Return what each instance would get if it alone joined the training data."""
        queries, total = torch.from_numpy(self._queries), np.zeros(len(features))
        samples = as_source(self.samples_)
        full = self._distances.shape[1] == self.k
        # Fewer contributors than k, and everyone is welcome.
        last = self._distances[:, -1] if full else np.full(len(queries), np.inf)
        others = self._distances[:, :-1] if full else self._distances
        start = 0
        for piece in torch.from_numpy(features).split(rows_at_once(len(queries))):
            between = distances(piece, queries).numpy()
            rows, given_by = np.nonzero(between < self._reach)
            near = between[rows, given_by]
            rows += start
            if self._distance is not None:
                for j in np.unique(given_by):
                    asked = given_by == j
                    near[asked] = reranked(self._distance, samples[[j]], source[rows[asked].tolist()])
            entering = near < last[given_by]
            rows, given_by, near = rows[entering], given_by[entering], near[entering]
            competing = np.column_stack([near, others[given_by]])
            np.add.at(total, rows, credits(competing, self.temperature_, self.quality_[given_by])[:, 0])
            start += len(piece)
        return total

    def _without_ties(self, values: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Return harmfulness: low credit first, and among instances without any, those farthest from all samples."""
        harmfulness = -values
        without = values == 0
        if without.any():
            harmfulness[without] = NeighbourIndex(self._queries).search(features[without], 1)[0][:, 0]
        return harmfulness

    def _features(self, source: DataSource, whose: str) -> np.ndarray:
        features = features_of(source, self.extractor_)
        check_features(torch.from_numpy(features), 0, whose)
        return features

    def _checked_samples(self, X: Any, name: str) -> DataSource:
        """Return samples as a source, or say what is wrong with them."""
        source = as_source(checked_data(X, reset=False))
        if tuple(source.sample_shape) != self._sample_shape:
            raise ValueError(
                f"{name} has instances of shape {tuple(source.sample_shape)}; expected {self._sample_shape}, that of "
                "the training data. Generated samples come on the scale and in the layout of what was trained on."
            )
        return source

    def _check_parameters(self) -> None:
        for name in ("k", "n_candidates", "n_generated"):
            value = getattr(self, name)
            optional = name != "k"
            if not (value is None and optional) and (not _is_count(value) or value < 1):
                raise ValueError(f"{name} must be a positive integer{' or None' if optional else ''}; got {value!r}.")
        if self.n_candidates is not None and self.n_candidates < self.k:
            raise ValueError(f"n_candidates must be at least k={self.k}; got {self.n_candidates}.")
        if self.recall not in RECALLS:
            raise ValueError(f"recall must be one of {list(RECALLS)}; got {self.recall!r}.")
        if self.query not in ("generated", "reference"):
            raise ValueError(f"query must be 'generated' or 'reference'; got {self.query!r}.")
        fixed = isinstance(self.temperature, Real) and not isinstance(self.temperature, bool)
        if self.temperature != "median" and not (fixed and float(self.temperature) > 0):
            raise ValueError(f"temperature must be 'median' or a number above zero; got {self.temperature!r}.")
        if self.quality not in (None, "realism") and not callable(self.quality):
            raise ValueError(f"quality must be 'realism', a function of samples or None; got {self.quality!r}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
