"""AC-GAN: a discriminator that also tells the class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from ganclean.dynamics.players import Players
from ganclean.dynamics.update import Batch, Update
from ganclean.losses import AdversarialLoss, resolve_loss
from ganclean.optim import resolve_optimizer
from ganclean.recipes.adversarial import DEFAULT_OPTIMIZER


@dataclass(frozen=True)
class _Discriminator:
    loss: AdversarialLoss
    weight: float

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        assert batch.y is not None
        fake = nets.G(batch.latents, batch.y)
        validity, classes = nets.D(batch.x)
        rejected, guessed = nets.D(fake)
        # An instance's class term is its own as much as its validity.
        own = self.loss.real(validity.flatten()) + self.weight * cross_entropy(classes, batch.y, reduction="none")
        others = self.loss.fake(rejected.flatten()) + self.weight * cross_entropy(guessed, batch.y, reduction="none")
        return (weights * own).mean() + others.mean()


@dataclass(frozen=True)
class _Generator:
    loss: AdversarialLoss
    weight: float

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        assert batch.y is not None
        validity, classes = nets.D(nets.G(batch.latents, batch.y))
        return self.loss.generator(validity.flatten()).mean() + self.weight * cross_entropy(classes, batch.y)


def acgan(loss="non_saturating", optimizer_g=None, optimizer_d=None, *, weight=1.0) -> list[Update]:
    """Return the updates of AC-GAN (Odena et al., 2017): validity and class, of real and of generated samples.

    The networks are G(z, y) and D(x), which returns one number and the logits of the classes for each sample. Samples
    are generated for the labels of the batch. The weight of an instance is on its validity and on its class loss; that
    a label was drawn with it for a generated sample stays.

    Parameters
    ----------
    loss : str or AdversarialLoss, default="non_saturating"
    optimizer_g, optimizer_d : Optimizer, optional
        Default ``Adam(lr=1e-3, betas=(0.5, 0.99))``.
    weight : float, default=1.0
        Of the class loss.

    Returns
    -------
    list of Update
        Named D and G.

    Examples
    --------
    >>> from ganclean import GANTrainer
    >>> from ganclean.recipes import acgan
    >>> trainer = GANTrainer(updates=acgan(weight=0.5), n_epochs=10)
    """
    chosen = resolve_loss(loss)
    return [
        Update("D", _Discriminator(chosen, float(weight)), resolve_optimizer(optimizer_d, DEFAULT_OPTIMIZER)),
        Update("G", _Generator(chosen, float(weight)), resolve_optimizer(optimizer_g, DEFAULT_OPTIMIZER)),
    ]
