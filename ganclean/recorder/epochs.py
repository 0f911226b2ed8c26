"""How many steps an epoch of somebody else's loop has."""

from __future__ import annotations

import warnings

from torch import Tensor


class EpochLength:
    """Finds out after how many steps the data are drawn anew, as long as each instance is drawn once per epoch.

    The first epoch ends where an instance comes again. From then on, every so many steps must again hold no instance
    twice, and hardly any that the first epoch did not hold; otherwise batches are drawn in another way, and nobody but
    the user knows what an epoch is.

    Parameters
    ----------
    given : int, optional
        What the user says.

    Attributes
    ----------
    steps : int or None
        None where it is not known.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recorder.epochs import EpochLength
    >>> length = EpochLength()
    >>> for rows in [[0, 1], [2, 3], [3, 0], [1, 2]]:
    ...     length.note(torch.tensor(rows))
    >>> length.steps
    2
    """

    def __init__(self, given: int | None = None):
        self.steps, self._given = given, given is not None
        self._first: set[int] = set()
        self._now: set[int] = set()
        self._new: set[int] = set()
        self._n_steps = 0
        self._largest = 0

    def note(self, indices: Tensor) -> None:
        """Take in the rows of the next step."""
        if self._given:
            return
        rows = set(indices.tolist())
        self._largest = max(self._largest, len(indices))
        if self.steps is not None and self._n_steps % self.steps == 0:
            self._now = set()
        twice = len(rows) < len(indices) or bool(rows & self._now)
        if twice and self.steps is None and self._n_steps and len(rows) == len(indices):
            self.steps, self._first, self._now, twice = self._n_steps, self._now, set(), False
        if self.steps is not None:
            # An incomplete last batch may be left out, another one in each epoch.
            self._new |= rows - self._first
            twice = twice or len(self._new) >= self._largest
        self._now |= rows
        self._n_steps += 1
        if twice:
            self.steps, self._given = None, True
            warnings.warn(
                "How many steps make an epoch cannot be told: instances are drawn in another way than each once per "
                "epoch (with replacement, or several steps on one batch), or recording began within an epoch. Until "
                "it is known, the whole run counts as one epoch. Pass Recorder(steps_per_epoch=...).",
                stacklevel=6,
            )
