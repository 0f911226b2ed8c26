"""What the same latents became before and after redaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ganclean.plotting.gallery import ImageGridDisplay
from ganclean.plotting.style import COLORS

if TYPE_CHECKING:
    from ganclean.redaction._base import BaseRedactor


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
        return self

    def _paired(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        starts = range(0, len(before), self.n_columns)
        return np.concatenate([half[start : start + self.n_columns] for start in starts for half in (before, after)])
