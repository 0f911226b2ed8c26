"""The game Jacobian of a training as an operator, from the objectives of its step (theory, section 4)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, gmres
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor
from torch.autograd import grad

from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.cuts import Cuts, Stops
from ganclean.dynamics.derivative import DirectionalDerivative, Secant
from ganclean.dynamics.objective import Point
from ganclean.dynamics.players import installed
from ganclean.dynamics.randomness import stream
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import Tensors, TrainingState, leaves, ravel, unravel
from ganclean.dynamics.step import Step
from ganclean.dynamics.update import Update
from ganclean.recipes.adversarial import DiscriminatorObjective

# Of the vectors of spectral norms, which are functions of the parameters where power iteration has converged.
POWER_ITERATIONS = 10
# Over so many steps it is counted how often an update is due: a multiple of all small periods.
COUNTED_STEPS = 5040
# Generated samples that no instance's term depends on: enough for batch statistics.
BYSTANDERS = 2

Pair = tuple[str, str]


@dataclass(frozen=True)
class Game:
    """All players' gradients at a state as functions of all players' parameters.

    A player's gradient g_p sums, over the updates that train it, the gradient of the update's objective times the share
    of the steps in which it is due; weight decay is part of it. Over a fixed batch, a game multiplies the transpose of
    J = ∂g/∂θ and of its blocks by vectors. The batch passes in chunks; latents, labels and all else that is random
    belong to the chunk and stay as they are, so that J is one fixed matrix. Every update meets the same state. Networks
    are in training mode. The vectors of spectral norms are functions of the parameters; what objectives carry from step
    to step is constant.

    Vectors are flat, player after player, for a GAN θ_G before θ_D; their type may be another than the parameters'.

    Parameters
    ----------
    step : Step
        Brings the objectives. A lazy penalty counts as what it is on average.
    state : TrainingState
    source : DataSource
    records : sequence of StepRecord
        The chunks; `draw_chunks` makes them.
    derivative : {"secant", "exact"}, default="secant"
        Central differences of first gradients, or second derivatives.
    delta : float, default=1e-3
        Relative width of the secant, ε‖v‖/‖θ‖.

    Examples
    --------
    >>> import torch
    >>> from ganclean import GANTrainer
    >>> from ganclean.backends.game import Game, draw_chunks
    >>> from ganclean.data import DataSource
    >>> from ganclean.networks import default_pair
    >>> source = DataSource(torch.randn(50, 2))
    >>> step = GANTrainer().make_step(*default_pair((2,), 32))
    >>> game = Game(step, step.initial_state(), source, draw_chunks(step, len(source), 25))
    >>> v = torch.randn(sum(game.sizes))
    >>> rows = [game.products(player, part)["G"] for player, part in game.split(v).items()]
    >>> torch.allclose(game.split(game.rmatvec(v))["G"], sum(rows), rtol=1e-3, atol=1e-4)
    True
    """

    step: AnyStep
    state: TrainingState
    source: DataSource
    records: tuple[StepRecord, ...]
    derivative: str = "secant"
    delta: float = 1e-3
    # Approximate inverses that a solver has computed, by damping. A copy with other chunks begins without.
    inverses: dict[float, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", _steady(self.step.plain))

    @cached_property
    def players(self) -> tuple[str, ...]:
        """The players that are trained, in the order of vectors."""
        return tuple(player for player in self.step.players if self.state.params[player])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of trained parameters of the players."""
        return tuple(sum(p.numel() for p in self.state.params[player].values()) for player in self.players)

    @cached_property
    def frequencies(self) -> dict[str, float]:
        """In which share of the steps each update is due, by its name."""
        return {str(update.name): _frequency(update) for update in self.step.updates}

    @cached_property
    def buffers(self) -> dict[str, Tensors]:
        """The buffers that every update starts from: those of the state, but for the vectors of spectral norms."""
        with torch.no_grad():
            return {
                player: {**self.state.buffers[player], **self._normals(player, self.state.params[player])}
                for player in self.step.players
            }

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector by player."""
        return dict(zip(self.players, v.split(self.sizes)))

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return Jᵀ v, shape (n_parameters,)."""
        products = self._products(self.split(v), self.players)
        return torch.cat([products[player] for player in self.players])

    def products(self, player: str, v: Tensor, into: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return (∂g_p/∂θ_q)ᵀ v of a player p for some players q, all by default, which costs little more than one."""
        return self._products({player: v}, self.players if into is None else tuple(into))

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient g_p of each player; all are 0 at a stationary point."""
        params = self.state.params
        total = {player: {n: self.decay(player)[n] * p for n, p in params[player].items()} for player in self.players}
        for record, x, share in self.chunks():
            for done in record.updates:
                found, _ = self.step.gradient(0, _alone(record, done), x, self._point(x))
                for (player, name), gradient in found.items():
                    total[player][name] = total[player][name] + share * self.frequencies[done.name] * gradient
        return {player: ravel(tensors) for player, tensors in total.items()}

    def along(self, v: Tensor) -> Tensor:
        """Return ⟨v, ∂(n g)/∂w_j⟩ for each of n instances in the order of the chunks, w_j its weight, shape (n,).

        For an instance with a loss of its own in a mean, that is the inner product of v with the gradient of this loss.
        It takes two forward passes, or one forward-mode derivative, where objectives detach nothing; no gradient of a
        single instance is ever held.
        """
        moves = self._moves(self.split(v))
        parts = []
        for record, x, _ in self.chunks():
            total = x.new_zeros(len(x))
            for done in record.updates:
                if done.name in moves and getattr(self.step.update_named(done.name).objective, "weighted", True):
                    share = len(x) * self.frequencies[done.name]
                    total = total + share * self._in_weights(record, done, x, moves[done.name])
            parts.append(total)
        return torch.cat(parts)

    def cotangent(self, gradient: TrainingState) -> Tensor:
        """Return a metric's gradient in all players' parameters, float64.

        At a stationary point a moving average equals what it follows, and running statistics are functions of the
        parameters: the gradients in both go to the parameters.
        """
        to_params: dict[str, Tensors] = {}
        to_buffers: Tensors = {}
        for player in self.step.players:
            average = gradient.averages.get(player, {})
            to_params[player] = {n: c + average.get(n, 0.0) for n, c in gradient.params[player].items()}
            for name, c in gradient.buffers[player].items():
                to_buffers[f"{player}/{name}"] = c + average.get(name, 0.0)
        total = torch.cat([ravel(to_params[player]).double() for player in self.players])
        if not any(bool(c.any()) for c in to_buffers.values()):
            return total
        # Statistics settle where b = F(θ, b): their cotangent solves (I − ∂F/∂b)ᵀ x = c.
        cotangents = ravel(to_buffers).double().cpu().numpy()

        def residue(x: np.ndarray) -> np.ndarray:
            return x - self._pull_buffers(torch.from_numpy(x).to(total.device), to_buffers)[1].cpu().numpy()

        n = len(cotangents)
        system = LinearOperator((n, n), matvec=residue, dtype=np.float64)
        tolerance = 10 * torch.finfo(self.step.like.dtype).eps
        settled = gmres(system, cotangents, rtol=tolerance, atol=0.0, restart=min(n, 20), maxiter=3)[0]
        return total + self._pull_buffers(torch.from_numpy(settled).to(total.device), to_buffers)[0]

    def chunks(self) -> Iterator[tuple[StepRecord, Tensor, float]]:
        """Yield what each chunk drew, its instances, and its share of the batch."""
        n = sum(len(record.indices) for record in self.records)
        for record in self.records:
            yield self.step.drawn(record, self.source), self.source[record.indices], len(record.indices) / n

    def decay(self, player: str) -> dict[str, float]:
        """Return the weight decay in a player's gradient, by the names of its parameters."""
        total = dict.fromkeys(self.state.params[player], 0.0)
        for update in self.step.updates:
            rule = self.step.rule_named(str(update.name))
            for owner, name in self.step.names[str(update.name)]:
                if owner == player:
                    own = rule.decay_in_gradient(f"{player}.{name}")
                    total[name] += self.frequencies[str(update.name)] * own
        return total

    def _point(self, x: Tensor) -> Point:
        return Point({0: self.state.params}, {0: self.buffers}, self.state.carried, x.new_ones(len(x)))

    def _normals(self, player: str, theta: Tensors) -> Tensors:
        """Return the vectors of a player's spectral norms as functions of its parameters; empty where it has none."""
        network = self.step.networks[player]
        after: Tensors = {}
        for _ in range(POWER_ITERATIONS if network.is_iterated else 0):
            after = network.iterate(theta, {**self.state.buffers[player], **after})
        return after

    def _moves(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the direction of each update that has one, as a vector in what it trains."""
        directions: dict[Pair, Tensor] = {}
        for player, params in self.state.params.items():
            if player in parts:
                pieces = unravel(parts[player].to(next(iter(params.values()))), params)
                directions |= {(player, name): piece for name, piece in pieces.items()}
        moves = {}
        for update in self.step.updates:
            pairs = self.step.names[str(update.name)]
            own = [directions[pair] if pair in directions else torch.zeros_like(self._param(pair)) for pair in pairs]
            move = torch.cat([piece.reshape(-1) for piece in own])
            if bool(move.any()):
                moves[str(update.name)] = move
        return moves

    def _param(self, pair: Pair) -> Tensor:
        return self.state.params[pair[0]][pair[1]]

    def _derivative(self, record: StepRecord, done: UpdateRecord, x: Tensor, move: Tensor) -> DirectionalDerivative:
        secant = None if self.derivative == "exact" else Secant(self.delta)
        pairs = self.step.names[done.name]
        return DirectionalDerivative(
            self.step.plain, 0, _alone(record, done), x, self._point(x), pairs, move, {}, secant
        )

    def _products(self, parts: Mapping[str, Tensor], into: tuple[str, ...]) -> dict[str, Tensor]:
        """Return Σ_p (∂g_p/∂θ_q)ᵀ v_p for each q in `into`."""
        (dtype,) = {part.dtype for part in parts.values()}
        total: dict[tuple[str, str, str], Tensor] = {}
        moves = self._moves(parts)
        for record, x, share in self.chunks() if moves else ():
            for done in record.updates:
                if done.name not in moves:
                    continue
                found = self._derivative(record, done, x, moves[done.name]).in_players(into)
                for (field_, _, player, name), c in found.items():
                    own = share * self.frequencies[done.name] * c
                    key = field_, player, name
                    total[key] = total[key] + own if key in total else own
        products = {}
        for player in into:
            params = self.state.params[player]
            product = ravel({n: total.get(("params", player, n), torch.zeros_like(p)) for n, p in params.items()})
            if total and self.step.networks[player].is_iterated:
                traced = self.step.networks[player].traced
                product = product + self._through_normals(player, {n: total["buffers", player, n] for n in traced})
            if player in parts:
                pieces = unravel(parts[player], params)
                product = product + ravel({n: decay * pieces[n] for n, decay in self.decay(player).items()}).to(product)
            products[player] = product.to(dtype)
        return products

    def _through_normals(self, player: str, cotangents: Tensors) -> Tensor:
        """Return what reaches a player's parameters through the vectors of its spectral norms."""
        theta = leaves(self.state.params[player])
        with torch.enable_grad():
            after = self._normals(player, theta)
        with self.step.networks[player].installed(theta):
            wanted, given = list(theta.values()), [cotangents[name] for name in after]
            return _joined(grad(list(after.values()), wanted, given, materialize_grads=True))

    def _in_weights(self, record: StepRecord, done: UpdateRecord, x: Tensor, move: Tensor) -> Tensor:
        """Return the derivative of ⟨v, ∇L⟩ in the weights of a chunk's instances, L an update's objective."""
        objective = self.step.update_named(done.name).objective
        if isinstance(objective, DiscriminatorObjective) and not objective.interpolates(record.index):
            done = replace(done, draws={name: _some(draw, len(x)) for name, draw in done.draws.items()})
        if self.derivative == "secant" or getattr(objective, "stops", True):
            return self._derivative(record, done, x, move).in_weights()
        params = {f"{player}.{name}": self._param((player, name)) for player, name in self.step.names[done.name]}
        theta, along = (dict(zip(self.step.names[done.name], t.values())) for t in (params, unravel(move, params)))
        alone, point = _alone(record, done), self._point(x)

        def slopes(moved: dict[Pair, Tensor]) -> Tensor:
            def value(weights: Tensor) -> Tensor:
                at = point._replace(weights=weights)
                return self.step.objective(0, alone, x, at, moved, functional=True)[0]

            return torch.func.grad(value)(point.weights)

        return torch.func.jvp(slopes, (theta,), (along,))[1].detach()

    def _pull_buffers(self, x: Tensor, like: Tensors) -> tuple[Tensor, Tensor]:
        """Return (∂F/∂θ)ᵀ x and (∂F/∂b)ᵀ x, float64, of the buffers F(θ, b) after a step in which θ stays."""
        step, state = self.step, self.state
        to_params, to_buffers = x.new_zeros(sum(self.sizes)), torch.zeros_like(x)
        pairs = [(path.partition("/")[0], path.partition("/")[2]) for path in like]
        for record, real, share in self.chunks():
            theta = {player: leaves(params) for player, params in state.params.items()}
            before = {player: leaves(network.trace(state.buffers[player])) for player, network in step.networks.items()}
            buffers = {player: {**tensors, **before[player]} for player, tensors in state.buffers.items()}
            # What is detached follows the state like all else.
            with torch.enable_grad(), Stops(Cuts(set(), [])).applied():
                for done in record.updates:
                    live = {(player, name): theta[player][name] for player, name in step.names[done.name]}
                    point = Point({0: theta}, {0: buffers}, state.carried, real.new_ones(len(real)))
                    _, left, _ = step.objective(0, _alone(record, done), real, point, live)
                    buffers = _blended(buffers, left.buffers, self.frequencies[done.name])
                value = ravel({path: buffers[p][name] for path, (p, name) in zip(like, pairs)}) @ x.to(step.like)
            sources = [leaf for player in self.players for leaf in theta[player].values()]
            own = [before[player][name] for player, name in pairs]
            with installed(step.networks, theta):
                found = grad(value, [*sources, *own], materialize_grads=True)
            to_params += share * _joined(found[: len(sources)]).double()
            to_buffers += share * _joined(found[len(sources) :]).double()
        return to_params, to_buffers


def draw_chunks(
    step: AnyStep, n_samples: int, batch_size: int, n_batch: int | None = None, random_state=0, index: int = 0
) -> tuple[StepRecord, ...]:
    """Return all rows in order, or so many random ones, in chunks of nearly equal size, each with a seed of its own.

    Parameters
    ----------
    step : Step
        Each chunk has all of its updates.
    n_samples : int
    batch_size : int
        The most rows in a chunk.
    n_batch : int, optional
        How many rows; default all.
    random_state : int, RandomState instance or None, default=0
        Draws the rows and the seeds.
    index : int, default=0
        The number of the step that objectives are told.
    """
    rng = check_random_state(random_state)
    rows = np.arange(n_samples)
    if n_batch is not None and n_batch < n_samples:
        rows = np.sort(rng.permutation(n_samples)[:n_batch])
    chunks = np.array_split(rows, -(-len(rows) // batch_size))
    updates = tuple(UpdateRecord(str(update.name)) for update in step.updates)
    return tuple(StepRecord(index, torch.from_numpy(chunk), int(rng.randint(2**31)), updates) for chunk in chunks)


def _alone(record: StepRecord, done: UpdateRecord) -> StepRecord:
    """Return the record of a step of one of its updates, whose randomness is that of no other."""
    return replace(record, seed=stream(record.seed, done.name), updates=(done,))


def _steady(step: Step) -> Step:
    """Return a step whose lazy penalties are what they are on average."""

    def steady(update: Update) -> Update:
        objective: Any = update.objective
        if getattr(getattr(objective, "penalty", None), "every", 1) == 1 or not is_dataclass(update.objective):
            return update
        penalty = clone(objective.penalty).set_params(every=1)
        steadied: Any = replace(objective, penalty=penalty)
        return replace(update, objective=steadied)

    updates = tuple(map(steady, step.updates))
    unchanged = all(map(operator.is_, updates, step.updates))
    return step if unchanged else replace(step, updates=updates, seen_calls={})


def _frequency(update: Update) -> float:
    if not callable(update.due):
        return 1 / update.due
    frequency = sum(update.is_due(t) for t in range(COUNTED_STEPS)) / COUNTED_STEPS
    if not frequency:
        raise ValueError(
            f"The update {update.name!r} is not due in any of the first {COUNTED_STEPS} steps, from which AID finds "
            "out how often it happens. Say how often in the long run: Update(due=...) with a number."
        )
    return frequency


def _some(draw: Any, n: int) -> Any:
    return draw[:BYSTANDERS] if isinstance(draw, Tensor) and draw.ndim and len(draw) == n else draw


def _blended(before: Mapping[str, Tensors], after: Mapping[str, Tensors], share: float) -> dict[str, Tensors]:
    """Return buffers as they are on average where an update happens in a share of the steps."""

    def blended(old: Tensor, new: Tensor) -> Tensor:
        return torch.lerp(old, new, share) if share != 1 and new.is_floating_point() else new

    return {
        player: {name: blended(before[player][name], b) for name, b in tensors.items()}
        for player, tensors in after.items()
    }


def _joined(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([g.detach().reshape(-1) for g in gradients])
