"""The derivative of an update's objective along a direction, exact or by a secant (theory, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.overrides import TorchFunctionMode

from ganclean.dynamics.cuts import STOPPING, CentreNeeded, Cuts, Stops, add
from ganclean.dynamics.objective import Left, Point
from ganclean.dynamics.players import installed
from ganclean.dynamics.randomness import stream
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import leaves, ravel, unravel
from ganclean.dynamics.step import Step
from ganclean.tensors import Tensors

Source = tuple[str, int, str, str]


class Secant(NamedTuple):
    """How the secant scheme looks along the cotangent of a gradient (theory, section 3).

    Parameters
    ----------
    delta : float or scalar Tensor, default=1e-2
        Relative width of a central difference, ε = δ‖θ‖/‖v‖.
    spread : float, default=inf
        Tensors are moved together as long as their own relative moves ‖v‖/‖θ‖ differ by no more than this factor, and
        in turn otherwise.
    n_perturbations : int, default=0
        Average over so many draws of noise in the parameters; 0 looks from the parameters themselves.
    perturbation : float, default=0.05
        Standard deviation of that noise, relative to the mean magnitude of each tensor.
    """

    delta: float | Tensor = 1e-2
    spread: float = math.inf
    n_perturbations: int = 0
    perturbation: float = 0.05


DEFAULT = Secant()


class OtherCalls(Exception):
    """An update did not make the calls that it was last seen to make."""


class Found(NamedTuple):
    tensors: dict[Source, Tensor]
    weights: Tensor


class DirectionalDerivative:
    """The derivative of an update's objective along a direction v of what it trains, as a scalar to be differentiated.

    The scalar ⟨∇L, v⟩, or [L(θ + εv) − L(θ − εv)] / 2ε, has as its gradient, in whatever L depends on, the product of v
    with that block of the Jacobian of ∇L. Buffers and what is carried are functions of the same passes; their cotangent
    adds its inner product with them.

    Parameters
    ----------
    step : Step
    k : int
        The number of the update in the record.
    record : StepRecord
    x : Tensor of shape (batch_size, *sample_shape)
    point : Point
        Where the objective is evaluated.
    pairs : tuple of (str, str)
        What the update trains: players and names.
    v : Tensor
        The direction, as a vector.
    random : dict of str to Tensor
        The states of the random number generators to continue from.
    secant : Secant or None
        None for the exact derivative.
    """

    def __init__(
        self,
        step: Step,
        k: int,
        record: StepRecord,
        x: Tensor,
        point: Point,
        pairs: tuple[tuple[str, str], ...],
        v: Tensor,
        random: Mapping[str, Tensor],
        secant: Secant | None,
    ):
        self.step, self.k, self.record, self.x, self.point = step, k, record, x, point
        self.pairs, self.v, self.random, self.secant = pairs, v, random, secant
        self.may_stop = getattr(step.update_named(record.updates[k].name).objective, "stops", True)
        self.theta = {f"{player}.{name}": point.params[k][player][name] for player, name in pairs}

    def gradients(self, to_buffers, to_carried, stacked: bool = False) -> Found:
        """Return the gradient in all that the objective depends on."""
        sources = self._sources()
        values = {key: self._of(key) for key in sources}
        if stacked:
            total = {key: torch.zeros_like(tensor) for key, tensor in values.items()}
            for value in self._scalars(to_buffers, to_carried, None, None):
                found = torch.func.grad(value)(values)
                total = {key: total[key] + g for key, g in found.items()}
        else:
            total = self._plain(values, to_buffers, to_carried)
        return Found(total, total.pop(("weights", self.k, "", "")))

    def in_players(self, players: Iterable[str]) -> dict[Source, Tensor]:
        """Return the gradient in the parameters and buffers of some players."""
        return self._in([key for key in self._sources() if key[0] in ("params", "buffers") and key[2] in players])

    def in_weights(self) -> Tensor:
        """Return the gradient in the weights alone."""
        key = ("weights", self.k, "", "")
        return self._in([key])[key]

    def _in(self, keys: list[Source]) -> dict[Source, Tensor]:
        # What moves is among the leaves wherever it must be seen what depends on it.
        seen = self.may_stop or self.secant is None
        moving = [("params", self.k, player, name) for player, name in self.pairs] if seen else []
        found = self._plain({key: self._of(key) for key in dict.fromkeys([*keys, *moving])}, {}, {})
        return {key: found[key] for key in keys}

    def _plain(self, values: dict[Source, Tensor], to_buffers, to_carried) -> dict[Source, Tensor]:
        sources = leaves(values)
        moved = {player for player, _ in self.pairs}
        keys = {(player, name) for player, name in self.pairs}
        moving = [leaf for key, leaf in sources.items() if key[0] == "params" and key[1] == self.k and key[2:] in keys]
        wanted = list(sources.values())

        def gathered(centred: bool) -> dict[int, Tensor]:
            cuts = Cuts(moved, moving, continues=bool(self.record.random))
            stops = Stops(cuts) if self.may_stop else None
            totals: dict[int, Tensor] = {}
            if centred and stops is not None:
                with torch.enable_grad(), stops.centre():
                    self._evaluated(sources, lambda theta: theta, cuts)
            for value in self._scalars(to_buffers, to_carried, cuts, stops):
                with torch.enable_grad():
                    scalar, live = value(sources, plain=True)
                into = [*wanted, *cuts.leaves]
                if scalar.requires_grad:
                    with installed(self.step.networks, live):
                        found = grad(scalar, into, allow_unused=True)
                    add(totals, into, found)
                del scalar, live
            with installed(self.step.networks, self._live(sources, lambda theta: theta)):
                cuts.pull(totals, wanted)
            return totals

        try:
            totals = gathered(self.record.updates[self.k].name in self.step.centred)
        except CentreNeeded:
            self.step.centred.add(self.record.updates[self.k].name)
            totals = gathered(True)
        return {
            key: totals[id(leaf)] if id(leaf) in totals else torch.zeros_like(leaf, requires_grad=False)
            for key, leaf in sources.items()
        }

    def _sources(self) -> list[Source]:
        step, point = self.step, self.point
        keys: list[Source] = []
        done = self.record.updates[self.k]
        versions = {player: {self.k, done.meets.get(player, self.k)} for player in step.players}
        if done.samples_of is not None:
            for player in versions:
                versions[player].add(done.samples_of)
        for player, of_player in versions.items():
            keys += [("params", v, player, name) for v in sorted(of_player) for name in point.params[v][player]]
            at = {self.k} if done.samples_of is None else {self.k, done.samples_of}
            traced = step.networks[player].traced
            keys += [("buffers", v, player, name) for v in sorted(at) for name in traced]
        keys += [("carried", self.k, "", name) for name in point.carried]
        return [*keys, ("weights", self.k, "", "")]

    def _of(self, key: Source) -> Tensor:
        field, version, player, name = key
        if field == "weights":
            return self.point.weights
        if field == "carried":
            return self.point.carried[name]
        return getattr(self.point, field)[version][player][name]

    def _at(self, sources: Mapping[Source, Tensor]) -> Point:
        """Return the point with sources in their places."""
        params = {v: {p: dict(t) for p, t in of.items()} for v, of in self.point.params.items()}
        buffers = {v: {p: dict(t) for p, t in of.items()} for v, of in self.point.buffers.items()}
        carried, weights = dict(self.point.carried), self.point.weights
        for (field, version, player, name), tensor in sources.items():
            if field == "weights":
                weights = tensor
            elif field == "carried":
                carried[name] = tensor
            else:
                (params if field == "params" else buffers)[version][player][name] = tensor
        return Point(params, buffers, carried, weights)

    def _trained(self, point: Point) -> dict[tuple[str, str], Tensor]:
        return {(player, name): point.params[self.k][player][name] for player, name in self.pairs}

    def _live(self, sources, move):
        """Return the parameters of all players with those that are trained moved."""
        point = self._at(sources)
        live = {player: dict(tensors) for player, tensors in point.params[self.k].items()}
        for (player, name), tensor in move(self._trained(point)).items():
            live[player][name] = tensor
        return live

    def _evaluated(self, sources, move, cuts: Cuts | None, functional: bool = False) -> tuple[Tensor, Left, Any, Any]:
        point = self._at(sources)
        live = move(self._trained(point))
        value, left, moved = self.step.objective(
            self.k, self.record, self.x, point, live, once=cuts, random=self.random, functional=functional
        )
        expected = self.step.seen_calls.get(self.step.form_of(self.record, self.k))
        if expected != left.calls:
            self.step.seen_calls[self.step.form_of(self.record, self.k)] = left.calls
            if expected is not None and self.k < len(self.record.updates) - 1:
                raise OtherCalls
        return value, left, live, moved

    def _beside(self, left: Left, to_buffers, to_carried, share: float) -> list[Tensor]:
        """Return the inner products of cotangents with what an evaluation has left."""
        parts = [
            share * (c * left.buffers[player][name]).sum()
            for player, cs in to_buffers.items()
            for name, c in cs.items()
        ]
        return parts + [share * (c * left.carried[name]).sum() for name, c in to_carried.items()]

    def _scalars(self, to_buffers, to_carried, cuts: Cuts | None, stops: Stops | None) -> Iterator[Callable]:
        """Yield functions of the sources whose sum is the scalar that is differentiated."""
        stopping: Callable[[], Any] = nullcontext if stops is None else stops.applied
        functional = cuts is None
        if functional and self.may_stop:
            stopping = _NothingStopped
        if self.secant is None:

            def along(sources, plain=False):
                v = unravel(self.v, self.theta)
                directions = dict(zip(self.pairs, v.values()))
                if functional:
                    point = self._at(sources)

                    def loss(moved):
                        with stopping():
                            value, left, _, _ = self._evaluated(sources, lambda theta: moved, None, True)
                        return value, (left.buffers, left.carried)

                    slope, (buffers, carried) = torch.func.grad(loss, has_aux=True)(self._trained(point))
                    left, moved = Left(buffers, carried, ()), None
                else:
                    with stopping():
                        value, left, live, moved = self._evaluated(sources, _copies, cuts)
                    found = grad(value, list(live.values()), create_graph=True, materialize_grads=True)
                    slope = dict(zip(live, found))
                total = sum((slope[pair] * c).sum() for pair, c in directions.items())
                for part in self._beside(left, to_buffers, to_carried, 1.0):
                    total = total + part
                return (total, moved) if plain else total

            yield along
            return
        looks = list(_looks(self.theta, self.v, stream(self.record.seed, self.k, "perturbation"), self.secant))
        for look in looks:
            for sign in (1, -1):

                def difference(sources, plain=False, look=look, sign=sign):
                    scale = (sign * look.share / (2 * look.width)).to(self.v.dtype)
                    shift = unravel(look.offset + sign * look.width * look.direction, self.theta)
                    shifts = dict(zip(self.pairs, shift.values()))

                    def move(theta):
                        return {pair: p + shifts[pair] for pair, p in theta.items()}

                    with stopping():
                        value, left, _, moved = self._evaluated(sources, move, cuts, functional)
                    total = scale * value
                    for part in self._beside(left, to_buffers, to_carried, 1 / (2 * len(looks))):
                        total = total + part
                    return (total, moved) if plain else total

                yield difference


def _copies(theta):
    # Leaves of their own where nobody differentiates in the parameters themselves.
    return {pair: p.clone() if p.requires_grad else p.detach().requires_grad_() for pair, p in theta.items()}


class _NothingStopped(TorchFunctionMode):
    """Refuses objectives that stop gradients: a transform of `torch.func` would take them for constants altogether."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in STOPPING and isinstance(args[0], Tensor):
            raise RuntimeError("an objective that detaches tensors cannot be pulled back for several metrics at once")
        return function(*args, **(kwargs or {}))


class _Difference(NamedTuple):
    """One central difference: from θ + offset, along ±width · direction."""

    offset: Tensor | float
    direction: Tensor
    width: Tensor
    share: float


def _looks(params: Tensors, v: Tensor, seed: int, secant: Secant) -> list[_Difference]:
    """Return the central differences that a cotangent takes: usually one."""
    theta = ravel(params)
    directions = [v] if secant.spread == math.inf else _directions(params, v, secant.spread)
    moved = [
        (d, secant_width(theta.where(d != 0, 0.0) if len(directions) > 1 else theta, d, secant.delta))
        for d in directions
    ]
    if not secant.n_perturbations:
        return [_Difference(0.0, d, width, 1.0) for d, width in moved]
    noise = torch.Generator(device=theta.device).manual_seed(seed)
    scale = ravel({n: p.abs().mean().expand(p.shape) for n, p in params.items()}) * secant.perturbation
    draws = [
        scale * torch.randn(len(theta), generator=noise, dtype=theta.dtype, device=theta.device)
        for _ in range(secant.n_perturbations)
    ]
    return [_Difference(offset, d, width, 1 / len(draws)) for offset in draws for d, width in moved]


def _directions(params: Tensors, v: Tensor, spread: float) -> list[Tensor]:
    """Split a cotangent into parts whose tensors would make moves of similar relative size."""
    pieces = unravel(v, params)
    typical = float(ravel(params).double().norm()) / math.sqrt(len(v)) or 1.0
    moves = {}
    for name, piece in pieces.items():
        own = float(params[name].double().norm()) or typical * math.sqrt(piece.numel())
        moves[name] = float(piece.double().norm()) / own
    groups: list[list[str]] = []
    for name in sorted((n for n, move in moves.items() if move), key=lambda n: -moves[n]):
        if groups and moves[groups[-1][0]] <= spread * moves[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [
        ravel({n: piece if n in group else torch.zeros_like(piece) for n, piece in pieces.items()}) for group in groups
    ] or [v]


def secant_width(theta: Tensor, v: Tensor, delta: float | Tensor) -> Tensor:
    """Return ε = δ‖θ‖/‖v‖ as a float64 scalar, on the device of the parameters; any where v or θ vanishes."""
    # In float64, where the squares of what fits float32 neither overflow nor vanish.
    size, norm = theta.double().norm(), v.double().norm()
    return delta * torch.where(size > 0, size, 1.0) / torch.where(norm != 0, norm, 1.0)
