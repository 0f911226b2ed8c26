"""WGAN-GP: a critic with a gradient penalty, updated several times for one update of the generator."""

from __future__ import annotations

from ganclean.dynamics.update import Update
from ganclean.losses import GradientPenalty
from ganclean.optim import Adam
from ganclean.recipes.adversarial import gan


def wgan_gp(optimizer_g=None, optimizer_d=None, *, weight=10.0, n_critic=5, conditional=False) -> list[Update]:
    """Return the updates of WGAN-GP (Gulrajani et al., 2017, algorithm 1).

    Parameters
    ----------
    optimizer_g, optimizer_d : Optimizer, optional
        Default ``Adam(lr=1e-4, betas=(0.0, 0.9))``, as in the paper.
    weight : float, default=10.0
        Of the penalty, which belongs to the instance that it is taken at.
    n_critic : int, default=5
        Updates of the critic for one of the generator.
    conditional : bool, default=False
        Whether the networks take labels as their second input.

    Returns
    -------
    list of Update
        Named D and G.

    Examples
    --------
    >>> from ganclean import GANTrainer
    >>> from ganclean.recipes import wgan_gp
    >>> trainer = GANTrainer(updates=wgan_gp(n_critic=3), n_epochs=10)
    """
    default = Adam(lr=1e-4, betas=(0.0, 0.9))
    return gan(
        "wasserstein",
        optimizer_g or default,
        optimizer_d or default,
        penalty=GradientPenalty(weight),
        n_critic=n_critic,
        conditional=conditional,
    )
