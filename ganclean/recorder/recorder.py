"""The record of a training loop that somebody else wrote, proven by replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganclean.data import DataSource
from ganclean.dynamics.randomness import random_states
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.update import Average
from ganclean.exceptions import ReplayMismatchError
from ganclean.losses import check_penalty, resolve_loss
from ganclean.recipes.adversarial import UPDATES
from ganclean.recorder.book import Book
from ganclean.recorder.declared import Declared, due_updates, run_updates
from ganclean.recorder.loop import Loop
from ganclean.recorder.watch import Watch, refuse_autocast
from ganclean.recorder.watched import Watched
from ganclean.runs.store import FolderStore, MemoryStore
from ganclean.runs.trajectory import Trajectory


class Recorder:
    """Records a user's own training loop, so that influence can be traced back through it.

    The loop stays as it is: ``with recorder.step(x, index):`` goes around the updates that one batch serves. There are
    two ways to say what they are.

    *Watched*: ``Recorder(G, D, opt_g, opt_d, loss=...)``, for the usual GAN. The block holds updates in any order and
    number: the generator's first, several of the discriminator's, one alone. The calls of the networks and the
    optimisers' steps are seen, with latents, labels, mixing shares, hyper-parameters, and which samples each update
    judged. Randomness inside the networks, such as dropout, is seeded anew in every call and torch's generator is then
    put back, so that it can be replayed.

    *Declared*: ``Recorder(players={"G": G, ...}, optimizers={"G": opt_g, ...}, updates=[("G", objective), ...])``, for
    any loop. Replay runs the objectives from the states that torch's random generators had at the block's beginning, so
    that the loop has to draw its random numbers inside the block, in the objectives' order; or ``recorder.run(x,
    index)`` does the updates that are due, with the loop's optimisers.

    The first steps, and one at each checkpoint, are replayed; where the result is not what the loop computed,
    `ReplayMismatchError` says which update is off, by how much, and what it looks like.

    Parameters
    ----------
    generator, discriminator : torch.nn.Module, optional
        The networks of a watched loop.
    opt_g, opt_d : torch.optim.SGD, Adam, AdamW or RMSprop, optional
        Their optimisers. Parameter groups may have hyper-parameters of their own, and a scheduler may change them.
    loss : str or AdversarialLoss, default="non_saturating"
        As of `GANTrainer`; ``NonSaturating(outputs="probabilities")`` where the discriminator ends in a sigmoid.
    penalty : Penalty, optional
        ``R1()`` or ``GradientPenalty()``, where the loop adds it to the discriminator's loss.
    update : {"alternating", "simultaneous"}, optional
        Where given, it is checked that the later update meets the other network after the earlier one, or before it.
        The order is seen anyway.
    ema : torch.nn.Module, optional
        The averaged generator that the loop keeps, updated within the step.
    ema_decay : float, callable or Average, optional
        Its decay: a number, a function of the step's number, or an `Average`, which says more.
    clip_norm, clip_value : float, optional
        Where the loop clips the gradients of each optimiser's parameters, before it steps.
    scale : float or dict of str to float, default=1.0
        What the discriminator's loss is multiplied by, such as 0.5; or of each, by ``"D"`` and ``"G"``.
    after : callable or dict of str to callable, optional
        What the loop does to parameters after the optimiser's step, such as weight clipping: from a dict of parameters
        to a dict of projected ones. The discriminator's, or by player.
    data : array, Tensor or Dataset, optional
        The data set. Where given, `x` is compared with its rows in every step.
    store_x : bool, default=False
        Whether to keep the instances as they were in each step, for data that are augmented at random before it.
    latents : callable, optional
        From a number n to n latents that metrics sample the generator on. Default: those of a watched loop are drawn
        from what its generator was called with; otherwise standard normal.
    sampler : callable, optional
        ``sampler(nets, latents, labels)`` gives the samples that metrics judge; default the generator's output.
    store : path, optional
        Folder that the trajectory is recorded into; default in memory.
    checkpoint_every : int or "auto", default="auto"
        Keep every so many states. "auto" keeps all as long as they fit in the budget, then every second, and so on.
    memory_budget : int, default=2**30
        Bytes that the kept states may take.
    steps_per_epoch : int, optional
        Default the number of steps until an instance is drawn for the second time, as long as each is drawn once per
        epoch.
    n_checked : int, default=3
        How many of the first steps are replayed.
    random_state : int, RandomState instance or None
        Seeds the randomness inside the networks.
    players : dict of str to torch.nn.Module, optional
        The networks of a declared loop.
    optimizers : dict of str to torch.optim.Optimizer, optional
        By the names of updates. An update trains what its optimiser holds, of one player or several.
    updates : list of Update or of (str, callable), optional
        Names and objectives, ``objective(nets, batch, weights)``; an `Update` says more: ``due``, ``micro``, ``after``.
        Its optimiser is the loop's own, or, as a name, that of another update.
    averages : dict of str to tuple of (torch.nn.Module, decay), optional
        The averaged networks that a declared loop keeps, by player, with a decay as of `ema_decay`.
    carried : dict of str to Tensor, or callable, optional
        What objectives hand on in ``batch.carried``: a dict that the loop keeps up to date, or a function that returns
        one.
    latent_dim : int or tuple of int, optional
        The shape of one standard normal latent; default that of the generator's first input.

    Raises
    ------
    ReplayMismatchError
        If the loop does something that was not declared.
    NetworkError
        If the loop cannot be recorded: in mixed precision, on several devices, with losses that are not declared.

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
    >>> cleanser = GANInfluence(random_state=0).fit(X, trajectory=recorder.finish())
    >>> cleanser.influence_.shape
    (32,)

    The same loop, declared:

    >>> def of_d(nets, batch, weights):
    ...     fake = nets.G(torch.randn(len(batch.x), 3))
    ...     return (weights * softplus(-nets.D(batch.x)).flatten()).mean() + softplus(nets.D(fake)).mean()
    >>> def of_g(nets, batch, weights):
    ...     return softplus(-nets.D(nets.G(torch.randn(len(batch.x), 3)))).mean()
    >>> recorder = Recorder(
    ...     players={"G": G, "D": D}, optimizers={"D": opt_d, "G": opt_g}, updates=[("D", of_d), ("G", of_g)]
    ... )
    >>> for index in torch.randperm(32).split(8):
    ...     recorder.run(X[index], index)
    >>> len(recorder.finish())
    4
    """

    def __init__(
        self,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        opt_g: torch.optim.Optimizer | None = None,
        opt_d: torch.optim.Optimizer | None = None,
        *,
        loss="non_saturating",
        penalty=None,
        update: str | None = None,
        ema: nn.Module | None = None,
        ema_decay=None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        scale=1.0,
        after=None,
        data=None,
        store_x: bool = False,
        latents: Callable | None = None,
        sampler: Callable | None = None,
        store=None,
        checkpoint_every="auto",
        memory_budget: int = 2**30,
        steps_per_epoch: int | None = None,
        n_checked: int = 3,
        random_state=None,
        players: Mapping[str, nn.Module] | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
        updates: Sequence[Any] | None = None,
        averages: Mapping[str, tuple[nn.Module, Any]] | None = None,
        carried=None,
        latent_dim=None,
    ):
        if update not in (None, *UPDATES):
            raise ValueError(f"update must be None or one of {list(UPDATES)}; got {update!r}.")
        if (ema is None) != (ema_decay is None):
            raise ValueError("A moving average needs both ema, the averaged generator, and ema_decay.")
        kept = dict(averages or {}) | ({} if ema is None else {"G": (ema, ema_decay)})
        kept = {p: (module, d if isinstance(d, Average) else Average(d)) for p, (module, d) in kept.items()}
        watched = {"generator": generator, "discriminator": discriminator, "opt_g": opt_g, "opt_d": opt_d}
        self._door: Watched | Declared
        if players is None:
            missing = [name for name, value in watched.items() if value is None]
            if missing or optimizers is not None or updates is not None:
                raise ValueError(
                    "A Recorder takes the networks and optimisers of the usual GAN, Recorder(G, D, opt_g, opt_d, "
                    "loss=...), or players={...}, optimizers={...} and updates=[...]; got "
                    f"{'no ' + ', '.join(missing) if missing else 'both'}."
                )
            if after is None or not isinstance(after, Mapping):
                after = {} if after is None else {"D": after}
            self._door = Watched(resolve_loss(loss), check_penalty(penalty), update, scale, after)
            modules, held = {"G": generator, "D": discriminator}, {"G": opt_g, "D": opt_d}
        else:
            given = sorted(name for name, value in (watched | {"penalty": penalty}).items() if value is not None)
            if given or optimizers is None or updates is None:
                raise ValueError(
                    "players={...} needs optimizers={...} and updates=[...], whose objectives say everything; got "
                    f"{', '.join(given) + ' beside them' if given else 'not all three'}."
                )
            self._door = Declared(updates, optimizers)
            modules, held = dict(players), dict(optimizers)
        self._clip = clip_norm, clip_value
        kept_values = {} if carried is None else carried
        self._loop = Loop(modules, held, kept, kept_values, clip_norm, clip_value)  # type: ignore[arg-type]
        self._door.check(self._loop)
        self._store = MemoryStore() if store is None else FolderStore(store)
        self._book = Book(
            self._loop,
            self._door,
            self._store,
            latents=latents,
            sampler=sampler,
            latent_shape=() if latent_dim is None else tuple(np.atleast_1d(latent_dim).tolist()),
            data=data,
            store_x=store_x,
            checkpoint_every=checkpoint_every,
            memory_budget=memory_budget,
            steps_per_epoch=steps_per_epoch,
            n_checked=n_checked,
            random_state=random_state,
        )

    def __len__(self) -> int:
        return self._book.n_steps

    @contextmanager
    def step(self, x: Tensor, index, *, y: Tensor | None = None, z_d=None, z_g=None) -> Iterator[None]:
        """Record the updates inside the block.

        Parameters
        ----------
        x : Tensor of shape (batch_size, *sample_shape)
            The real instances, as the discriminator gets them.
        index : sequence of int of shape (batch_size,)
            Their rows in the data.
        y : Tensor of shape (batch_size, ...), optional
            Their labels, where the networks or objectives take any.
        z_d, z_g : Tensor of shape (batch_size, *latent_shape), optional
            The latents of the first update of each network. Those that the generator is called with are recorded
            anyway; given ones are compared with them.
        """
        record, before = self._book.begin(x, index, y)
        seed = record.seed if self._door.reseeds else None
        watch = Watch(self._loop, x, seed, before is not None)
        if not self._door.reseeds:
            record = replace(record, random=random_states(self._loop.like.device))
        with ExitStack() as stack:
            watch.attach(stack)
            yield
        updates, labels = self._door.seen(watch, record.index, y)
        record = replace(record, updates=updates, labels=labels)
        _compare_latents(record, {"D": z_d, "G": z_g})
        self._book.end(record, before, x, watch)

    def run(self, x: Tensor, index, *, y: Tensor | None = None) -> None:
        """Do the declared updates that are due with the loop's optimisers, and record them.

        Parameters
        ----------
        x, index, y
            As of `step`.
        """
        if isinstance(self._door, Watched):
            raise ValueError("run needs the objectives: Recorder(players={...}, optimizers={...}, updates=[...]).")
        refuse_autocast("recorder.run was called")
        record, before = self._book.begin(x, index, y)
        step = self._book.complete(y is not None, ())
        before = self._loop.state() if before is None else before
        x = x.to(self._loop.like)
        watch = Watch(self._loop, x)
        updates = due_updates(step, self._loop, record.index, self._book.numbers)
        record = replace(record, updates=updates, labels=y)
        drawn = step.drawn(replace(record, shifts={}), DataSource(x))
        with torch.no_grad(), ExitStack() as stack:
            if "G" in step.networks:
                stack.callback(watch.note_inputs(step.networks["G"].module))
            run_updates(step, self._loop, before, drawn, x, self._clip)
        self._book.end(record, before if self._book.is_checked(record.index) else None, x, watch)

    def finish(self) -> Trajectory:
        """End the record and return the trajectory, for ``GANInfluence.fit(X, trajectory=...)``."""
        return self._book.finish()

    def load(self) -> Trajectory:
        """Return a trajectory that was recorded into the folder before, with the same networks and optimisers."""
        return self._book.load()

    def resume(self) -> int:
        """Go on with an interrupted recording: put networks, average and optimisers back to its last checkpoint.

        Returns
        -------
        int
            The number of recorded steps, from which the loop has to continue; 0 where the folder holds none.
        """
        return self._book.resume()


def _compare_latents(record: StepRecord, given: Mapping[str, Tensor | None]) -> None:
    for name, z in given.items():
        done: UpdateRecord | None = record.of(name)
        seen = None if done is None else done.draws.get("latents")
        if z is not None and (seen is None or z.shape != seen.shape or not torch.equal(z.to(seen), seen)):
            raise ReplayMismatchError(
                f"z_{name.lower()} of step {record.index} is not what the generator was called with. Leave it out: "
                "the recorder sees the latents itself."
            )
