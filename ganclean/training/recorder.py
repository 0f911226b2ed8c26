"""The record of a training loop that somebody else wrote, proven by replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn

from ganclean.data import batch_hash
from ganclean.exceptions import TrajectoryError
from ganclean.losses import check_penalty, resolve_loss
from ganclean.optim import Clipped, Optimizer
from ganclean.training.checkpoints import size_of
from ganclean.training.network import assign, copied
from ganclean.training.proof import check_step
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState
from ganclean.training.step import UPDATES, TrainingStep
from ganclean.training.store import FolderStore, MemoryStore
from ganclean.training.torch_optimizers import moments_of, restore_moments, rule_of
from ganclean.training.trainer import describe_step
from ganclean.training.trajectory import Trajectory
from ganclean.training.watch import Watch

# A step that leads to a checkpoint is replayed, but no more than one in so many.
CHECKED_EVERY = 50


class Recorder:
    """Records a user's own training loop, so that influence can be traced back through it.

    Around each update of the discriminator, and of the generator where there is one, goes ``with recorder.step(x,
    index)``; the loop itself stays as it is. The recorder watches the calls of the networks for latents, labels and
    mixing shares, and the optimisers for their hyper-parameters. Randomness inside the networks, such as dropout, is
    seeded anew in every call and torch's generator is then put back, so that it can be replayed.

    The first steps, and one at each checkpoint, are replayed from the declared loss; where the result is not what the
    loop computed, `ReplayMismatchError` names the tensor and the deviation.

    Parameters
    ----------
    generator, discriminator : torch.nn.Module
        The networks of the loop, G(z) or G(z, y), D(x) or D(x, y).
    opt_g, opt_d : torch.optim.SGD, Adam, AdamW or RMSprop
        Their optimisers.
    loss : str or AdversarialLoss, default="non_saturating"
        As of `GANTrainer`; ``NonSaturating(outputs="probabilities")`` where the discriminator ends in a sigmoid.
    penalty : Penalty, optional
        ``R1()`` or ``GradientPenalty()``, where the loop adds it to the discriminator's loss.
    update : {"alternating", "simultaneous"}, default="alternating"
        Whether the generator meets the updated discriminator or the old one.
    ema : torch.nn.Module, optional
        The averaged generator that the loop keeps, updated within the step after each of the generator's updates.
    ema_decay : float, optional
        Its decay.
    clip_norm, clip_value : float, optional
        Where the loop clips the gradients of both networks, before the optimiser's step.
    store : path, optional
        Folder that the trajectory is recorded into; default in memory.
    checkpoint_every : int or "auto", default="auto"
        Keep every so many states. "auto" keeps all as long as they fit in the budget, then every second, and so on.
    memory_budget : int, default=2**30
        Bytes that the kept states may take.
    steps_per_epoch : int, optional
        Default the number of steps until an instance is drawn for the second time.
    n_checked : int, default=3
        How many of the first steps are replayed.
    random_state : int, RandomState instance or None
        Seeds the randomness inside the networks.

    Raises
    ------
    ReplayMismatchError
        If the loop does something that the declared loss does not.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.nn.functional import softplus
    >>> from ganclean import GANInfluence, Recorder
    >>> _ = torch.manual_seed(0)
    >>> X, G, D = torch.randn(32, 2), nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
    >>> opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=1e-2) for net in (G, D))
    >>> recorder = Recorder(G, D, opt_g, opt_d)
    >>> for index in torch.randperm(32).split(8):
    ...     with recorder.step(X[index], index):
    ...         fake = G(torch.randn(8, 3))
    ...         opt_d.zero_grad()
    ...         (softplus(-D(X[index])).mean() + softplus(D(fake.detach())).mean()).backward()
    ...         opt_d.step()
    ...         opt_g.zero_grad()
    ...         softplus(-D(fake)).mean().backward()
    ...         opt_g.step()
    >>> cleaner = GANInfluence(random_state=0).fit(X, trajectory=recorder.finish())
    >>> cleaner.influence_.shape
    (32,)
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        opt_g: torch.optim.Optimizer,
        opt_d: torch.optim.Optimizer,
        *,
        loss="non_saturating",
        penalty=None,
        update="alternating",
        ema: nn.Module | None = None,
        ema_decay: float | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        store=None,
        checkpoint_every="auto",
        memory_budget: int = 2**30,
        steps_per_epoch: int | None = None,
        n_checked: int = 3,
        random_state=None,
    ):
        if update not in UPDATES:
            raise ValueError(f"update must be one of {list(UPDATES)}; got {update!r}.")
        if (ema is None) != (ema_decay is None):
            raise ValueError("A moving average needs both ema, the averaged generator, and ema_decay.")
        self._modules = {"generator": generator, "discriminator": discriminator}
        self._optimizers = {"generator": opt_g, "discriminator": opt_d}
        self._ema, self._ema_decay = ema, ema_decay
        self._loss, self._penalty, self._update = resolve_loss(loss), check_penalty(penalty), update
        self._clip = {"max_norm": clip_norm, "max_value": clip_value}
        self._store = MemoryStore() if store is None else FolderStore(store)
        self._every = checkpoint_every
        self._budget = memory_budget
        self._spacing = 1 if checkpoint_every == "auto" else int(checkpoint_every)
        self._steps_per_epoch = steps_per_epoch
        self._n_checked = n_checked
        self._random = check_random_state(random_state)
        self._step: TrainingStep | None = None
        self._rules: dict[str, Optimizer] = {}
        self._n_steps = 0
        self._seen: set[int] = set()
        self._begun, self._begun_at = False, 0
        self._hashes: dict[str, str] = {}
        self._left: dict[str, Tensors] = {}

    def __len__(self) -> int:
        return self._n_steps

    @contextmanager
    def step(self, x: Tensor, index, *, y: Tensor | None = None, z_d=None, z_g=None) -> Iterator[None]:
        """Record the updates inside the block: one of the discriminator, and one or none of the generator.

        Parameters
        ----------
        x : Tensor of shape (batch_size, *sample_shape)
            The real instances, as the discriminator gets them.
        index : sequence of int of shape (batch_size,)
            Their rows in the data.
        y : Tensor of shape (batch_size, ...), optional
            Their labels, where the networks are conditional.
        z_d, z_g : Tensor of shape (batch_size, *latent_shape), optional
            The latents of both updates. Those that the generator is called with are recorded anyway; given ones are
            compared with them.
        """
        watch, record, before = self._begin(x, index, y)
        with ExitStack() as stack:
            watch.attach(stack)
            yield
        self._end(watch, record, before, {"d": z_d, "g": z_g})

    def finish(self) -> Trajectory:
        """End the record and return the trajectory, for ``GANInfluence.fit(X, trajectory=...)``."""
        if self._step is None or not self._n_steps:
            raise TrajectoryError("Nothing was recorded: put each update of the loop inside recorder.step(x, index).")
        if self._n_steps not in self._store.kept():
            self._store.checkpoint(self._n_steps, self._snapshot())
        begun = self._store.description() if isinstance(self._store, FolderStore) else self._describe()
        description = begun | {
            "n_steps": self._n_steps,
            "steps_per_epoch": self._steps_per_epoch or self._n_steps,
            "batches": self._hashes,
        }
        self._store.finish(description)
        return Trajectory(description, self._store, self._budget).bind(self._step, None)

    def load(self) -> Trajectory:
        """Return a trajectory that was recorded into the folder before, with the same networks and optimisers."""
        if not isinstance(self._store, FolderStore):
            raise TrajectoryError("There is nothing to load: give the Recorder the folder, store=...")
        self._build()
        trajectory = Trajectory(self._store.description(), self._store)
        trajectory.check_matches(self._describe())
        trajectory.check_complete()
        return trajectory.bind(self._complete(self._store.record(0)), None)

    def resume(self) -> int:
        """Go on with an interrupted recording: put networks, average and optimisers back to its last checkpoint.

        Returns
        -------
        int
            The number of recorded steps, from which the loop has to continue; 0 where the folder holds none.
        """
        if not isinstance(self._store, FolderStore) or not self._store.holds_run():
            return 0
        self._build()
        Trajectory(self._store.description(), self._store).check_matches(self._describe())
        self._store.device = next(self._modules["generator"].parameters()).device
        self._n_steps = self._begun_at = self._store.resume()
        self._begun = True
        state = self._store.state(self._n_steps)
        updates = {"generator": 0, "discriminator": 0}
        for t in range(self._n_steps):
            record = self._store.record(t)
            self._draw_seed()
            self._note(record)
            updates["discriminator"] = record.number_d
            updates["generator"] = record.number_g if record.updates_generator else updates["generator"]
        for player, module in self._modules.items():
            assign(module, getattr(state, player) | getattr(state, f"buffers_{player}"))
            moments = getattr(state, f"moments_{player}")
            restore_moments(
                self._optimizers[player], self._rules[player], self._params(player), moments, updates[player]
            )
        if self._ema is not None:
            assign(self._ema, state.average)
        return self._n_steps

    def _begin(self, x: Tensor, index, y: Tensor | None) -> tuple[Watch, StepRecord, TrainingState | None]:
        """Return what watches the step, the beginnings of its record, and the state where it will be replayed."""
        if len(index) != len(x):
            raise ValueError(f"index names {len(index)} rows, but x holds {len(x)} instances; expected as many.")
        if self._step is None:
            self._build()
        first = not self._n_steps and not self._begun
        before = self._snapshot() if first or self._is_checked(self._n_steps) else None
        if first:
            assert before is not None
            if isinstance(self._store, FolderStore) and self._store.holds_run():
                raise TrajectoryError(
                    f"The folder {self._store} holds a recorded run already, and it is not overwritten. Choose another "
                    "one; or call recorder.resume() to go on with it, recorder.load() to use it."
                )
            self._store.start(self._describe(), before)
            self._begun = True
        record = StepRecord(
            self._n_steps,
            torch.as_tensor(np.asarray(index), dtype=torch.int64).reshape(-1).cpu(),
            self._draw_seed(),
            labels=y,
            shifts=self._shifts(),
        )
        interpolates = self._penalty is not None and self._penalty.at == "interpolated"
        return Watch(self._modules, self._optimizers, self._rules, x, record.seed, interpolates), record, before

    def _end(
        self, watch: Watch, record: StepRecord, before: TrainingState | None, given: dict[str, Tensor | None]
    ) -> None:
        record = watch.completed(record, self._update, given)
        step = self._complete(record)
        keeps = (record.index + 1) % self._spacing == 0
        after = self._snapshot() if keeps or before is not None else None
        if before is not None and after is not None:
            # The state already holds what was done to the buffers before the step.
            real = watch.x.to(next(iter(before.generator.values())))
            check_step(before, after, step(before, replace(record, shifts={}), real), record)
        self._store.add(record)
        self._n_steps += 1
        self._note(record)
        if record.index - self._begun_at < self._n_checked:
            self._hashes[str(record.index)] = batch_hash(watch.x)
        if keeps and after is not None:
            self._store.checkpoint(self._n_steps, after)
            self._thin(after)
        self._left = {player: _copies(module.named_buffers()) for player, module in self._modules.items()}

    def _complete(self, record: StepRecord) -> TrainingStep:
        """Return the training step, which learns the shape of latents from the first record."""
        assert self._step is not None
        if not self._step.latent_shape:
            assert record.latents_d is not None
            self._step = replace(
                self._step, latent_shape=tuple(record.latents_d.shape[1:]), conditional=record.labels_d is not None
            )
        return self._step

    def _build(self) -> None:
        """Copy the networks as they are and read the optimisers' rules."""
        for player, optimizer in self._optimizers.items():
            rule = rule_of(optimizer)
            clipped = any(limit is not None for limit in self._clip.values())
            self._rules[player] = Clipped(rule, **self._clip) if clipped else rule
        self._step = TrainingStep(
            copied(self._modules["generator"]),
            copied(self._modules["discriminator"]),
            self._loss,
            self._rules["generator"],
            self._rules["discriminator"],
            (),
            self._update,
            self._ema_decay,
            self._penalty,
        )

    def _describe(self) -> dict[str, Any]:
        """Return what identifies the run."""
        assert self._step is not None
        return {"n_steps": None, "steps_per_epoch": None, "data": None, "batches": {}, **describe_step(self._step)}

    def _snapshot(self) -> TrainingState:
        """Return copies of everything that the next step reads."""
        params = {player: self._params(player) for player in self._modules}
        moments = {
            player: moments_of(optimizer, self._rules[player], params[player])
            for player, optimizer in self._optimizers.items()
        }
        averaged = {} if self._ema is None else dict(self._ema.named_parameters())
        return TrainingState(
            generator=_copies(params["generator"].items()),
            discriminator=_copies(params["discriminator"].items()),
            moments_generator=moments["generator"],
            moments_discriminator=moments["discriminator"],
            average=_copies((name, averaged[name]) for name in params["generator"]) if averaged else {},
            buffers_generator=_copies(self._modules["generator"].named_buffers()),
            buffers_discriminator=_copies(self._modules["discriminator"].named_buffers()),
        )

    def _params(self, player: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._modules[player].named_parameters() if p.requires_grad}

    def _shifts(self) -> dict[str, Tensor]:
        """Return by how much the buffers were changed since the last step, as sampling in training mode does."""
        shifts = {}
        for player, left in self._left.items():
            for name, buffer in self._modules[player].named_buffers():
                if not torch.equal(buffer, left[name]):
                    shifts[f"{player}/{name}"] = buffer.detach() - left[name]
        return shifts

    def _is_checked(self, index: int) -> bool:
        """Return whether a step is replayed: the first ones, and now and then one that leads to a checkpoint."""
        spacing = max(self._spacing, CHECKED_EVERY)
        return index - self._begun_at < self._n_checked or (index + 1) % (spacing - spacing % self._spacing) == 0

    def _thin(self, state: TrainingState) -> None:
        """Keep every second state only, once all do not fit in the budget any more."""
        room = max(self._budget // max(size_of(state), 1), 4)
        while self._every == "auto" and len(self._store.kept()) > room:
            self._spacing *= 2
            for index in [i for i in self._store.kept() if i % self._spacing]:
                # The last one is where an interrupted recording goes on; it goes with the next thinning.
                if index != self._n_steps:
                    self._store.discard(index)

    def _note(self, record: StepRecord) -> None:
        """Find out how long an epoch is: until an instance comes again."""
        if self._steps_per_epoch is None:
            rows = set(record.indices.tolist())
            if rows & self._seen:
                self._steps_per_epoch = record.index
            self._seen |= rows

    def _draw_seed(self) -> int:
        return int(self._random.randint(2**31))


def _copies(tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors}
