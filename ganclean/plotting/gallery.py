"""What harmful and helpful instances look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.data import as_source
from ganclean.plotting.style import COLORS, axes, pyplot

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence


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
        cls, cleanser: GANInfluence, X, *, which: str = "harmful", n_shown: int = 16, n_columns: int = 8
    ) -> ImageGridDisplay:
        """Show the most harmful or the most helpful training images with their harmfulness.

        Parameters
        ----------
        cleanser : GANInfluence
            Fitted.
        X : array-like, Tensor or Dataset
            The images that it was fitted on.
        which : {"harmful", "helpful"}, default="harmful"
        n_shown : int, default=16
        n_columns : int, default=8
        """
        if which not in ("harmful", "helpful"):
            raise ValueError(f"which must be 'harmful' or 'helpful'; got {which!r}.")
        order = np.argsort(-cleanser.harmfulness_ if which == "harmful" else cleanser.harmfulness_, kind="stable")
        rows = order[:n_shown]
        images = as_source(X)[rows.tolist()].float().cpu().numpy()
        captions = [f"{cleanser.harmfulness_[row]:+.2g}" for row in rows]
        return cls(images, captions, n_columns, COLORS[which]).plot()

    def plot(self) -> ImageGridDisplay:
        """Show the grid."""
        images = np.asarray(self.images)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Expected grey or colour images, shape (n, 1 or 3, height, width); got {images.shape}.")
        n_rows = -(-len(images) // self.n_columns)
        # In inches. Matplotlib's own layout of this many Axes takes seconds.
        size, gap, below = 0.8, 0.06, 0.22 if self.captions is not None else 0.06
        width, height = self.n_columns * (size + gap) + gap, n_rows * (size + below) + gap
        figure, axes_ = pyplot().subplots(
            n_rows,
            self.n_columns,
            figsize=(width, height),
            squeeze=False,
            gridspec_kw={
                "left": gap / width,
                "right": 1 - gap / width,
                "bottom": below / height,
                "top": 1 - gap / height,
                "wspace": gap / size,
                "hspace": below / size,
            },
        )
        for ax in axes_.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for i, (ax, image) in enumerate(zip(axes_.flat, images)):
            picture = np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1)
            ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            if self.captions is not None:
                ax.set_xlabel(self.captions[i], fontsize=7, labelpad=2)
            if self.frame is not None:
                ax.spines[:].set(visible=True, color=self.frame, linewidth=1.5)
        self.figure_, self.axes_ = figure, axes_
        return self


class HarmfulnessScatterDisplay:
    """Points in the plane, coloured by their harmfulness, the removed ones ringed.

    Colours are symmetric around zero and end at the 98th percentile, so that a few extreme instances do not leave the
    others pale.

    Parameters
    ----------
    points : ndarray of shape (n_samples, 2)
    harmfulness : ndarray of shape (n_samples,)
    removed : ndarray of shape (n_samples,), bool
    metric : str
    names : tuple of two str, default=("x", "y")
        Of the axes.

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.plotting import HarmfulnessScatterDisplay
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X)
    >>> HarmfulnessScatterDisplay.from_estimator(cleanser, X).ax_.get_xlabel()
    'column 0'
    """

    def __init__(self, points, harmfulness, removed, metric: str, names: tuple[str, str] = ("x", "y")):
        self.points = points
        self.harmfulness = harmfulness
        self.removed = removed
        self.metric = metric
        self.names = names

    @classmethod
    def from_estimator(
        cls, cleanser: GANInfluence, X, *, columns: tuple[int, int] = (0, 1), ax=None
    ) -> HarmfulnessScatterDisplay:
        """Plot two columns of tabular training data.

        Parameters
        ----------
        cleanser : GANInfluence
            Fitted.
        X : array-like, Tensor or Dataset of shape (n_samples, n_features)
            The data that it was fitted on.
        columns : tuple of two int, default=(0, 1)
        ax : matplotlib Axes, optional
        """
        source = as_source(X)
        if len(source.sample_shape) != 1:
            raise ValueError(
                f"Expected tabular data, shape (n_samples, n_features), and got instances of shape "
                f"{tuple(source.sample_shape)}. ImageGridDisplay shows images."
            )
        points = source[list(range(len(source)))].double().cpu().numpy()[:, list(columns)]
        named = getattr(cleanser, "feature_names_in_", None)
        x, y = (f"column {column}" if named is None else str(named[column]) for column in columns)
        return cls(points, cleanser.harmfulness_, ~cleanser.support_, cleanser.metric_name_, (x, y)).plot(ax=ax)

    def plot(self, *, ax=None) -> HarmfulnessScatterDisplay:
        """Plot the points, the most extreme ones on top."""
        ax = axes(ax, figsize=(5.6, 4.4))
        order = np.argsort(np.abs(self.harmfulness), kind="stable")
        limit = float(np.quantile(np.abs(self.harmfulness), 0.98)) or 1.0
        drawn = ax.scatter(
            *self.points[order].T,
            c=self.harmfulness[order],
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            s=22,
            edgecolors="#a8a29e",
            linewidths=0.3,
        )
        removed = np.asarray(self.removed)
        if removed.any():
            rings = {"facecolors": "none", "edgecolors": COLORS["none"], "linewidths": 0.9}
            ax.scatter(*self.points[removed].T, s=42, label=f"removed ({removed.sum()})", **rings)
            ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        label = f"harmfulness: predicted improvement\nof {self.metric} on removal"
        ax.figure.colorbar(drawn, ax=ax, extend="both", label=label)
        ax.set(xlabel=self.names[0], ylabel=self.names[1])
        self.ax_, self.figure_ = ax, ax.figure
        return self
