"""FLD: the feature likelihood divergence, which sees fidelity, variety and memorisation at once."""

from __future__ import annotations

import math

import torch
from sklearn.utils import check_random_state
from torch import Tensor

from ganclean.distances import check_features
from ganclean.exceptions import MetricError
from ganclean.metrics.memorisation import MemorisationMetric

QUANTITIES = ("fld", "gap")
VARIANCE_FLOOR = 1e-12
"""In units of the standardised features: far above rounding, far below any distance that is no copy's."""
BACKGROUND_SHRINKAGE = 0.9**2
"""By which squared distances to the background's centre are multiplied, so that no instance is without density."""


class FLD(MemorisationMetric):
    """Feature likelihood divergence of generated samples, or its generalisation gap. For evaluation only.

    A mixture of isotropic Gaussians, one at each sample, is fitted to the training data by its variances alone. How
    probable it makes test data tells the quality of the samples; where it makes the training data much more probable
    than test data, the samples are copies, whose variances collapse.

    Parameters
    ----------
    train : array-like, Tensor or Dataset of shape (n_train, *sample_shape)
        What the generator was trained on.
    feature_extractor : module, callable, "inception", "pixels" or None, default=None
        From samples to vectors. None takes Inception-v3 for images and the values themselves for vectors.
    quantity : {"fld", "gap"}, default="fld"
        What a call returns, in hundredths of a nat per feature:

        - fld: negative log-likelihood of the test data, less that under a mixture centred on training data; lower is
          better, and 0 is as good as training data;
        - gap: negative log-likelihood of the training data less that of the test data; the further below 0, the more
          the samples follow the training data.
    n_samples : int, optional
        Generated samples; default as many as reference instances, at most 5,000. Take no more than half as many as
        training instances: the baseline has no more centres, and FLD falls below 0 beyond.
    max_iter : int, default=100
        Steps of expectation maximisation.
    tol : float, default=1e-6
        Stop where a step raises the mean log-likelihood per feature by less.
    random_state : int, RandomState instance or None, default=0
        Divides the training data for the baseline.

    Attributes
    ----------
    train_features_ : Tensor of shape (n_train, n_features), float64
    features_ : Tensor of shape (n_reference, n_features), float64
        Of the test data.

    Notes
    -----
    Features are standardised by those of the test data. In the fit only, a background component at the mean of the
    training data takes what no sample explains. Variances are found by expectation maximisation, whose steps are in
    closed form and never lower the likelihood; published code takes 50 steps of Adam from the same start. Squared
    distances between all samples and training instances are in memory: 8 n_train n bytes, a few times over.

    References
    ----------
    Jiralerspong et al., Feature likelihood divergence: evaluating the generalization of generative models using
    samples, 2023, section 3.

    Examples
    --------
    >>> import torch
    >>> from ganclean.metrics import FLD
    >>> X = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> train, test, fresh = X.split([200, 100, 100])
    >>> values = FLD(train).fit(test).compute(fresh)
    >>> abs(values["fld"]) < 50, values["gap"] > -50
    (True, True)
    >>> FLD(train).fit(test).compute(train[:100] + 1e-3)["gap"] < -500
    True
    """

    def __init__(
        self, train, feature_extractor=None, quantity="fld", n_samples=None, max_iter=100, tol=1e-6, random_state=0
    ):
        self.train = train
        self.feature_extractor = feature_extractor
        self.quantity = quantity
        self.n_samples = n_samples
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    @property
    def greater_is_better(self):  # type: ignore[override]
        """Whether a larger value means better samples: of the gap, yes; of the divergence, no."""
        return self.quantity == "gap"

    def fit_features(self, features):
        if self.quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {list(QUANTITIES)}; got {self.quantity!r}.")
        super().fit_features(features)
        if len(features) < 2:
            raise MetricError(f"FLD needs at least 2 reference instances to standardise features; got {len(features)}.")
        self._mean, scale = features.mean(dim=0), features.std(dim=0)
        self._scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self._baselines: dict[int, float] = {}

    @torch.no_grad()
    def compute(self, samples) -> dict[str, float]:
        """Return both quantities of some samples, at the cost of one.

        Parameters
        ----------
        samples : Tensor of shape (n, *sample_shape)

        Returns
        -------
        dict of str to float
            ``"fld"`` and ``"gap"``.
        """
        return {name: float(value) for name, value in self._compute(self.extract(samples)).items()}

    @torch.no_grad()
    def reduce(self, features):
        return self._compute(features)[self.quantity]

    def _compute(self, features: Tensor) -> dict[str, Tensor]:
        check_features(features, 0, "generated samples")
        centres, train, test = (
            (x.to(features) - self._mean.to(features)) / self._scale.to(features)
            for x in (features, self.train_features_, self.features_)
        )
        log_variances = self._fit(centres, train)
        on_train, on_test = (-log_likelihood(x, centres, log_variances) for x in (train, test))
        return {"fld": 100 * (on_test - self._baseline(len(features), train, test)), "gap": 100 * (on_train - on_test)}

    def _fit(self, centres: Tensor, train: Tensor) -> Tensor:
        return fit_log_variances(centres, train, self.max_iter, self.tol)[:-1]

    def _baseline(self, n_samples: int, train: Tensor, test: Tensor) -> float:
        """Return the negative log-likelihood of the test data under a mixture at training instances."""
        n_centres = min(n_samples, len(train) // 2)
        if n_centres not in self._baselines:
            order = torch.from_numpy(check_random_state(self.random_state).permutation(len(train))).to(train.device)
            centres, rest = train[order[:n_centres]], train[order[n_centres:]]
            self._baselines[n_centres] = -float(log_likelihood(test, centres, self._fit(centres, rest)))
        return self._baselines[n_centres]


def fit_log_variances(centres: Tensor, data: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the logarithms of the variances with which Gaussians at given centres make data most probable.

    Parameters
    ----------
    centres : Tensor of shape (n_centres, n_features)
    data : Tensor of shape (n, n_features)
    max_iter : int
    tol : float
        In the mean log-likelihood per feature.

    Returns
    -------
    Tensor of shape (n_centres + 1,)
        At least the logarithm of `VARIANCE_FLOOR`; the last is that of the background.
    """
    n_features, floor = data.shape[1], math.log(VARIANCE_FLOOR)
    # The background has the weight of all the others together.
    to_mean = (data - data.mean(dim=0)).square().sum(dim=1, keepdim=True)
    squares = torch.cat([torch.cdist(data, centres).square(), BACKGROUND_SHRINKAGE * to_mean], dim=1)
    log_weights = squares.new_full((squares.shape[1],), -math.log(len(centres)))
    log_weights[-1] = 0.0
    log_variances = ((squares.amin(dim=0) + 1e-3) / n_features).log()
    log_variances[-1] = 0.0
    log_squares, likelihood = squares.log(), -math.inf
    for _ in range(max_iter):
        log_shares = log_weights + log_normal(squares, log_variances, n_features)
        totals = log_shares.logsumexp(dim=1, keepdim=True)
        previous, likelihood = likelihood, float(totals.mean()) / n_features
        if likelihood - previous < tol:
            break
        log_shares -= totals
        weighted = (log_shares + log_squares).logsumexp(dim=0) - log_shares.logsumexp(dim=0)
        log_variances = (weighted - math.log(n_features)).clamp(min=floor)
    return log_variances


def log_likelihood(data: Tensor, centres: Tensor, log_variances: Tensor) -> Tensor:
    """Return the mean log-density per feature of data under equally weighted isotropic Gaussians."""
    n_features = data.shape[1]
    densities = log_normal(torch.cdist(data, centres).square(), log_variances, n_features)
    return (densities.logsumexp(dim=1).mean() - math.log(len(centres))) / n_features


def log_normal(squares: Tensor, log_variances: Tensor, n_features: int) -> Tensor:
    """Return the log-density of isotropic Gaussians from squared distances to their centres."""
    return -squares / (2 * log_variances.exp()) - n_features / 2 * (log_variances + math.log(2 * math.pi))
