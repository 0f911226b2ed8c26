"""The game Jacobian of a GAN as an operator, from the losses of its training step (theory, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, gmres
from sklearn.base import clone
from sklearn.utils import check_random_state
from torch import Tensor
from torch.autograd import grad

from ganclean.backends.adjoint import secant_width
from ganclean.data import DataSource
from ganclean.optim import AdamW, Clipped, Optimizer
from ganclean.training.network import Network
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState, leaves, ravel, unravel
from ganclean.training.step import TrainingStep

PLAYERS = ("generator", "discriminator")
# Of the vectors of spectral norms, which are functions of the parameters where power iteration has converged.
POWER_ITERATIONS = 10

Evaluate = Callable[[Tensors, Tensors], Tensor]


@dataclass(frozen=True)
class Game:
    """Both players' gradients at a state as functions of both players' parameters.

    With g_G = ∇_{θ_G} L_G and g_D = ∇_{θ_D} L_D over a fixed batch, weight decay included, it multiplies the transpose
    of J = ∂(g_G, g_D)/∂(θ_G, θ_D) and of its four blocks by vectors. The batch passes in chunks; latents, labels and
    all else that is random belong to the chunk and stay as they are, so that J is one fixed matrix. Networks are in
    training mode. The vectors of spectral norms are functions of the parameters.

    Vectors are flat, θ_G before θ_D; their type may be another than the parameters'.

    Parameters
    ----------
    step : TrainingStep
        Knows networks, losses and penalty. A lazy penalty counts as what it is on average.
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
    >>> game = Game(step, step.initial_state(), source, draw_chunks(len(source), 25))
    >>> v_g, v_d = (torch.randn(n) for n in game.sizes)
    >>> whole = game.rmatvec(torch.cat([v_g, v_d]))[: len(v_g)]
    >>> torch.allclose(whole, game.own("generator", v_g) + game.cross("discriminator", v_d), rtol=1e-3, atol=1e-4)
    True
    """

    step: TrainingStep
    state: TrainingState
    source: DataSource
    records: tuple[StepRecord, ...]
    derivative: str = "secant"
    delta: float = 1e-3
    # Approximate inverses that a solver has computed, by damping. A copy with other chunks begins without.
    inverses: dict[float, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        penalty = self.step.penalty
        if penalty is not None and penalty.every != 1:
            step = replace(self.step, penalty=clone(penalty).set_params(every=1))
            object.__setattr__(self, "step", step)

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of trained parameters of both players."""
        return len(self._theta["generator"]), len(self._theta["discriminator"])

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return Jᵀ v, shape (n_parameters,)."""
        from_g, from_d = (self.products(player, part) for player, part in zip(PLAYERS, v.split(self.sizes)))
        return torch.cat([from_g[0] + from_d[1], from_g[1] + from_d[0]])

    def own(self, player: str, v: Tensor) -> Tensor:
        """Return (∂g_p/∂θ_p)ᵀ v of a player p: the curvature of its own loss times v."""
        return self._products(player, v, [player])[player]

    def cross(self, player: str, v: Tensor) -> Tensor:
        """Return (∂g_p/∂θ_q)ᵀ v of a player p, in the parameters θ_q of its opponent."""
        rival = _rival(player)
        return self._products(player, v, [rival])[rival]

    def products(self, player: str, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return `own` and `cross` together, which cost little more than one of them."""
        both = self._products(player, v, PLAYERS)
        return both[player], both[_rival(player)]

    def gradient(self, player: str) -> Tensor:
        """Return the gradient of a player's loss in its own parameters; 0 for both at a stationary point."""
        total = torch.zeros_like(self._theta[player])
        for record, real, share in self._chunks():
            theta = leaves(getattr(self.state, player))
            evaluate, _, held = self._loss(player, record, real, into=())
            with torch.enable_grad():
                # The vectors of spectral norms are constants to the gradient that trains.
                moved = {n: t.clone() for n, t in theta.items()}
                value = evaluate(theta, moved)
            with self._network(player).installed(moved), self._network(_rival(player)).installed(held, trained=False):
                total += share * _joined(grad(value, list(moved.values()), materialize_grads=True))
        return total + decay_of(self._rule(player)) * self._theta[player]

    def along(self, v: Tensor) -> Tensor:
        """Return ⟨v, ∇_{θ_D} ℓ_D(x)⟩ for each instance of the chunks, in their order, shape (n,).

        Two forward passes, or one forward-mode derivative: no gradient of a single instance is ever held.
        """
        theta, buffers = self.state.discriminator, self.state.buffers_discriminator
        direction = v.to(self._theta["discriminator"])
        width = float(secant_width(self._theta["discriminator"], direction, self.delta))
        interpolates = self.step.penalty is not None and self.step.penalty.at == "interpolated"
        with torch.no_grad():
            played = [self._normals("discriminator", theta)] * 3
        move = unravel(direction, theta)
        parts = []
        for record, real, _ in self._chunks():
            fake = self._generated(record) if interpolates else real

            def terms(params, functional=False, chunk=(record, real, fake)):
                record, real, fake = chunk
                return self.step.instance_terms(params, buffers, played, record, real, record.labels, fake, functional)

            if self.derivative == "exact":
                parts.append(torch.func.jvp(lambda p: terms(p, True), (theta,), (move,))[1].detach())
            else:
                ahead, behind = ({n: t + e * move[n] for n, t in theta.items()} for e in (width, -width))
                parts.append((terms(ahead) - terms(behind)).detach() / (2 * width))
        return torch.cat(parts)

    def cotangent(self, gradient: TrainingState) -> Tensor:
        """Return a metric's gradient in (θ_G, θ_D), float64.

        At a stationary point a moving average equals what it follows, and running statistics are functions of the
        parameters: the gradients in both go to the parameters.
        """
        to_g = ravel(gradient.generator).double()
        if gradient.average:
            to_g = to_g + ravel(gradient.average).double()
        total = torch.cat([to_g, ravel(gradient.discriminator).double()])
        buffers = {**_named("generator", gradient.buffers_generator)}
        buffers |= _named("discriminator", gradient.buffers_discriminator)
        if not any(bool(c.any()) for c in buffers.values()):
            return total
        # Statistics settle where b = F(θ, b): their cotangent solves (I − ∂F/∂b)ᵀ x = c.
        c = ravel(buffers).double().cpu().numpy()

        def residue(x: np.ndarray) -> np.ndarray:
            return x - self._pull_buffers(torch.from_numpy(x).to(to_g.device), buffers)[1].cpu().numpy()

        operator = LinearOperator((len(c), len(c)), matvec=residue, dtype=np.float64)
        tolerance = 10 * torch.finfo(self._theta["generator"].dtype).eps
        settled = gmres(operator, c, rtol=tolerance, atol=0.0, restart=min(len(c), 20), maxiter=3)[0]
        return total + self._pull_buffers(torch.from_numpy(settled).to(to_g.device), buffers)[0]

    @cached_property
    def _theta(self) -> dict[str, Tensor]:
        return {player: ravel(getattr(self.state, player)) for player in PLAYERS}

    def _network(self, player: str) -> Network:
        return self.step.players[PLAYERS.index(player)]

    def _rule(self, player: str) -> Optimizer:
        return getattr(self.step, f"optimizer_{player}")

    def _chunks(self) -> Iterator[tuple[StepRecord, Tensor, float]]:
        """Yield what each chunk drew, its instances, and its share of the batch."""
        n = sum(len(record.indices) for record in self.records)
        for record in self.records:
            yield self.step.drawn(record, self.source), self.source[record.indices], len(record.indices) / n

    def _normals(self, player: str, theta: Tensors) -> Tensors:
        """Return the vectors of a player's spectral norms as functions of its parameters; empty where it has none."""
        network, buffers = self._network(player), getattr(self.state, f"buffers_{player}")
        after: Tensors = {}
        for _ in range(POWER_ITERATIONS):
            after = network.iterate(theta, {**buffers, **after})
            if not after:
                break
        return after

    def _generated(self, record: StepRecord) -> Tensor:
        with torch.no_grad():
            return self.step.generate(self.state.generator, self.state.buffers_generator, record)[0]

    def _products(self, player: str, v: Tensor, into) -> dict[str, Tensor]:
        """Return (∂g_p/∂θ_q)ᵀ v of a player p for each q in `into`."""
        theta = self._theta[player]
        direction = v.to(theta)
        total = {q: torch.zeros_like(self._theta[q]) for q in into}
        if bool(direction.any()):
            width = float(secant_width(theta, direction, self.delta))
            for record, real, share in self._chunks():
                for q, product in self._chunk_products(player, direction, width, record, real, into).items():
                    total[q] += share * product
            if player in total:
                total[player] += decay_of(self._rule(player)) * direction
        return {q: product.to(v.dtype) for q, product in total.items()}

    def _chunk_products(
        self, player: str, v: Tensor, width: float, record: StepRecord, real: Tensor, into
    ) -> dict[str, Tensor]:
        """Differentiate the directional derivative of a player's loss along v in the parameters of both."""
        params = getattr(self.state, player)
        theta, move = leaves(params), unravel(v, params)
        evaluate, sources, held = self._loss(player, record, real, into)
        wanted = {**(_named("own", theta) if player in into else {}), **_named("cross", sources)}
        totals = {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
        for value, moved in self._directional(evaluate, theta, move, width):
            with self._network(player).installed(moved), self._network(_rival(player)).installed(held):
                gradients = grad(value, list(wanted.values()), materialize_grads=True)
            # Detached, since early versions of torch fill gaps with zeros that require a gradient.
            totals = {name: totals[name] + g.detach() for name, g in zip(wanted, gradients)}
        products = {}
        if player in into:
            products[player] = ravel({n: totals[f"own/{n}"] for n in theta})
        if _rival(player) in into:
            products[_rival(player)] = self._to_rival(player, record, {n: totals[f"cross/{n}"] for n in sources})
        return products

    def _loss(self, player: str, record: StepRecord, real: Tensor, into) -> tuple[Evaluate, Tensors, Tensors]:
        """Return a player's loss on a chunk, the leaves through which it depends on the opponent, and those of them
        that are the opponent's parameters.

        The loss is a function of the player's parameters twice: as they are, which spectral norms look at, and moved.
        """
        step, state = self.step, self.state
        if player == "discriminator":
            fake = self._generated(record)
            sources = leaves({"fake": fake}) if "generator" in into else {}
            fake = sources.get("fake", fake)

            def loss_d(theta: Tensors, moved: Tensors) -> Tensor:
                played = [self._normals("discriminator", theta)] * 3
                return step.discriminator_loss(moved, state.buffers_discriminator, played, record, real, fake)[0]

            return loss_d, sources, {}
        sources = leaves(state.discriminator) if "discriminator" in into else {}
        rival = sources or state.discriminator

        def loss_g(theta: Tensors, moved: Tensors) -> Tensor:
            buffers_g = {**state.buffers_generator, **self._normals("generator", theta)}
            buffers_d = {**state.buffers_discriminator, **self._normals("discriminator", rival)}
            return step.generator_loss(moved, rival, buffers_g, buffers_d, record)[0]

        return loss_g, sources, rival

    def _directional(
        self, evaluate: Evaluate, theta: Tensors, move: Tensors, width: float
    ) -> Iterator[tuple[Tensor, Tensors]]:
        """Yield scalars whose sum is a loss's derivative along `move`, each with the parameters it was evaluated at."""
        if self.derivative == "exact":
            with torch.enable_grad():
                moved = {n: t.clone() for n, t in theta.items()}
                value = evaluate(theta, moved)
            with torch.enable_grad():
                gradients = grad(value, list(moved.values()), create_graph=True, materialize_grads=True)
                yield sum((g * move[n]).sum() for n, g in zip(moved, gradients)), moved  # type: ignore[misc]
            return
        for sign in (1, -1):
            with torch.enable_grad():
                moved = {n: t + sign * width * move[n] for n, t in theta.items()}
                value = evaluate(theta, moved) * (sign / (2 * width))
            yield value, moved

    def _to_rival(self, player: str, record: StepRecord, cotangents: Tensors) -> Tensor:
        """Return what reaches the opponent's parameters: at once, or through the generated samples."""
        if player == "generator":
            return ravel(cotangents)
        theta = leaves(self.state.generator)
        with torch.enable_grad():
            buffers = {**self.state.buffers_generator, **self._normals("generator", theta)}
            fake, _ = self.step.generate(theta, buffers, record)
        with self._network("generator").installed(theta):
            return _joined(grad(fake, list(theta.values()), cotangents["fake"], materialize_grads=True))

    def _pull_buffers(self, x: Tensor, like: Tensors) -> tuple[Tensor, Tensor]:
        """Return (∂F/∂θ)ᵀ x and (∂F/∂b)ᵀ x, float64, of the buffers F(θ, b) after a discriminator's update."""
        step, state = self.step, self.state
        to_theta = x.new_zeros(sum(self.sizes))
        to_buffers = torch.zeros_like(x)
        for record, real, share in self._chunks():
            theta = {player: leaves(getattr(state, player)) for player in PLAYERS}
            before = {p: leaves(self._network(p).trace(getattr(state, f"buffers_{p}"))) for p in PLAYERS}
            b_g, b_d = ({**getattr(state, f"buffers_{p}"), **before[p]} for p in PLAYERS)
            with torch.enable_grad():
                fake, after_g = step.generate(theta["generator"], b_g, record)
                played = step.iterated(theta["discriminator"], b_d, record)
                after_d = step.discriminator_loss(theta["discriminator"], b_d, played, record, real, fake)[1][1]
                after = {**_named("generator", after_g), **_named("discriminator", after_d)}
                value = ravel({n: after[n] for n in like}) @ x.to(real)
            sources = [leaf for p in PLAYERS for leaf in theta[p].values()]
            buffers = {**_named("generator", before["generator"]), **_named("discriminator", before["discriminator"])}
            with step.installed(theta["generator"], theta["discriminator"]):
                gradients = grad(value, [*sources, *(buffers[name] for name in like)], materialize_grads=True)
            to_theta += share * _joined(gradients[: len(sources)]).double()
            to_buffers += share * _joined(gradients[len(sources) :]).double()
        return to_theta, to_buffers


def draw_chunks(n_samples: int, batch_size: int, n_batch: int | None = None, random_state=0) -> tuple[StepRecord, ...]:
    """Return all rows in order, or so many random ones, in chunks of nearly equal size, each with a seed of its own.

    Parameters
    ----------
    n_samples : int
    batch_size : int
        The most rows in a chunk.
    n_batch : int, optional
        How many rows; default all.
    random_state : int, RandomState instance or None, default=0
        Draws the rows and the seeds.
    """
    rng = check_random_state(random_state)
    rows = np.arange(n_samples)
    if n_batch is not None and n_batch < n_samples:
        rows = np.sort(rng.permutation(n_samples)[:n_batch])
    chunks = np.array_split(rows, -(-len(rows) // batch_size))
    return tuple(StepRecord(0, torch.from_numpy(chunk), int(rng.randint(2**31 - 8))) for chunk in chunks)


def _rival(player: str) -> str:
    return PLAYERS[1 - PLAYERS.index(player)]


def decay_of(rule: Optimizer) -> float:
    """Return the weight decay that a rule adds to the gradient."""
    inner = rule.optimizer if isinstance(rule, Clipped) else rule
    return 0.0 if isinstance(inner, AdamW) else float(getattr(inner, "weight_decay", 0.0))


def _named(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _joined(gradients) -> Tensor:
    return torch.cat([g.detach().reshape(-1) for g in gradients])
