"""What generated samples owe to the training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.data import as_source
from ganclean.plotting.gallery import ImageGridDisplay
from ganclean.plotting.style import COLORS
from ganclean.valuation.credit import top_contributors

if TYPE_CHECKING:
    from ganclean.valuation import GMValuator


class AttributionDisplay:
    """Samples on the left, each beside the training images that it owes most to, with their shares of its credit.

    Parameters
    ----------
    samples : ndarray of shape (n, channels, height, width)
        Grey or colour, in [−1, 1].
    contributors : ndarray of shape (n, k, channels, height, width)
    shares : ndarray of shape (n, k)
        Of each sample's credit; they need not sum to 1, since others may have contributed too.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of matplotlib Axes, shape (n, k + 1)

    Examples
    --------
    >>> from ganclean.datasets import load_digits_images
    >>> from ganclean.plotting import AttributionDisplay
    >>> from ganclean.valuation import GMValuator
    >>> X, _ = load_digits_images()
    >>> valuator = GMValuator(feature_extractor="pixels").fit(X[:200], X_gen=X[200:220])
    >>> AttributionDisplay.from_estimator(valuator, X[:200], n_shown=2, k=3).axes_.shape
    (2, 4)
    """

    def __init__(self, samples, contributors, shares):
        self.samples = samples
        self.contributors = contributors
        self.shares = shares

    @classmethod
    def from_estimator(
        cls, valuator: GMValuator, X, samples=None, *, n_shown: int = 6, k: int = 7
    ) -> AttributionDisplay:
        """Show the first of some samples with the training images that they owe most to.

        Parameters
        ----------
        valuator : GMValuator
            Fitted.
        X : array-like, Tensor or Dataset
            The images that it was fitted on.
        samples : array-like, Tensor or Dataset, optional
            Generated images; default those that it was fitted with.
        n_shown : int, default=6
            Of the samples.
        k : int, default=7
            Training images beside each; at most as many as share a sample's credit.
        """
        source = as_source(valuator.samples_ if samples is None else samples)
        shown = source[list(range(min(n_shown, len(source))))]
        attributions = valuator.attributions_[: len(shown)] if samples is None else valuator.attribute(shown)
        rows, shares = top_contributors(attributions, min(k, int(np.diff(attributions.indptr).min())))
        contributors = np.stack([as_source(X)[of_one.tolist()].float().cpu().numpy() for of_one in rows])
        return cls(shown.float().cpu().numpy(), contributors, shares).plot()

    def plot(self) -> AttributionDisplay:
        """Show one row for each sample."""
        images = np.concatenate([np.asarray(self.samples)[:, None], self.contributors], axis=1)
        captions = [text for row in self.shares for text in ("sample", *(f"{share:.0%}" for share in row))]
        grid = ImageGridDisplay(images.reshape(-1, *images.shape[2:]), captions, n_columns=images.shape[1]).plot()
        for ax in grid.axes_[:, 0]:
            ax.spines[:].set(visible=True, color=COLORS["faint"], linewidth=2)
        self.figure_, self.axes_ = grid.figure_, grid.axes_
        return self
