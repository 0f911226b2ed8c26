"""What is each family of metrics able to see, and what is noise? All of them beside their values for real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ganclean.data import DataSource, as_source
from ganclean.exceptions import MetricError
from ganclean.metrics import FID, FLD, KID, PRDC, Authenticity, CTTest, FeatureMetric, InceptionScore
from ganclean.metrics.extractors import features_of, resolve_extractor

BETTER = {
    "fid": "low",
    "kid": "low",
    "inception_score": "high",
    "precision": "high",
    "recall": "high",
    "density": "high",
    "coverage": "high",
    "ct": "as real",
    "authenticity": "as real",
    "fld": "low",
    "fld_gap": "as real",
}
"""The metrics of a panel, and which values are good."""
MIN_SAMPLES = 60
"""With as many, one of the three cells of C_T holds the twenty samples that it needs."""


@dataclass(frozen=True)
class MetricPanel:
    """Metrics of generated samples beside those of real data.

    Parameters
    ----------
    values : dict of str to ndarray of shape (n_splits,)
        Of the generated samples.
    null : dict of str to ndarray of shape (n_splits,)
        Of as many test instances in their place.
    n_samples : int
        Samples that each value is of.
    n_test, n_train : int
        Test and training instances that they were compared with.
    """

    values: dict[str, np.ndarray]
    null: dict[str, np.ndarray]
    n_samples: int
    n_test: int
    n_train: int

    def z(self, metric: str) -> float:
        """Return how many standard deviations of real data's values the mean is away from theirs.

        It is NaN or infinite where all splits of the real data have the same value.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return float((self.values[metric].mean() - self.null[metric].mean()) / self.null[metric].std(ddof=1))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return by metric the mean and standard deviation of both, z, and which values are good."""
        return {
            metric: {
                "mean": float(values.mean()),
                "sd": float(values.std(ddof=1)),
                "null_mean": float(self.null[metric].mean()),
                "null_sd": float(self.null[metric].std(ddof=1)),
                "z": self.z(metric),
                "better": BETTER[metric],
            }
            for metric, values in self.values.items()
        }

    def __str__(self) -> str:
        title = (
            f"{self.n_samples} samples against {self.n_test} test and {self.n_train} training instances: "
            f"mean (sd) of {len(next(iter(self.values.values())))} splits"
        )
        header = f"{'metric':<16}{'better':<9}{'generated':>21}{'real':>21}{'z':>9}"
        rows = [
            f"{name:<16}{row['better']:<9}{_text(row['mean'], row['sd']):>21}"
            f"{_text(row['null_mean'], row['null_sd']):>21}{row['z']:>9.3g}"
            for name, row in self.to_dict().items()
        ]
        return "\n".join([title, header, *rows])


def metric_panel(
    samples, X_test, X_train, *, feature_extractor=None, classifier=None, k=5, n_splits=5, random_state=0
) -> MetricPanel:
    """Evaluate samples by a metric of each family, and real data by the same metrics.

    In each split one random half of the test data is the reference. The samples, and the other half in their place,
    are compared with it and with the training data: as many of both, since most metrics depend on the number. Values
    within the scatter of real data's say nothing.

    Parameters
    ----------
    samples : estimator, array-like, Tensor or Dataset of shape (n, *sample_shape)
        Generated samples, of which half as many as test instances are drawn in each split, or all where there are
        fewer; or a fitted estimator that makes as many as test instances by ``sample(n)``, such as `GANInfluence`
        or `sklearn.mixture.GaussianMixture`.
    X_test : array-like, Tensor or Dataset of shape (n_test, *sample_shape)
        At least 120 instances of the distribution of the training data that were not trained on.
    X_train : array-like, Tensor or Dataset of shape (n_train, *sample_shape)
        What the generator was trained on. FLD needs twice as many as samples, or real data's value is below 0.
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors. Each
        instance's features are extracted once and serve all metrics.
    classifier : module or callable, optional
        From samples to class logits, for the Inception score, which is left out otherwise.
    k : int, default=5
        Which neighbour the balls of precision, recall, density and coverage reach to.
    n_splits : int, default=5
        At least 2.
    random_state : int, RandomState instance or None, default=0
        Draws the splits.

    Returns
    -------
    MetricPanel

    Raises
    ------
    ValueError
        If `n_splits` is not as expected.
    MetricError
        If there are too few samples or test instances, or they are not of one shape.
    NetworkError
        If the feature extractor cannot be had or does not return one vector per sample.
    NonFiniteError
        If a feature is NaN or infinite.

    Notes
    -----
    Splits share their instances: `z` is a guide and no test statistic. An FID, KID, precision, recall, density,
    coverage and Inception score like real data's do not tell whether the samples are copies; C_T, authenticity and FLD
    with its gap do. Samples that fit the data badly have a high C_T and authenticity, which is no merit.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.validation import metric_panel
    >>> X = np.random.default_rng(0).normal(size=(600, 2))
    >>> panel = metric_panel(X[:200], X[400:], X_train=X[:400])  # copies of training instances
    >>> abs(panel.z("fid")) < 5, panel.z("ct") < -5, float(panel.values["authenticity"].max())
    (True, True, 0.0)
    """
    if not isinstance(n_splits, Integral) or n_splits < 2:
        raise ValueError(f"n_splits must be an integer of at least 2; got {n_splits!r}.")
    test, train = as_source(X_test), as_source(X_train)
    made = as_source(_drawn(samples, len(test)))
    n_samples = min(len(made), len(test) // 2)
    if n_samples < MIN_SAMPLES:
        raise MetricError(
            f"A panel needs at least {MIN_SAMPLES} samples and {2 * MIN_SAMPLES} test instances; got {len(made)} and "
            f"{len(test)}."
        )
    if made.sample_shape != test.sample_shape:
        raise MetricError(
            f"The samples have shape {tuple(made.sample_shape)} and the test instances {tuple(test.sample_shape)}. "
            "Give both in the same form."
        )
    extractor = resolve_extractor(feature_extractor, test.sample_shape)
    judge = None if classifier is None else resolve_extractor(classifier, test.sample_shape)
    train_features = _features(train, extractor)
    generated, real = ((_features(x, extractor), None if judge is None else _features(x, judge)) for x in (made, test))
    rng = check_random_state(random_state)
    values: list[dict[str, float]] = []
    null: list[dict[str, float]] = []
    for _ in range(n_splits):
        rows, drawn = (torch.from_numpy(rng.permutation(len(x))) for x in (test, made))
        metrics = fitted_metrics(real[0][rows[n_samples:]], train_features, k)
        for side, (features, logits), chosen in ((values, generated, drawn), (null, real, rows)):
            chosen = chosen[:n_samples]
            side.append(metric_values(metrics, features[chosen], None if logits is None else logits[chosen]))
    return MetricPanel(_by_metric(values), _by_metric(null), n_samples, len(test) - n_samples, len(train))


def fitted_metrics(test: Tensor, train: Tensor, k: int = 5) -> list[FeatureMetric]:
    """Return a metric of each family, fitted to features.

    Parameters
    ----------
    test : Tensor of shape (n_test, n_features)
    train : Tensor of shape (n_train, n_features)
    k : int, default=5
    """
    metrics = [
        FID("pixels"),
        KID("pixels"),
        PRDC("pixels", k=k),
        CTTest(train, "pixels"),
        Authenticity(train, "pixels"),
        FLD(train, "pixels"),
    ]
    return [metric.fit(test) for metric in metrics]


def metric_values(metrics: list[FeatureMetric], features: Tensor, logits: Tensor | None = None) -> dict[str, float]:
    """Return the values of a panel's metrics.

    Parameters
    ----------
    metrics : list of FeatureMetric
        From `fitted_metrics`.
    features : Tensor of shape (n, n_features)
        Of the samples.
    logits : Tensor of shape (n, n_classes), optional
        A classifier's outputs for the samples.
    """
    fid, kid, prdc, ct, authenticity, fld = metrics
    divergence = fld.compute(features)
    values = {
        "fid": float(fid(features)),
        "kid": float(kid(features)),
        **prdc.compute(features),
        "ct": float(ct(features)),
        "authenticity": float(authenticity(features)),
        "fld": divergence["fld"],
        "fld_gap": divergence["gap"],
    }
    if logits is not None:
        values["inception_score"] = float(InceptionScore(nn.Identity()).fit(logits)(logits))
    return {name: values[name] for name in BETTER if name in values}


def _drawn(samples: Any, n: int) -> Any:
    """Return samples, of an estimator as many as asked for."""
    if not isinstance(samples, BaseEstimator):
        return samples
    check_is_fitted(samples)
    drawn = samples.sample(n)  # type: ignore[attr-defined]
    return drawn[0] if isinstance(drawn, tuple) else drawn


def _by_metric(splits: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([values[name] for values in splits]) for name in splits[0]}


def _features(source: DataSource, extractor: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.from_numpy(features_of(source, extractor))


def _text(mean: float, deviation: float) -> str:
    return f"{mean:.3g} ({deviation:.2g})"
