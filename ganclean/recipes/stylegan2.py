"""StyleGAN2: lazy regularisers as updates of their own, and a path length whose mean is carried."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ganclean.dynamics.players import Players
from ganclean.dynamics.update import Batch, Update
from ganclean.optim import Adam, Optimizer

MEAN = "path_length"


def _styles(nets: Players, latents: Tensor, mixing: float) -> tuple[Tensor, ...]:
    """Return the styles of some latents: one tensor, or two of which the generator mixes the second in."""
    w = nets.G.mapping(latents)
    if not mixing or float(torch.rand(())) >= mixing:
        return (w,)
    return w, nets.G.mapping(torch.randn_like(latents))


@dataclass(frozen=True)
class _Generator:
    mixing: float

    # Labels are nothing to it.
    conditional: ClassVar[bool] = False

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        return softplus(-nets.D(nets.G.synthesis(*_styles(nets, batch.latents, self.mixing)))).mean()


@dataclass(frozen=True)
class _PathLength:
    weight: float
    decay: float
    every: int
    carries: dict[str, float] = field(default_factory=lambda: {MEAN: 0.0})

    conditional: ClassVar[bool] = False

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        w = nets.G.mapping(batch.latents)
        noise: Tensor | None = None

        def projected(w: Tensor) -> Tensor:
            nonlocal noise
            images = nets.G.synthesis(w)
            if noise is None:
                noise = torch.randn_like(images) / math.sqrt(math.prod(images.shape[2:]))
            return (images * noise).flatten(1).sum(1)

        _, slope = nets.slope(projected, w)
        lengths = slope.flatten(1).square().sum(1).sqrt()
        mean = torch.lerp(batch.carried[MEAN], lengths.mean(), 1 - self.decay)
        batch.carried[MEAN] = mean.detach()
        return self.every * self.weight * (lengths - mean.detach()).square().mean()


@dataclass(frozen=True)
class _Discriminator:
    mixing: float

    # Labels are nothing to it.
    conditional: ClassVar[bool] = False

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        fake = nets.G.synthesis(*_styles(nets, batch.latents, self.mixing))
        return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(fake)).mean()


@dataclass(frozen=True)
class _R1:
    gamma: float
    every: int

    # Labels are nothing to it.
    conditional: ClassVar[bool] = False

    def __call__(self, nets: Players, batch: Batch, weights: Tensor) -> Tensor:
        _, slope = nets.slope(lambda x: nets.D(x).flatten(), batch.x)
        return self.every * self.gamma / 2 * (weights * slope.flatten(1).square().sum(1)).mean()


def _lazy(optimizer: Optimizer, every: int) -> Optimizer:
    """Return Adam for updates of which some more are regularisers (Karras et al., 2020, appendix B)."""
    if not isinstance(optimizer, Adam):
        raise ValueError(f"stylegan2 corrects Adam for its lazy regularisers; got {optimizer!r}.")
    share = every / (every + 1)
    params: dict[str, Any] = optimizer.get_params(deep=False)
    params |= {"lr": optimizer.lr * share, "betas": tuple(beta**share for beta in optimizer.betas)}
    return type(optimizer)(**params)


def stylegan2(
    optimizer_g=None,
    optimizer_d=None,
    *,
    gamma=10.0,
    path_length=2.0,
    path_decay=0.99,
    r1_every=16,
    path_every=4,
    style_mixing=0.0,
) -> list[Update]:
    """Return the updates of StyleGAN2 (Karras et al., 2020): G, its path length, D, and its R1 penalty.

    The generator has the parts `mapping`, z to w, and `synthesis`, w to images (or two w to be mixed, where
    `style_mixing` is positive); called as a whole it is ``synthesis(mapping(z))``. The regularisers are updates of
    their own, every so many steps, that share the optimisers of the main updates; Adam's rate and decays are corrected
    for them. The weight of an instance is on its term in D's loss and on its R1 penalty.

    Parameters
    ----------
    optimizer_g, optimizer_d : Adam, optional
        Before the correction; default ``Adam(lr=2e-3, betas=(0.0, 0.99))``.
    gamma : float, default=10.0
        Of R1.
    path_length : float, default=2.0
        Weight of the path length penalty; 0 leaves that update out.
    path_decay : float, default=0.99
        Decay of the mean path length, which steps carry on.
    r1_every, path_every : int, default=16, 4
        In every so many steps.
    style_mixing : float, default=0.0
        The probability of mixing two styles in a step.

    Returns
    -------
    list of Update
        Named G, G_path, D and D_r1.

    Examples
    --------
    >>> from ganclean import Average, GANTrainer
    >>> from ganclean.recipes import stylegan2
    >>> average = Average(decay=lambda t: min(0.998, (1 + t) / (10 + t)), buffers="copied")
    >>> trainer = GANTrainer(updates=stylegan2(gamma=1.0), ema_decay=average, n_epochs=10)
    """
    default = Adam(lr=2e-3, betas=(0.0, 0.99))
    rule_g, rule_d = optimizer_g or default, optimizer_d or default
    updates = [Update("G", _Generator(float(style_mixing)), _lazy(rule_g, path_every) if path_length else rule_g)]
    if path_length:
        penalty = _PathLength(float(path_length), float(path_decay), int(path_every))
        updates.append(Update("G", penalty, "G", due=int(path_every), name="G_path"))
    return [
        *updates,
        Update("D", _Discriminator(float(style_mixing)), _lazy(rule_d, r1_every)),
        Update("D", _R1(float(gamma), int(r1_every)), "D", due=int(r1_every), name="D_r1"),
    ]
