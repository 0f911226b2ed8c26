"""Update rules as pure functions: parameters, gradients and moments in, parameters and moments out.

They compute what the optimisers of `torch.optim` compute, but without state of their own, so that a training
step can be differentiated (theory, section 2) and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from ganclean.training.state import Tensors, ravel, unravel


class Optimizer(BaseEstimator):
    """Base class of the update rules.

    A rule of one's own names its running moments in `moment_names` and defines `rule`; if `rule` depends on the
    gradient in a nonlinear way, it also defines `gradient_from_moments`.
    """

    moment_names: tuple[str, ...] = ()

    def rule(self, param: Tensor, grad: Tensor, moments: Tensors, step: int) -> tuple[Tensor, Tensors]:
        """Return the new value and moments of an element-wise update; `step` counts from 1."""
        raise NotImplementedError

    def gradient_from_moments(self, param: Tensor, before: Tensors, after: Tensors) -> Tensor:
        """Return the gradient of the loss that led from the moments `before` to the moments `after`.

        It spares the backward pass over a recorded run one gradient evaluation per step. A rule that is linear in
        the gradient has a derivative that does not depend on it, and may return anything of the right shape.
        """
        return torch.zeros_like(param)

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
        self, params: Tensors, before: dict[str, Tensors], after: dict[str, Tensors], step: int
    ) -> Callable[[Tensors, dict[str, Tensors]], tuple[Tensor, Tensor, dict[str, Tensors]]]:
        """Return the vector-Jacobian product of one recorded update.

        The returned function maps the cotangents of the new parameters and moments to those of the old parameters,
        of the gradient (both as vectors) and of the old moments.
        """
        flat = {moment: ravel(tensors) for moment, tensors in before.items()}
        flat_after = {moment: ravel(tensors) for moment, tensors in after.items()}
        param = ravel(params)
        grad = self.gradient_from_moments(param, flat, flat_after)
        vjp = torch.func.vjp(lambda p, g, m: self.rule(p, g, m, step), param, grad, flat)[1]

        def pull(cotangent: Tensors, cotangent_moments: dict[str, Tensors]):
            moments = {moment: ravel(tensors) for moment, tensors in cotangent_moments.items()}
            d_param, d_grad, d_moments = vjp((ravel(cotangent), moments))
            return d_param, d_grad, {moment: unravel(vector, params) for moment, vector in d_moments.items()}

        return pull


class SGD(Optimizer):
    """Stochastic gradient descent, as `torch.optim.SGD` without dampening.

    Parameters
    ----------
    lr : float, default=1e-3
        Learning rate.
    momentum : float, default=0.0
        Decay of the running sum of gradients; 0 keeps none.
    nesterov : bool, default=False
        Whether to look ahead along the momentum.
    weight_decay : float, default=0.0
        Factor of the parameters that is added to the gradient.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import SGD
    >>> params, _ = SGD(lr=0.5).update({"w": torch.ones(1)}, {"w": torch.ones(1)}, {}, step=1)
    >>> params["w"]
    tensor([0.5000])
    """

    def __init__(self, lr=1e-3, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.weight_decay = weight_decay

    @property
    def moment_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum",) if self.momentum else ()

    def init(self, params):
        if self.nesterov and not self.momentum:
            raise ValueError("SGD(nesterov=True) looks ahead along the momentum and needs one; got momentum=0.")
        return super().init(params)

    def rule(self, param, grad, moments, step):
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        if self.momentum:
            running = self.momentum * moments["momentum"] + grad
            moments = {"momentum": running}
            grad = grad + self.momentum * running if self.nesterov else running
        return param - self.lr * grad, moments


class Adam(Optimizer):
    """Adam of Kingma and Ba (2015), algorithm 1, as `torch.optim.Adam`.

    Parameters
    ----------
    lr : float, default=1e-3
        Learning rate.
    betas : tuple of two floats, default=(0.9, 0.999)
        Decay of the running means of the gradient and of its square.
    eps : float, default=1e-8
        Added to the denominator.
    weight_decay : float, default=0.0
        Factor of the parameters that is added to the gradient.

    Notes
    -----
    The square root has an infinite derivative at 0. A parameter whose gradient has always been zero is not moved,
    and the rule is written so that it contributes zero to every derivative (theory, section 2).

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import Adam
    >>> rule, params = Adam(lr=0.5), {"w": torch.ones(1)}
    >>> params, moments = rule.update(params, {"w": torch.ones(1)}, rule.init(params), step=1)
    >>> params["w"]
    tensor([0.5000])
    """

    moment_names = ("mean", "square")

    def __init__(self, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def rule(self, param, grad, moments, step):
        beta1, beta2 = self.betas
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        mean = beta1 * moments["mean"] + (1 - beta1) * grad
        square = beta2 * moments["square"] + (1 - beta2) * grad * grad
        moved = square > 0
        root = torch.where(moved, square, 1.0).sqrt() / (1 - beta2**step) ** 0.5
        direction = torch.where(moved, mean / (root + self.eps), 0.0)
        return param - self.lr / (1 - beta1**step) * direction, {"mean": mean, "square": square}

    def gradient_from_moments(self, param, before, after):
        beta1 = self.betas[0]
        grad = (after["mean"] - beta1 * before["mean"]) / (1 - beta1)
        return grad - self.weight_decay * param if self.weight_decay else grad


def resolve_optimizer(optimizer: Any, default: Optimizer) -> Optimizer:
    """Return `optimizer`, or `default` where it is None."""
    if optimizer is None:
        return default
    if isinstance(optimizer, Optimizer):
        return optimizer
    hint = (
        " Pass the rule itself, without parameters: ganclean.optim.Adam(lr=...)."
        if isinstance(optimizer, torch.optim.Optimizer)
        else ""
    )
    raise ValueError(f"optimizer must be a ganclean.optim rule such as SGD or Adam; got {optimizer!r}.{hint}")
