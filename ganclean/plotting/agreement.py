"""How well influence predicts, at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.plotting.style import COLORS, axes
from ganclean.validation import LinearDatamodelingScore, estimation_accuracy
from ganclean.validation.accuracy import STATISTICS, Agreement

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence
    from ganclean.validation import TrustReport

SYMBOLS = {"kendall_tau": "τ", "pearson": "r", "spearman": "ρ", "jaccard": "Jaccard"}
FEWEST = 8
"""Points that an interval needs: of fewer, resamples are too often all the same."""


class InfluenceScatterDisplay:
    """Predicted against true changes of a metric, with the line on which they are equal.

    Parameters
    ----------
    agreement : Agreement or TrustReport
        Anything with `predicted` and `true`.
    metric : str, optional
        What changes.
    what : str, default="removals"
        What the points are.
    statistics : sequence of {"kendall_tau", "pearson", "spearman", "jaccard"}
        Shown above the plot, each with its bootstrap interval over points.

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.plotting import InfluenceScatterDisplay
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=5), random_state=0).fit(X)
    >>> InfluenceScatterDisplay.from_estimator(cleanser, n_instances=20).ax_.get_xlabel()
    'predicted change of fid'
    """

    def __init__(
        self,
        agreement: Agreement | TrustReport,
        *,
        metric: str | None = None,
        what: str = "removals",
        statistics=("kendall_tau", "pearson"),
    ):
        self.agreement = agreement
        self.metric = metric
        self.what = what
        self.statistics = statistics

    @classmethod
    def from_agreement(
        cls, agreement: Agreement | TrustReport, *, metric: str | None = None, what: str | None = None, ax=None
    ) -> InfluenceScatterDisplay:
        """Plot what a function of `ganclean.validation` has found.

        Parameters
        ----------
        agreement : EstimationAccuracy, LinearDatamodelingScore or TrustReport
        metric : str, optional
            What changes.
        what : str, optional
            What the points are; by default it follows from the kind of agreement.
        ax : matplotlib Axes, optional
        """
        statistics: tuple[str, ...] = ("kendall_tau", "pearson")
        if isinstance(agreement, LinearDatamodelingScore):
            kind, statistics = "random subsets", ("spearman", "pearson")
        else:
            kind = "removals" if isinstance(agreement, Agreement) else "random reweightings"
        return cls(agreement, metric=metric, what=what or kind, statistics=statistics).plot(ax=ax)

    @classmethod
    def from_estimator(
        cls,
        cleanser: GANInfluence,
        n_instances: int = 100,
        last_epochs: int | str | None = "traced",
        *,
        ax=None,
        **settings,
    ) -> InfluenceScatterDisplay:
        """Retrain without random instances, and plot what was predicted against what came of it.

        Parameters
        ----------
        cleanser : GANInfluence
            Fitted.
        n_instances : int, default=100
        last_epochs : int, "traced" or None, default="traced"
            Retrain so many epochs, those that the influence was traced through, or (None) the whole run.
        ax : matplotlib Axes, optional
        **settings
            Passed to `ganclean.validation.estimation_accuracy`: `group_size`, `random_state`, `n_jobs`, …
        """
        epochs = cleanser.backend_.traced_epochs() if isinstance(last_epochs, str) else last_epochs
        accuracy = estimation_accuracy(cleanser, n_instances, epochs, **settings)
        return cls.from_agreement(accuracy, metric=cleanser.metric_name_, ax=ax)

    def plot(self, *, ax=None) -> InfluenceScatterDisplay:
        """Plot the points, and the statistics above them."""
        ax = axes(ax, figsize=(4.6, 4.4))
        predicted, true = self.agreement.predicted, self.agreement.true
        ax.axline((0, 0), slope=1, color=COLORS["none"], linewidth=1, linestyle=":", label="predicted = true")
        many = len(predicted) > 200
        ax.scatter(
            predicted,
            true,
            s=10 if many else 22,
            color=COLORS["helpful"],
            alpha=0.5 if many else 0.75,
            linewidths=0,
            label=f"{len(predicted)} {self.what}",
            zorder=2,
        )
        low, high = (extreme([predicted.min(), predicted.max(), true.min(), true.max()]) for extreme in (min, max))
        margin = 0.06 * (high - low) or 1.0
        ax.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        change = f"change of {self.metric}" if self.metric else "change"
        ax.set(xlabel=f"predicted {change}", ylabel=f"true {change}, by retraining")
        ax.ticklabel_format(style="sci", scilimits=(-3, 4))
        ax.locator_params(nbins=6)
        ax.set_title("\n".join(self._said(name) for name in self.statistics), fontsize="medium", loc="left")
        ax.legend(frameon=False, fontsize="small", loc="best")
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _said(self, statistic: str) -> str:
        """Return a statistic with its interval."""
        predicted, true = self.agreement.predicted, self.agreement.true
        if np.ptp(predicted) == 0 or np.ptp(true) == 0:
            return f"{SYMBOLS[statistic]} is not defined: nothing changes"
        said = f"{SYMBOLS[statistic]} = {STATISTICS[statistic](predicted, true):.2f}"
        if len(predicted) < FEWEST:
            return said
        low, high = Agreement(predicted, true, []).interval(statistic)
        return f"{said}   (95% bootstrap interval {low:.2f} to {high:.2f})"
