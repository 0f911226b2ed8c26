"""How credit is shared among the training instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ganclean.plotting.style import COLORS, axes

if TYPE_CHECKING:
    from ganclean.valuation import GMValuator


class CreditShareDisplay:
    """Which part of the credit goes to which part of the training instances, those with most of it first.

    Parameters
    ----------
    values : ndarray of shape (n_samples,)
        Of at least zero.

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.plotting import CreditShareDisplay
    >>> display = CreditShareDisplay(np.array([3.0, 1.0, 0.0, 0.0])).plot()
    >>> display.ax_.get_title(loc="left")
    'half of the credit goes to 25% of the instances; 50% get none'
    """

    def __init__(self, values):
        self.values = values

    @classmethod
    def from_estimator(cls, valuator: GMValuator, *, ax=None) -> CreditShareDisplay:
        """Plot a fitted valuator's values."""
        return cls(valuator.values_).plot(ax=ax)

    def plot(self, *, ax=None) -> CreditShareDisplay:
        """Plot the curve; the diagonal is equal credit for all."""
        values = np.sort(np.asarray(self.values, dtype=np.float64))[::-1]
        received = np.r_[0.0, values.cumsum() / values.sum()]
        of_all = np.linspace(0, 1, len(received))
        ax = axes(ax)
        ax.plot(of_all, received, color=COLORS["helpful"], linewidth=2)
        ax.plot([0, 1], [0, 1], color=COLORS["faint"], linewidth=1)
        half = int(np.searchsorted(received, 0.5 - 1e-12))
        ax.plot(of_all[half], received[half], "o", color=COLORS["helpful"])
        ax.set_title(
            f"half of the credit goes to {of_all[half]:.0%} of the instances; {(values == 0).mean():.0%} get none",
            loc="left",
            fontsize="small",
        )
        ax.set(
            xlabel="training instances, most credited first", ylabel="part of the credit", xlim=(0, 1), ylim=(0, 1.02)
        )
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.yaxis.set_major_formatter("{x:.0%}")
        self.ax_, self.figure_ = ax, ax.figure
        return self
