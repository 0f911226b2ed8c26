"""Redaction as a recipe: one more kind of fake for the discriminator, a guide for the generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ganclean.dynamics.drawing import Drawing
from ganclean.dynamics.players import Players
from ganclean.dynamics.update import Batch, Update
from ganclean.losses import AdversarialLoss
from ganclean.recipes.adversarial import DiscriminatorObjective, GeneratorObjective, judged

GUIDES = ("penalty", "guide")
NO_SMOOTHING = (0.0, 0.0)


class SmoothedLoss(AdversarialLoss):
    """An adversarial loss whose discriminator is told with some probability the opposite of what is true.

    Parameters
    ----------
    loss : AdversarialLoss
    flip_real, flip_fake : float
        The probability for real instances and for fake ones.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import LeastSquares
    >>> from ganclean.recipes.redacting import SmoothedLoss
    >>> SmoothedLoss(LeastSquares(), flip_real=0.1, flip_fake=0.0).real(torch.tensor([1.0]))
    tensor([0.0500])
    """

    def __init__(self, loss, flip_real, flip_fake):
        self.loss = loss
        self.flip_real = flip_real
        self.flip_fake = flip_fake

    def real(self, output):
        return (1 - self.flip_real) * self.loss.real(output) + self.flip_real * self.loss.fake(output)

    def fake(self, output):
        return (1 - self.flip_fake) * self.loss.fake(output) + self.flip_fake * self.loss.real(output)

    def generator(self, output):
        return self.loss.generator(output)


class NegativeBuffer:
    """Known samples of the redacted region, the newest where there are more than it holds.

    Parameters
    ----------
    capacity : int

    Attributes
    ----------
    samples : Tensor of shape (n, *sample_shape), or None while it is empty
    labels : Tensor of shape (n, ...), or None
        What conditional networks take them for.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recipes.redacting import NegativeBuffer
    >>> buffer = NegativeBuffer(2)
    >>> buffer.add(torch.tensor([[1.0], [2.0], [3.0]]))
    >>> buffer.samples
    tensor([[2.],
            [3.]])
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.samples: Tensor | None = None
        self.labels: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples)

    def add(self, samples: Tensor, labels: Tensor | None = None) -> None:
        """Take in some samples."""
        if not len(samples):
            return
        both = [self.samples, samples], [self.labels, labels]
        self.samples, self.labels = (
            None if new is None else torch.cat([t for t in (old, new) if t is not None])[-self.capacity :]
            for old, new in both
        )

    def draw(self, n: int, noise: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return n samples drawn with replacement, and their labels."""
        assert self.samples is not None, "nothing can be drawn from an empty buffer"
        rows = torch.randint(len(self), (n,), generator=noise).to(self.samples.device)
        return self.samples[rows], None if self.labels is None else self.labels[rows]


@dataclass(frozen=True)
class RedactingDiscriminator(DiscriminatorObjective):
    """``mean(w (real(D(x)) + penalty)) + lam mean(fake(D(G(z)))) + (1 - lam) mean(fake(D(negatives)))``.

    While the buffer is empty, lam counts as 1, and this is the discriminator of the usual GAN.

    Parameters
    ----------
    loss : AdversarialLoss
    penalty : Penalty, optional
    conditional : bool
    scale : float
        As of `DiscriminatorObjective`.
    lam : float
        In (0, 1].
    buffer : NegativeBuffer
        May be filled between steps.

    References
    ----------
    Kong, Chaudhuri, Data redaction from pre-trained GANs, 2022.

    Sinha et al., Negative data augmentation, 2021, for the mixture of fakes.
    """

    lam: float = 1.0
    buffer: NegativeBuffer = field(default_factory=lambda: NegativeBuffer(1))

    def draw(self, drawing: Drawing, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the update draws: that of `DiscriminatorObjective`, and negatives where any are known."""
        draws = super().draw(drawing, known)
        if "negatives" in draws or not len(self.buffer) or self.lam == 1:
            return draws
        # A stream of their own: all else is drawn as without redaction.
        draws["negatives"], labels = self.buffer.draw(drawing.n, drawing.generator("negatives"))
        if self.conditional:
            if labels is None:
                raise ValueError("The networks are conditional: negatives need labels, buffer.add(samples, labels).")
            draws["labels_negatives"] = labels
        return draws

    def passes(self, batch: Batch) -> tuple[str, ...]:
        """Return the discriminator's passes in order: negatives follow generated samples."""
        real, fake, *others = super().passes(batch)
        return (real, fake, *(("negatives",) if "negatives" in batch.drawn.draws else ()), *others)

    def further(self, name: str, nets: Players, batch: Batch, rejected: Tensor | None) -> Tensor:
        """Return the loss on generated samples and negatives."""
        if name != "negatives" or rejected is None:
            return super().further(name, nets, batch, rejected)
        draws = batch.drawn.draws
        output = judged(nets, batch, name, draws["negatives"], draws.get("labels_negatives"))
        return self.lam * rejected + (1 - self.lam) * self.loss.fake(output).mean()


@dataclass(frozen=True)
class GuidedGenerator(GeneratorObjective):
    """``mean(generator(D(G(z))) - guide_weight log score(G(z)))``, or ``mean(generator(guided(D(G(z)), score)))``.

    Parameters
    ----------
    loss : AdversarialLoss
    conditional : bool
    scale : float
        As of `GeneratorObjective`.
    score : callable, optional
        From samples to how valid they are, shape (n,), differentiable: from 0, and at least 1 where they are valid. A
        compiled step takes what it holds, such as the parameters of a classifier, for constants.
    guide : {"penalty", "guide"}
        Whether the score is a term of the loss of its own, or blends the discriminator's output into `guide_floor`
        where a sample is invalid.
    guide_weight, guide_floor : float
    """

    score: Callable[[Tensor], Tensor] | None = None
    guide: Literal["penalty", "guide"] = "penalty"
    guide_weight: float = 1.0
    guide_floor: float = -4.0

    # The score is the user's own and may detach.
    stops: ClassVar[bool] = True

    def terms(self, fake: Tensor, output: Tensor) -> Tensor:
        """Return the loss of each sample, given the discriminator's output for it."""
        if self.score is None:
            return super().terms(fake, output)
        score = self.score(fake)
        if self.guide == "guide":
            return super().terms(fake, guided(output, score, self.guide_floor))
        tiny = torch.finfo(score.dtype).tiny
        return super().terms(fake, output) - self.guide_weight * score.clamp(min=tiny).log()


def guided(output: Tensor, score: Tensor, floor: float) -> Tensor:
    """Return the discriminator's outputs, blended into `floor` as the score falls from 1 to 0.

    Its derivative in a sample holds that of the score too, so that the generator learns the way out of the region even
    where the discriminator is flat.
    """
    return floor + score.clamp(max=1) * (output - floor)


def redaction(
    updates: Iterable[Update],
    *,
    lam: float = 0.8,
    buffer: NegativeBuffer | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    guide: Literal["penalty", "guide"] = "penalty",
    guide_weight: float = 1.0,
    guide_floor: float = -4.0,
    label_smoothing: tuple[float, float] = NO_SMOOTHING,
) -> list[Update]:
    """Return the updates of redaction, given those of the usual GAN.

    The discriminator also learns to reject known samples of a region, the generator what a score says of its samples.
    Optimisers, and when the updates happen, stay as they are; so does any further update.

    Parameters
    ----------
    updates : iterable of Update
        Those of ``gan(...)``.
    lam : float, default=0.8
        The weight of generated samples among what the discriminator is to reject, in (0, 1]; the rest is that of the
        known samples.
    buffer : NegativeBuffer, optional
        The known samples; default none. It may be filled between steps.
    score : callable, optional
    guide : {"penalty", "guide"}, default="penalty"
    guide_weight : float, default=1.0
    guide_floor : float, default=-4.0
        As of `GuidedGenerator`.
    label_smoothing : tuple of two floats, default=(0.0, 0.0)
        The probability with which the discriminator is told that a real instance is fake, and a fake one real.

    Returns
    -------
    list of Update

    Raises
    ------
    ValueError
        If a parameter is not as expected, or objectives are not those of the usual GAN.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recipes import gan
    >>> from ganclean.recipes.redacting import NegativeBuffer, redaction
    >>> buffer = NegativeBuffer(1000)
    >>> buffer.add(torch.tensor([[9.0, 9.0]]))
    >>> discriminator, generator = redaction(gan("hinge", n_critic=2), lam=0.9, buffer=buffer)
    >>> discriminator.objective.lam, generator.is_due(0), generator.is_due(1)
    (0.9, False, True)
    """
    check_settings(lam, guide, label_smoothing)
    updates = list(updates)
    check_redactable(updates, guided=score is not None)
    buffer = NegativeBuffer(1) if buffer is None else buffer
    redacting = []
    for update in updates:
        own: Any = update.objective
        if _is(own, DiscriminatorObjective, RedactingDiscriminator):
            loss = SmoothedLoss(own.loss, *label_smoothing) if any(label_smoothing) else own.loss
            own = RedactingDiscriminator(loss, own.penalty, own.conditional, own.scale, float(lam), buffer)
        elif score is not None and _is(own, GeneratorObjective, GuidedGenerator):
            own = GuidedGenerator(
                own.loss, own.conditional, own.scale, score, guide, float(guide_weight), float(guide_floor)
            )
        redacting.append(replace(update, objective=own))
    return redacting


def check_settings(lam: Any, guide: Any, label_smoothing: Sequence[float] = NO_SMOOTHING) -> None:
    """Raise ValueError where redaction's settings are not as expected."""
    if guide not in GUIDES:
        raise ValueError(f"guide must be one of {list(GUIDES)}; got {guide!r}.")
    if not isinstance(lam, Real) or not 0 < float(lam) <= 1:
        raise ValueError(f"lam must lie in (0, 1]; got {lam!r}.")
    if len(label_smoothing) != 2 or not all(0 <= flip < 0.5 for flip in label_smoothing):
        raise ValueError(f"label_smoothing must be two numbers in [0, 0.5); got {label_smoothing!r}.")


def check_redactable(updates: Iterable[Update], *, guided: bool = False) -> None:
    """Raise ValueError where there is no objective of the usual GAN to redact with.

    Parameters
    ----------
    updates : iterable of Update
    guided : bool, default=False
        Whether the generator's is needed too.
    """
    found = {update.name: update.objective for update in updates}
    needed: list[tuple[str, tuple[type, ...]]] = [("discriminator", (DiscriminatorObjective, RedactingDiscriminator))]
    if guided:
        needed.append(("generator", (GeneratorObjective, GuidedGenerator)))
    for player, kinds in needed:
        if not any(_is(objective, *kinds) for objective in found.values()):
            given = ", ".join(f"{name}: {getattr(own, '__name__', type(own).__name__)}" for name, own in found.items())
            raise ValueError(
                f"Redaction adds to the {player}'s objective of the usual GAN, as ganclean.recipes.gan(...) returns "
                f"it; there is none among the updates ({given}). Redact with a GANTrainer(loss=...) or "
                "GANTrainer(updates=gan(...)), or write the term on what is to be rejected into your own objective."
            )


def _is(objective: Any, *kinds: type) -> bool:
    # Not isinstance: what a subclass of one's own does would be lost.
    return type(objective) in kinds
