"""GANTrainer: runs training steps and records what happened."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from torch import nn

from ganclean._version import __version__
from ganclean.data import DataSource
from ganclean.exceptions import NonFiniteError
from ganclean.losses import resolve_loss
from ganclean.optim import Adam, resolve_optimizer
from ganclean.training.state import TrainingState
from ganclean.training.step import UPDATES, StepRecord, TrainingStep
from ganclean.training.trajectory import FolderStore, MemoryStore, Trajectory

Progress = Callable[[str, int, int], None]


class GANTrainer(BaseEstimator):
    """Trains a GAN and records the run, so that influence can be traced back through it.

    Parameters
    ----------
    loss : str or AdversarialLoss, default="non_saturating"
        One of ``"non_saturating"``, ``"minimax"``, ``"hinge"``, ``"least_squares"``, ``"wasserstein"``.
    optimizer : Optimizer, optional
        Update rule of both networks; default ``Adam(lr=1e-3, betas=(0.5, 0.99))``.
    optimizer_generator, optimizer_discriminator : Optimizer, optional
        Update rules of one network each, in place of `optimizer`.
    n_epochs : int, default=50
        Passes over the data.
    batch_size : int or "auto", default="auto"
        Instances per step; "auto" takes 64, or all where there are fewer. The last batch of an epoch is smaller where
        the number of instances is no multiple.
    update : {"alternating", "simultaneous"}, default="alternating"
        In an alternating update the generator meets the updated discriminator and new latents; in a simultaneous one
        both networks use the same old parameters and the same latents.
    latent_dim : int or tuple of int, default=32
        Shape of the generator's standard normal input.
    ema_decay : float, optional
        Decay of a moving average of the generator's parameters. Where given, samples and metrics are those of the
        averaged generator, which are less noisy.
    store : path, optional
        Folder that the trajectory is recorded into; default in memory.
    checkpoint_every : int, default=1
        Keep every so many states of the traced part of the run; the others are recomputed when they are needed, at
        one more training step each.

    Examples
    --------
    >>> from ganclean import GANTrainer
    >>> from ganclean.optim import SGD
    >>> GANTrainer(optimizer=SGD(lr=0.1)).set_params(optimizer__momentum=0.9).optimizer.momentum
    0.9
    """

    def __init__(
        self,
        loss="non_saturating",
        optimizer=None,
        optimizer_generator=None,
        optimizer_discriminator=None,
        n_epochs=50,
        batch_size="auto",
        update="alternating",
        latent_dim=32,
        ema_decay=None,
        store=None,
        checkpoint_every=1,
    ):
        self.loss = loss
        self.optimizer = optimizer
        self.optimizer_generator = optimizer_generator
        self.optimizer_discriminator = optimizer_discriminator
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.update = update
        self.latent_dim = latent_dim
        self.ema_decay = ema_decay
        self.store = store
        self.checkpoint_every = checkpoint_every

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        shape = (self.latent_dim,) if isinstance(self.latent_dim, Integral) else self.latent_dim
        return tuple(int(size) for size in shape)

    def make_step(self, generator: nn.Module, discriminator: nn.Module) -> TrainingStep:
        """Return the training step of copies of two networks, after checking the parameters."""
        if self.update not in UPDATES:
            raise ValueError(f"update must be one of {list(UPDATES)}; got {self.update!r}.")
        if self.ema_decay is not None and not (isinstance(self.ema_decay, Real) and 0 <= float(self.ema_decay) < 1):
            raise ValueError(f"ema_decay must be None or a number in [0, 1); got {self.ema_decay!r}.")
        default = resolve_optimizer(self.optimizer, Adam(lr=1e-3, betas=(0.5, 0.99)))
        return TrainingStep(
            copy.deepcopy(generator),
            copy.deepcopy(discriminator),
            resolve_loss(self.loss),
            resolve_optimizer(self.optimizer_generator, default),
            resolve_optimizer(self.optimizer_discriminator, default),
            self.update,
            None if self.ema_decay is None else float(self.ema_decay),
        )

    def batch_size_for(self, n_samples: int) -> int:
        """Return the number of instances in a full batch."""
        if self.batch_size == "auto":
            return min(64, n_samples)
        _check_positive("batch_size", self.batch_size)
        if self.batch_size > n_samples:
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the data, which has {n_samples} instances. Choose a "
                "smaller one, or batch_size='auto'."
            )
        return int(self.batch_size)

    def describe(self, step: TrainingStep, n_samples: int, data_fingerprint: str) -> dict[str, Any]:
        """Return what identifies a run: it must agree for a recorded trajectory to be used again."""
        _check_positive("n_epochs", self.n_epochs)
        _check_positive("checkpoint_every", self.checkpoint_every)
        steps_per_epoch = -(-n_samples // self.batch_size_for(n_samples))
        state = step.initial_state()
        return {
            "version": __version__,
            "n_steps": steps_per_epoch * int(self.n_epochs),
            "steps_per_epoch": steps_per_epoch,
            "data": data_fingerprint,
            "parameters": {
                f"{player}.{name}": f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}"
                for player, params in (("generator", state.generator), ("discriminator", state.discriminator))
                for name, p in params.items()
            },
            "modules": {"generator": repr(step.generator), "discriminator": repr(step.discriminator)},
            "settings": {
                "loss": repr(step.loss),
                "optimizer_generator": repr(step.optimizer_generator),
                "optimizer_discriminator": repr(step.optimizer_discriminator),
                "update": step.update,
                "ema_decay": step.ema_decay,
                "n_epochs": int(self.n_epochs),
                "batch_size": self.batch_size_for(n_samples),
                "latent_shape": list(self.latent_shape),
            },
        }

    def record(
        self,
        step: TrainingStep,
        source: DataSource,
        description: dict[str, Any],
        *,
        traced_epochs: int | None = None,
        random_state=None,
        progress: Progress | None = None,
    ) -> Trajectory:
        """Train and return the trajectory.

        Parameters
        ----------
        step : TrainingStep
        source : DataSource
            The training data.
        description : dict
            From `describe`.
        traced_epochs : int, optional
            How many of the last epochs will be traced: their states are kept, beside the first one; default all.
        random_state : int, RandomState instance or None
            Draws batches, latents and seeds.
        progress : callable, optional
            Called with (what is done, steps done, steps in all).

        Raises
        ------
        NonFiniteError
            If training diverges; the message names the step.
        """
        trajectory = Trajectory(description, MemoryStore() if self.store is None else FolderStore(self.store))
        trajectory.bind(step, source)
        start = trajectory.start_of_last(traced_epochs)
        state = step.initial_state()
        trajectory.store.start(description, state)
        for record in self.draw(step, source, random_state):
            t = record.index + 1
            state = step(state, record, source[record.indices])
            kept = t >= start and (t - start) % self.checkpoint_every == 0
            trajectory.store.append(record, state if kept or t == len(trajectory) else None)
            if t % trajectory.steps_per_epoch == 0 and not _is_finite(state):
                raise NonFiniteError(
                    f"Training diverged: a parameter is NaN or infinite by step {t} of {len(trajectory)}. Lower the "
                    "learning rate or choose another loss."
                )
            if progress is not None:
                progress("training", t, len(trajectory))
        return trajectory

    def draw(self, step: TrainingStep, source: DataSource, random_state=None) -> Iterator[StepRecord]:
        """Yield what each step of a run draws: a random order of the data in every epoch, latents, seeds."""
        rng = check_random_state(random_state)
        parameter = next(step.generator.parameters())
        noise = torch.Generator().manual_seed(int(rng.randint(2**31)))
        size = self.batch_size_for(len(source))

        def latents(n: int) -> torch.Tensor:
            return torch.randn(n, *self.latent_shape, generator=noise, dtype=parameter.dtype).to(parameter.device)

        index = 0
        for _ in range(self.n_epochs):
            order = torch.from_numpy(rng.permutation(len(source)).astype(np.int64))
            for indices in order.split(size):
                latents_d = latents(len(indices))
                latents_g = latents_d if self.update == "simultaneous" else latents(len(indices))
                yield StepRecord(index, indices, latents_d, latents_g, int(rng.randint(2**31)))
                index += 1


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def _is_finite(state: TrainingState) -> bool:
    return all(bool(p.isfinite().all()) for params in (state.generator, state.discriminator) for p in params.values())
