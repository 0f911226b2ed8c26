"""The training step of redaction: one more kind of fake for the discriminator, a guide for the generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ganclean.losses import AdversarialLoss
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors
from ganclean.training.step import TrainingStep

GUIDES = ("penalty", "guide")


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
    >>> from ganclean.redaction.step import SmoothedLoss
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
class RedactionRecord(StepRecord):
    """What a step of redaction drew: a `StepRecord`, and what the discriminator is to reject beside generated samples.

    Parameters
    ----------
    negatives : Tensor of shape (batch_size, *sample_shape), optional
        None where none are known.
    labels_negatives : Tensor of shape (batch_size, ...), optional
        Their labels, where the networks are conditional.
    """

    negatives: Tensor | None = None
    labels_negatives: Tensor | None = None


@dataclass(frozen=True)
class RedactionStep(TrainingStep):
    """A training step whose discriminator also rejects known samples of the redacted region.

    The discriminator's loss is ``mean(real(D(x))) + lam mean(fake(D(G(z)))) + (1 - lam) mean(fake(D(x_redacted)))``;
    while the buffer is empty, lam counts as 1. All else is as in `TrainingStep`, of which this is the special case
    of an empty buffer and no score.

    Parameters
    ----------
    lam : float
        In (0, 1].
    buffer : NegativeBuffer
        May be filled between steps.
    score : callable or None
        From samples to how valid they are, differentiable: from 0, and at least 1 where they are valid.
    guide : {"penalty", "guide"}
        Whether the score is a term of the generator's loss of its own, or blends the discriminator's output into
        `guide_floor` where a sample is invalid.
    guide_weight, guide_floor : float

    References
    ----------
    Kong, Chaudhuri, Data redaction from pre-trained GANs, 2022.

    Sinha et al., Negative data augmentation, 2021, for the mixture of fakes.
    """

    lam: float = 1.0
    buffer: NegativeBuffer = field(default_factory=lambda: NegativeBuffer(1))
    score: Callable[[Tensor], Tensor] | None = None
    guide: Literal["penalty", "guide"] = "penalty"
    guide_weight: float = 1.0
    guide_floor: float = -4.0

    @classmethod
    def of(cls, step: TrainingStep, **settings: Any) -> RedactionStep:
        """Return a step with the networks and rules of another."""
        return cls(**{f.name: getattr(step, f.name) for f in fields(step)} | settings)

    def drawn(self, record, source):
        """Return a record with all that its seed, the data and the buffer determine."""
        record = super().drawn(record, source)
        if isinstance(record, RedactionRecord) or not len(self.buffer) or self.lam == 1:
            return record
        # A seed of its own: all else is drawn as without redaction.
        noise = torch.Generator().manual_seed(record.seed + 7)
        negatives, labels = self.buffer.draw(len(record.indices), noise)
        return RedactionRecord(**vars(record), negatives=negatives, labels_negatives=labels)

    def iterated(self, theta, buffers, record):
        """Return the vectors of the discriminator's spectral norms in each of its calls in its own update."""
        played = super().iterated(theta, buffers, record)
        if _negatives(record) is not None:
            played.append(self.players[1].iterate(theta, {**buffers, **played[-1]}))
        return played

    def _loss_on_fake(
        self, theta: Tensors, buffers: Tensors, played: list[Tensors], fake: Tensor, record: StepRecord
    ) -> tuple[Tensor, Tensors]:
        loss, buffers = super()._loss_on_fake(theta, buffers, played, fake, record)
        negatives = _negatives(record)
        if negatives is None:
            return loss, buffers
        judged, buffers = self._judge(theta, {**buffers, **played[2]}, *negatives, record.seed + 6)
        return self.lam * loss + (1 - self.lam) * self.loss.fake(judged).mean(), buffers

    def _generator_terms(self, fake: Tensor, output: Tensor) -> Tensor:
        if self.score is None:
            return super()._generator_terms(fake, output)
        score = self.score(fake)
        if self.guide == "guide":
            return super()._generator_terms(fake, guided(output, score, self.guide_floor))
        tiny = torch.finfo(score.dtype).tiny
        return super()._generator_terms(fake, output) - self.guide_weight * score.clamp(min=tiny).log()


def guided(output: Tensor, score: Tensor, floor: float) -> Tensor:
    """Return the discriminator's outputs, blended into `floor` as the score falls from 1 to 0.

    Its derivative in a sample holds that of the score too, so that the generator learns the way out of the region even
    where the discriminator is flat.
    """
    return floor + score.clamp(max=1) * (output - floor)


def _negatives(record: StepRecord) -> tuple[Tensor, Tensor | None] | None:
    """Return a record's negatives and their labels, where it has any."""
    if not isinstance(record, RedactionRecord) or record.negatives is None:
        return None
    return record.negatives, record.labels_negatives
