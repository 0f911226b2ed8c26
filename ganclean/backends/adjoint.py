"""The vector-Jacobian product of one training step, exact or by a secant (theory, sections 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from ganclean.training.network import Network
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState, leaves, ravel, unravel
from ganclean.training.step import TrainingStep, gradient_of, is_shared, shifted


class StepAdjoint(NamedTuple):
    """What the cotangent of the state after a step becomes before it.

    Parameters
    ----------
    cotangent : TrainingState
        (∂Φ/∂s)ᵀ λ; of the buffers, those that derivatives flow through.
    weights : Tensor of shape (batch_size,)
        (∂Φ/∂w)ᵀ λ: minus the step's contribution to the influence of the drawn instances.
    push : dict of str to Tensor
        The cotangent of the discriminator's gradient; its inner product with the gradient of the loss of any other
        instance, divided by the batch size, is what `weights` holds for the drawn ones.
    """

    cotangent: TrainingState
    weights: Tensor
    push: Tensors


Adjoint = Callable[
    [TrainingStep, TrainingState, TrainingState, StepRecord, Tensor, list[TrainingState]], list[StepAdjoint]
]


def exact_adjoint(
    step: TrainingStep,
    state: TrainingState,
    after: TrainingState,
    record: StepRecord,
    real: Tensor,
    cotangents: list[TrainingState],
) -> list[StepAdjoint]:
    """Pull cotangents back through a step by `torch.func.vjp` of that very step.

    Parameters
    ----------
    step : TrainingStep
    state, after : TrainingState
        The states before and after the step.
    record : StepRecord
    real : Tensor of shape (batch_size, *sample_shape)
    cotangents : list of TrainingState
        One λ for each metric; the step is evaluated once for all of them.

    Returns
    -------
    list of StepAdjoint
    """

    def next_state(differentiable: TrainingState, weights: Tensor, push: Tensors) -> TrainingState:
        full = differentiable._replace(
            buffers_generator={**state.buffers_generator, **differentiable.buffers_generator},
            buffers_discriminator={**state.buffers_discriminator, **differentiable.buffers_discriminator},
        )
        return step.differentiable(step(full, record, real, weights, push, functional=True))

    weights = real.new_ones(len(real))
    push = {name: torch.zeros_like(p) for name, p in state.discriminator.items()}
    # The transform takes its derivatives all the same; without the outer graph, which nobody needs.
    with torch.no_grad():
        pull = torch.func.vjp(next_state, step.differentiable(state), weights, push)[1]
        return [StepAdjoint(*pull(cotangent)) for cotangent in cotangents]


class Secant(NamedTuple):
    """How the secant scheme looks along the cotangent of a gradient (theory, section 3).

    Parameters
    ----------
    delta : float, default=1e-2
        Relative width of a central difference, ε = δ‖θ‖/‖v‖.
    spread : float, default=inf
        Tensors are moved together as long as their own relative moves ‖v‖/‖θ‖ differ by no more than this factor, and
        in turn otherwise.
    n_perturbations : int, default=0
        Average over so many draws of noise in the parameters; 0 looks from the parameters themselves.
    perturbation : float, default=0.05
        Standard deviation of that noise, relative to the mean magnitude of each tensor.
    """

    delta: float = 1e-2
    spread: float = math.inf
    n_perturbations: int = 0
    perturbation: float = 0.05


DEFAULT = Secant()


class _Look(NamedTuple):
    """One central difference: from θ + offset, along ±width · direction."""

    offset: Tensor | float
    direction: Tensor
    width: float
    share: float


class _Pulled(NamedTuple):
    theta: Tensor
    beside: tuple[Tensors, ...]
    terms: Tensor | None


def secant_adjoint(
    step: TrainingStep,
    state: TrainingState,
    after: TrainingState,
    record: StepRecord,
    real: Tensor,
    cotangents: list[TrainingState],
    secant: Secant = DEFAULT,
) -> list[StepAdjoint]:
    """Pull cotangents back through a step by central differences of first gradients (theory, section 3).

    Along the cotangent v of a network's gradient, at θ ± εv, two ordinary gradient evaluations give the products with
    all blocks of the step's Jacobian, since these are derivatives of one scalar. The generator's pass in the
    discriminator's loss does not depend on the sign and is shared. Both signs see the step's own randomness. Parameters
    and result as in `exact_adjoint`.
    """
    # The shift is a constant, through which cotangents pass as they are.
    state = shifted(state, record)
    generator, discriminator = step.players
    theta_g, start_g = leaves(state.generator), leaves(generator.trace(state.buffers_generator))

    def generate():
        with torch.enable_grad():
            return step.generate(theta_g, {**state.buffers_generator, **start_g}, record)

    fake, between_g = generate()
    # Each metric goes back through a graph of its own, since compiled modules do not let it be used twice.
    graphs = [(fake, between_g)]
    with torch.no_grad():
        # Of the discriminator's buffers, training looks at the vectors of spectral norms alone.
        played = step.iterated(state.discriminator, state.buffers_discriminator, record)
    between_d = {**state.buffers_discriminator, **played[-1]}
    opponent = after.discriminator if step.update == "alternating" else state.discriminator

    def loss_g(theta, rivals, start, start_d):
        buffers_g, buffers_d = {**between_g, **start}, {**between_d, **start_d}
        played_g = {} if is_shared(record) else generator.iterate(theta, buffers_g)
        played_d = discriminator.iterate(rivals, buffers_d)

        def evaluate(moved):
            loss, buffers = step.generator_loss(
                moved, rivals, {**buffers_g, **played_g}, {**buffers_d, **played_d}, record
            )
            return loss, buffers, None

        return evaluate

    def loss_d(theta, inputs, start):
        buffers = {**state.buffers_discriminator, **start}
        played = step.iterated(theta, buffers, record)

        def evaluate(moved):
            loss, (terms, changed) = step.discriminator_loss(moved, buffers, played, record, real, inputs["fake"])
            return loss, (changed,), terms

        return evaluate

    def gradient_d() -> Tensors:
        with discriminator.installed(state.discriminator):
            return gradient_of(
                lambda theta: step.discriminator_loss(
                    theta, state.buffers_discriminator, played, record, real, fake.detach()
                ),
                state.discriminator,
            )[0]

    def gradient_g() -> Tensors:
        with step.installed(state.generator, opponent):
            return gradient_of(lambda theta: (loss_g(theta, opponent, {}, {})(theta)[0], ()), state.generator)[0]

    pull_d = step.optimizer_discriminator.at(record.settings_d).pullback(
        state.discriminator, state.moments_discriminator, after.moments_discriminator, record.number_d, gradient_d
    )
    if record.updates_generator:
        pull_g = step.optimizer_generator.at(record.settings_g).pullback(
            state.generator, state.moments_generator, after.moments_generator, record.number_g, gradient_g
        )

    def pull(cotangent: TrainingState) -> StepAdjoint:
        to_g, moments_g, average = cotangent.generator, cotangent.moments_generator, cotangent.average
        to_d = ravel(cotangent.discriminator)
        buffers_g, buffers_d = cotangent.buffers_generator, cotangent.buffers_discriminator
        to_opponent = torch.zeros_like(to_d)
        if record.updates_generator:
            if step.ema_decay is not None:
                to_g = {n: c + (1 - step.ema_decay) * average[n] for n, c in to_g.items()}
                average = {n: step.ema_decay * c for n, c in average.items()}
            passed, v, moments_g = pull_g(to_g, moments_g)
            starts = (opponent, generator.trace(between_g), discriminator.trace(between_d))
            with discriminator.installed(opponent):
                pulled = _central_difference(
                    generator, loss_g, state.generator, starts, v, (buffers_g, buffers_d), record.seed, secant
                )
            to_g = unravel(passed + pulled.theta, state.generator)
            rivals, buffers_g, buffers_d = pulled.beside
            to_opponent = ravel(rivals)
        # In an alternating update the generator met the new discriminator, in a simultaneous one the old.
        if step.update == "alternating":
            to_d = to_d + to_opponent
        passed, v, moments_d = pull_d(unravel(to_d, state.discriminator), cotangent.moments_discriminator)
        if step.update == "simultaneous":
            passed = passed + to_opponent
        inputs = ({"fake": fake}, discriminator.trace(state.buffers_discriminator))
        pulled = _central_difference(
            discriminator, loss_d, state.discriminator, inputs, v, (buffers_d,), record.seed, secant
        )
        through, buffers_d = pulled.beside
        made, changed = graphs.pop() if graphs else generate()
        reached = {"fake": made, **{n: changed[n] for n in start_g if changed[n].requires_grad}}
        sources = {**theta_g, **{f"buffer {n}": b for n, b in start_g.items()}}
        with generator.installed(state.generator):
            pushed = grad(
                list(reached.values()),
                list(sources.values()),
                [through["fake"], *(buffers_g[n] for n in list(reached)[1:])],
                materialize_grads=True,
            )
        weights = real.new_zeros(len(real)) if pulled.terms is None else pulled.terms / len(real)
        return StepAdjoint(
            TrainingState(
                generator={n: c + g.detach() for (n, c), g in zip(to_g.items(), pushed)},
                discriminator=unravel(passed + pulled.theta, state.discriminator),
                moments_generator=moments_g,
                moments_discriminator=moments_d,
                average=average,
                buffers_generator={n: g.detach() for n, g in zip(start_g, pushed[len(theta_g) :])},
                buffers_discriminator=buffers_d,
            ),
            weights,
            unravel(v, state.discriminator),
        )

    return [pull(cotangent) for cotangent in cotangents]


def check_second_derivative(step: TrainingStep, state: TrainingState, record: StepRecord, real: Tensor) -> None:
    """Raise `RuntimeError` where the networks have no second derivative.

    Plain autograd says so; `torch.func` takes what is marked as differentiable only once for a constant.
    """
    with torch.no_grad():
        fake, _ = step.generate(state.generator, state.buffers_generator, record)
        played = step.iterated(state.discriminator, state.buffers_discriminator, record)
    theta_g, theta_d = leaves(state.generator), leaves(state.discriminator)
    with torch.enable_grad(), step.installed(theta_g, theta_d):
        loss = step.discriminator_loss(theta_d, state.buffers_discriminator, played, record, real, fake)[0]
        complete = replace(record, latents_g=record.latents_d, labels_g=record.labels_d)
        buffers = {**state.buffers_discriminator, **played[-1]}
        loss = loss + step.generator_loss(theta_g, theta_d, state.buffers_generator, buffers, complete)[0]
        params = [*theta_g.values(), *theta_d.values()]
        # What is marked as differentiable only once fails where its cotangent depends on the parameters, as that of the
        # square does, and where the whole graph is walked through, as `backward` does.
        gradients = grad(loss * loss, params, create_graph=True, materialize_grads=True)
        torch.stack([(g * g).sum() for g in gradients]).sum().backward()


def _central_difference(
    network: Network,
    make_loss: Callable,
    params: Tensors,
    starts: tuple[Tensors, ...],
    v: Tensor,
    cotangents: tuple[Tensors, ...],
    seed: int,
    secant: Secant,
) -> _Pulled:
    """Return d/dα of a loss's gradients at θ + αv, and what its running statistics pass on.

    The scalar [L(θ + εv) − L(θ − εv)] / 2ε has as its gradient, in whatever L depends on, the product of v with that
    block of the Jacobian of ∇L. Running statistics b are functions of the same passes; their cotangent adds its inner
    product with b.
    """
    looks = _looks(params, v, seed, secant)
    if not looks:
        if not any(bool(c.any()) for tensors in cotangents for c in tensors.values()):
            nothing = tuple({n: torch.zeros_like(t) for n, t in tensors.items()} for tensors in starts)
            return _Pulled(torch.zeros_like(v), nothing, None)
        looks = [_Look(0.0, v, 1.0, 1.0)]
    theta, inputs = leaves(params), tuple(leaves(tensors) for tensors in starts)
    flat = [*theta.values(), *(leaf for tensors in inputs for leaf in tensors.values())]
    totals, terms = [torch.zeros_like(leaf) for leaf in flat], None
    for look in looks:
        for sign in (1, -1):
            scale = sign * look.share / (2 * look.width)
            move = unravel(look.offset + sign * look.width * look.direction, params)
            with torch.enable_grad():
                moved = {n: p + move[n] for n, p in theta.items()}
                loss, buffers, beside = make_loss(theta, *inputs)(moved)
                value = scale * loss
                for tensors, cotangent in zip(buffers, cotangents):
                    for name, c in cotangent.items():
                        value = value + (c * tensors[name]).sum() / (2 * len(looks))
            with network.installed(moved):
                gradients = grad(value, flat, materialize_grads=True)
            # Detached, since early versions of torch fill gaps with zeros that require a gradient.
            totals = [total + gradient.detach() for total, gradient in zip(totals, gradients)]
            if beside is not None:
                part = scale * beside.detach()
                terms = part if terms is None else terms + part
    sums = iter(totals)
    joined = torch.cat([next(sums).reshape(-1) for _ in theta])
    return _Pulled(joined, tuple({n: next(sums) for n in tensors} for tensors in inputs), terms)


def _looks(params: Tensors, v: Tensor, seed: int, secant: Secant) -> list[_Look]:
    """Return the central differences that a cotangent takes: usually one."""
    theta = ravel(params)
    directions = [v] if secant.spread == math.inf else _directions(params, v, secant.spread)
    moved = [
        (d, secant_width(theta.where(d != 0, 0.0) if len(directions) > 1 else theta, d, secant.delta))
        for d in directions
    ]
    moved = [(d, width) for d, width in moved if width]
    if not secant.n_perturbations:
        return [_Look(0.0, d, width, 1.0) for d, width in moved]
    noise = torch.Generator(device=theta.device).manual_seed(seed)
    scale = ravel({n: p.abs().mean().expand(p.shape) for n, p in params.items()}) * secant.perturbation
    draws = [
        scale * torch.randn(len(theta), generator=noise, dtype=theta.dtype, device=theta.device)
        for _ in range(secant.n_perturbations)
    ]
    return [_Look(offset, d, width, 1 / len(draws)) for offset in draws for d, width in moved]


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
    ]


def secant_width(theta: Tensor, v: Tensor, delta: float) -> float:
    """Return ε = δ‖θ‖/‖v‖, or 0 where v vanishes and there is no direction to look along."""
    # In float64, where the squares of what fits float32 neither overflow nor vanish.
    norm = float(v.double().norm())
    if not math.isfinite(norm):
        return math.nan
    return delta * (float(theta.double().norm()) or 1.0) / norm if norm else 0.0
