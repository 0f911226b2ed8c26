"""The pairs of the reproduction benchmarks: the paper's own, and one as people train them today.

"paper" is that of Terashita et al. (ICLR 2021) and of the configuration that they published: stacks of (transposed)
convolutions to 32 channels, each with a sigmoid and, after it, layer normalisation; a last linear layer, with tanh in
the generator; Glorot's initial weights; simultaneous plain SGD, learning rate and weight decay 1e-3, batches of 100.
(There, biases do not decay.) For 28 × 28 images kernels and strides are the published ones; 8 × 8 images have three
layers in the place of seven. The perceptrons for the 2-D normal data are the published ones, too. "modern" has leaky
rectifiers, spectral normalisation in the discriminator, alternating Adam with β₁ = 0 and a moving average of the
generator.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ganclean import GANTrainer
from ganclean.optim import SGD, Adam

CHANNELS, LATENT, BATCH = 32, 32, 100
# Kernels and strides of the generator from 1 × 1 to the image, and of the discriminator from the image to 1 × 1.
STACKS = {
    28: (
        [(2, 1), (3, 1), (3, 2), (2, 1), (3, 1), (3, 2), (4, 1)],
        [(4, 1), (3, 2), (3, 1), (2, 1), (3, 2), (3, 1), (2, 1)],
    ),
    8: ([(2, 1), (3, 1), (2, 2)], [(2, 2), (3, 1), (2, 1)]),
}


def perceptron(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers without bias, with an activation between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=False), activation()]
    return nn.Sequential(*layers[:-1])


def published_stack(kind: type[nn.Module], shape: list[tuple[int, int]], n_in: int) -> list[nn.Module]:
    """Convolutions of one kind to 32 channels, each followed by a sigmoid and layer normalisation."""
    layers: list[nn.Module] = []
    for i, (kernel, stride) in enumerate(shape):
        convolution = kind(CHANNELS if i else n_in, CHANNELS, kernel, stride)
        layers += [convolution, nn.Sigmoid(), nn.GroupNorm(1, CHANNELS)]
    return layers


def paper_pair(sample_shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Return the published pair for points in the plane or for images of 28 × 28 or 8 × 8."""
    if sample_shape == (2,):
        return perceptron([10, 32, 32, 2], nn.ReLU), perceptron([2, 64, 64, 1], nn.ReLU)
    channels, side, _ = sample_shape
    up, down = STACKS[side]
    generator = nn.Sequential(
        nn.Unflatten(1, (LATENT, 1, 1)),
        *published_stack(nn.ConvTranspose2d, up, LATENT),
        nn.Conv2d(CHANNELS, channels, 1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(*published_stack(nn.Conv2d, down, channels), nn.Flatten(), nn.Linear(CHANNELS, 1))
    for layer in (*generator, *discriminator):
        if hasattr(layer, "weight") and not isinstance(layer, nn.GroupNorm):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return generator, discriminator


def modern_pair(sample_shape: tuple[int, ...], width: int = 16) -> tuple[nn.Module, nn.Module]:
    """Return a small pair with leaky rectifiers and spectral normalisation in the discriminator."""

    def leaky() -> nn.Module:
        return nn.LeakyReLU(0.2)

    if sample_shape == (2,):
        generator = perceptron([10, 32, 32, 2], leaky)
        layers = perceptron([2, 64, 64, 1], leaky)
        return generator, nn.Sequential(*[spectral_norm(m) if isinstance(m, nn.Linear) else m for m in layers])
    channels, side = sample_shape[0], sample_shape[1] // 4
    generator = nn.Sequential(
        nn.Linear(LATENT, 2 * width * side * side),
        nn.Unflatten(1, (2 * width, side, side)),
        nn.GroupNorm(4, 2 * width),
        leaky(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.GroupNorm(4, width),
        leaky(),
        nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)),
        leaky(),
        spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
        leaky(),
        nn.Flatten(),
        spectral_norm(nn.Linear(2 * width * side * side, 1)),
    )
    return generator, discriminator


PAIRS = {"paper": paper_pair, "modern": modern_pair}


def networks(pair: str, sample_shape: tuple[int, ...], seed: int) -> tuple[nn.Module, nn.Module]:
    """Return a named pair with initial weights from a seed."""
    torch.manual_seed(seed)
    return PAIRS[pair](tuple(sample_shape))


def trainer(pair: str, sample_shape: tuple[int, ...], n_epochs: int, lr: float | None = None) -> GANTrainer:
    """Return how a named pair is trained; `lr` in place of the published or usual learning rate."""
    is_plane = tuple(sample_shape) == (2,)
    common = {"n_epochs": n_epochs, "batch_size": BATCH, "latent_dim": 10 if is_plane else LATENT}
    if pair == "paper":
        rule = SGD(lr=lr or 1e-3, weight_decay=0.0 if is_plane else 1e-3)
        return GANTrainer("non_saturating", rule, update="simultaneous", **common)
    return GANTrainer("non_saturating", Adam(lr=lr or 1e-3, betas=(0.0, 0.99)), ema_decay=0.99, **common)
