"""A GAN that is trained without a record of the run: something to value, or to redact."""

from __future__ import annotations

from collections import deque
from typing import Any

from sklearn.utils import check_random_state
from torch import nn

from ganclean.data import checked_data
from ganclean.dynamics.network import loaded
from ganclean.training.preparation import prepared
from ganclean.training.trainer import GANTrainer


def train_gan(
    X: Any, y: Any = None, *, generator=None, discriminator=None, players=None, trainer=None, random_state=None
) -> tuple[nn.Module, nn.Module | None]:
    """Train a GAN and return its networks.

    Parameters
    ----------
    X : array-like, Tensor or map-style Dataset of shape (n_samples, *sample_shape)
    y : array-like of shape (n_samples, ...), optional
        The labels of conditional networks.
    generator, discriminator : torch.nn.Module, callable or None
    players : dict of str to module or callable, optional
        As of `GANInfluence`.
    trainer : GANTrainer, optional
        How to train; default ``GANTrainer()``. Its store is left alone.
    random_state : int, RandomState instance or None

    Returns
    -------
    generator, discriminator : torch.nn.Module
        In evaluation mode; with a moving average, the averaged generator. The second is None
        where there is no player D.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANTrainer, train_gan
    >>> X = np.random.default_rng(0).normal(size=(100, 2))
    >>> generator, discriminator = train_gan(X, trainer=GANTrainer(n_epochs=2), random_state=0)
    >>> generator.training
    False
    """
    initial = check_random_state(random_state).randint(2**31)
    trainer = GANTrainer() if trainer is None else trainer
    trainer, step, source = prepared(generator, discriminator, trainer, checked_data(X), y, initial, players)
    ((_, state),) = deque(trainer.run(step, source, step.initial_state(), random_state), maxlen=1)
    return (
        loaded(step.generator, state.module_values("G")),
        None if step.discriminator is None else loaded(step.discriminator, state.module_values("D")),
    )
