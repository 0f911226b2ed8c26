"""GANTrainer: runs training steps and records what happened."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from torch import nn

from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep, CompiledStep
from ganclean.dynamics.network import copied
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.step import Step
from ganclean.dynamics.update import Average, Update
from ganclean.exceptions import NonFiniteError
from ganclean.optim import resolve_optimizer
from ganclean.progress import Progress
from ganclean.recipes.adversarial import DEFAULT_OPTIMIZER, gan
from ganclean.runs.checkpoints import CheckpointPlan, plan_checkpoints, size_of
from ganclean.runs.identity import describe_step
from ganclean.runs.recording import Recording
from ganclean.runs.store import FolderStore, MemoryStore
from ganclean.runs.trajectory import MEMORY_BUDGET, Trajectory
from ganclean.training.schedule import scheduled_settings


class GANTrainer(BaseEstimator):
    """Trains a GAN and records the run, so that influence can be traced back through it.

    Parameters `loss` to `n_critic` and `update` describe the usual GAN; `updates` takes their place where training is
    anything else.

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
    ema_decay : float, callable, Average or dict of str to these, optional
        Decay of a moving average of the generator's parameters: a number, a function of the step's number (a ramp-up),
        or an `Average`, which says more; a dict for other players too. Where given, samples and metrics are those of
        the averaged generator, which are less noisy. Buffers, such as running statistics, are not averaged unless it
        says so.
    store : path, optional
        Folder that the trajectory is recorded into; default in memory.
    checkpoint_every : int or "auto", default="auto"
        Keep every so many states of the traced part of the run; the others are recomputed when they are needed, at
        one more training step each. "auto" keeps all where `memory_budget` allows it, and else as many as it allows.
    memory_budget : int, default=2**30
        How many bytes the kept states and those recomputed in between may take together; with a folder, each of them,
        on disk and in memory. Where states are large, recomputation takes up to five more training steps per traced
        step to keep to it, and no more than that.
    compile : bool, default=False
        Whether steps run as compiled graphs, which pays for long runs of small networks.
    updates : list of Update, optional
        Objectives of one's own, in the order in which they happen; batches then hold labels where `fit` gets them.
    sampler : callable, optional
        ``sampler(nets, latents, labels)`` gives the samples that metrics judge; default ``nets.G(latents)``, with
        labels where `conditional`.
    latents : callable, optional
        From a number n to n latents, drawn with torch; default standard normal of `latent_dim`.
    carried : dict of str to Tensor or float, optional
        What objectives hand on from step to step in ``batch.carried``, with its first values. Recipes bring theirs
        along.

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
        updates=None,
        sampler=None,
        latents=None,
        carried=None,
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
        self.updates = updates
        self.sampler = sampler
        self.latents = latents
        self.carried = carried

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent."""
        shape = (self.latent_dim,) if isinstance(self.latent_dim, Integral) else self.latent_dim
        return tuple(int(size) for size in shape)

    @property
    def takes_labels(self) -> bool:
        """Whether objectives of one's own may look at labels, where there are any."""
        return self.updates is not None and any(getattr(u.objective, "conditional", True) for u in self._updates())

    def make_step(self, generator: nn.Module | None, discriminator: nn.Module | None, players=None) -> AnyStep:
        """Return the training step of copies of some networks, after checking the parameters.

        Parameters
        ----------
        generator, discriminator : torch.nn.Module or None
            The players G and D.
        players : dict of str to torch.nn.Module, optional
            Further ones.
        """
        modules = {"G": generator, "D": discriminator, **(players or {})}
        copies = {player: copied(module) for player, module in modules.items() if module is not None}
        updates = self._updates()
        carried: dict[str, Any] = {}
        for update in updates:
            carried |= getattr(update.objective, "carries", {})
        samplers = [getattr(update.objective, "sampler", None) for update in updates]
        step = Step(
            copies,
            tuple(updates),
            self._averages(),
            carried | dict(self.carried or {}),
            next((s for s in (self.sampler, *samplers) if s is not None), None),
            self.latents,
            self.latent_shape,
            bool(self.conditional),
        )
        step.names  # noqa: B018 - raises where an update trains what is not there
        return CompiledStep(step) if self.compile else step

    def _updates(self) -> list[Update]:
        if self.updates is None:
            _check_positive("n_critic", self.n_critic)
            default = resolve_optimizer(self.optimizer, DEFAULT_OPTIMIZER)
            return gan(
                self.loss,
                resolve_optimizer(self.optimizer_generator, default),
                resolve_optimizer(self.optimizer_discriminator, default),
                update=self.update,
                penalty=self.penalty,
                n_critic=self.n_critic,
                conditional=self.conditional,
            )
        updates = [self.updates] if isinstance(self.updates, Update) else list(self.updates)
        if not updates or not all(isinstance(update, Update) for update in updates):
            raise ValueError(f"updates must be a list of ganclean.Update; got {self.updates!r}.")
        replaced = {"optimizer", "optimizer_generator", "optimizer_discriminator", "penalty"}
        given = sorted(name for name in replaced if getattr(self, name) is not None)
        if given:
            raise ValueError(f"updates bring their objectives and optimisers along: leave {', '.join(given)} out.")
        return updates

    def _averages(self) -> dict[str, Average]:
        chosen = self.ema_decay
        if chosen is None:
            return {}
        if not isinstance(chosen, Mapping):
            chosen = {"G": chosen}
        try:
            return {player: a if isinstance(a, Average) else Average(a) for player, a in chosen.items()}
        except ValueError as error:
            raise ValueError(
                f"ema_decay must be None, a number in [0, 1), a function of the step's number, an Average, or a dict "
                f"of these by player; got {self.ema_decay!r}."
            ) from error

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

    def describe(self, step: AnyStep, n_samples: int, data_fingerprint: str) -> dict[str, Any]:
        """Return what identifies a run: it must agree for a recorded trajectory to be used again."""
        _check_positive("n_epochs", self.n_epochs)
        _check_positive("memory_budget", self.memory_budget)
        if self.checkpoint_every != "auto":
            _check_positive("checkpoint_every", self.checkpoint_every, " or 'auto'")
        steps_per_epoch = -(-n_samples // self.batch_size_for(n_samples))
        described = describe_step(step.plain)
        described["settings"] |= {
            "n_epochs": int(self.n_epochs),
            "batch_size": self.batch_size_for(n_samples),
            "schedule": self._describe_schedule(step, steps_per_epoch * int(self.n_epochs)),
        }
        return {
            "n_steps": steps_per_epoch * int(self.n_epochs),
            "steps_per_epoch": steps_per_epoch,
            "data": data_fingerprint,
            **described,
        }

    def plan(self, step: AnyStep, n_steps: int, start: int) -> CheckpointPlan:
        """Return which states of a run of `n_steps` that is traced from step `start` on are kept."""
        return plan_checkpoints(
            self.checkpoint_every,
            n_steps=n_steps,
            start=start,
            state_bytes=size_of(step.initial_state()),
            memory_budget=self.memory_budget,
            on_disk=self.store is not None,
        )

    def train(
        self,
        step: AnyStep,
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
        step : Step
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
        self, step: AnyStep, source: DataSource, state: TrainingState, random_state=None, *, start: int = 0
    ) -> Iterator[tuple[StepRecord, TrainingState]]:
        """Train, and yield what each step drew and the state after it.

        Parameters
        ----------
        step : Step
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

    def draw(self, step: AnyStep, source: DataSource, random_state=None) -> Iterator[StepRecord]:
        """Yield what each step of a run draws: a random order of the data in every epoch, and a seed for the rest.

        `Step.drawn` completes a record.
        """
        rng = check_random_state(random_state)
        n_samples = len(source)
        size = self.batch_size_for(n_samples)
        schedules = self._schedules(step, -(-n_samples // size) * int(self.n_epochs))
        numbers: dict[str, int] = {}
        index = 0
        for _ in range(self.n_epochs):
            order = torch.from_numpy(rng.permutation(n_samples).astype(np.int64))
            for indices in order.split(size):
                updates, numbers = step.plan(index, numbers, lambda slot, number: schedules[slot][number - 1])
                yield StepRecord(index, indices, int(rng.randint(2**31)), updates)
                index += 1

    def _schedules(self, step: AnyStep, n_steps: int) -> dict[str, list[dict[str, Any]]]:
        """Return the scheduled hyper-parameters of every update of each optimiser."""
        counts: dict[str, int] = {}
        for update in step.updates:
            counts[update.slot] = counts.get(update.slot, 0) + sum(update.is_due(t) for t in range(n_steps))
        if self.scheduler is None:
            return {slot: [{}] * n for slot, n in counts.items()}
        rules = {slot: step.rule_named(slot) for slot in counts}
        return {slot: scheduled_settings(rules[slot], self.scheduler, n) for slot, n in counts.items()}

    def _describe_schedule(self, step: AnyStep, n_steps: int) -> str | None:
        """Return a hash of what the scheduler does, whatever object it is."""
        if self.scheduler is None:
            return None
        return hashlib.blake2b(repr(list(self._schedules(step, n_steps).values())).encode(), digest_size=8).hexdigest()


def _check_positive(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer{alternative}; got {value!r}.")


def _is_finite(state: TrainingState) -> bool:
    return all(bool(p.isfinite().all()) for params in state.params.values() for p in params.values())
