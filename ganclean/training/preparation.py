"""What a fit works with: the networks, how they are trained, and the data in their type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from sklearn.base import clone
from sklearn.utils.validation import check_consistent_length
from torch import Tensor, nn

from ganclean.data import DataSource, as_labels, batch_hash, labels_in
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.randomness import seeded
from ganclean.exceptions import TrajectoryError
from ganclean.networks import default_pair
from ganclean.runs.trajectory import Trajectory
from ganclean.training.probe import check_networks
from ganclean.training.trainer import GANTrainer

Given = nn.Module | Callable | None


def prepared(
    generator: Given,
    discriminator: Given,
    trainer: GANTrainer | None,
    data: Any,
    y: Any,
    seed: int,
    players: Mapping[str, nn.Module | Callable] | None = None,
) -> tuple[GANTrainer, AnyStep, DataSource]:
    """Build what trains, and check that the networks fit the data.

    Parameters
    ----------
    generator, discriminator, trainer, players
        As of `GANInfluence`.
    data : array, Tensor or Dataset
    y : array-like or None
        Labels.
    seed : int
        Determines the initial weights of networks that are built here.
    """
    if not isinstance(trainer, GANTrainer | None):
        raise ValueError(f"trainer must be a GANTrainer or None; got {trainer!r}.")
    trainer = GANTrainer() if trainer is None else clone(trainer)
    own = trainer.updates is not None
    labels = labels_for(data, y, trainer.conditional or trainer.takes_labels)
    source = DataSource(data, labels=labels)
    if own:
        trainer.set_params(conditional=labels is not None)
    shape = tuple(source.sample_shape)
    with seeded(seed):
        generator = _built("generator", generator, shape)
        discriminator = _built("discriminator", discriminator, shape)
        others = {name: _built(name, network, shape) for name, network in (players or {}).items()}
        if not own and (generator is None or discriminator is None):
            # A default network suits the one beside it, or else the data.
            given = [p for module in (generator, discriminator) if module is not None for p in module.parameters()]
            dtype = torch.float64 if source[[0]].dtype == torch.float64 else torch.float32
            like = given[0] if given else torch.empty(0, dtype=dtype)
            defaults = default_pair(shape, trainer.latent_dim)
            generator = defaults[0].to(like) if generator is None else generator
            discriminator = defaults[1].to(like) if discriminator is None else discriminator
    step = trainer.make_step(generator, discriminator, others)
    source = source.cast(step.like.dtype, step.like.device)
    check_networks(step, source, trainer.batch_size_for(len(source)))
    return trainer, step, source


def attached(trajectory: Trajectory, data: Any, y: Any) -> tuple[Trajectory, DataSource]:
    """Return the record of a user's own loop, which brings its networks along, with the data attached."""
    trajectory.check_complete()
    step = trajectory.step
    labels = labels_for(data, y, step.conditional)
    source = DataSource(data, labels=labels).cast(step.like.dtype, step.like.device)
    trajectory.check_batches(source)
    _check_labels(trajectory, source)
    trajectory = trajectory.bind(step, source)
    check_networks(step, source, recorded=trajectory[0])
    return trajectory, source


def _check_labels(trajectory: Trajectory, source: DataSource) -> None:
    """Raise `TrajectoryError` where the labels are not those that a user's own loop trained on."""
    if source.labels is None:
        return
    for t, expected in trajectory.description.get("labels", {}).items():
        if batch_hash(source.labels_of(trajectory.store.record(int(t)).indices)) != expected:
            raise TrajectoryError(
                f"The trajectory is of other labels: those of step {t} are not what the loop trained on. Pass "
                "labels y in the order of the data, as the networks get them."
            )


def labels_for(data: Any, y: Any, conditional: bool) -> Tensor | None:
    """Return the labels that conditional networks take: `y`, or what a Dataset holds."""
    if not conditional:
        return None
    if y is None:
        return labels_in(data)
    check_consistent_length(data, y)
    return as_labels(y)


def _built(player: str, network: Given, sample_shape: tuple[int, ...]) -> nn.Module | None:
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
