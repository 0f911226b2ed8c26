"""Precision, recall, density and coverage: fidelity and variety apart, by nearest neighbours in feature space."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ganclean.data import as_source
from ganclean.distances import ball_radii, check_features, distances, rows_at_once
from ganclean.metrics.base import FeatureMetric

QUANTITIES = ("precision", "recall", "density", "coverage")
"""Distances that are in memory at a time."""


class PRDC(FeatureMetric):
    """Precision, recall, density or coverage of generated samples; higher is better. For evaluation only.

    All four draw a ball around every instance that reaches to its k-th nearest neighbour among its own kind, and count.
    Counts have no gradient: influence is computed on another metric, and these tell what a removal did to fidelity
    (precision, density) and to variety (recall, coverage).

    Parameters
    ----------
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors.
    k : int, default=5
        Which neighbour a ball reaches to, the instance itself not counted. Published precision and recall use 3.
    quantity : {"precision", "recall", "density", "coverage"}, default="coverage"
        What a call returns:

        - precision: fraction of the samples that lie in the ball of some reference instance;
        - recall: fraction of the reference instances that lie in the ball of some sample;
        - density: number of reference balls that a sample lies in, over k, averaged; near 1 for samples of the
          reference's own distribution, and more where they crowd its dense regions;
        - coverage: fraction of the reference instances whose ball holds some sample; unlike recall, no ball of an
          outlying sample can raise it.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000. All but precision depend on it.

    Attributes
    ----------
    features_ : Tensor of shape (n_reference, n_features), float64
        Of the reference.
    radii_ : Tensor of shape (n_reference,), float64
        Of the reference's balls.

    Notes
    -----
    What lies on the surface of a ball lies in it, as in Kynkäänniemi et al. (2019), equation 1; implementations that
    compare with < differ where distances tie, as between duplicates. Distances are sums of squared differences and
    not matrix products, which would round ties apart; that costs about 1 ns per pair and feature on one CPU core.

    References
    ----------
    Kynkäänniemi et al., Improved precision and recall metric for assessing generative models, 2019, section 2.

    Naeem et al., Reliable fidelity and diversity metrics for generative models, 2020, section 3.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import PRDC
    >>> X = torch.arange(8.0)[:, None]
    >>> PRDC(k=1).fit(X).compute(X[:4] + 0.1)
    {'precision': 1.0, 'recall': 0.625, 'density': 2.0, 'coverage': 0.625}
    """

    greater_is_better = True
    is_differentiable = False

    def __init__(self, feature_extractor=None, k=5, quantity="coverage", n_samples=None):
        self.feature_extractor = feature_extractor
        self.k = k
        self.quantity = quantity
        self.n_samples = n_samples

    def fit(self, reference, y=None):
        """Extract the features of the reference data and draw their balls.

        Parameters
        ----------
        reference : array-like, Tensor or Dataset of shape (n_reference, *sample_shape)
        y : ignored

        Raises
        ------
        ValueError
            If `k` or `quantity` is not as expected.
        MetricError
            If there are not more than k reference instances.
        NetworkError
            If the feature extractor cannot be had or does not return one vector per sample.
        NonFiniteError
            If a feature is NaN or infinite.
        """
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1; got {self.k!r}.")
        if self.quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {list(QUANTITIES)}; got {self.quantity!r}.")
        return super().fit(reference)

    def fit_features(self, features):
        check_features(features, self.k, "reference instances")
        self.features_, self.radii_ = features, ball_radii(features, self.k)

    @torch.no_grad()
    def compute(self, samples) -> dict[str, float]:
        """Return all four quantities of some samples, at the cost of one.

        Parameters
        ----------
        samples : array-like, Tensor or Dataset of shape (n, *sample_shape)

        Returns
        -------
        dict of str to float
            ``"precision"``, ``"recall"``, ``"density"`` and ``"coverage"``.
        """
        features = torch.cat([self.extract(batch) for batch in as_source(samples).batches()])
        return {name: float(value) for name, value in self._compute(features, QUANTITIES).items()}

    @torch.no_grad()
    def __call__(self, samples, *discriminator):
        """Return the chosen quantity of some samples, shape (n, *sample_shape), as a scalar without gradient."""
        return super().__call__(samples)

    @torch.no_grad()
    def reduce(self, features):
        return self._compute(features, [self.quantity])[self.quantity]

    def _compute(self, features: Tensor, quantities: Sequence[str]) -> dict[str, Tensor]:
        # Only recall draws balls around the samples.
        check_features(features, self.k if "recall" in quantities else 0, "generated samples")
        reference, radii = self.features_.to(features), self.radii_.to(features)
        sample_radii = ball_radii(features, self.k) if "recall" in quantities else None
        values = precision_recall_density_coverage(reference, radii, features, sample_radii, self.k)
        return {name: values[name] for name in quantities}


def precision_recall_density_coverage(
    reference: Tensor, radii: Tensor, samples: Tensor, sample_radii: Tensor | None, k: int
) -> dict[str, Tensor]:
    """Return the four quantities of features, without recall where the samples have no balls.

    Parameters
    ----------
    reference : Tensor of shape (n_reference, n_features)
    radii : Tensor of shape (n_reference,)
    samples : Tensor of shape (n, n_features)
    sample_radii : Tensor of shape (n,), optional
    k : int
        Which neighbour the balls reach to.

    Returns
    -------
    dict of str to Tensor
        float64 scalars.
    """
    balls_around = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    covered, recalled = [], []
    rows = rows_at_once(len(samples))
    for centres, reach in zip(reference.split(rows), radii.split(rows)):
        between = distances(centres, samples)
        inside = between <= reach[:, None]
        balls_around += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        if sample_radii is not None:
            recalled.append((between <= sample_radii).any(dim=1))
    values = {
        "precision": (balls_around > 0).double().mean(),
        "density": balls_around.double().mean() / k,
        "coverage": torch.cat(covered).double().mean(),
    }
    if sample_radii is not None:
        values["recall"] = torch.cat(recalled).double().mean()
    return values
