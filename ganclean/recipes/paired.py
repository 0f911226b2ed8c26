"""Image to image: a generator that maps an input to its target, judged beside the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ganclean.dynamics.players import Players
from ganclean.dynamics.update import Batch, Update
from ganclean.losses import AdversarialLoss, resolve_loss
from ganclean.optim import Adam


def _patches(nets: Players, inputs: Tensor, images: Tensor) -> Tensor:
    """Return the discriminator's outputs for pairs, all patches of a pair in one row."""
    return nets.D(torch.cat([inputs, images], dim=1)).flatten(1)


@dataclass(frozen=True)
class _Discriminator:
    loss: AdversarialLoss

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        assert batch.y is not None
        real = self.loss.real(_patches(nets, batch.y, batch.x)).mean(1)
        # The generated image of a pair goes with the pair.
        fake = self.loss.fake(_patches(nets, batch.y, nets.G(batch.y))).mean(1)
        return (weights * (real + fake)).mean() / 2


@dataclass(frozen=True)
class _Generator:
    loss: AdversarialLoss
    weight: float

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        assert batch.y is not None
        image = nets.G(batch.y)
        fooled = self.loss.generator(_patches(nets, batch.y, image)).mean(1)
        return (weights * (fooled + self.weight * (image - batch.x).abs().flatten(1).mean(1))).mean()

    @staticmethod
    def sampler(nets: Players, latents: Any, inputs: Tensor) -> Tensor:
        """Return what the generator makes of inputs of the data."""
        return nets.G(inputs)


def image_to_image(loss="non_saturating", optimizer_g=None, optimizer_d=None, *, weight=100.0) -> list[Update]:
    """Return the updates of paired image-to-image translation (Isola et al., 2017).

    The data are the targets, and the labels `y` of `fit` the inputs, images of the same height and width. The networks
    are G(input) and D(input and image, joined along the channels), which returns patches of any number. A pair stands
    on both sides: its weight is on all its terms, in both losses.

    Parameters
    ----------
    loss : str or AdversarialLoss, default="non_saturating"
    optimizer_g, optimizer_d : Optimizer, optional
        Default ``Adam(lr=2e-4, betas=(0.5, 0.999))``.
    weight : float, default=100.0
        Of the mean absolute difference to the target.

    Returns
    -------
    list of Update
        Named D and G.

    Examples
    --------
    >>> from ganclean import GANTrainer
    >>> from ganclean.recipes import image_to_image
    >>> trainer = GANTrainer(updates=image_to_image(weight=10.0), n_epochs=10)
    """
    chosen, default = resolve_loss(loss), Adam(lr=2e-4, betas=(0.5, 0.999))
    return [
        Update("D", _Discriminator(chosen), optimizer_d or default),
        Update("G", _Generator(chosen, float(weight)), optimizer_g or default),
    ]
