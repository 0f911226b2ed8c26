"""What influence has to beat: chance, outlier detection, and gradients that are not followed through training."""

from __future__ import annotations

import numpy as np
from sklearn.utils import check_random_state

from ganclean.backends.base import InfluenceBackend
from ganclean.backends.itd import ITD
from ganclean.metrics.extractors import features_of, resolve_extractor


class RandomScore(InfluenceBackend):
    """Scores instances at random: what removal of as many does whatever they are.

    Parameters
    ----------
    random_state : int, RandomState instance or None

    Attributes
    ----------
    influences_ : dict of str to ndarray of shape (n_samples,), float64
        One random order for all metrics.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.backends import RandomScore
    >>> X = np.random.default_rng(0).normal(size=(64, 2))
    >>> backend = RandomScore(random_state=0)
    >>> GANInfluence(trainer=GANTrainer(n_epochs=1), backend=backend, n_remove=8).fit(X).transform(X).shape
    (56, 2)
    """

    predicts = False
    needs_run = False

    def __init__(self, random_state=None):
        self.random_state = random_state

    def fit(self, trajectory, gradients, progress=None):
        rng = check_random_state(self.random_state)
        scores = rng.uniform(size=len(trajectory.source))
        self.influences_ = dict.fromkeys(gradients, scores)
        self._seed = rng.randint(2**31)
        return self

    def score_samples(self, trajectory, gradient, samples):
        return np.random.RandomState(self._seed).uniform(size=len(samples))


class IsolationForestScore(InfluenceBackend):
    """Scores instances by how isolated they are: `sklearn.ensemble.IsolationForest` on features of the data.

    It looks at the data alone, not at training: an outlier that the generator never imitates does no harm.

    Parameters
    ----------
    feature_extractor : module, callable, "inception" or "pixels", default="pixels"
        From a batch of instances to vectors.
    n_estimators : int, default=100
        The number of trees.
    random_state : int, RandomState instance or None

    Attributes
    ----------
    influences_ : dict of str to ndarray of shape (n_samples,), float64
        One score for all metrics, high for outliers.
    forest_ : IsolationForest

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.backends import IsolationForestScore
    >>> X = np.r_[np.random.default_rng(0).normal(size=(63, 2)), [[9.0, 9.0]]]
    >>> backend = IsolationForestScore(random_state=0)
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=1), backend=backend, n_remove=1).fit(X)
    >>> bool(cleanser.support_[63])
    False
    """

    predicts = False
    needs_run = False

    def __init__(self, feature_extractor="pixels", n_estimators=100, random_state=None):
        self.feature_extractor = feature_extractor
        self.n_estimators = n_estimators
        self.random_state = random_state

    def fit(self, trajectory, gradients, progress=None):
        from sklearn.ensemble import IsolationForest  # imported here, as all other back-ends do without trees

        source = trajectory.source
        self.extractor_ = resolve_extractor(self.feature_extractor, tuple(source.sample_shape))
        features = features_of(source, self.extractor_)
        self.forest_ = IsolationForest(n_estimators=self.n_estimators, random_state=self.random_state).fit(features)
        scores = -self.forest_.score_samples(features)
        self.influences_ = dict.fromkeys(gradients, scores)
        return self

    def score_samples(self, trajectory, gradient, samples):
        return -self.forest_.score_samples(features_of(samples, self.extractor_))


class GradientDot(ITD):
    """TracIn for GANs: the metric's gradient times each instance's gradient, summed over the traced steps.

    The metric's gradient is held fixed instead of being followed back through the steps. What separates it from `ITD`
    is what the cross-Jacobians bring: an instance reaches the generator only through later steps. Where both networks
    are updated simultaneously, the score for a metric of the generator's samples is therefore zero; in an alternating
    update the generator sees the discriminator's move within the same step.

    Parameters and attributes are those of `ITD`.

    References
    ----------
    Pruthi, Liu, Kale, Sundararajan, Estimating training data influence by tracing gradient descent, NeurIPS 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.backends import GradientDot
    >>> X = np.random.default_rng(0).normal(size=(64, 2))
    >>> fits = [
    ...     GANInfluence(trainer=GANTrainer(n_epochs=2, update=u), backend=GradientDot(), random_state=0).fit(X)
    ...     for u in ("simultaneous", "alternating")
    ... ]
    >>> [bool(fit.influence_.any()) for fit in fits]
    [False, True]
    """

    _propagates = False
