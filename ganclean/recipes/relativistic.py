"""Relativistic average GAN: real samples are judged beside generated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import softplus

from ganclean.dynamics.players import Players
from ganclean.dynamics.update import Batch, Update
from ganclean.optim import resolve_optimizer
from ganclean.recipes.adversarial import DEFAULT_OPTIMIZER


@dataclass(frozen=True)
class _Relativistic:
    """The loss of one side: of the discriminator with sign 1, of the generator with sign −1."""

    sign: float

    # Labels are nothing to it.
    conditional: ClassVar[bool] = False

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        real = nets.D(batch.x).flatten()
        fake = nets.D(nets.G(batch.latents)).flatten()
        # Whoever is removed is removed from the mean, too, that generated samples are compared with.
        mean_real = (weights * real).sum() / weights.sum()
        own = softplus(-self.sign * (real - fake.mean()))
        return (weights * own).mean() + softplus(self.sign * (fake - mean_real)).mean()


def relativistic(optimizer_g=None, optimizer_d=None) -> list[Update]:
    """Return the updates of the relativistic average GAN (Jolicoeur-Martineau, 2019, equation 7).

    Both losses couple the instances of a batch, through the mean output of the real ones. The weight of an instance is
    on its own term and on its share of that mean: weight 0 is the batch without it, but for the batch size that the
    terms are divided by. The generator's loss looks at real instances too, so that they reach it directly.

    Parameters
    ----------
    optimizer_g, optimizer_d : Optimizer, optional
        Default ``Adam(lr=1e-3, betas=(0.5, 0.99))``.

    Returns
    -------
    list of Update
        Named D and G.

    Examples
    --------
    >>> from ganclean import GANTrainer
    >>> from ganclean.recipes import relativistic
    >>> trainer = GANTrainer(updates=relativistic(), n_epochs=10)
    """
    return [
        Update("D", _Relativistic(1.0), resolve_optimizer(optimizer_d, DEFAULT_OPTIMIZER)),
        Update("G", _Relativistic(-1.0), resolve_optimizer(optimizer_g, DEFAULT_OPTIMIZER)),
    ]
