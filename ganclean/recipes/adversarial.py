"""The usual GAN as two updates: a discriminator's and a generator's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ganclean.dynamics.drawing import Drawing
from ganclean.dynamics.players import Players
from ganclean.dynamics.step import one_number_per_sample
from ganclean.dynamics.update import Batch, Update
from ganclean.exceptions import NetworkError
from ganclean.losses import AdversarialLoss, Penalty, check_penalty, resolve_loss
from ganclean.optim import Adam, resolve_optimizer

UPDATES = ("alternating", "simultaneous")
DEFAULT_OPTIMIZER = Adam(lr=1e-3, betas=(0.5, 0.99))


@dataclass(frozen=True)
class DiscriminatorObjective:
    """``mean(w (real(D(x)) + penalty)) + mean(fake(D(G(z))))``.

    Parameters
    ----------
    loss : AdversarialLoss
    penalty : Penalty, optional
    conditional : bool
        Whether both networks take labels as their second input.
    scale : float
        Multiplies all of it.
    """

    loss: AdversarialLoss
    penalty: Penalty | None = None
    conditional: bool = False
    scale: float = 1.0

    # Nothing is detached, and the instances' weights enter.
    stops: ClassVar[bool] = False
    weighted: ClassVar[bool] = True

    def draw(self, drawing: Drawing, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the update draws: latents, labels to generate for, and where a penalty looks."""
        draws = _drawn(drawing, known, self.conditional)
        if self.interpolates(drawing.index) and "mixing" not in draws:
            draws["mixing"] = drawing.uniform("mixing")
        return draws

    def interpolates(self, index: int) -> bool:
        """Return whether a penalty between real and generated samples is due in a step."""
        return self.penalty is not None and self.penalty.at == "interpolated" and self.penalty.is_due(index)

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        fake = generated(nets, batch)
        terms: Tensor | None = None
        rejected: Tensor | None = None
        passes = batch.drawn.passes or self.passes(batch)
        for place, name in enumerate(passes):
            aside(nets, batch, place)
            if name == "real":
                own = self._on_real(nets, batch)
                terms = own if terms is None else terms + own
            elif name == "fake":
                rejected = self._on_fake(nets, batch, fake)
            elif name in ("slope", "interpolated"):
                own = self._between(nets, batch, fake) if name == "interpolated" else self._slope(nets, batch)
                terms = own if terms is None else terms + own
            elif name in ("real+fake", "fake+real"):
                terms, rejected = self._on_both(nets, batch, fake, name)
            else:
                rejected = self.further(name, nets, batch, rejected)
        aside(nets, batch, len(passes))
        assert terms is not None and rejected is not None
        value = (weights * terms).sum() / len(terms) + rejected
        return value if self.scale == 1 else self.scale * value

    def passes(self, batch: Batch) -> tuple[str, ...]:
        """Return the discriminator's passes in order."""
        return ("real", "fake", *(("interpolated",) if self.interpolates(batch.number) else ()))

    def further(self, name: str, nets: Players, batch: Batch, rejected: Tensor | None) -> Tensor:
        """Return the loss on what is to be rejected after a pass of another kind."""
        raise NetworkError(f"The discriminator has no pass {name!r}.")

    def _on_real(self, nets: Players, batch: Batch) -> Tensor:
        penalty = self.penalty
        if penalty is None or penalty.at != "real" or not penalty.is_due(batch.number) or "slope" in batch.drawn.passes:
            return self.loss.real(judged(nets, batch, "real", batch.x, batch.y if self.conditional else None))
        output, slope = self._sloped(nets, batch, "real", batch.x)
        return self.loss.real(output) + penalty.every * penalty.terms(slope)

    def _slope(self, nets: Players, batch: Batch) -> Tensor:
        """Return the penalty on real instances where it is taken in a pass of its own."""
        assert self.penalty is not None
        _, slope = self._sloped(nets, batch, "slope", batch.x)
        return self.penalty.every * self.penalty.terms(slope)

    def _on_fake(self, nets: Players, batch: Batch, fake: Tensor) -> Tensor:
        return self.loss.fake(judged(nets, batch, "fake", fake, _labels(batch))).mean()

    def _on_both(self, nets: Players, batch: Batch, fake: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Judge real and generated samples in one call."""
        both = [batch.x, fake] if name == "real+fake" else [fake, batch.x]
        labels = None
        if self.conditional and batch.y is not None and name not in batch.drawn.draws.get("beside", {}):
            of_fake = _labels(batch)
            assert of_fake is not None
            labels = torch.cat([batch.y, of_fake] if name == "real+fake" else [of_fake, batch.y])
        output = judged(nets, batch, name, torch.cat(both), labels)
        first, second = output.split([len(part) for part in both])
        real, of_fake = (first, second) if name == "real+fake" else (second, first)
        return self.loss.real(real), self.loss.fake(of_fake).mean()

    def _between(self, nets: Players, batch: Batch, fake: Tensor) -> Tensor:
        assert self.penalty is not None
        share = batch.drawn.draws["mixing"].view(-1, *[1] * (batch.x.ndim - 1))
        mixed = share * batch.x + (1 - share) * fake
        _, slope = self._sloped(nets, batch, "interpolated", mixed)
        return self.penalty.every * self.penalty.terms(slope)

    def _sloped(self, nets: Players, batch: Batch, name: str, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the discriminator's outputs and ‖∇ₓD‖² for each sample."""
        labels = batch.y if self.conditional else None
        output, slope = nets.slope(lambda x: judged(nets, batch, name, x, labels), samples)
        return output, slope.flatten(1).square().sum(1)


@dataclass(frozen=True)
class GeneratorObjective:
    """``mean(generator(D(G(z))))``.

    Parameters
    ----------
    loss : AdversarialLoss
    conditional : bool
    scale : float
        Multiplies it.
    """

    loss: AdversarialLoss
    conditional: bool = False
    scale: float = 1.0

    stops: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    # Where it meets the discriminator as it was, it looks at the same samples, which are generated once.
    shares_samples: ClassVar[bool] = True

    def draw(self, drawing: Drawing, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the update draws: latents, and labels to generate for."""
        return _drawn(drawing, known, self.conditional)

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        fake = generated(nets, batch)
        aside(nets, batch, 0)
        value = self.terms(fake, judged(nets, batch, "generator", fake, _labels(batch))).mean()
        aside(nets, batch, 1)
        return value if self.scale == 1 else self.scale * value

    def terms(self, fake: Tensor, output: Tensor) -> Tensor:
        """Return the loss of each sample, given the discriminator's output for it."""
        return self.loss.generator(output)


def gan(
    loss="non_saturating",
    optimizer_g=None,
    optimizer_d=None,
    *,
    update="alternating",
    penalty=None,
    n_critic=1,
    conditional=False,
    scale=1.0,
) -> list[Update]:
    """Return the two updates of the usual GAN: the discriminator's, then the generator's.

    Parameters
    ----------
    loss : str or AdversarialLoss, default="non_saturating"
    optimizer_g, optimizer_d : Optimizer, optional
        Default ``Adam(lr=1e-3, betas=(0.5, 0.99))``.
    update : {"alternating", "simultaneous"}, default="alternating"
        In an alternating update the generator meets the updated discriminator and new latents; in a simultaneous one
        both networks use the same old parameters and the same samples.
    penalty : Penalty, optional
        ``R1()`` or ``GradientPenalty()``. An instance's penalty is removed with it.
    n_critic : int, default=1
        Updates of the discriminator for one of the generator.
    conditional : bool, default=False
        Whether the networks take labels as their second input, G(z, y) and D(x, y).
    scale : float or dict of str to float, default=1.0
        What the losses are multiplied by: of the discriminator, or of each of ``"D"`` and ``"G"``.

    Returns
    -------
    list of Update
        Named D and G.

    Examples
    --------
    >>> from ganclean.recipes import gan
    >>> [update.name for update in gan("hinge", n_critic=2)]
    ['D', 'G']
    """
    if update not in UPDATES:
        raise ValueError(f"update must be one of {list(UPDATES)}; got {update!r}.")
    chosen = resolve_loss(loss)
    scales = {"D": scale, "G": 1.0} if not isinstance(scale, Mapping) else {"D": 1.0, "G": 1.0, **scale}
    of_d = DiscriminatorObjective(chosen, check_penalty(penalty), bool(conditional), float(scales["D"]))
    of_g = GeneratorObjective(chosen, bool(conditional), float(scales["G"]))
    return [
        Update("D", of_d, resolve_optimizer(optimizer_d, DEFAULT_OPTIMIZER)),
        Update(
            "G",
            of_g,
            resolve_optimizer(optimizer_g, DEFAULT_OPTIMIZER),
            due=EveryLast(int(n_critic)) if n_critic != 1 else 1,
            meets="now" if update == "alternating" else "before",
        ),
    ]


@dataclass(frozen=True)
class EveryLast:
    """Whether a step is the last of so many.

    Parameters
    ----------
    n : int
    """

    n: int

    def __call__(self, index: int) -> bool:
        return (index + 1) % self.n == 0


def generated(nets: Players, batch: Batch) -> Any:
    """Return the samples that an update looks at: its own, or once more those of an earlier update of the step."""
    draws = batch.drawn.draws
    aside(nets, batch, "first")
    players = nets if batch.drawn.samples_of is None else nets.of_update(batch.drawn.samples_of)
    if "inputs" in draws:
        args, kwargs = draws["inputs"]
        output = players.G(*args, **kwargs)
        for place in draws.get("output", ()):
            output = output[place]
        return output
    labels = _labels(batch)
    return players.G(batch.latents) if labels is None else players.G(batch.latents, labels)


def judged(nets: Players, batch: Batch, name: str, samples: Tensor, labels: Tensor | None) -> Tensor:
    """Return the discriminator's outputs for some samples as a vector."""
    beside = batch.drawn.draws.get("beside", {}).get(name)
    if beside is not None:
        args, kwargs = beside
        return one_number_per_sample(nets.D(samples, *args, **kwargs), len(samples))
    output = nets.D(samples) if labels is None else nets.D(samples, labels)
    return one_number_per_sample(output, len(samples))


def aside(nets: Players, batch: Batch, place: int | str) -> None:
    """Make the calls that a user's loop makes before a pass, beside what its losses need: they move buffers."""
    for player, args, kwargs in batch.drawn.draws.get("aside", {}).get(str(place), ()):
        nets[player](*args, **kwargs)


def _labels(batch: Batch) -> Tensor | None:
    return batch.drawn.draws.get("labels")


def _drawn(drawing: Drawing, known: Mapping[str, Any], conditional: bool) -> dict[str, Any]:
    draws = dict(known)
    if "latents" not in draws and "inputs" not in draws:
        draws["latents"] = drawing.latents()
    if conditional and "labels" not in draws and "inputs" not in draws:
        draws["labels"] = drawing.labels()
    return draws


def adversarial_loss(updates: Iterable[Update]) -> AdversarialLoss:
    """Return the loss of the usual GAN's updates.

    Raises
    ------
    ValueError
        If they are others.
    """
    for update in updates:
        if isinstance(update.objective, DiscriminatorObjective):
            return update.objective.loss
    raise ValueError(
        "This needs the updates of the usual GAN, whose losses are known; objectives of one's own are not."
    )
