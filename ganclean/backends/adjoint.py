"""The vector-Jacobian product of one training step, exact or by a secant (theory, sections 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from ganclean.training.state import Tensors, TrainingState, ravel, unravel
from ganclean.training.step import StepRecord, TrainingStep


class StepAdjoint(NamedTuple):
    """What the cotangent of the state after a step becomes before it.

    Parameters
    ----------
    cotangent : TrainingState
        (∂Φ/∂s)ᵀ λ, without buffers.
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
            buffers_generator=state.buffers_generator, buffers_discriminator=state.buffers_discriminator
        )
        return step(full, record, real, weights, push).without_buffers()

    weights = real.new_ones(len(real))
    push = {name: torch.zeros_like(p) for name, p in state.discriminator.items()}
    # The transform takes its derivatives all the same; without the outer graph, which nobody needs.
    with torch.no_grad():
        pull = torch.func.vjp(next_state, state.without_buffers(), weights, push)[1]
        return [StepAdjoint(*pull(cotangent)) for cotangent in cotangents]


def secant_adjoint(
    step: TrainingStep,
    state: TrainingState,
    after: TrainingState,
    record: StepRecord,
    real: Tensor,
    cotangents: list[TrainingState],
    delta: float = 1e-2,
) -> list[StepAdjoint]:
    """Pull cotangents back through a step by central differences of first gradients (theory, section 3).

    Along the cotangent v of a network's gradient, at θ ± εv with ε = δ‖θ‖/‖v‖, two ordinary gradient evaluations give
    the products with all four blocks of the step's Jacobian. The generator's pass in the discriminator's loss does not
    depend on the sign and is shared. Parameters and result as in `exact_adjoint`.
    """
    opponent = after.discriminator if step.update == "alternating" else state.discriminator
    pull_generator = step.optimizer_generator.pullback(
        state.generator, state.moments_generator, after.moments_generator, record.index + 1
    )
    pull_discriminator = step.optimizer_discriminator.pullback(
        state.discriminator, state.moments_discriminator, after.moments_discriminator, record.index + 1
    )
    leaves = _leaves(state.generator)
    fake = step.generate(leaves, state.buffers_generator, record.latents_d, record.seed)

    def pull(cotangent: TrainingState) -> StepAdjoint:
        generator, average = cotangent.generator, cotangent.average
        if step.ema_decay is not None:
            generator = {n: c + (1 - step.ema_decay) * average[n] for n, c in generator.items()}
            average = {n: step.ema_decay * c for n, c in average.items()}

        to_generator, v, moments_generator = pull_generator(generator, cotangent.moments_generator)
        curvature, to_opponent = _generator_secant(step, state, opponent, record, v, delta)
        to_generator = to_generator + curvature

        # In an alternating update the generator met the new discriminator, in a simultaneous one the old.
        discriminator = ravel(cotangent.discriminator)
        if step.update == "alternating":
            discriminator = discriminator + to_opponent
        to_discriminator, v, moments_discriminator = pull_discriminator(
            unravel(discriminator, state.discriminator), cotangent.moments_discriminator
        )
        if step.update == "simultaneous":
            to_discriminator = to_discriminator + to_opponent
        curvature, to_fake, weights = _discriminator_secant(step, state, record, real, fake.detach(), v, delta)
        to_discriminator = to_discriminator + curvature
        to_generator = to_generator + ravel(
            dict(zip(leaves, grad(fake, list(leaves.values()), to_fake, retain_graph=True, materialize_grads=True)))
        )
        return StepAdjoint(
            TrainingState(
                generator=unravel(to_generator, state.generator),
                discriminator=unravel(to_discriminator, state.discriminator),
                moments_generator=moments_generator,
                moments_discriminator=moments_discriminator,
                average=average,
                buffers_generator={},
                buffers_discriminator={},
            ),
            weights,
            unravel(v, state.discriminator),
        )

    return [pull(cotangent) for cotangent in cotangents]


def secant_width(theta: Tensor, v: Tensor, delta: float) -> float:
    """Return ε = δ‖θ‖/‖v‖, or 0 where v vanishes and there is no direction to look along."""
    # In float64, where the squares of what fits float32 neither overflow nor vanish.
    norm = float(v.double().norm())
    if not math.isfinite(norm):
        return math.nan
    return delta * (float(theta.double().norm()) or 1.0) / norm if norm else 0.0


def _generator_secant(
    step: TrainingStep, state: TrainingState, opponent: Tensors, record: StepRecord, v: Tensor, delta: float
) -> tuple[Tensor, Tensor]:
    """Return d/dα of ∇_{θ_G} L_G and ∇_{θ_D} L_G at θ_G + αv, as vectors."""
    theta = ravel(state.generator)
    width = secant_width(theta, v, delta)
    if not width:
        return torch.zeros_like(theta), torch.zeros_like(ravel(opponent))
    rivals = _leaves(opponent)
    plus, minus = (_leaves(unravel(theta + sign * width * v, state.generator)) for sign in (1, -1))
    # One backward pass serves both signs: each has parameters of its own in the generator, and in the
    # discriminator, which they share, their gradients are subtracted by the sum itself.
    difference = step.generator_loss(plus, rivals, state, record) - step.generator_loss(minus, rivals, state, record)
    grads = _gradients(difference, [*plus.values(), *minus.values(), *rivals.values()])
    n = len(plus)
    # The gradient at −ε comes out with its sign turned by the subtraction.
    curvature = _join(grads[:n]) + _join(grads[n : 2 * n])
    return curvature / (2 * width), _join(grads[2 * n :]) / (2 * width)


def _discriminator_secant(
    step: TrainingStep, state: TrainingState, record: StepRecord, real: Tensor, fake: Tensor, v: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d/dα of ∇_{θ_D} L_D (a vector), of ∇ L_D in the generated samples, and of the real terms, at θ_D + αv."""
    theta = ravel(state.discriminator)
    width = secant_width(theta, v, delta)
    if not width:
        return torch.zeros_like(theta), torch.zeros_like(fake), real.new_zeros(len(real))
    fake = fake.requires_grad_()
    plus, minus = (_leaves(unravel(theta + sign * width * v, state.discriminator)) for sign in (1, -1))
    loss_plus, terms_plus = step.discriminator_loss(plus, state, record, real, fake)
    loss_minus, terms_minus = step.discriminator_loss(minus, state, record, real, fake)
    grads = _gradients(loss_plus - loss_minus, [*plus.values(), *minus.values(), fake])
    n = len(plus)
    curvature = _join(grads[:n]) + _join(grads[n : 2 * n])
    weights = (terms_plus - terms_minus).detach() / len(real)
    return curvature / (2 * width), grads[-1] / (2 * width), weights / (2 * width)


def _leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return grad(loss, leaves, materialize_grads=True)


def _join(grads: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in grads])
