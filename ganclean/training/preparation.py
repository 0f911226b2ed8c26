"""What a fit works with: the networks, how they are trained, and the data in their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.base import clone
from sklearn.utils.validation import check_consistent_length
from torch import Tensor, nn

from ganclean.data import DataSource, as_labels, labels_in
from ganclean.networks import default_pair
from ganclean.training.network import seeded
from ganclean.training.probe import check_networks
from ganclean.training.step import TrainingStep
from ganclean.training.trainer import GANTrainer
from ganclean.training.trajectory import Trajectory

Network = nn.Module | Callable | None


def prepared(
    generator: Network, discriminator: Network, trainer: GANTrainer | None, data: Any, y: Any, seed: int
) -> tuple[GANTrainer, TrainingStep, DataSource]:
    """Build what trains, and check that the networks fit the data.

    Parameters
    ----------
    generator, discriminator, trainer
        As of `GANInfluence`.
    data : array, Tensor or Dataset
    y : array-like or None
        Labels of conditional networks.
    seed : int
        Determines the initial weights of networks that are built here.
    """
    if not isinstance(trainer, GANTrainer | None):
        raise ValueError(f"trainer must be a GANTrainer or None; got {trainer!r}.")
    trainer = GANTrainer() if trainer is None else clone(trainer)
    source = DataSource(data, labels=labels_for(data, y, trainer.conditional))
    shape = tuple(source.sample_shape)
    with seeded(seed):
        generator = _built("generator", generator, shape)
        discriminator = _built("discriminator", discriminator, shape)
        if generator is None or discriminator is None:
            # A default network suits the one beside it, or else the data.
            given = [p for module in (generator, discriminator) if module is not None for p in module.parameters()]
            dtype = torch.float64 if source[[0]].dtype == torch.float64 else torch.float32
            like = given[0] if given else torch.empty(0, dtype=dtype)
            defaults = default_pair(shape, trainer.latent_dim)
            generator = defaults[0].to(like) if generator is None else generator
            discriminator = defaults[1].to(like) if discriminator is None else discriminator
    step = trainer.make_step(generator, discriminator)
    parameter = next(generator.parameters(), None)
    if parameter is not None:
        source = source.cast(parameter.dtype, parameter.device)
    check_networks(step, source, trainer.batch_size_for(len(source)))
    return trainer, step, source


def attached(trajectory: Trajectory, data: Any, y: Any) -> tuple[TrainingStep, DataSource]:
    """Attach the data to the record of a user's own loop, which brings its networks along."""
    trajectory.check_complete()
    step = trajectory.step
    like = next(step.generator.parameters())
    source = DataSource(data, labels=labels_for(data, y, step.conditional)).cast(like.dtype, like.device)
    trajectory.check_batches(source)
    trajectory.bind(step, source)
    check_networks(step, source)
    return step, source


def labels_for(data: Any, y: Any, conditional: bool) -> Tensor | None:
    """Return the labels that conditional networks take: `y`, or what a Dataset holds."""
    if not conditional:
        return None
    if y is None:
        return labels_in(data)
    check_consistent_length(data, y)
    return as_labels(y)


def _built(player: str, network: Network, sample_shape: tuple[int, ...]) -> nn.Module | None:
    if network is None:
        return None
    if not isinstance(network, nn.Module) and callable(network):
        network = network(sample_shape)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{player} must be a torch.nn.Module, a function from the shape of one instance to a module, or None; got "
            f"{network!r}."
        )
    return network
