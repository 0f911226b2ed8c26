"""Where objectives are evaluated: the scalar of an update, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ganclean.dynamics.cuts import Cuts
from ganclean.dynamics.players import Players, buffers_of, calls_of, installed
from ganclean.dynamics.randomness import continued, seeded, stream
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.update import Batch, Update
from ganclean.tensors import Tensors, leaves

if TYPE_CHECKING:
    from ganclean.dynamics.step import Step

Calls = tuple[tuple[str, str], ...]
Live = Mapping[tuple[str, str], Tensor]


class Point(NamedTuple):
    """What an update's objective is evaluated at.

    Parameters
    ----------
    params, buffers : dict of int to dict of str to dict of str to Tensor
        By version, which is the number of updates of the step that lie behind, and by player.
    carried : dict of str to Tensor
    weights : Tensor of shape (batch_size,)
    """

    params: dict[int, dict[str, Tensors]]
    buffers: dict[int, dict[str, Tensors]]
    carried: Tensors
    weights: Tensor


class Left(NamedTuple):
    """What an evaluation of an objective leaves behind: buffers, what is carried, and the calls that were made."""

    buffers: Mapping[str, Tensors]
    carried: Tensors
    calls: Calls


def point_of(step: Step, k: int, states: list[TrainingState], done: UpdateRecord, weights: Tensor) -> Point:
    """Return where the objective of update `k` of a step was evaluated, given the states before each update."""
    versions = {k, *done.meets.values(), *(() if done.samples_of is None else (done.samples_of,))}
    return Point(
        {v: states[v].params for v in versions},
        {v: states[v].buffers for v in versions},
        states[k].carried,
        weights,
    )


def slices_of(update: Update, n: int) -> list[slice]:
    """Return the rows that an update evaluates its objective on, one after the other."""
    micro = min(update.micro, n)
    ends = [n * (i + 1) // micro for i in range(micro)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends)]


def evaluated(
    step: Step,
    k: int,
    record: StepRecord,
    x: Tensor,
    point: Point,
    live: Live,
    *,
    rows: slice | None = None,
    once: Cuts | None = None,
    random: Mapping[str, Tensor] | None = None,
    functional: bool = False,
) -> tuple[Tensor, Left, dict[str, Tensors]]:
    """Return the scalar whose gradient update `k` of a step takes, what its evaluation leaves, and the parameters that
    the players had.

    Every objective is evaluated here, whoever asks.

    Parameters
    ----------
    step : Step
    k : int
    record : StepRecord
    x : Tensor of shape (batch_size, *sample_shape)
    point : Point
    live : dict
        The trained parameters, by player and name: those that the gradient is taken in.
    rows : slice, optional
        One of `slices_of`; default all of them, one after the other.
    once : Cuts, optional
    random : dict of str to Tensor, optional
        The states of the random number generators to continue from; default those of the moment.
    functional : bool, default=False
    """
    done = record.updates[k]
    update = step.update_named(done.name)
    theta = {player: point.params[done.meets.get(player, k)][player] for player in step.players}
    moved = _merged(theta, live)
    trained = {player for player, _ in live}
    buffers: Mapping[str, Tensors] = {player: point.buffers[k][player] for player in step.players}
    carried = dict(point.carried)
    latents = partial(step.draw_latents, len(x), stream(record.seed, k, done.name, "latents"))
    batch = Batch(x, record.labels, record.indices, record.index, carried, done, latents)
    parts = slices_of(update, len(x))
    total: Tensor | None = None
    calls: Calls = ()
    with continued(random) if random else nullcontext():
        for number, part in enumerate(parts):
            if rows is not None and part != rows:
                continue
            own = batch if len(parts) == 1 else batch.slice(part)
            own.carried = carried
            if record.random:
                own.make_latents = partial(step.draw_latents, part.stop - part.start)
            nets = _players(step, k, number, record, point, (theta, moved, buffers), trained, once, functional)
            with nullcontext() if record.random else seeded(stream(record.seed, k, number, "objective"), x.device):
                value = _scalar(update.objective(nets, own, point.weights[part]), update)
            if len(parts) > 1:
                value = (part.stop - part.start) / len(x) * value
            total = value if total is None else total + value
            carried, buffers, calls = own.carried, dict(buffers_of(nets)), calls + calls_of(nets)
    assert total is not None
    return total, Left(buffers, _carried(carried, point.carried), calls), moved


def gradient(
    step: Step,
    k: int,
    record: StepRecord,
    x: Tensor,
    point: Point,
    *,
    random: Mapping[str, Tensor] | None = None,
    functional: bool = False,
) -> tuple[dict[tuple[str, str], Tensor], Left]:
    """Return the gradient of update `k` in what it trains, and what its evaluation leaves.

    Slice by slice, so that memory holds the graph of one. Parameters as in `evaluated`.
    """
    done = record.updates[k]
    theta = {(player, name): point.params[k][player][name] for player, name in step.names[done.name]}
    total: dict[tuple[str, str], Tensor] = {}
    calls: Calls = ()
    with continued(random) if random else nullcontext():
        for rows in slices_of(step.update_named(done.name), len(x)):

            def loss(live: Live, rows=rows, point=point) -> tuple[Tensor, Left, dict[str, Tensors]]:
                return evaluated(step, k, record, x, point, live, rows=rows, functional=functional)

            found, left = (_by_transform if functional else partial(_by_autograd, step))(loss, theta)
            total = found if not total else {key: total[key] + g for key, g in found.items()}
            calls += left.calls
            point = point._replace(buffers={**point.buffers, k: dict(left.buffers)}, carried=left.carried)
    return total, Left(point.buffers[k], point.carried, calls)


def _by_autograd(step: Step, loss: Callable, theta: dict) -> tuple[dict, Left]:
    params = leaves(theta)
    with torch.enable_grad():
        value, left, live = loss(params)
    with installed(step.networks, live):
        found = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    buffers = {player: {name: b.detach() for name, b in tensors.items()} for player, tensors in left.buffers.items()}
    carried = {name: value.detach() for name, value in left.carried.items()}
    return {key: g.detach() for key, g in zip(params, found)}, Left(buffers, carried, left.calls)


def _by_transform(loss: Callable, theta: dict) -> tuple[dict, Left]:
    made: list[Calls] = []

    def value(live: Live) -> tuple[Tensor, tuple]:
        value, left, _ = loss(live)
        made.append(left.calls)
        return value, (left.buffers, left.carried)

    found, (buffers, carried) = torch.func.grad(value, has_aux=True)(theta)
    return found, Left(buffers, carried, made[-1])


def _players(
    step: Step,
    k: int,
    number: int,
    record: StepRecord,
    point: Point,
    now: tuple[Mapping[str, Tensors], Mapping[str, Tensors], Mapping[str, Tensors]],
    trained: set[str],
    once: Cuts | None,
    functional: bool,
) -> Players:
    """Return the players that slice `number` of update `k` meets, and through them those of earlier updates."""
    theta, moved, _ = now

    def players(k: int, theta, moved, buffers, earlier=None) -> Players:
        seed_of = None if record.random else _seeds(record, k, number)
        return Players(
            step.networks,
            theta,
            moved,
            buffers,
            seed_of=seed_of,
            device=step.like.device,
            once=once,
            scope=(k, number),
            earlier=earlier,
            functional=functional,
        )

    met: dict[int, Players] = {}

    def earlier(j: int) -> Players:
        if j not in met:
            # What is trained has not changed since then; all else is as it was.
            old = {p: theta[p] if p in trained else point.params[j][p] for p in step.players}
            live = {p: moved[p] if p in trained else old[p] for p in step.players}
            met[j] = players(j, old, live, point.buffers[j])
        return met[j]

    return players(k, *now, earlier)


def _merged(theta: Mapping[str, Tensors], live: Live) -> dict[str, Tensors]:
    moved = {player: dict(tensors) for player, tensors in theta.items()}
    for (player, name), tensor in live.items():
        moved[player][name] = tensor
    return moved


def _seeds(record: StepRecord, k: int, number: int) -> Callable[[str, int], int]:
    """Return what gives the seed of a player's call."""
    calls = record.updates[k].calls

    def seed_of(player: str, i: int) -> int:
        if player in calls:
            return stream(record.seed, "seen", player, calls[player][i])
        return stream(record.seed, k, number, player, i)

    return seed_of


def _carried(after: Mapping[str, Any], before: Tensors) -> Tensors:
    unknown = sorted(after.keys() - before.keys())
    if unknown:
        raise ValueError(
            f"An objective carries {unknown}, which have no first value. Declare them: carried={{{unknown[0]!r}: "
            "torch.tensor(...)}."
        )
    return {name: torch.as_tensor(after[name]).to(old).reshape(old.shape) for name, old in before.items()}


def _scalar(value: Any, update: Update) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"The objective of the update {update.name!r} must return a scalar tensor; it returned {got}.")
    return value.reshape(())
