"""Feature extractors: any module, Inception-v3, or a small classifier trained on the spot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ganclean.data import DataSource, as_source
from ganclean.dynamics.randomness import seeded
from ganclean.exceptions import NetworkError
from ganclean.networks import ImageClassifier


class InceptionV3(nn.Module):
    """torchvision's Inception-v3 with its ImageNet weights, which torchvision fetches on first use.

    These are not the weights of the original FID: values compare with each other, not with published ones.

    Parameters
    ----------
    output : {"features", "logits"}, default="features"
        The 2,048 pooled features, or the 1,000 class logits.
    value_range : tuple of two floats, default=(-1.0, 1.0)
        Range of the images' values; the default is that of a generator which ends in tanh.
    resize : bool, default=True
        Whether images are resized to 299 × 299.

    Raises
    ------
    NetworkError
        If the weights are not on this machine and cannot be fetched.
    """

    def __init__(self, output="features", value_range=(-1.0, 1.0), resize=True):
        super().__init__()
        if output not in ("features", "logits"):
            raise ValueError(f"output must be 'features' or 'logits'; got {output!r}.")
        from torchvision.models import Inception_V3_Weights, inception_v3

        try:
            self.network = inception_v3(weights=Inception_V3_Weights.DEFAULT, transform_input=False).eval()
        except (OSError, RuntimeError) as error:
            raise NetworkError(
                f"Inception-v3's weights are not on this machine and could not be fetched ({error}). Connect to a "
                "network once, or pass a feature extractor of your own: FID(feature_extractor=module), where "
                "module maps images to vectors, or FID(feature_extractor='pixels')."
            ) from error
        if output == "features":
            self.network.fc = nn.Identity()
        self.network.requires_grad_(False)
        self.low, self.high = value_range
        self.resize = resize
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def train(self, mode: bool = True) -> InceptionV3:
        """Stay in evaluation mode: a feature extractor is a fixed function."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (n, 2048) or logits (n, 1000) of grey or colour images."""
        images = (images - self.low) / (self.high - self.low)
        if self.resize:
            images = interpolate(images, size=(299, 299), mode="bilinear", antialias=True)
        return self.network((images.expand(-1, 3, -1, -1) - self.mean) / self.std)


def train_classifier(X, y, *, n_features=32, n_epochs=20, batch_size=64, lr=3e-3, random_state=0) -> ImageClassifier:
    """Train a small classifier on labelled images; its ``features`` make a good extractor for these very images.

    Parameters
    ----------
    X : array-like or Tensor of shape (n_samples, channels, height, width)
        Height and width at least 4.
    y : array-like of shape (n_samples,), int
        Labels from 0.
    n_features : int, default=32
        Width of the penultimate layer.
    n_epochs, batch_size : int
    lr : float
        Learning rate of Adam.
    random_state : int

    Returns
    -------
    ImageClassifier
        In evaluation mode, float32, its parameters not trainable.

    Examples
    --------
    >>> import torch
    >>> from ganclean.datasets import load_digits_images
    >>> from ganclean.metrics import train_classifier
    >>> X, y = load_digits_images()
    >>> classifier = train_classifier(X[:200], y[:200], n_epochs=2)
    >>> classifier.features(torch.from_numpy(X[:3])).shape
    torch.Size([3, 32])
    """
    source = as_source(X).cast(torch.float32, None)
    labels = torch.as_tensor(y, dtype=torch.int64)
    with seeded(random_state):
        classifier = ImageClassifier(tuple(source.sample_shape), int(labels.max()) + 1, n_features)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_epochs)
        for _ in range(n_epochs):
            for rows in torch.randperm(len(source)).split(batch_size):
                optimizer.zero_grad()
                cross_entropy(classifier(source[rows]), labels[rows]).backward()
                optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def resolve_extractor(extractor, sample_shape) -> Callable[[Tensor], Tensor]:
    """Return the feature extractor that a parameter stands for: None chooses by the shape of the data."""
    if extractor is None:
        extractor = "inception" if len(sample_shape) == 3 and sample_shape[0] in (1, 3) else "pixels"
    if extractor == "pixels":
        return nn.Flatten()
    if extractor == "inception":
        return InceptionV3()
    if isinstance(extractor, nn.Module):
        return extractor.eval()
    if callable(extractor):
        return extractor
    raise NetworkError(
        f"feature_extractor must be a module or function from samples to vectors, 'inception', 'pixels' or None; got "
        f"{extractor!r}."
    )


def extract_features(extractor: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """Return an extractor's features as float64 vectors; samples are cast to the extractor's own type first."""
    parameter = next(extractor.parameters(), None) if isinstance(extractor, nn.Module) else None
    features = extractor(samples if parameter is None else samples.to(parameter))
    if not isinstance(features, Tensor) or features.ndim == 0 or len(features) != len(samples):
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise NetworkError(
            f"The feature extractor returned {got} for {len(samples)} samples; expected one tensor of shape "
            f"({len(samples)}, n_features)."
        )
    return features.flatten(1).double() if features.ndim > 1 else features[:, None].double()


def features_of(source: DataSource, extract: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return features of all instances, shape (n_samples, n_features), float64."""
    with torch.no_grad():
        return torch.cat([extract_features(extract, batch).cpu() for batch in source.batches()]).numpy()
