"""The vector-Jacobian product of one training step, exact or by a secant (theory, sections 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import vmap
from torch.utils._pytree import tree_map

from ganclean.dynamics.derivative import DEFAULT, DirectionalDerivative, Found, OtherCalls, Secant
from ganclean.dynamics.players import installed
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState, leaves, map_state, unravel
from ganclean.dynamics.step import Step, moments_of, shifted


class StepAdjoint(NamedTuple):
    """What the cotangent of the state after a step becomes before it.

    Parameters
    ----------
    cotangent : TrainingState
        (∂Φ/∂s)ᵀ λ; of the buffers, those that derivatives flow through.
    weights : Tensor of shape (batch_size,)
        (∂Φ/∂w)ᵀ λ: minus the step's contribution to the influence of the drawn instances.
    pushes : tuple of Tensor
        The cotangent of each update's gradient, as a vector: what `sensitivities` of other instances follow from.
    """

    cotangent: TrainingState
    weights: Tensor
    pushes: tuple[Tensor, ...]


Adjoint = Callable[..., list[StepAdjoint]]


def exact_adjoint(
    step: Step,
    state: TrainingState,
    after: TrainingState,
    record: StepRecord,
    x: Tensor,
    cotangents: list[TrainingState],
    stacked: bool = False,
) -> list[StepAdjoint]:
    """Pull cotangents back through a step by second derivatives of its objectives.

    Parameters
    ----------
    step : Step
    state, after : TrainingState
        The states before and after the step.
    record : StepRecord
    x : Tensor of shape (batch_size, *sample_shape)
    cotangents : list of TrainingState
        One λ for each metric.
    stacked : bool, default=False
        Whether to pull all of them back at once by `torch.func.vmap`, which is faster where the networks are small.

    Returns
    -------
    list of StepAdjoint
    """
    return step.run(_adjoint, state, record, x, after, cotangents, stacked, None)


def secant_adjoint(
    step: Step,
    state: TrainingState,
    after: TrainingState,
    record: StepRecord,
    x: Tensor,
    cotangents: list[TrainingState],
    stacked: bool = False,
    secant: Secant = DEFAULT,
) -> list[StepAdjoint]:
    """Pull cotangents back through a step by central differences of first gradients (theory, section 3).

    Along the cotangent v of an update's gradient, at θ ± εv, two ordinary gradient evaluations give the products with
    all blocks of the step's Jacobian, the weights' included, since these are derivatives of one scalar. What does not
    depend on the sign, such as the generator's pass in the discriminator's loss, is shared. Both signs see the step's
    own randomness. Parameters and result as in `exact_adjoint`.
    """
    return step.run(_adjoint, state, record, x, after, cotangents, stacked, _as_input(secant))


def _as_input(secant: Secant) -> Secant:
    # A number that differs from call to call is no constant of a compiled step.
    return secant._replace(delta=torch.as_tensor(secant.delta, dtype=torch.float64))


def _adjoint(
    step: Step,
    state: TrainingState,
    record: StepRecord,
    x: Tensor,
    after: TrainingState,
    cotangents: list[TrainingState],
    stacked: bool,
    secant: Secant | None,
) -> list[StepAdjoint]:
    try:
        return _pulled(step, record, x, states_between(step, state, after, record, x), cotangents, stacked, secant)
    except OtherCalls:
        return _pulled(step, record, x, step.states(state, record, x), cotangents, stacked, secant)


def states_between(
    step: Step, state: TrainingState, after: TrainingState, record: StepRecord, x: Tensor
) -> tuple[list[TrainingState], list[Mapping[str, Tensor]]]:
    """Return the states around all updates, and those of random number generators where they are continued.

    Where each update moves something else and buffers are of a known kind, they follow from the states before and after
    the step; otherwise the step is run once more.
    """
    states, n = [shifted(state, record)], len(record.updates)
    slots = [step.update_named(done.name).slot for done in record.updates]
    moved = [pair for done in record.updates for pair in step.names[done.name]]
    stateless = all(network.is_stateless for network in step.networks.values())
    calls = [step.seen_calls.get(step.form_of(record, k)) for k in range(n - 1)]
    known = stateless or (all(net.is_known for net in step.networks.values()) and None not in calls)
    if n > 1 and (record.random or step.carried or len({*slots}) < n or len({*moved}) < len(moved) or not known):
        return step.states(state, record, x)
    for k, done in enumerate(record.updates[:-1]):
        now = states[-1]
        params = {player: dict(tensors) for player, tensors in now.params.items()}
        for player, name in step.names[done.name]:
            params[player][name] = after.params[player][name]
        buffers = dict(now.buffers)
        if not stateless:
            with torch.no_grad():
                for player, path in calls[k] or ():
                    theta = states[done.meets.get(player, k)].params[player]
                    buffers[player] = step.networks[player].advanced(theta, buffers[player], path)
        moments = {**now.moments, slots[k]: after.moments[slots[k]]}
        states.append(now._replace(params=params, buffers=buffers, moments=moments))
    # One update begins where the step does.
    return [*states, after], [record.random] * n


def _pulled(
    step: Step,
    record: StepRecord,
    x: Tensor,
    around: tuple[list[TrainingState], list[Mapping[str, Tensor]]],
    cotangents: list[TrainingState],
    stacked: bool,
    secant: Secant | None,
) -> list[StepAdjoint]:
    """Pull cotangents back through the updates of a step, from the last to the first."""
    states, randoms = around
    weights = x.new_ones(len(x))
    pairs = [step.names[done.name] for done in record.updates]
    slots = [step.update_named(done.name).slot for done in record.updates]
    points = [step.point(k, states, done, weights) for k, done in enumerate(record.updates)]
    pulls = []
    for k, done in enumerate(record.updates):
        params = {f"{player}.{name}": states[k].params[player][name] for player, name in pairs[k]}
        before, later = (moments_of(states[i].moments[slots[k]], params) for i in (k, k + 1))

        def gradient(k=k) -> dict[str, Tensor]:
            found, _ = step.gradient(k, record, x, points[k], random=randoms[k])
            return {f"{player}.{name}": g for (player, name), g in found.items()}

        pulls.append(step.rule_of(done).pullback(params, before, later, done.number, gradient))

    def pull(cotangent: TrainingState) -> StepAdjoint:
        to = _Cotangent(step, cotangent, record)
        to_weights, pushes = torch.zeros_like(weights), []
        for k in reversed(range(len(record.updates))):
            to.arrive(k + 1)
            v = to.through_rule(k, pairs[k], slots[k], pulls[k])
            pushes.append(v)
            look = DirectionalDerivative(step, k, record, x, points[k], pairs[k], v, randoms[k], secant)
            found = look.gradients(to.buffers, to.carried, stacked)
            to_weights = to_weights + found.weights
            to.take(k, found)
        to.arrive(0)
        return StepAdjoint(to.state(), to_weights, tuple(reversed(pushes)))

    if not stacked:
        return [pull(cotangent) for cotangent in cotangents]
    together = vmap(pull, randomness="same")(map_state(lambda *tensors: torch.stack(tensors), *cotangents))
    return [tree_map(lambda tensor, i=i: tensor[i], together) for i in range(len(cotangents))]


class _Cotangent:
    """The cotangent of a state on its way back through the updates of a step."""

    def __init__(self, step: Step, cotangent: TrainingState, record: StepRecord):
        self.step = step
        self.params = {player: dict(tensors) for player, tensors in cotangent.params.items()}
        self.buffers = {player: dict(tensors) for player, tensors in cotangent.buffers.items()}
        self.moments, self.carried = dict(cotangent.moments), dict(cotangent.carried)
        # By version: what reaches the parameters and buffers that earlier updates have since replaced.
        self.waiting: dict[int, list[tuple[str, str, str, Tensor]]] = {}
        self.averages = self._through_averages(cotangent, record)

    def _through_averages(self, cotangent: TrainingState, record: StepRecord) -> dict[str, dict[str, Tensor]]:
        averages = {}
        for player, tensors in cotangent.averages.items():
            kept = self.step.decay_of(player, record)
            averages[player] = dict(tensors)
            if kept is None:
                continue
            average = self.step.averages[player]
            for name, c in tensors.items():
                into = self.params[player] if name in self.params[player] else self.buffers[player]
                # A copied buffer is the new one.
                share = kept if into is self.params[player] or average.buffers == "averaged" else 0.0
                into[name] = into[name] + (1 - share) * c
                averages[player][name] = share * c
        return averages

    def arrive(self, version: int) -> None:
        """Add what waits for a version."""
        for field, player, name, c in self.waiting.pop(version, ()):
            tensors = getattr(self, field)[player]
            tensors[name] = tensors[name] + c

    def through_rule(self, k: int, pairs, slot: str, pull) -> Tensor:
        """Pull the cotangents of what an update trains back through its rule; return that of its gradient."""
        params = {f"{player}.{name}": self.params[player][name] for player, name in pairs}
        moments = moments_of(self.moments[slot], params)
        passed, v, moments = pull(params, moments)
        for (player, name), c in zip(pairs, unravel(passed, params).values()):
            self.params[player][name] = c
        self.moments[slot] = {m: {**tensors, **moments[m]} for m, tensors in self.moments[slot].items()}
        return v

    def take(self, k: int, found: Found) -> None:
        """Take in what an objective's derivative passes on: to the state before its update, or to earlier ones."""
        for (field, version, player, name), c in found.tensors.items():
            if field == "carried":
                self.carried[name] = c
            elif field == "buffers" and version == k:
                # It holds what the objective made of the cotangent of the buffers after it.
                self.buffers[player][name] = c
            elif version == k:
                tensors = getattr(self, field)[player]
                tensors[name] = tensors[name] + c
            else:
                self.waiting.setdefault(version, []).append((field, player, name, c))

    def state(self) -> TrainingState:
        return TrainingState(self.params, self.moments, self.averages, self.buffers, self.carried)


def sensitivities(
    step: Step,
    around: tuple[list[TrainingState], list[Mapping[str, Tensor]]],
    record: StepRecord,
    x: Tensor,
    weights: Tensor,
    pushes: tuple[Tensor, ...],
    secant: Secant | None,
    factors: Mapping[str, float] | None = None,
) -> Tensor:
    """Return (∂Φ/∂w)ᵀ λ for a batch of other instances, given the cotangents of the updates' gradients.

    Parameters
    ----------
    step : Step
    around : tuple
        The states around all updates, as `states_between` returns them.
    record : StepRecord
        Of the step, with what the other batch needs.
    x : Tensor of shape (n, *sample_shape)
    weights : Tensor of shape (n,)
        At which to differentiate.
    pushes : tuple of Tensor
        From the step's `StepAdjoint`.
    secant : Secant or None
        None for the exact derivative.
    factors : dict of str to float, optional
        By which to multiply what each update has a part in it, by name; those that are not there count as 0.
    """
    states, randoms = around
    total = torch.zeros_like(weights)
    for k, (done, v) in enumerate(zip(record.updates, pushes, strict=True)):
        factor = 1.0 if factors is None else factors.get(done.name, 0.0)
        if not factor or not getattr(step.update_named(done.name).objective, "weighted", True):
            continue
        point = step.point(k, states, done, weights)
        look = DirectionalDerivative(step, k, record, x, point, step.names[done.name], v, randoms[k], secant)
        total = total + factor * look.in_weights()
    return total


def check_second_derivative(step: Step, state: TrainingState, record: StepRecord, x: Tensor) -> None:
    """Raise `RuntimeError` where the networks have no second derivative.

    What is marked as differentiable only once fails where its cotangent depends on the parameters, as that of the
    square of a loss does, and where the whole graph is walked through, as `backward` does.
    """
    states, randoms = step.states(state, record, x)
    for k, done in enumerate(record.updates):
        point = step.point(k, states, done, x.new_ones(len(x)))
        params = {player: leaves(tensors) for player, tensors in point.params[k].items()}
        point = point._replace(params=dict.fromkeys(point.params, params))
        live = {(player, name): params[player][name] for player, name in step.names[done.name]}
        everything = [leaf for tensors in params.values() for leaf in tensors.values()]
        with torch.enable_grad():
            loss, _, moved = step.objective(k, record, x, point, live, random=randoms[k])
            with installed(step.networks, moved):
                gradients = grad(loss * loss, everything, create_graph=True, materialize_grads=True)
                total = torch.stack([(g * g).sum() for g in gradients]).sum()
                if total.requires_grad:
                    total.backward()
