"""What is valued: samples that a trained generator makes, whatever kind of generator it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ganclean.dynamics.network import copied
from ganclean.dynamics.randomness import seeded
from ganclean.exceptions import NetworkError

CHUNK_SIZE = 500
"""Samples that are generated at a time."""


def trained(generator: Any, X: Any, y: Any) -> Any:
    """Return what generates: a module in evaluation mode, or a fitted estimator with a method `sample`.

    Parameters
    ----------
    generator : torch.nn.Module or estimator
        A module is copied. An estimator that is fitted is taken as it is, of another one a clone is fitted on the data.
    X, y
        The training data and their labels, or None.
    """
    if isinstance(generator, nn.Module):
        return copied(generator).eval()
    if not callable(getattr(generator, "sample", None)):
        raise ValueError(
            "generator must be a torch.nn.Module, or an object with a method sample(n_samples), such as a fitted "
            f"GANInfluence; got {generator!r}."
        )
    if isinstance(generator, BaseEstimator):
        try:
            check_is_fitted(generator)
        except NotFittedError:
            return clone(generator).fit(X, y)
    return generator


def generated(
    generator: Any, n_samples: int, latent_shape: tuple[int, ...], labels: Tensor | None, rng: np.random.RandomState
) -> tuple[Any, Any]:
    """Return samples and what they were made for.

    Parameters
    ----------
    generator : torch.nn.Module or object with `sample`
        As `trained` returns it.
    n_samples : int
    latent_shape : tuple of int
        Of one standard normal latent of a module.
    labels : Tensor of shape (n_samples, ...) or None
        The second input of a conditional module.
    rng : RandomState

    Returns
    -------
    samples : Tensor of shape (n_samples, *sample_shape), or what `sample` returned
    labels : as given, or what `sample` returned beside the samples
    """
    if not isinstance(generator, nn.Module):
        made = generator.sample(n_samples)
        return made if isinstance(made, tuple) else (made, None)
    like = next(generator.parameters(), torch.empty(0, dtype=torch.float32))
    latents = torch.from_numpy(rng.standard_normal((n_samples, *latent_shape))).to(like)
    # Dropout is off; noise that a generator draws for itself is not.
    with torch.no_grad(), seeded(rng.randint(2**31), like.device):
        if labels is None:
            chunks = [generator(z) for z in latents.split(CHUNK_SIZE)]
        else:
            labels = labels.to(device=like.device, dtype=like.dtype if labels.is_floating_point() else labels.dtype)
            pairs = zip(latents.split(CHUNK_SIZE), labels.split(CHUNK_SIZE))
            chunks = [generator(z, made_for) for z, made_for in pairs]
    if not all(isinstance(chunk, Tensor) for chunk in chunks):
        raise NetworkError(
            f"The generator returned {type(chunks[0]).__name__}; expected one tensor of samples. Wrap it in a module "
            "that returns the samples alone."
        )
    return torch.cat(chunks), labels
