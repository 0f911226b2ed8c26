"""What all cleansers share: from one harmfulness for each instance to kept rows."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from ganclean.data import DataSource, as_source, checked_data, fingerprint, take


class Cleanser(BaseEstimator):
    """Base class of estimators that score training instances and drop the most harmful.

    A subclass has a parameter `n_remove`. Its `fit` checks the data by ``_check_data(X, reset=True)``, sets
    ``_fingerprint`` to theirs and calls ``_drop``; its ``_harmfulness_of`` scores instances that were not trained on.
    A subclass that chooses the kept rows by a rule of its own calls ``_keep`` instead.
    """

    n_remove: float | int | str
    _fingerprint: str

    def __sklearn_is_fitted__(self) -> bool:
        """A fit that failed half-way leaves what it had computed, but no kept rows."""
        return hasattr(self, "support_")

    def fit_resample(self, X, y=None, **fit_params):
        """Fit and return the kept rows: imbalanced-learn's protocol.

        Parameters
        ----------
        X : array-like, Tensor or Dataset of shape (n_samples, *sample_shape)
        y : array-like of shape (n_samples,), optional
        **fit_params
            Passed to `fit`.

        Returns
        -------
        X_kept, y_kept
            In the containers that they came in; y_kept is None where y is.
        """
        if y is not None:
            check_consistent_length(X, y)
        self.fit(X, y, **fit_params)
        kept = self.sample_indices_
        return take(X, kept), None if y is None else take(y, kept)

    @property
    def transform(self):
        """Drop harmful rows: ``transform(X)``, once fitted.

        On the data of `fit` (the same content, and the same labels where conditional networks are trained and a Dataset
        holds them) it keeps the rows of `support_`; of other data it drops the rows whose `score_samples` is above
        `threshold_`. An array gives an array, a tensor a tensor, a DataFrame a DataFrame and a
        Dataset a `torch.utils.data.Subset`.
        """
        # NotFittedError is an AttributeError too: hasattr is False until fitted, as imbalanced-learn's Pipeline needs.
        check_is_fitted(self)
        return self._transform

    def _transform(self, X):
        data = self._check_data(X)
        if self._is_training_data(data):
            return take(X, self.sample_indices_)
        return take(X, np.flatnonzero(self._harmfulness_of(data) <= self.threshold_))

    def score_samples(self, X, y=None):
        """Return the harmfulness that instances would have had in training, on the scale of `harmfulness_`.

        Parameters
        ----------
        X : array-like, Tensor or Dataset of shape (n, *sample_shape)
        y : array-like of shape (n, ...), optional
            The labels of conditional networks; otherwise ignored.

        Returns
        -------
        ndarray of shape (n,), float64
        """
        check_is_fitted(self)
        return self._harmfulness_of(self._check_data(X), y)

    def get_support(self, indices=False):
        """Return the mask of the kept rows, or their indices.

        Parameters
        ----------
        indices : bool, default=False
        """
        check_is_fitted(self)
        return self.sample_indices_ if indices else self.support_

    def _harmfulness_of(self, data: Any, y: Any = None) -> np.ndarray:
        """Return the harmfulness of checked instances that were not trained on."""
        raise NotImplementedError

    def _check_data(self, X, reset=False):
        """Check data and return them as an array, a tensor or a Dataset; remember their form where `reset`."""
        if reset:
            for name in ("support_", "feature_names_in_"):
                vars(self).pop(name, None)
        data = checked_data(X, self, reset)
        shape = tuple(DataSource(data).sample_shape)
        if reset:
            self._sample_shape, self._returns_arrays = shape, isinstance(data, np.ndarray)
            self.n_features_in_ = int(np.prod(shape))
        elif shape != self._sample_shape:
            raise ValueError(f"X has instances of shape {shape}, but fit was called with shape {self._sample_shape}.")
        return data

    def _count_to_remove(self, n_samples: int) -> int:
        n = self.n_remove
        if isinstance(n, Integral) and not isinstance(n, bool) and 0 <= int(n) < n_samples:
            return int(n)
        if isinstance(n, Real) and not isinstance(n, Integral) and 0 <= float(n) < 1:
            # Rounding up to all instances would leave nothing to train on.
            return min(round(float(n) * n_samples), n_samples - 1)
        raise ValueError(
            f"n_remove must be a fraction in [0, 1) or a count below the {n_samples} instances; got {n!r}."
        )

    def _drop(self, harmfulness: np.ndarray, n_remove: int) -> None:
        """Keep all but the most harmful instances."""
        support = np.ones(len(harmfulness), dtype=bool)
        support[np.argsort(-harmfulness, kind="stable")[:n_remove]] = False
        self._keep(harmfulness, support)

    def _keep(self, harmfulness: np.ndarray, support: np.ndarray) -> None:
        """Set the attributes that say which instances are kept."""
        self.harmfulness_, self.support_ = harmfulness, support
        self.sample_indices_ = np.flatnonzero(self.support_)
        self.sample_weight_ = self.support_.astype(np.float64)
        self.threshold_ = float(self.harmfulness_[self.support_].max())

    def _is_training_data(self, data) -> bool:
        return len(as_source(data)) == len(self.support_) and fingerprint(data) == self._fingerprint
