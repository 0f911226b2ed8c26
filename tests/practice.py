"""Small smooth GANs in float64 that train as people really train them: one feature at a time, and all together."""

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from ganclean.augmentation import DiffAugment
from ganclean.losses import R1, GradientPenalty
from ganclean.optim import SGD, Adam, AdamW, Clipped, RMSprop
from tests.toy_gans import toy_data

LATENT = 3
ADAM = Adam(lr=1e-2, betas=(0.5, 0.9), eps=1e-3)


def perceptrons(norm_g=None, normalize_d=lambda layer: layer, norm_d=None, dropout=0.0):
    """A pair for points in the plane, with normalisation and dropout where asked for."""
    generator = [nn.Linear(LATENT, 6), *([norm_g(6)] if norm_g else []), nn.Tanh(), nn.Linear(6, 2)]
    discriminator = [
        normalize_d(nn.Linear(2, 6)),
        *([norm_d(6)] if norm_d else []),
        nn.Softplus(),
        *([nn.Dropout(dropout)] if dropout else []),
        normalize_d(nn.Linear(6, 1)),
    ]
    return nn.Sequential(*generator).double(), nn.Sequential(*discriminator).double()


class ConditionalGenerator(nn.Module):
    """Images of 4 × 4 from latents and classes, with conditional batch normalisation."""

    def __init__(self, n_classes=3, channels=3):
        super().__init__()
        self.first = nn.Linear(LATENT, channels * 16)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(n_classes, channels)
        self.last = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, z, y):
        x = self.norm(self.first(z).view(len(z), -1, 4, 4))
        return torch.tanh(self.last(torch.tanh(x * (1 + self.scale(y)[:, :, None, None]))))


class ProjectionDiscriminator(nn.Module):
    """Augmented images and classes to one number, spectrally normalised, with dropout."""

    def __init__(self, n_classes=3, augment=True, dropout=0.2, normalize=parametrizations.spectral_norm):
        super().__init__()
        self.augment = DiffAugment() if augment else nn.Identity()
        self.conv = normalize(nn.Conv2d(2, 4, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.head = normalize(nn.Linear(4 * 16, 1))
        self.project = nn.Embedding(n_classes, 4 * 16)

    def forward(self, x, y):
        h = self.dropout(nn.functional.softplus(self.conv(self.augment(x)))).flatten(1)
        return self.head(h).flatten() + (h * self.project(y)).sum(dim=1)


def augmented_pair():
    generator = nn.Sequential(nn.Linear(LATENT, 2 * 16), nn.Unflatten(1, (2, 4, 4)), nn.Tanh())
    discriminator = nn.Sequential(
        DiffAugment(), nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(48, 1)
    )
    return generator.double(), discriminator.double()


def partly_trained():
    generator, discriminator = perceptrons()
    generator[0].requires_grad_(False)
    discriminator[0].bias.requires_grad_(False)
    return generator, discriminator


def conditional_pair():
    return ConditionalGenerator().double(), ProjectionDiscriminator(augment=False, dropout=0.0).double()


def everything_pair():
    return ConditionalGenerator().double(), ProjectionDiscriminator().double()


def images(n_samples=16):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, size=n_samples)
    return np.tanh(rng.normal(size=(n_samples, 2, 4, 4)) / 2 + (y - 1)[:, None, None, None] / 2), y


def points():
    return toy_data(), None


def scheduled(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


# Feature: a function that makes the pair, one that makes the data, and the trainer's settings.
PRACTICE = {
    "adamw": (perceptrons, points, {"optimizer": AdamW(lr=1e-2, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1)}),
    "adam with beta1 = 0": (perceptrons, points, {"optimizer": Adam(lr=1e-2, betas=(0.0, 0.9), eps=1e-3)}),
    "rmsprop": (perceptrons, points, {"optimizer": RMSprop(lr=1e-2, alpha=0.9, eps=1e-2)}),
    "rmsprop, centered, momentum": (
        perceptrons,
        points,
        {"optimizer": RMSprop(lr=3e-3, alpha=0.9, eps=1e-1, momentum=0.5, centered=True)},
    ),
    "schedule": (perceptrons, points, {"optimizer": ADAM, "scheduler": scheduled}),
    "one cycle": (
        perceptrons,
        points,
        {"optimizer": ADAM, "scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=2e-2, total_steps=20)},
    ),
    "n_critic": (perceptrons, points, {"optimizer": ADAM, "n_critic": 2}),
    "moving average": (perceptrons, points, {"ema_decay": 0.8}),
    "r1": (perceptrons, points, {"penalty": R1(gamma=2.0)}),
    "r1, lazy": (perceptrons, points, {"penalty": R1(gamma=2.0, every=2), "update": "simultaneous"}),
    "gradient penalty": (
        perceptrons,
        points,
        {"penalty": GradientPenalty(weight=2.0), "loss": "wasserstein", "n_critic": 2, "optimizer": ADAM},
    ),
    "gradient clipping": (perceptrons, points, {"optimizer": Clipped(SGD(lr=0.1), max_norm=0.3)}),
    "gradient clipping by value": (perceptrons, points, {"optimizer": Clipped(ADAM, max_value=0.05)}),
    "batch norm": (partial(perceptrons, norm_g=nn.BatchNorm1d, norm_d=nn.BatchNorm1d), points, {}),
    "batch norm, cumulative": (
        partial(perceptrons, norm_g=partial(nn.BatchNorm1d, momentum=None)),
        points,
        {"update": "simultaneous"},
    ),
    "spectral norm": (partial(perceptrons, normalize_d=parametrizations.spectral_norm), points, {}),
    "spectral norm, hook": (
        partial(perceptrons, normalize_d=spectral_norm),
        points,
        {"update": "simultaneous", "penalty": GradientPenalty()},
    ),
    "dropout": (partial(perceptrons, dropout=0.3), points, {"optimizer": ADAM}),
    "conditional": (conditional_pair, images, {"conditional": True}),
    "augmentation": (augmented_pair, images, {"optimizer": ADAM}),
    "frozen parameters": (partly_trained, points, {"optimizer": ADAM, "ema_decay": 0.5}),
    "everything": (
        everything_pair,
        images,
        {
            "conditional": True,
            "optimizer": Adam(lr=1e-2, betas=(0.0, 0.9), eps=1e-3),
            "optimizer_discriminator": Clipped(Adam(lr=2e-2, betas=(0.0, 0.9), eps=1e-3), max_norm=5.0),
            "penalty": R1(gamma=1.0, every=3),
            "ema_decay": 0.7,
            "scheduler": scheduled,
            "n_critic": 2,
        },
    ),
}


def practised(feature, **settings):
    """Return a pair, data, labels and the trainer's settings of one feature."""
    make_pair, make_data, chosen = PRACTICE[feature]
    torch.manual_seed(0)
    X, y = make_data()
    return make_pair(), X, y, chosen | settings
