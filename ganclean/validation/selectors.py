"""Which instances to remove: influence, and the baselines that it must beat (theory, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.utils import check_random_state
from torch import nn

from ganclean.metrics import DiscriminatorLoss, FeatureMetric
from ganclean.metrics.extractors import features_of
from ganclean.valuation.density import DensitySelector

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence

Selector = Callable[["GANInfluence", int], np.ndarray]


def influence(cleaner: GANInfluence, seed: int) -> np.ndarray:
    """Return the harmfulness for the metric that decides."""
    return cleaner.harmfulness_


def discriminator_loss(cleaner: GANInfluence, seed: int) -> np.ndarray:
    """Return the harmfulness for the discriminator's loss: what influence would be if the loss told the quality."""
    metric = DiscriminatorLoss(cleaner.trajectory_.step.loss).fit(cleaner.reference_)
    trajectory = cleaner.trajectory_
    evaluator = cleaner._evaluator(metric.sample_size)
    _, gradient = evaluator.gradient("discriminator loss", metric, trajectory.state(len(trajectory)))
    return -clone(cleaner.backend_).fit(trajectory, {"": gradient}).influences_[""]


def isolation_forest(cleaner: GANInfluence, seed: int) -> np.ndarray:
    """Return how isolated the instances are in the metric's features."""
    features = metric_features(cleaner)
    return -IsolationForest(random_state=seed).fit(features).score_samples(features)


def density(cleaner: GANInfluence, seed: int) -> np.ndarray:
    """Return how improbable the instances are under a Gaussian in the metric's features, as in instance selection."""
    return DensitySelector().fit(metric_features(cleaner)).harmfulness_


def random(cleaner: GANInfluence, seed: int) -> np.ndarray:
    """Return a random order."""
    return check_random_state(seed).permutation(len(cleaner.influence_)).astype(np.float64)


SELECTORS: dict[str, Selector] = {
    "influence": influence,
    "discriminator_loss": discriminator_loss,
    "isolation_forest": isolation_forest,
    "density": density,
    "random": random,
}


def resolve_selector(name: str | Selector, cleaner: GANInfluence) -> Selector:
    """Return the selector that a name stands for; ``"influence:NAME"`` is influence on one of several metrics."""
    if callable(name):
        return name
    if name in SELECTORS:
        return SELECTORS[name]
    metric = name.removeprefix("influence:")
    if metric != name and metric in cleaner.metrics_:
        return _InfluenceOn(metric)
    known = [*SELECTORS, *(f"influence:{metric}" for metric in cleaner.metrics_)]
    raise ValueError(f"A selector must be one of {known}, or a function of (cleaner, seed); got {name!r}.")


class _InfluenceOn:
    """The harmfulness for one of several metrics; a class, so that it can be sent to another process."""

    def __init__(self, metric: str):
        self.metric = metric

    def __call__(self, cleaner: GANInfluence, seed: int) -> np.ndarray:
        sign = 1 if cleaner.metrics_[self.metric].greater_is_better else -1
        return sign * cleaner.influences_[self.metric]


def metric_features(cleaner: GANInfluence) -> np.ndarray:
    """Return the training instances' features of the deciding metric, or their values where it has none."""
    metric = cleaner.metric_
    extract = metric.extract if isinstance(metric, FeatureMetric) else nn.Flatten()
    return features_of(cleaner.trajectory_.source, extract)
