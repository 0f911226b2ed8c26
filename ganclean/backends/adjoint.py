"""The vector-Jacobian product of one training step, exact or by a secant (theory, sections 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import vmap
from torch.utils._pytree import tree_map

from ganclean.training.network import Network
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState, leaves, map_state, ravel, unravel
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


Adjoint = Callable[..., list[StepAdjoint]]


def exact_adjoint(
    step: TrainingStep,
    state: TrainingState,
    after: TrainingState,
    record: StepRecord,
    real: Tensor,
    cotangents: list[TrainingState],
    stacked: bool = False,
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
    stacked : bool, default=False
        Whether to pull all of them back at once by `torch.func.vmap`, which is faster where the networks are small.

    Returns
    -------
    list of StepAdjoint
    """

    return step.run(_exact, state, record, real, cotangents, stacked)


def _exact(
    step: TrainingStep,
    state: TrainingState,
    record: StepRecord,
    real: Tensor,
    cotangents: list[TrainingState],
    stacked: bool,
) -> list[StepAdjoint]:
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
        return _each(lambda cotangent: StepAdjoint(*pull(cotangent)), cotangents, stacked)


def _each(
    pull: Callable[[TrainingState], StepAdjoint], cotangents: list[TrainingState], stacked: bool
) -> list[StepAdjoint]:
    """Pull each cotangent back, or all at once."""
    if not stacked:
        return [pull(cotangent) for cotangent in cotangents]
    together = vmap(pull, randomness="same")(map_state(lambda *tensors: torch.stack(tensors), *cotangents))
    return [tree_map(lambda tensor, i=i: tensor[i], together) for i in range(len(cotangents))]


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


class _Look(NamedTuple):
    """One central difference: from θ + offset, along ±width · direction."""

    offset: Tensor | float
    direction: Tensor
    width: Tensor
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
    stacked: bool = False,
    secant: Secant = DEFAULT,
) -> list[StepAdjoint]:
    """Pull cotangents back through a step by central differences of first gradients (theory, section 3).

    Along the cotangent v of a network's gradient, at θ ± εv, two ordinary gradient evaluations give the products with
    all blocks of the step's Jacobian, since these are derivatives of one scalar. The generator's pass in the
    discriminator's loss does not depend on the sign and is shared. Both signs see the step's own randomness. Parameters
    and result as in `exact_adjoint`.
    """
    # A number that differs from call to call is no constant of a compiled step.
    secant = secant._replace(delta=torch.as_tensor(secant.delta, dtype=torch.float64))
    return step.run(_secant, state, record, real, after, cotangents, stacked, secant)


def _secant(
    step: TrainingStep,
    state: TrainingState,
    record: StepRecord,
    real: Tensor,
    after: TrainingState,
    cotangents: list[TrainingState],
    stacked: bool,
    secant: Secant,
) -> list[StepAdjoint]:
    # The shift is a constant, through which cotangents pass as they are.
    state = shifted(state, record)
    generator, discriminator = step.players
    fake, between_g, pull_generated = _generated(step, state, record, functional=stacked)
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
            loss, (terms, changed) = step.discriminator_loss(
                moved, buffers, played, record, real, inputs["fake"], functional=stacked
            )
            return loss, (changed,), terms

        return evaluate

    def gradient_d() -> Tensors:
        with discriminator.installed(state.discriminator):
            return gradient_of(
                lambda theta: step.discriminator_loss(theta, state.buffers_discriminator, played, record, real, fake),
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
            with nullcontext() if stacked else discriminator.installed(opponent):
                pulled = _central_difference(
                    generator, loss_g, state.generator, starts, v, (buffers_g, buffers_d), record.seed, secant, stacked
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
            discriminator, loss_d, state.discriminator, inputs, v, (buffers_d,), record.seed, secant, stacked
        )
        through, buffers_d = pulled.beside
        pushed, buffers_g = pull_generated(through["fake"], buffers_g)
        weights = real.new_zeros(len(real)) if pulled.terms is None else pulled.terms / len(real)
        return StepAdjoint(
            TrainingState(
                generator={n: c + pushed[n] for n, c in to_g.items()},
                discriminator=unravel(passed + pulled.theta, state.discriminator),
                moments_generator=moments_g,
                moments_discriminator=moments_d,
                average=average,
                buffers_generator=buffers_g,
                buffers_discriminator=buffers_d,
            ),
            weights,
            unravel(v, state.discriminator),
        )

    return _each(pull, cotangents, stacked)


def _generated(
    step: TrainingStep, state: TrainingState, record: StepRecord, functional: bool
) -> tuple[Tensor, Tensors, Callable[[Tensor, Tensors], tuple[Tensors, Tensors]]]:
    """Return the samples of the discriminator's update, the buffers afterwards, and the vector-Jacobian product of both
    in the generator's parameters and in its buffers before.
    """
    network = step.players[0]
    before = state.generator, network.trace(state.buffers_generator)

    def generate(theta: Tensors, start: Tensors) -> tuple[tuple[Tensor, Tensors], Tensors]:
        fake, buffers = step.generate(theta, {**state.buffers_generator, **start}, record)
        return (fake, network.trace(buffers)), buffers

    if functional:
        (fake, _), vjp, buffers = torch.func.vjp(generate, *before, has_aux=True)  # type: ignore[misc]
        return fake, buffers, lambda to_fake, to_buffers: vjp((to_fake, to_buffers))

    def made():
        sources = leaves(before[0]), leaves(before[1])
        with torch.enable_grad():
            return sources, *generate(*sources)

    # Each metric goes back through a graph of its own, since compiled modules do not let it be used twice.
    graphs = [made()]
    _, (fake, _), buffers = graphs[0]

    def pull(to_fake: Tensor, to_buffers: Tensors) -> tuple[Tensors, Tensors]:
        sources, (fake, after), _ = graphs.pop() if graphs else made()
        ends = [(fake, to_fake), *((after[n], c) for n, c in to_buffers.items() if after[n].requires_grad)]
        inputs = [leaf for tensors in sources for leaf in tensors.values()]
        with network.installed(state.generator):
            found = grad([end for end, _ in ends], inputs, [c for _, c in ends], materialize_grads=True)
        # Early versions of torch fill gaps with zeros that require a gradient.
        gradients = [gradient.detach() for gradient in found]
        theta = dict(zip(sources[0], gradients))
        return theta, dict(zip(sources[1], gradients[len(theta) :]))

    return fake.detach(), {name: b.detach() for name, b in buffers.items()}, pull


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
    functional: bool,
) -> _Pulled:
    """Return d/dα of a loss's gradients at θ + αv, and what its running statistics pass on.

    The scalar [L(θ + εv) − L(θ − εv)] / 2ε has as its gradient, in whatever L depends on, the product of v with that
    block of the Jacobian of ∇L. Running statistics b are functions of the same passes; their cotangent adds its inner
    product with b.
    """
    looks = _looks(params, v, seed, secant)
    sources = {f"{i}/{name}": tensor for i, tensors in enumerate((params, *starts)) for name, tensor in tensors.items()}
    totals, terms = {source: torch.zeros_like(tensor) for source, tensor in sources.items()}, None
    for look in looks:
        for sign in (1, -1):
            scale = (sign * look.share / (2 * look.width)).to(v.dtype)
            move = unravel(look.offset + sign * look.width * look.direction, params)

            def value(sources, scale=scale, move=move):
                theta, *inputs = (
                    {name: sources[f"{i}/{name}"] for name in tensors} for i, tensors in enumerate((params, *starts))
                )
                loss, buffers, beside = make_loss(theta, *inputs)({n: p + move[n] for n, p in theta.items()})
                value = scale * loss
                for tensors, cotangent in zip(buffers, cotangents):
                    for name, c in cotangent.items():
                        value = value + (c * tensors[name]).sum() / (2 * len(looks))
                return value, () if beside is None else (scale * beside,)

            moved = {n: p + move[n] for n, p in params.items()}
            with nullcontext() if functional else network.installed(moved):
                gradients, beside = gradient_of(value, sources, functional)
            totals = {source: total + gradients[source] for source, total in totals.items()}
            for part in beside:
                terms = part if terms is None else terms + part
    theta, *beside = ({name: totals[f"{i}/{name}"] for name in tensors} for i, tensors in enumerate((params, *starts)))
    return _Pulled(ravel(theta), tuple(beside), terms)


def _looks(params: Tensors, v: Tensor, seed: int, secant: Secant) -> list[_Look]:
    """Return the central differences that a cotangent takes: usually one."""
    theta = ravel(params)
    directions = [v] if secant.spread == math.inf else _directions(params, v, secant.spread)
    moved = [
        (d, secant_width(theta.where(d != 0, 0.0) if len(directions) > 1 else theta, d, secant.delta))
        for d in directions
    ]
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
    ] or [v]


def secant_width(theta: Tensor, v: Tensor, delta: float | Tensor) -> Tensor:
    """Return ε = δ‖θ‖/‖v‖ as a float64 scalar, on the device of the parameters; any where v or θ vanishes."""
    # In float64, where the squares of what fits float32 neither overflow nor vanish.
    size, norm = theta.double().norm(), v.double().norm()
    return delta * torch.where(size > 0, size, 1.0) / torch.where(norm != 0, norm, 1.0)
