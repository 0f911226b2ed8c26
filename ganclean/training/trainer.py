"""GANTrainer: runs training steps and records what happened."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
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
from ganclean.losses import check_penalty, resolve_loss
from ganclean.optim import Adam, resolve_optimizer
from ganclean.training.capture import CompiledStep
from ganclean.training.checkpoints import CheckpointPlan, plan_checkpoints, size_of
from ganclean.training.network import copied
from ganclean.training.record import StepRecord
from ganclean.training.recording import Recording
from ganclean.training.schedule import scheduled_settings
from ganclean.training.state import TrainingState
from ganclean.training.step import UPDATES, TrainingStep
from ganclean.training.store import FolderStore, MemoryStore
from ganclean.training.tensorfile import content_hash
from ganclean.training.trajectory import MEMORY_BUDGET, Trajectory

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
        Update rules of one network each, in place of `optimizer`. `Clipped` around a rule clips gradients.
    scheduler : callable, optional
        From an optimiser of `torch.optim` to a scheduler of `torch.optim.lr_scheduler`, such as
        ``functools.partial(StepLR, step_size=1000)``; it advances with every update of a network, of both alike.
    penalty : Penalty, optional
        ``R1()`` or ``GradientPenalty()``, on the slope of the discriminator.
    n_critic : int, default=1
        Updates of the discriminator for one of the generator. A step updates the discriminator, and every so many
        steps the generator too.
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
    conditional : bool, default=False
        Whether the networks take labels as their second input, G(z, y) and D(x, y): the `y` of `fit`, or the second
        entry of a Dataset's items. Samples are generated for labels drawn from the data's own.
    ema_decay : float, optional
        Decay of a moving average of the generator's parameters. Where given, samples and metrics are those of the
        averaged generator, which are less noisy. Buffers, such as running statistics, are not averaged.
    store : path, optional
        Folder that the trajectory is recorded into; default in memory.
    checkpoint_every : int or "auto", default="auto"
        Keep every so many states of the traced part of the run; the others are recomputed when they are needed, at
        one more training step each. "auto" keeps all where `memory_budget` allows it, and else as many as it allows.
    memory_budget : int, default=2**30
        How many bytes the kept states and those recomputed in between may take together; with a folder, each of them,
        on disk and in memory. Where states are large, recomputation takes up to five more training steps per traced
        step to keep to it, and no more than that.

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
        scheduler=None,
        penalty=None,
        n_critic=1,
        n_epochs=50,
        batch_size="auto",
        update="alternating",
        latent_dim=32,
        conditional=False,
        ema_decay=None,
        store=None,
        checkpoint_every="auto",
        memory_budget=MEMORY_BUDGET,
        compile=False,
    ):
        self.loss = loss
        self.optimizer = optimizer
        self.optimizer_generator = optimizer_generator
        self.optimizer_discriminator = optimizer_discriminator
        self.scheduler = scheduler
        self.penalty = penalty
        self.n_critic = n_critic
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.update = update
        self.latent_dim = latent_dim
        self.conditional = conditional
        self.ema_decay = ema_decay
        self.store = store
        self.checkpoint_every = checkpoint_every
        self.memory_budget = memory_budget
        self.compile = compile

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
        return (CompiledStep if self.compile else TrainingStep)(
            copied(generator),
            copied(discriminator),
            resolve_loss(self.loss),
            resolve_optimizer(self.optimizer_generator, default),
            resolve_optimizer(self.optimizer_discriminator, default),
            self.latent_shape,
            self.update,
            None if self.ema_decay is None else float(self.ema_decay),
            check_penalty(self.penalty),
            bool(self.conditional),
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
        _check_positive("n_critic", self.n_critic)
        _check_positive("memory_budget", self.memory_budget)
        if self.checkpoint_every != "auto":
            _check_positive("checkpoint_every", self.checkpoint_every, " or 'auto'")
        steps_per_epoch = -(-n_samples // self.batch_size_for(n_samples))
        described = describe_step(step)
        described["settings"] |= {
            "n_epochs": int(self.n_epochs),
            "batch_size": self.batch_size_for(n_samples),
            "latent_shape": list(self.latent_shape),
            "n_critic": int(self.n_critic),
            "conditional": step.conditional,
            "schedule": self._describe_schedule(step, steps_per_epoch * int(self.n_epochs)),
        }
        return {
            "n_steps": steps_per_epoch * int(self.n_epochs),
            "steps_per_epoch": steps_per_epoch,
            "data": data_fingerprint,
            **described,
        }

    def plan(self, step: TrainingStep, n_steps: int, start: int) -> CheckpointPlan:
        """Return which states of a run of `n_steps` that is traced from step `start` on are kept."""
        return plan_checkpoints(
            self.checkpoint_every,
            n_steps=n_steps,
            start=start,
            state_bytes=size_of(step.initial_state()),
            memory_budget=self.memory_budget,
            on_disk=self.store is not None,
        )

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
        """Train and return the trajectory; go on with a run that was interrupted, and leave a complete one as it is.

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
        TrajectoryError
            If the folder to record into holds another run.
        """
        seed = random_state if isinstance(random_state, Integral) else check_random_state(random_state).randint(2**31)
        store = MemoryStore() if self.store is None else FolderStore(self.store)
        description = {**description, "random_state": int(seed)}
        trajectory = Trajectory(description, store, self.memory_budget).bind(step, source)
        plan = self.plan(step, len(trajectory), trajectory.start_of_last(traced_epochs))
        recording = Recording(trajectory, step.initial_state(), plan)
        if recording.index == len(trajectory):
            return trajectory
        if self.checkpoint_every == "auto" and not plan.fits:
            warnings.warn(
                f"memory_budget={self.memory_budget} is too small to trace {plan.n_steps - plan.start} steps: even "
                f"with few states kept and the others recomputed, it takes {plan.bytes_needed} bytes. Give as much to "
                "GANTrainer(memory_budget=...), record into a folder (store=...), or trace fewer epochs.",
                stacklevel=2,
            )
        with recording:
            for record, state in self.run(step, source, recording.state, seed, start=recording.index):
                recording.add(record, state)
                if progress is not None:
                    progress("training", record.index + 1, len(trajectory))
        return trajectory

    def run(
        self, step: TrainingStep, source: DataSource, state: TrainingState, random_state=None, *, start: int = 0
    ) -> Iterator[tuple[StepRecord, TrainingState]]:
        """Train, and yield what each step drew and the state after it.

        Parameters
        ----------
        step : TrainingStep
        source : DataSource
            The training data.
        state : TrainingState
            The state before step `start`.
        random_state : int, RandomState instance or None
            Draws batches, latents and seeds.
        start : int, default=0
            The number of steps that lie behind.

        Raises
        ------
        NonFiniteError
            If training diverges; the message names the step.
        """
        _check_positive("n_epochs", self.n_epochs)
        _check_positive("n_critic", self.n_critic)
        steps_per_epoch = -(-len(source) // self.batch_size_for(len(source)))
        for record in islice(self.draw(step, source, random_state), start, None):
            t = record.index + 1
            state = step(state, step.drawn(record, source), source[record.indices])
            # Before it is yielded, so that a complete run is never one that diverged.
            if t % steps_per_epoch == 0 and not _is_finite(state):
                raise NonFiniteError(
                    f"Training diverged: a parameter is NaN or infinite by step {t} of "
                    f"{steps_per_epoch * self.n_epochs}. Lower the learning rate or choose another loss."
                )
            yield record, state

    def draw(self, step: TrainingStep, source: DataSource, random_state=None) -> Iterator[StepRecord]:
        """Yield what each step of a run draws: a random order of the data in every epoch, and a seed for the rest.

        `TrainingStep.drawn` completes a record.
        """
        rng = check_random_state(random_state)
        n_samples = len(source)
        size = self.batch_size_for(n_samples)
        n_steps = -(-n_samples // size) * int(self.n_epochs)
        settings_d, settings_g = self._schedules(step, n_steps)
        index = 0
        for _ in range(self.n_epochs):
            order = torch.from_numpy(rng.permutation(n_samples).astype(np.int64))
            for indices in order.split(size):
                number_g = -(-(index + 1) // self.n_critic)
                yield StepRecord(
                    index,
                    indices,
                    int(rng.randint(2**31)),
                    updates_generator=(index + 1) % self.n_critic == 0,
                    number_g=number_g,
                    settings_d=settings_d[index],
                    settings_g=settings_g[number_g - 1],
                )
                index += 1

    def _schedules(self, step: TrainingStep, n_steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the scheduled hyper-parameters of every update of the discriminator and of the generator."""
        if self.scheduler is None:
            return [{}] * n_steps, [{}] * n_steps
        return (
            scheduled_settings(step.optimizer_discriminator, self.scheduler, n_steps),
            scheduled_settings(step.optimizer_generator, self.scheduler, -(-n_steps // self.n_critic)),
        )

    def _describe_schedule(self, step: TrainingStep, n_steps: int) -> str | None:
        """Return a hash of what the scheduler does, whatever object it is."""
        if self.scheduler is None:
            return None
        return hashlib.blake2b(repr(self._schedules(step, n_steps)).encode(), digest_size=8).hexdigest()


def describe_step(step: TrainingStep) -> dict[str, Any]:
    """Return what identifies the networks and the rules of a run."""
    players = (("generator", step.generator), ("discriminator", step.discriminator))
    weights = {f"{player}.{name}": p for player, module in players for name, p in module.named_parameters()}
    buffers = {f"{player}.{name}": b for player, module in players for name, b in module.named_buffers()}
    return {
        "version": __version__,
        "parameters": {
            name: f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}"
            for name, p in weights.items()
            if p.requires_grad
        },
        "modules": {"generator": repr(step.generator), "discriminator": repr(step.discriminator)},
        "frozen": content_hash({name: p for name, p in weights.items() if not p.requires_grad}),
        "initial": content_hash(weights | buffers),
        "settings": {
            "loss": repr(step.loss),
            "optimizer_generator": repr(step.optimizer_generator),
            "optimizer_discriminator": repr(step.optimizer_discriminator),
            "update": step.update,
            "ema_decay": step.ema_decay,
            "penalty": repr(step.penalty),
        },
    }


def _check_positive(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer{alternative}; got {value!r}.")


def _is_finite(state: TrainingState) -> bool:
    return all(bool(p.isfinite().all()) for params in (state.generator, state.discriminator) for p in params.values())
