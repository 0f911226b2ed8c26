"""What all update rules share: a step, and the pullback of a cotangent through a recorded one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from ganclean.tensors import Tensors, ravel, unravel

# Rounding makes errors of 1 to 50 machine epsilons, measured; gradients within one module differ by far less than this.
ROUNDING = 1000


class Optimizer(BaseEstimator):
    """Base class of the update rules.

    A rule of one's own takes its hyper-parameters as named arguments of `__init__` and keeps them under the same
    names. It names its running moments in `moment_names` and defines `rule`; if `rule` depends on the gradient in a
    nonlinear way, it also defines `gradient_from_moments`.
    """

    moment_names: tuple[str, ...] = ()

    @property
    def unclipped(self) -> Optimizer:
        """The rule that holds the hyper-parameters: this one, or the one inside where it is `Clipped`."""
        return self

    def rule(self, param: Tensor, grad: Tensor, moments: Tensors, step: int) -> tuple[Tensor, Tensors]:
        """Return the new value and moments of a network's parameters, all as vectors; `step` counts from 1."""
        raise NotImplementedError

    def gradient_from_moments(self, param: Tensor, before: Tensors, after: Tensors) -> Tensor | None:
        """Return the gradient of the loss that led from the moments `before` to the moments `after`.

        It spares the backward pass over a recorded run one gradient evaluation per step. None says that the moments
        do not determine the gradient. A rule that is linear in the gradient has a derivative that does not depend on
        it, and may return anything of the right shape.
        """
        return torch.zeros_like(param)

    def at(self, settings: Mapping[str, Any]) -> Optimizer:
        """Return the rule with other values of some hyper-parameters, such as a scheduled learning rate.

        Parameters
        ----------
        settings : dict
            Values by the names of hyper-parameters; the others stay as they are.

        Returns
        -------
        Optimizer
            A shallow copy, or the rule itself where `settings` is empty.

        Raises
        ------
        ValueError
            If the rule has no hyper-parameter of that name, or would need a moment that it does not keep.

        Examples
        --------
        >>> from ganclean.optim import Adam
        >>> Adam(lr=1e-3, betas=(0.5, 0.9)).at({"lr": 5e-4})
        Adam(betas=(0.5, 0.9), lr=0.0005)
        """
        if not settings:
            return self
        known = self.get_params(deep=False)
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no hyper-parameter {', '.join(map(repr, unknown))}; only what it has can "
                f"change: {', '.join(known)}."
            )
        changed = copy.copy(self)
        for name, value in settings.items():
            setattr(changed, name, value)
        missing = [moment for moment in changed.moment_names if moment not in self.moment_names]
        if missing:
            raise ValueError(
                f"{changed} needs the moments {missing}, which {self} does not keep. What needs them must be on from "
                f"the first update: switch it on in {type(self).__name__} too."
            )
        return changed

    def decay_in_gradient(self, name: str) -> float:
        """Return the weight decay that the rule adds to the gradient of a parameter, given its name."""
        return float(getattr(self, "weight_decay", 0.0))

    def changes(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyper-parameters that differ from the rule's own, as plain numbers and tuples, for `at`."""
        reference = self.unclipped
        given = {name: plain(value) for name, value in values.items()}
        return {name: value for name, value in given.items() if value != plain(getattr(reference, name))}

    def init(self, params: Tensors) -> dict[str, Tensors]:
        """Return the moments before the first step: zeros."""
        return {
            moment: {name: torch.zeros_like(param) for name, param in params.items()} for moment in self.moment_names
        }

    def update(
        self, params: Tensors, grads: Tensors, moments: dict[str, Tensors], step: int
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """Apply the rule to all parameters of a network.

        Parameters
        ----------
        params, grads : dict of str to Tensor
            Parameters and the gradient of the loss, by name.
        moments : dict of str to dict of str to Tensor
            The moments that `init` or the last call returned.
        step : int
            The number of this update, from 1.

        Returns
        -------
        params, moments
            New tensors in the same form; the arguments are left as they are.
        """
        flat = {moment: ravel(tensors) for moment, tensors in moments.items()}
        param, flat = self.rule(ravel(params), ravel(grads), flat, step)
        return unravel(param, params), {moment: unravel(vector, params) for moment, vector in flat.items()}

    def pullback(
        self,
        params: Tensors,
        before: dict[str, Tensors],
        after: dict[str, Tensors],
        step: int,
        gradient: Callable[[], Tensors] | None = None,
    ) -> Callable[[Tensors, dict[str, Tensors]], tuple[Tensor, Tensor, dict[str, Tensors]]]:
        """Return the vector-Jacobian product of one recorded update.

        Parameters
        ----------
        params : dict of str to Tensor
            The parameters before the update.
        before, after : dict of str to dict of str to Tensor
            The moments before and after the update.
        step : int
            The number of the update, from 1.
        gradient : callable, optional
            Evaluates the gradient of the loss, by parameter name. Called only where the moments do not determine it.

        Returns
        -------
        callable
            Maps the cotangents of the new parameters and moments to those of the old parameters, of the gradient (both
            as vectors) and of the old moments.

        Raises
        ------
        ValueError
            If the moments do not determine the gradient and `gradient` is None.
        """
        flat = {moment: ravel(tensors) for moment, tensors in before.items()}
        flat_after = {moment: ravel(tensors) for moment, tensors in after.items()}
        param = ravel(params)
        grad = self.gradient_from_moments(param, flat, flat_after)
        if grad is None:
            if gradient is None:
                raise ValueError(
                    f"The derivative of {self} depends on the gradient, which its moments do not determine. Pass "
                    "gradient, a function that evaluates it."
                )
            grads = gradient()
            grad = ravel({name: grads[name] for name in params})
        vjp = torch.func.vjp(lambda p, g, m: self.rule(p, g, m, step), param, grad, flat)[1]
        moving = _moving(after["square"]) if "square" in after else None

        def pull(cotangent: Tensors, cotangent_moments: dict[str, Tensors]):
            moments = {moment: ravel(tensors) for moment, tensors in cotangent_moments.items()}
            d_param, d_grad, d_moments = vjp((ravel(cotangent), moments))
            if moving is not None:
                # How the old parameter enters the new one still counts; what rounding errors moved it by does not.
                _, d_grad, d_moments = vjp((ravel(cotangent) * moving, moments))
            return d_param, d_grad, {moment: unravel(vector, params) for moment, vector in d_moments.items()}

        return pull


class Wrapping(Optimizer):
    """Base class of rules around another rule, `optimizer`, which holds the hyper-parameters and the moments."""

    optimizer: Optimizer

    @property
    def moment_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.optimizer.moment_names

    @property
    def unclipped(self) -> Optimizer:
        return self.optimizer.unclipped

    def decay_in_gradient(self, name: str) -> float:
        return self.optimizer.decay_in_gradient(name)

    def at(self, settings: Mapping[str, Any]) -> Optimizer:
        """Return the rule with other values of some hyper-parameters of the inner rule."""
        if not settings:
            return self
        changed = copy.copy(self)
        changed.optimizer = self.optimizer.at(settings)
        return changed

    def init(self, params: Tensors) -> dict[str, Tensors]:
        return self.optimizer.init(params)


def plain(value: Any) -> Any:
    """Return a hyper-parameter as a float or a tuple of floats where it consists of numbers, also of tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(plain(entry) for entry in value)
    return float(value) if isinstance(value, (Real, Tensor)) and not isinstance(value, bool) else value


def _moving(square: Tensors) -> Tensor:
    """Return 0 for parameters whose gradients are rounding errors and 1 for others, as a vector.

    A bias in front of batch normalisation has the gradient 0. What rounding makes of it, a rule that divides by its
    root mean square brings to the size of all other gradients, and its derivative to the reciprocal of the error: it
    would drown the rest. Such a tensor is told by the other tensors of its module, whose gradients are much larger.
    """
    modules = [name.rpartition(".")[0] for name in square]
    module = torch.tensor([modules.index(name) for name in modules], device=next(iter(square.values())).device)
    rms = torch.stack([tensor.double().mean() for tensor in square.values()]).clamp(min=0).sqrt()
    largest = torch.zeros_like(rms).scatter_reduce(0, module, rms, "amax")[module]
    eps = torch.finfo(next(iter(square.values())).dtype).eps
    moves = ~(rms < ROUNDING * eps * largest)
    return ravel({name: one.to(tensor).expand(tensor.shape) for one, (name, tensor) in zip(moves, square.items())})
