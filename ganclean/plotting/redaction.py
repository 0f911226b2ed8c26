"""What the same latents became before and after redaction, and how invalidity fell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ganclean.plotting.gallery import ImageGridDisplay
from ganclean.plotting.style import COLORS, axes
from ganclean.redaction.invalidity import Invalidity

if TYPE_CHECKING:
    from ganclean.redaction._base import BaseRedactor
    from ganclean.redaction.redactor import GANRedactor


class RedactionDisplay:
    """Images before redaction, and below each what the same latent becomes afterwards; invalid ones are framed.

    Parameters
    ----------
    before, after : ndarray of shape (n, channels, height, width)
        Grey or colour, in [−1, 1].
    invalid : ndarray of shape (2, n), bool
        Before and after.
    n_columns : int, default=8
        n is a multiple of it.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of matplotlib Axes
    """

    def __init__(self, before, after, invalid, n_columns: int = 8):
        self.before = before
        self.after = after
        self.invalid = invalid
        self.n_columns = n_columns

    @classmethod
    def from_estimator(cls, redactor: BaseRedactor, *, n_shown: int = 16, n_columns: int = 8) -> RedactionDisplay:
        """Show samples before and after redaction, half of them invalid before where there are as many.

        Parameters
        ----------
        redactor : BaseRedactor
            Fitted.
        n_shown : int, default=16
            A multiple of `n_columns`.
        n_columns : int, default=8
        """
        if n_shown < 1 or n_shown % n_columns:
            raise ValueError(f"n_shown must be a positive multiple of n_columns={n_columns}; got {n_shown}.")
        before, after = (samples.float().cpu() for samples in redactor.before_and_after(max(20 * n_shown, 400)))
        invalid = np.zeros((2, len(before)), dtype=bool)
        if redactor.criterion_.judges:
            invalid = ~np.stack([redactor.criterion_.is_valid(redactor._as_given(half)) for half in (before, after)])
        bad, good = np.flatnonzero(invalid[0]), np.flatnonzero(~invalid[0])
        rows = np.concatenate([bad[: n_shown // 2], good, bad[n_shown // 2 :]])[:n_shown]
        chosen = torch.from_numpy(rows)
        return cls(before[chosen].numpy(), after[chosen].numpy(), invalid[:, rows], n_columns).plot()

    def plot(self) -> RedactionDisplay:
        """Show the grid, in pairs of rows of which the upper one is before."""
        grid = ImageGridDisplay(self._paired(self.before, self.after), n_columns=self.n_columns).plot()
        for ax, is_invalid in zip(grid.axes_.flat, self._paired(*self.invalid)):
            if is_invalid:
                ax.spines[:].set(visible=True, color=COLORS["harmful"], linewidth=1.5)
        self.figure_, self.axes_ = grid.figure_, grid.axes_
        self._name_rows()
        return self

    def _name_rows(self) -> None:
        """Write beside each row whether it is before or after, on a margin of its own."""
        margin, (width, height), inside = 0.22, self.figure_.get_size_inches(), self.figure_.subplotpars
        self.figure_.set_size_inches(width + margin, height)
        left, right = ((x * width + margin) / (width + margin) for x in (inside.left, inside.right))
        self.figure_.subplots_adjust(left=left, right=right)
        for row, ax in enumerate(self.axes_[:, 0]):
            ax.set_ylabel("after" if row % 2 else "before", fontsize=9, labelpad=2)

    def _paired(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        starts = range(0, len(before), self.n_columns)
        return np.concatenate([half[start : start + self.n_columns] for start in starts for half in (before, after)])


class InvalidityCurveDisplay:
    """The share of invalid samples after each epoch of redaction, with its 95% confidence interval.

    Parameters
    ----------
    invalidities : list of Invalidity
        Of the generator as given, and after each epoch.

    Attributes
    ----------
    ax_, figure_ : matplotlib Axes and Figure

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.plotting import InvalidityCurveDisplay
    >>> from ganclean.redaction import Invalidity
    >>> curve = [Invalidity.of(np.arange(1000) >= n_invalid) for n_invalid in (100, 20, 5)]
    >>> InvalidityCurveDisplay(curve).plot().ax_.get_xlabel()
    'epoch of redaction'
    """

    def __init__(self, invalidities: list[Invalidity]):
        self.invalidities = invalidities

    @classmethod
    def from_estimator(cls, redactor: GANRedactor, *, ax=None) -> InvalidityCurveDisplay:
        """Plot a fitted redactor's history.

        Parameters
        ----------
        redactor : GANRedactor
            Fitted by a method that judges what the generator produces, or with a `target_invalidity`.
        ax : matplotlib Axes, optional

        Raises
        ------
        ValueError
            If nothing was judged between the epochs.
        """
        rates, n = np.array(redactor.history_["invalidity"]), redactor.queries_per_epoch
        if np.isnan(rates).any():
            raise ValueError(
                f"Nothing was judged between the epochs of method={redactor.method_!r}. Choose 'validity' or "
                "'combined', or set a target_invalidity."
            )
        return cls([Invalidity.of(np.arange(n) >= round(rate * n)) for rate in rates]).plot(ax=ax)

    def plot(self, *, ax=None) -> InvalidityCurveDisplay:
        """Plot the curve and the band of its intervals."""
        ax, epochs = axes(ax), np.arange(len(self.invalidities))
        rates, lows, highs = np.array([(part.rate, part.low, part.high) for part in self.invalidities]).T
        ax.fill_between(epochs, lows, highs, color=COLORS["harmful"], alpha=0.2, linewidth=0)
        ax.plot(epochs, rates, "o-", color=COLORS["harmful"], linewidth=2, markersize=4)
        ax.set(xlabel="epoch of redaction", ylabel="invalid samples", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        self.ax_, self.figure_ = ax, ax.figure
        return self
