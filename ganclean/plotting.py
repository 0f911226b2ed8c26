"""Displays, in scikit-learn's way: ``Display.from_…(…)`` computes and plots, ``.plot(ax=…)`` plots again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.data import as_source
from ganclean.exceptions import missing_extra

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence
    from ganclean.validation import CleansingCurve

COLORS = {"harmful": "#c2410c", "helpful": "#0f766e", "random": "#78716c", "none": "#1c1917"}


def _pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise missing_extra("matplotlib", "cli") from error
    return plt


def _tidy(ax):
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


class CleansingCurveDisplay:
    """A metric on held-out data against the fraction of the training data that was removed.

    Parameters
    ----------
    curve : CleansingCurve

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure
    """

    def __init__(self, curve: CleansingCurve):
        self.curve = curve

    @classmethod
    def from_curve(cls, curve: CleansingCurve, *, ax=None) -> CleansingCurveDisplay:
        """Plot a curve that `ganclean.validation.cleansing_curve` returned."""
        return cls(curve).plot(ax=ax)

    def plot(self, *, ax=None) -> CleansingCurveDisplay:
        """Plot the mean over seeds, with the seeds themselves as thin lines."""
        ax = _pyplot().subplots(figsize=(5.6, 3.6), layout="constrained")[1] if ax is None else ax
        curve = self.curve
        rates = 100 * np.concatenate([[0], curve.rates])
        names = {"influence": "most harmful removed", "random": "as many random ones removed"}
        for selector, color in (("random", COLORS["random"]), ("influence", COLORS["harmful"])):
            values = np.column_stack([curve.baseline, curve.values[selector]])
            ax.plot(rates, values.T, color=color, alpha=0.25, linewidth=0.8)
            ax.plot(rates, values.mean(axis=0), color=color, marker="o", label=names[selector])
        ax.axhline(curve.baseline.mean(), color=COLORS["none"], linestyle=":", linewidth=1, label="nothing removed")
        better = "higher" if curve.greater_is_better else "lower"
        ax.set(xlabel="training instances removed (%)", ylabel=f"{curve.metric}, held out ({better} is better)")
        ax.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
        ax.legend(frameon=False)
        _tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


class InfluenceHistogramDisplay:
    """How harmfulness is distributed over the training instances, and where the threshold lies.

    Parameters
    ----------
    harmfulness : ndarray of shape (n_samples,)
    threshold : float
    metric : str

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure
    """

    def __init__(self, harmfulness, threshold: float, metric: str):
        self.harmfulness = harmfulness
        self.threshold = threshold
        self.metric = metric

    @classmethod
    def from_estimator(cls, cleaner: GANInfluence, *, ax=None) -> InfluenceHistogramDisplay:
        """Plot a fitted cleanser's harmfulness."""
        return cls(cleaner.harmfulness_, cleaner.threshold_, cleaner.metric_name_).plot(ax=ax)

    def plot(self, *, ax=None) -> InfluenceHistogramDisplay:
        """Plot the histogram, the removed part in another colour."""
        ax = _pyplot().subplots(figsize=(5.6, 3.6), layout="constrained")[1] if ax is None else ax
        edges = np.histogram_bin_edges(self.harmfulness, bins=50)
        removed = self.harmfulness > self.threshold
        ax.hist(self.harmfulness[~removed], edges, color=COLORS["helpful"], alpha=0.8, label="kept")
        ax.hist(self.harmfulness[removed], edges, color=COLORS["harmful"], alpha=0.9, label="removed")
        ax.axvline(0, color=COLORS["none"], linewidth=0.8)
        ax.set(xlabel=f"harmfulness: predicted improvement of {self.metric} on removal", ylabel="instances")
        ax.legend(frameon=False)
        _tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


class ImageGridDisplay:
    """Images side by side, each with a caption.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width)
        Grey or colour, in [−1, 1].
    captions : list of str, optional
    n_columns : int, default=8
    frame : str, optional
        Colour of the frames.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of matplotlib Axes
    """

    def __init__(self, images, captions=None, n_columns: int = 8, frame: str | None = None):
        self.images = images
        self.captions = captions
        self.n_columns = n_columns
        self.frame = frame

    @classmethod
    def from_estimator(
        cls, cleaner: GANInfluence, X, *, which: str = "harmful", n_shown: int = 16, n_columns: int = 8
    ) -> ImageGridDisplay:
        """Show the most harmful or the most helpful training images with their harmfulness.

        Parameters
        ----------
        cleaner : GANInfluence
            Fitted.
        X : array-like, Tensor or Dataset
            The images that it was fitted on.
        which : {"harmful", "helpful"}, default="harmful"
        n_shown : int, default=16
        n_columns : int, default=8
        """
        if which not in ("harmful", "helpful"):
            raise ValueError(f"which must be 'harmful' or 'helpful'; got {which!r}.")
        order = np.argsort(-cleaner.harmfulness_ if which == "harmful" else cleaner.harmfulness_, kind="stable")
        rows = order[:n_shown]
        images = as_source(X)[rows.tolist()].float().cpu().numpy()
        captions = [f"{cleaner.harmfulness_[row]:+.2g}" for row in rows]
        return cls(images, captions, n_columns, COLORS[which]).plot()

    def plot(self) -> ImageGridDisplay:
        """Show the grid."""
        images = np.asarray(self.images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Expected grey or colour images, shape (n, 1 or 3, height, width); got {images.shape}.")
        n_rows = -(-len(images) // self.n_columns)
        height = 1.0 if self.captions is not None else 0.85
        figure, axes = _pyplot().subplots(
            n_rows,
            self.n_columns,
            figsize=(0.85 * self.n_columns, height * n_rows),
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for i, (ax, image) in enumerate(zip(axes.flat, images)):
            picture = np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1)
            ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            if self.captions is not None:
                ax.set_xlabel(self.captions[i], fontsize=7, labelpad=2)
            if self.frame is not None:
                ax.spines[:].set(visible=True, color=self.frame, linewidth=1.5)
        self.figure_, self.axes_ = figure, axes
        return self
