"""Small default networks: for vectors a pair of perceptrons, for images a convolutional pair and a classifier.

All are smooth (SiLU) and free of batch statistics: first-order influence predicts their training well (theory,
section 3), which kinks and a coupling within the batch would spoil.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class MLPGenerator(nn.Sequential):
    """Two hidden layers from latents to samples of any shape.

    Parameters
    ----------
    sample_shape : tuple of int
    latent_dim : int, default=32
    width : int, default=32
        Units in each hidden layer.

    Examples
    --------
    >>> import torch
    >>> from ganclean.networks import MLPGenerator
    >>> MLPGenerator((2,), latent_dim=4)(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def __init__(self, sample_shape, latent_dim=32, width=32):
        super().__init__(
            nn.Linear(latent_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, math.prod(sample_shape)),
            nn.Unflatten(1, tuple(sample_shape)),
        )


class MLPDiscriminator(nn.Sequential):
    """Two hidden layers from samples of any shape to one number each.

    Parameters
    ----------
    sample_shape : tuple of int
    width : int, default=64

    Examples
    --------
    >>> import torch
    >>> from ganclean.networks import MLPDiscriminator
    >>> MLPDiscriminator((2,))(torch.zeros(3, 2)).shape
    torch.Size([3, 1])
    """

    def __init__(self, sample_shape, width=64):
        super().__init__(
            nn.Flatten(),
            nn.Linear(math.prod(sample_shape), width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )


class ConvGenerator(nn.Sequential):
    """Two transposed convolutions from latents to images in [−1, 1], with group normalisation.

    Parameters
    ----------
    sample_shape : tuple of int
        Channels, height and width; height and width divisible by 4.
    latent_dim : int, default=32
    width : int, default=16
        Channels of the second-last layer; the one before has twice as many.

    Examples
    --------
    >>> import torch
    >>> from ganclean.networks import ConvGenerator
    >>> ConvGenerator((1, 8, 8), latent_dim=4)(torch.zeros(3, 4)).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(self, sample_shape, latent_dim=32, width=16):
        channels, height, breadth = sample_shape
        super().__init__(
            nn.Linear(latent_dim, 2 * width * (height // 4) * (breadth // 4)),
            nn.Unflatten(1, (2 * width, height // 4, breadth // 4)),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )


class ConvDiscriminator(nn.Sequential):
    """Two strided convolutions from images to one number each.

    Parameters
    ----------
    sample_shape : tuple of int
        Channels, height and width; height and width divisible by 4.
    width : int, default=16
        Channels of the first layer; the second has twice as many.

    Examples
    --------
    >>> import torch
    >>> from ganclean.networks import ConvDiscriminator
    >>> ConvDiscriminator((1, 8, 8))(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 1])
    """

    def __init__(self, sample_shape, width=16):
        channels, height, breadth = sample_shape
        super().__init__(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (height // 4) * (breadth // 4), 1),
        )


class ImageClassifier(nn.Module):
    """A small convolutional classifier whose penultimate layer gives features for metrics.

    Parameters
    ----------
    sample_shape : tuple of int
        Channels, height and width; height and width at least 4.
    n_classes : int
    n_features : int, default=32
        Width of the penultimate layer.

    Examples
    --------
    >>> import torch
    >>> from ganclean.networks import ImageClassifier
    >>> classifier = ImageClassifier((1, 8, 8), n_classes=10)
    >>> classifier(torch.zeros(3, 1, 8, 8)).shape, classifier.features(torch.zeros(3, 1, 8, 8)).shape
    (torch.Size([3, 10]), torch.Size([3, 32]))
    """

    def __init__(self, sample_shape, n_classes, n_features=32):
        super().__init__()
        channels, height, breadth = sample_shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (breadth // 4), n_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(n_features, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits, shape (n, n_classes)."""
        return self.head(self.features(images))


def default_pair(sample_shape, latent_dim):
    """Return a generator and a discriminator that suit the shape of the data."""
    if len(sample_shape) == 3 and sample_shape[1] % 4 == 0 and sample_shape[2] % 4 == 0:
        return ConvGenerator(sample_shape, latent_dim), ConvDiscriminator(sample_shape)
    return MLPGenerator(sample_shape, latent_dim), MLPDiscriminator(sample_shape)
