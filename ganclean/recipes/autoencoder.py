"""A variational autoencoder: not a GAN, and one update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ganclean.dynamics.players import Players
from ganclean.dynamics.update import Batch, Update
from ganclean.optim import resolve_optimizer
from ganclean.recipes.adversarial import DEFAULT_OPTIMIZER


@dataclass(frozen=True)
class _Bound:
    beta: float

    # Labels are nothing to it.
    conditional: ClassVar[bool] = False

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        mean, log_variance = nets.E(batch.x)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        missed = (nets.G(latents) - batch.x).square().flatten(1).sum(1) / 2
        divergence = (log_variance.exp() + mean.square() - 1 - log_variance).sum(1) / 2
        return (weights * (missed + self.beta * divergence)).mean()


def vae(optimizer=None, *, beta=1.0) -> list[Update]:
    """Return the one update of a variational autoencoder (Kingma and Welling, 2014) with unit Gaussian outputs.

    The players are the encoder E(x), which returns mean and log-variance, and the decoder G(z); samples are those of
    the prior. The weight of an instance is on its own bound.

    Parameters
    ----------
    optimizer : Optimizer, optional
        Default ``Adam(lr=1e-3, betas=(0.5, 0.99))``.
    beta : float, default=1.0
        Weight of the divergence from the prior.

    Returns
    -------
    list of Update
        Named E+G.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.recipes import vae
    >>> X = np.random.default_rng(0).normal(size=(64, 2))
    >>> class Encoder(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(2, 4)
    ...     def forward(self, x):
    ...         return self.layer(x).chunk(2, dim=1)
    >>> trainer = GANTrainer(updates=vae(), latent_dim=2, n_epochs=3)
    >>> encoder, decoder = Encoder(), nn.Linear(2, 2)
    >>> cleanser = GANInfluence(decoder, players={"E": encoder}, trainer=trainer, random_state=0).fit(X)
    >>> cleanser.influence_.shape
    (64,)
    """
    return [Update(("E", "G"), _Bound(float(beta)), resolve_optimizer(optimizer, DEFAULT_OPTIMIZER))]
