"""What a step is made of: updates with their objectives, averages, and the batch that objectives see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from ganclean.dynamics.record import UpdateRecord
from ganclean.optim import Optimizer, Projected

MEETS = ("now", "before")


@dataclass
class Batch:
    """What an objective sees of a step, beside the networks.

    Parameters
    ----------
    x : Tensor of shape (batch_size, *sample_shape)
        The instances.
    y : Tensor of shape (batch_size, ...), optional
        Their labels, where there are any.
    index : Tensor of shape (batch_size,), int64
        Their rows in the data.
    number : int
        The number of the step, from 0.
    carried : dict of str to Tensor
        What steps hand on: to be read, and assigned.
    drawn : UpdateRecord
        What the update drew where the library draws for it.
    make_latents : callable
        Draws latents as the trainer's `latents` says.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor
    number: int
    carried: dict[str, Tensor]
    drawn: UpdateRecord
    make_latents: Callable[[], Tensor]
    _latents: Tensor | None = field(default=None, repr=False)

    @property
    def latents(self) -> Any:
        """Latents of this update, one per instance: drawn as the trainer's `latents` says, those of metrics alike."""
        if "latents" in self.drawn.draws:
            return self.drawn.draws["latents"]
        if self._latents is None:
            self._latents = self.make_latents()
        return self._latents

    def slice(self, rows: slice) -> Batch:
        """Return some rows as a batch that shares what is carried."""
        n = len(self.x)

        def part(node: Any) -> Any:
            return node[rows] if isinstance(node, Tensor) and node.ndim and len(node) == n else node

        return replace(
            self,
            x=self.x[rows],
            y=part(self.y),
            index=self.index[rows],
            drawn=replace(self.drawn, draws={name: part(value) for name, value in self.drawn.draws.items()}),
            make_latents=lambda: self.latents[rows],
            _latents=None,
        )


Objective = Callable[[Any, Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """One update of a training step: the gradient of an objective in some players' parameters, and an optimiser's rule.

    Parameters
    ----------
    trains : str or tuple of str
        The players whose parameters it moves, or parts of them: ``"G"``, ``("G", "Q")``, ``"G.mapping"``.
    objective : callable
        ``objective(nets, batch, weights)`` returns a scalar. `nets` holds the players, ``nets.G(z)``; `batch` has
        ``x``, ``y``, ``index``, ``number`` (the step's), ``latents`` and ``carried``; `weights`, of shape
        (batch_size,), are ones in the real run. Where they stand defines what the removal of an instance means: on its
        own term, on its share of a mean, on its pair. Randomness is torch's, under the step's own seed.
    optimizer : Optimizer or str
        The rule, from `ganclean.optim`; or the name of another update whose optimiser this one shares, with its moments
        and its count.
    due : int or callable, default=1
        In which steps it happens: the first and every so many after it, or where a function of the step's number, from
        0, is true.
    micro : int, default=1
        Gradient accumulation: the batch is cut into so many slices of nearly equal size, each evaluated by itself, with
        the batch statistics of its own; the gradient is the mean over them, weighted by their sizes.
    after : callable, optional
        From the new parameters, a dict of str to Tensor, to projected ones: weight clipping, weight normalisation.
        Where the update trains one player, names are those in its module.
    name : str, optional
        Default what it trains.
    meets : {"now", "before"}, default="now"
        Whether it meets the other players as earlier updates of the step have left them, or as they were before the
        step.

    Examples
    --------
    >>> from ganclean import Update
    >>> from ganclean.optim import Adam
    >>> def critic(nets, batch, weights):
    ...     return nets.D(nets.G(batch.latents)).mean() - (weights * nets.D(batch.x).flatten()).mean()
    >>> Update("D", critic, Adam(lr=1e-4), after=lambda params: {n: p.clamp(-0.1, 0.1) for n, p in params.items()}).name
    'D'
    """

    trains: str | tuple[str, ...]
    objective: Objective
    optimizer: Optimizer | str
    due: int | Callable[[int], bool] = 1
    micro: int = 1
    after: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None
    name: str | None = None
    meets: str = "now"

    def __post_init__(self) -> None:
        trains = (self.trains,) if isinstance(self.trains, str) else tuple(self.trains)
        if not trains or not all(isinstance(part, str) and part for part in trains):
            raise ValueError(f"trains must be a player's name or several of them, such as 'D'; got {self.trains!r}.")
        if not callable(self.objective):
            raise ValueError(f"objective must be a function (nets, batch, weights) -> scalar; got {self.objective!r}.")
        if not isinstance(self.optimizer, (Optimizer, str)):
            raise ValueError(
                f"optimizer must be a rule of ganclean.optim, or the name of the update whose optimiser is shared; got "
                f"{self.optimizer!r}."
            )
        if not callable(self.due) and not _is_count(self.due):
            raise ValueError(f"due must be a positive integer or a function of the step's number; got {self.due!r}.")
        if not _is_count(self.micro):
            raise ValueError(f"micro must be a positive integer; got {self.micro!r}.")
        if self.after is not None and not callable(self.after):
            raise ValueError(f"after must be a function of the new parameters; got {self.after!r}.")
        if self.meets not in MEETS:
            raise ValueError(f"meets must be one of {list(MEETS)}; got {self.meets!r}.")
        object.__setattr__(self, "trains", trains)
        object.__setattr__(self, "name", "+".join(trains) if self.name is None else str(self.name))

    def is_due(self, index: int) -> bool:
        """Return whether it happens in a step."""
        return bool(self.due(index)) if callable(self.due) else index % self.due == 0

    @property
    def slot(self) -> str:
        """The update whose optimiser it uses."""
        assert self.name is not None
        return self.optimizer if isinstance(self.optimizer, str) else self.name

    def projected(self, rule: Optimizer) -> Optimizer:
        """Return a rule with the projection after it."""
        if self.after is None:
            return rule
        return Projected(rule, self.after, f"{self.trains[0]}." if len(self.trains) == 1 else "")


@dataclass(frozen=True)
class Average:
    """A moving average of a player's parameters, which follows every step that trains it.

    Parameters
    ----------
    decay : float or callable, default=0.999
        The share of the old average, in [0, 1]; or a function of the step's number, from 0, to it: 0 copies, which is
        how a ramp-up or a late start is written.
    every : int, default=1
        Follow only in every so many steps: those whose number plus one is a multiple.
    buffers : {"live", "copied", "averaged"}, default="live"
        What the averaged network has for buffers: those of the moment, those of the last time that the average
        followed, or averages of them.

    Examples
    --------
    >>> from ganclean.dynamics.update import Average
    >>> Average(decay=lambda t: min(0.999, (1 + t) / (10 + t))).decay_at(0)
    0.1
    """

    decay: float | Callable[[int], float] = 0.999
    every: int = 1
    buffers: str = "live"

    def __post_init__(self) -> None:
        if not callable(self.decay) and not (isinstance(self.decay, Real) and 0 <= float(self.decay) < 1):
            raise ValueError(
                f"decay must be a number in [0, 1) or a function of the step's number; got {self.decay!r}."
            )
        if not _is_count(self.every):
            raise ValueError(f"every must be a positive integer; got {self.every!r}.")
        if self.buffers not in ("live", "copied", "averaged"):
            raise ValueError(f"buffers must be 'live', 'copied' or 'averaged'; got {self.buffers!r}.")

    def mixes(self, buffer: Tensor) -> bool:
        """Return whether a buffer is averaged, and not copied."""
        return self.buffers == "averaged" and buffer.is_floating_point()

    def decay_at(self, index: int) -> float:
        """Return the share of the old average after a step."""
        if (index + 1) % self.every:
            return 1.0
        decay = float(self.decay(index) if callable(self.decay) else self.decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"An average's decay must be in [0, 1]; the function gave {decay} for step {index}.")
        return decay


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
