"""Whether removal helps, at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.plotting.style import COLORS, axes, selector_label, selector_style
from ganclean.validation.significance import paired_comparison

if TYPE_CHECKING:
    from ganclean.validation import CleansingCurve


class CleansingCurveDisplay:
    """A metric on held-out data against the fraction of the training data that was removed, for each selector.

    Bands are 95% intervals of the paired change from removing nothing, at each rate by itself. What seeds have in
    common cancels in them, so that a rate differs from no removal where its band leaves the dotted line, however far
    the seeds are apart.

    Parameters
    ----------
    curve : CleansingCurve

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.plotting import CleansingCurveDisplay
    >>> from ganclean.validation import cleansing_curve
    >>> X = np.random.default_rng(0).normal(size=(120, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X[:80])
    >>> curve = cleansing_curve(cleanser, X[80:], n_seeds=2)
    >>> CleansingCurveDisplay.from_curve(curve, relative=True).ax_.get_xlabel()
    'training instances removed (%)'
    """

    def __init__(self, curve: CleansingCurve):
        self.curve = curve

    @classmethod
    def from_curve(
        cls, curve: CleansingCurve, *, metric: str | None = None, relative: bool = False, level: float = 0.95, ax=None
    ) -> CleansingCurveDisplay:
        """Plot a curve that `ganclean.validation.cleansing_curve` returned; for the parameters see `plot`."""
        return cls(curve).plot(metric=metric, relative=relative, level=level, ax=ax)

    def plot(
        self, *, metric: str | None = None, relative: bool = False, level: float = 0.95, ax=None
    ) -> CleansingCurveDisplay:
        """Plot the means over seeds.

        Parameters
        ----------
        metric : str, optional
            One of the metrics that the curve was evaluated on; default the one that influence is on.
        relative : bool, default=False
            Whether to plot the paired improvement over removing nothing instead: up is better for every metric.
        level : float, default=0.95
            Confidence of the bands; a single seed has none.
        ax : matplotlib Axes, optional
        """
        curve, ax = self.curve, axes(ax)
        metric = curve.metric if metric is None else metric
        if metric not in curve.values:
            raise ValueError(f"metric must be one of {sorted(curve.values)}; got {metric!r}.")
        baseline = curve.baseline[metric]
        sign = 1 if curve.greater_is_better[metric] else -1
        rates = 100 * np.concatenate([[0], curve.rates])
        for selector in reversed(curve.selectors):
            first = selector == curve.selectors[0]
            color, marker = selector_style(selector, curve.selectors)
            changes = curve.values[metric][selector] - baseline[:, None]
            shown = np.concatenate([[0], sign * changes.mean(axis=0) if relative else changes.mean(axis=0)])
            line = shown if relative else baseline.mean() + shown
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 2.2 if first else 1.4}
            ax.plot(rates, line, **style, label=selector_label(selector), zorder=3 + first)
            if len(baseline) > 1:
                half = np.array([0.0, *(_half_width(change, level) for change in changes.T)])
                ax.fill_between(rates, line - half, line + half, color=color, alpha=0.2 if first else 0.1, linewidth=0)
        ax.axhline(0 if relative else baseline.mean(), color=COLORS["none"], linestyle=":", linewidth=1.2)
        better = "higher" if relative or sign > 0 else "lower"
        what = f"improvement of held-out {metric}\n(paired, " if relative else f"held-out {metric}\n("
        ax.set(xlabel="training instances removed (%)", ylabel=f"{what}{better} is better)")
        ticks = _apart(rates)
        ax.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks])
        handles, labels = ax.get_legend_handles_labels()
        bands = f"shaded: {level:.0%} interval of the paired change over {len(baseline)} seeds"
        ax.legend(
            handles[::-1],
            labels[::-1],
            title=f"removed ({bands if len(baseline) > 1 else 'one seed, no intervals'})",
            frameon=False,
            fontsize="small",
            title_fontsize="small",
            alignment="left",
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.2,
            ncols=2,
        )
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _apart(rates: np.ndarray) -> list[float]:
    """Return zero and the rates that have room for a label, from the highest down."""
    room, ticks = 0.06 * rates.max(), [0.0]
    for rate in sorted(rates, reverse=True):
        if all(abs(rate - tick) >= room for tick in ticks):
            ticks.append(float(rate))
    return sorted(ticks)


def _half_width(changes: np.ndarray, level: float) -> float:
    comparison = paired_comparison(changes, level)
    return comparison.high - comparison.improvement
