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
from ganclean.recipes.adversarial import adversarial_loss
from ganclean.valuation.density import DensitySelector

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence

Selector = Callable[["GANInfluence", int], np.ndarray]


def influence(cleanser: GANInfluence, seed: int) -> np.ndarray:
    """Return the harmfulness for the metric that decides."""
    return cleanser.harmfulness_


def discriminator_loss(cleanser: GANInfluence, seed: int) -> np.ndarray:
    """Return the harmfulness for the discriminator's loss: what influence would be if the loss told the quality."""
    metric = DiscriminatorLoss(adversarial_loss(cleanser.trajectory_.step.updates)).fit(cleanser.reference_)
    trajectory = cleanser.trajectory_
    evaluator = cleanser.evaluator(metric.sample_size)
    _, gradient = evaluator.gradient("discriminator loss", metric, trajectory.state(len(trajectory)))
    return -clone(cleanser.backend_).fit(trajectory, {"": gradient}).influences_[""]


def isolation_forest(cleanser: GANInfluence, seed: int) -> np.ndarray:
    """Return how isolated the instances are in the metric's features."""
    features = metric_features(cleanser)
    return -IsolationForest(random_state=seed).fit(features).score_samples(features)


def density(cleanser: GANInfluence, seed: int) -> np.ndarray:
    """Return how improbable the instances are under a Gaussian in the metric's features, as in instance selection."""
    return DensitySelector().fit(metric_features(cleanser)).harmfulness_


def random(cleanser: GANInfluence, seed: int) -> np.ndarray:
    """Return a random order."""
    return check_random_state(seed).permutation(len(cleanser.influence_)).astype(np.float64)


SELECTORS: dict[str, Selector] = {
    "influence": influence,
    "discriminator_loss": discriminator_loss,
    "isolation_forest": isolation_forest,
    "density": density,
    "random": random,
}


def resolve_selector(name: str | Selector, cleanser: GANInfluence) -> Selector:
    """Return the selector that a name stands for; ``"influence:NAME"`` is influence on one of several metrics."""
    if callable(name):
        return name
    if name in SELECTORS:
        return SELECTORS[name]
    metric = name.removeprefix("influence:")
    if metric != name and metric in cleanser.metrics_:
        return _InfluenceOn(metric)
    known = [*SELECTORS, *(f"influence:{metric}" for metric in cleanser.metrics_)]
    raise ValueError(f"A selector must be one of {known}, or a function of (cleanser, seed); got {name!r}.")


class _InfluenceOn:
    """The harmfulness for one of several metrics; a class, so that it can be sent to another process."""

    def __init__(self, metric: str):
        self.metric = metric

    def __call__(self, cleanser: GANInfluence, seed: int) -> np.ndarray:
        sign = 1 if cleanser.metrics_[self.metric].greater_is_better else -1
        return sign * cleanser.influences_[self.metric]


def metric_features(cleanser: GANInfluence) -> np.ndarray:
    """Return the training instances' features of the deciding metric, or their values where it has none."""
    metric = cleanser.metric_
    extract = metric.extract if isinstance(metric, FeatureMetric) else nn.Flatten()
    return features_of(cleanser.trajectory_.source, extract)
