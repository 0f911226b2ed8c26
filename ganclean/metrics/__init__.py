"""Metrics of generated samples: what a training instance can harm."""

from ganclean.metrics.base import FeatureMetric, Metric
from ganclean.metrics.elementary import DiscriminatorLoss, FunctionMetric, SampleMean
from ganclean.metrics.extractors import InceptionV3, train_classifier
from ganclean.metrics.fld import FLD
from ganclean.metrics.frechet import FID
from ganclean.metrics.inception import InceptionScore
from ganclean.metrics.kernel import KID, MMD
from ganclean.metrics.likelihood import AverageLogLikelihood
from ganclean.metrics.memorisation import Authenticity, CTTest
from ganclean.metrics.prdc import PRDC

METRICS: dict[str, type[Metric]] = {
    "fid": FID,
    "kid": KID,
    "mmd": MMD,
    "inception_score": InceptionScore,
    "log_likelihood": AverageLogLikelihood,
}


def resolve_metric(metric) -> Metric:
    """Return the metric that a name or a metric object stands for."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]()
    raise ValueError(f"metric must be one of {sorted(METRICS)}, a Metric object, or a dict of them; got {metric!r}.")


__all__ = [
    "FID",
    "FLD",
    "KID",
    "MMD",
    "PRDC",
    "Authenticity",
    "AverageLogLikelihood",
    "CTTest",
    "DiscriminatorLoss",
    "FeatureMetric",
    "FunctionMetric",
    "InceptionScore",
    "InceptionV3",
    "Metric",
    "SampleMean",
    "resolve_metric",
    "train_classifier",
]
