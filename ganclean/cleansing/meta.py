"""CleansedEstimator: an estimator that is fitted on cleansed data."""

from __future__ import annotations

from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted


def _estimator_has(method):
    def check(self):
        return hasattr(getattr(self, "estimator_", self.estimator), method)

    return check


class CleansedEstimator(MetaEstimatorMixin, BaseEstimator):
    """Fits a cleanser, drops rows, and fits an estimator on the rest; predictions are the estimator's.

    Nothing is dropped at prediction, so it works in scikit-learn's ``Pipeline``, ``GridSearchCV`` and
    ``cross_validate``, with ``cleanser__n_remove`` to tune.

    Parameters
    ----------
    cleanser : estimator with `fit_resample`
        For instance `GANInfluence`.
    estimator : estimator
        Fitted on the kept rows.

    Attributes
    ----------
    cleanser_, estimator_ : estimators
        The fitted clones.
    classes_ : ndarray
        Those of the fitted estimator, where it has them.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from ganclean import CleansedEstimator, GANInfluence, GANTrainer
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(100, 2)), np.arange(100) % 2
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2), n_remove=20, random_state=0)
    >>> CleansedEstimator(cleanser, LogisticRegression()).fit(X, y).predict(X).shape
    (100,)
    """

    def __init__(self, cleanser, estimator):
        self.cleanser = cleanser
        self.estimator = estimator

    def fit(self, X, y=None, **fit_params):
        """Fit the cleanser on all rows and the estimator on those that it keeps.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
        y : array-like of shape (n_samples,), optional
        **fit_params
            Passed to the cleanser's `fit_resample`, for instance ``X_val``.
        """
        self.cleanser_ = clone(self.cleanser)
        X, y = self.cleanser_.fit_resample(X, y, **fit_params)
        self.estimator_ = clone(self.estimator).fit(X, y)
        for name in ("classes_", "n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        return self

    @available_if(_estimator_has("predict"))
    def predict(self, X):
        """Return the estimator's predictions."""
        check_is_fitted(self)
        return self.estimator_.predict(X)

    @available_if(_estimator_has("predict_proba"))
    def predict_proba(self, X):
        """Return the estimator's class probabilities."""
        check_is_fitted(self)
        return self.estimator_.predict_proba(X)

    @available_if(_estimator_has("decision_function"))
    def decision_function(self, X):
        """Return the estimator's decision function."""
        check_is_fitted(self)
        return self.estimator_.decision_function(X)

    @available_if(_estimator_has("transform"))
    def transform(self, X):
        """Return the estimator's transformation; no rows are dropped."""
        check_is_fitted(self)
        return self.estimator_.transform(X)

    @available_if(_estimator_has("score"))
    def score(self, X, y=None):
        """Return the estimator's score."""
        check_is_fitted(self)
        return self.estimator_.score(X, y)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        inner = self.estimator.__sklearn_tags__()
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags = inner.classifier_tags
        tags.regressor_tags = inner.regressor_tags
        tags.target_tags = inner.target_tags
        return tags
