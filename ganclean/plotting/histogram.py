"""How harmfulness is distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.plotting.style import COLORS, axes

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence


class InfluenceHistogramDisplay:
    """How harmfulness is distributed over the training instances, and which of them are removed.

    Parameters
    ----------
    harmfulness : ndarray of shape (n_samples,)
    removed : ndarray of shape (n_samples,), bool
    metric : str
    std_error : ndarray of shape (n_samples,), optional
        Of the harmfulness, over runs. Where it is finite, the legend says how many instances are clearly harmful or
        helpful.

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.plotting import InfluenceHistogramDisplay
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X)
    >>> InfluenceHistogramDisplay.from_estimator(cleanser).ax_.get_ylabel()
    'instances'
    """

    def __init__(self, harmfulness, removed, metric: str, std_error=None):
        self.harmfulness = harmfulness
        self.removed = removed
        self.metric = metric
        self.std_error = std_error

    @classmethod
    def from_estimator(cls, cleanser: GANInfluence, *, ax=None) -> InfluenceHistogramDisplay:
        """Plot a fitted cleanser's harmfulness."""
        std_error = cleanser.influence_std_error_
        return cls(cleanser.harmfulness_, ~cleanser.support_, cleanser.metric_name_, std_error).plot(ax=ax)

    def plot(self, *, ax=None) -> InfluenceHistogramDisplay:
        """Plot the histogram, the removed part in another colour."""
        ax, removed = axes(ax), np.asarray(self.removed)
        edges = np.histogram_bin_edges(self.harmfulness, bins=50)
        parts = {"kept": (~removed, "helpful"), "removed": (removed, "harmful")}
        values = [self.harmfulness[rows] for rows, _ in parts.values()]
        ax.hist(
            values,
            edges,
            stacked=True,
            color=[COLORS[color] for _, color in parts.values()],
            label=[f"{name} ({rows.sum()}){self._clear(rows)}" for name, (rows, _) in parts.items()],
        )
        ax.axvline(0, color=COLORS["none"], linewidth=0.8)
        ax.set(xlabel=f"harmfulness: predicted improvement of {self.metric} on removal", ylabel="instances")
        ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _clear(self, rows: np.ndarray) -> str:
        """Say what part of some instances lies more than two standard errors from zero, where these are known."""
        if self.std_error is None or not np.isfinite(self.std_error).all() or not rows.any():
            return ""
        clear = np.abs(self.harmfulness[rows]) > 2 * self.std_error[rows]
        return f", {clear.mean():.0%} of them more than 2 s.e. from 0"
