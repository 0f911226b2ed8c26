"""The update rules of `torch.optim` that GANs are trained with, and clipping."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ganclean.optim.base import Optimizer, Wrapping
from ganclean.tensors import Tensors


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
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        descent, moments = self._descent(grad, moments, step)
        return param - descent, moments

    def gradient_from_moments(self, param, before, after):
        grad = self._averaged_gradient(before, after)
        return grad - self.weight_decay * param if self.weight_decay else grad

    def _descent(self, grad: Tensor, moments: Tensors, step: int) -> tuple[Tensor, Tensors]:
        beta1, beta2 = self.betas
        mean = beta1 * moments["mean"] + (1 - beta1) * grad
        square = beta2 * moments["square"] + (1 - beta2) * grad * grad
        direction = _over_root(mean, square, self.eps, (1 - beta2**step) ** 0.5)
        return self.lr / (1 - beta1**step) * direction, {"mean": mean, "square": square}

    def _averaged_gradient(self, before: Tensors, after: Tensors) -> Tensor:
        beta1 = self.betas[0]
        return (after["mean"] - beta1 * before["mean"]) / (1 - beta1)


class AdamW(Adam):
    """Adam with decoupled weight decay of Loshchilov and Hutter (2019), as `torch.optim.AdamW`.

    Parameters
    ----------
    lr : float, default=1e-3
        Learning rate.
    betas : tuple of two floats, default=(0.9, 0.999)
        Decay of the running means of the gradient and of its square.
    eps : float, default=1e-8
        Added to the denominator.
    weight_decay : float, default=1e-2
        The parameters shrink by `lr` times this factor in every step, whatever the gradient.

    Notes
    -----
    A parameter whose gradient has always been zero only shrinks, and contributes zero to every derivative in the
    gradient and the moments, as in `Adam`.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import AdamW
    >>> rule, params = AdamW(lr=0.5, weight_decay=0.2), {"w": torch.ones(1)}
    >>> params, moments = rule.update(params, {"w": torch.ones(1)}, rule.init(params), step=1)
    >>> params["w"]
    tensor([0.4000])
    """

    def __init__(self, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(lr, betas, eps, weight_decay)

    def rule(self, param, grad, moments, step):
        descent, moments = self._descent(grad, moments, step)
        return param * (1 - self.lr * self.weight_decay) - descent, moments

    def decay_in_gradient(self, name):
        """Return 0: it decays the parameters themselves."""
        return 0.0

    def gradient_from_moments(self, param, before, after):
        return self._averaged_gradient(before, after)


class RMSprop(Optimizer):
    """RMSprop of Tieleman and Hinton (2012), and its centered form of Graves (2013), as `torch.optim.RMSprop`.

    Parameters
    ----------
    lr : float, default=1e-2
        Learning rate.
    alpha : float, default=0.99
        Decay of the running mean of the squared gradient, and of the gradient where `centered`.
    eps : float, default=1e-8
        Added to the denominator.
    weight_decay : float, default=0.0
        Factor of the parameters that is added to the gradient.
    momentum : float, default=0.0
        Decay of the running sum of scaled gradients; 0 keeps none.
    centered : bool, default=False
        Whether to divide by the standard deviation of the gradient instead of its root mean square.

    Notes
    -----
    A parameter whose gradient has always been zero is not moved and contributes zero to every derivative, as in `Adam`.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import RMSprop
    >>> rule, params = RMSprop(lr=0.05), {"w": torch.ones(1)}
    >>> params, moments = rule.update(params, {"w": torch.ones(1)}, rule.init(params), step=1)
    >>> params["w"]
    tensor([0.5000])
    """

    def __init__(self, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
        self.lr = lr
        self.alpha = alpha
        self.eps = eps
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.centered = centered

    @property
    def moment_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("square", *(["mean"] if self.centered else []), *(["momentum"] if self.momentum else []))

    def rule(self, param, grad, moments, step):
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        moments = {**moments, "square": self.alpha * moments["square"] + (1 - self.alpha) * grad * grad}
        if self.centered:
            moments["mean"] = self.alpha * moments["mean"] + (1 - self.alpha) * grad
        direction = _over_root(grad, self._spread(moments), self.eps)
        if self.momentum:
            direction = moments["momentum"] = self.momentum * moments["momentum"] + direction
        return param - self.lr * direction, moments

    def gradient_from_moments(self, param, before, after):
        if self.momentum:
            root = self._spread(after).clamp(min=0).sqrt()
            grad = (after["momentum"] - self.momentum * before["momentum"]) * (root + self.eps)
        elif self.centered and self.alpha != 1:
            grad = (after["mean"] - self.alpha * before["mean"]) / (1 - self.alpha)
        else:
            return None
        return grad - self.weight_decay * param if self.weight_decay else grad

    def _spread(self, moments: Tensors) -> Tensor:
        return moments["square"] - moments["mean"].square() if self.centered else moments["square"]


class Clipped(Wrapping):
    """A rule on the clipped gradient of a network, as after `torch.nn.utils.clip_grad_value_` or `clip_grad_norm_`.

    Parameters
    ----------
    optimizer : Optimizer
        The rule that receives the clipped gradient.
    max_norm : float, optional
        Largest Euclidean norm of the network's whole gradient.
    max_value : float, optional
        Largest absolute value of an entry. Where both are given, entries are clipped first.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import SGD, Clipped
    >>> rule, params = Clipped(SGD(lr=1.0), max_norm=1.0), {"w": torch.ones(2)}
    >>> params, _ = rule.update(params, {"w": torch.tensor([3.0, 4.0])}, rule.init(params), step=1)
    >>> params["w"]
    tensor([0.4000, 0.2000])
    """

    def __init__(self, optimizer, max_norm=None, max_value=None):
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.max_value = max_value

    def init(self, params):
        """Return the moments of the inner rule before the first step.

        Raises
        ------
        ValueError
            If there is no inner rule, no bound, or a bound that is not positive.
        """
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(f"Clipped needs a ganclean.optim rule such as SGD or Adam; got {self.optimizer!r}.")
        bounds = {"max_norm": self.max_norm, "max_value": self.max_value}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        if not given:
            raise ValueError("Clipped needs max_norm or max_value; got neither. Give one, or use the rule without it.")
        for name, bound in given.items():
            if not (isinstance(bound, Real) and bound > 0):
                raise ValueError(f"Clipped needs a positive number as {name}; got {bound!r}.")
        return self.optimizer.init(params)

    def rule(self, param, grad, moments, step):
        if self.max_value is not None:
            grad = grad.clamp(-self.max_value, self.max_value)
        if self.max_norm is not None:
            # The same constant as in torch.nn.utils.clip_grad_norm_.
            grad = grad * (self.max_norm / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
        return self.optimizer.rule(param, grad, moments, step)

    def gradient_from_moments(self, param, before, after):
        """Return None: the moments know the clipped gradient only."""
        return None


def _over_root(numerator: Tensor, square: Tensor, eps: float, correction: float = 1.0) -> Tensor:
    """Return numerator / (√square / correction + eps), and 0 without derivative where both numbers are 0."""
    positive = square > 0
    # The inner `where` keeps the infinite derivative of the root at 0 out of the product that the outer one drops.
    root = torch.where(positive, torch.where(positive, square, 1.0).sqrt() / correction, 0.0)
    moved = positive | (numerator != 0)
    return torch.where(moved, numerator / torch.where(moved, root + eps, 1.0), 0.0)
