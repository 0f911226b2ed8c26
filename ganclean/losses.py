r"""Adversarial losses and penalties, one value per example, so that a training step can weight them.

A discriminator's loss is ``mean(w * (real(D(x)) + penalty(x))) + mean(fake(D(G(z))))``, a generator's is
``mean(generator(D(G(z))))``; the three functions of a loss take the discriminator's outputs.
"""

from __future__ import annotations

from numbers import Integral
from typing import Literal

import torch
from sklearn.base import BaseEstimator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, relu, softplus


class AdversarialLoss(BaseEstimator):
    """Base class of the adversarial losses.

    A loss of one's own subclasses this and defines `real`, `fake` and `generator`, each from a tensor of
    discriminator outputs of shape (batch_size,) to a tensor of losses of the same shape.
    """

    def real(self, output: Tensor) -> Tensor:
        """The discriminator's loss on real instances."""
        raise NotImplementedError

    def fake(self, output: Tensor) -> Tensor:
        """The discriminator's loss on generated samples."""
        raise NotImplementedError

    def generator(self, output: Tensor) -> Tensor:
        """The generator's loss on generated samples."""
        raise NotImplementedError


class Minimax(AdversarialLoss):
    """The zero-sum game of Goodfellow et al. (2014), equation 1: the generator minimises log(1 − σ(D(G(z)))).

    Parameters
    ----------
    outputs : {"logits", "probabilities"}, default="logits"
        What the discriminator returns: probabilities where its last layer is a sigmoid. Their logarithms are bounded
        below by −100, as in `torch.nn.BCELoss`.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import Minimax
    >>> loss, output = Minimax(), torch.zeros(1)
    >>> torch.equal(loss.generator(output), -loss.fake(output))
    True
    """

    def __init__(self, outputs="logits"):
        self.outputs = outputs

    def real(self, output):
        if self.outputs == "probabilities":
            return binary_cross_entropy(output, torch.ones_like(output), reduction="none")
        return softplus(-output)

    def fake(self, output):
        if self.outputs == "probabilities":
            return binary_cross_entropy(output, torch.zeros_like(output), reduction="none")
        return softplus(output)

    def generator(self, output):
        return -self.fake(output)


class NonSaturating(Minimax):
    """The usual GAN loss of Goodfellow et al. (2014), section 3: the generator maximises log σ(D(G(z))).

    Parameters
    ----------
    outputs : {"logits", "probabilities"}, default="logits"
        What the discriminator returns: probabilities where its last layer is a sigmoid. Their logarithms are bounded
        below by −100, as in `torch.nn.BCELoss`.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import NonSaturating
    >>> NonSaturating().generator(torch.zeros(2))
    tensor([0.6931, 0.6931])
    """

    def generator(self, output):
        return self.real(output)


class Hinge(AdversarialLoss):
    """The hinge loss of Lim and Ye (2017), as in spectrally normalised GANs.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import Hinge
    >>> Hinge().real(torch.tensor([0.0, 2.0]))
    tensor([1., 0.])
    """

    def real(self, output):
        return relu(1 - output)

    def fake(self, output):
        return relu(1 + output)

    def generator(self, output):
        return -output


class LeastSquares(AdversarialLoss):
    """Least-squares GAN of Mao et al. (2017), equation 9, with targets 0 and 1 and the factor one half.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import LeastSquares
    >>> LeastSquares().real(torch.tensor([1.0, 3.0]))
    tensor([0., 2.])
    """

    def real(self, output):
        return (output - 1).square() / 2

    def fake(self, output):
        return output.square() / 2

    def generator(self, output):
        return (output - 1).square() / 2


class Wasserstein(AdversarialLoss):
    """The critic's loss of Arjovsky et al. (2017); it needs a Lipschitz discriminator to mean a distance.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import Wasserstein
    >>> Wasserstein().real(torch.tensor([2.0]))
    tensor([-2.])
    """

    def real(self, output):
        return -output

    def fake(self, output):
        return output

    def generator(self, output):
        return -output


class Penalty(BaseEstimator):
    """Base class of the penalties on the slope of the discriminator.

    A penalty of one's own says where the slope is taken and defines `terms`.

    Parameters
    ----------
    every : int, default=1
        Apply it in every so many steps, from the first on, and multiply it by as much ("lazily").
    """

    at: Literal["real", "interpolated"] = "real"

    def __init__(self, every=1):
        self.every = every

    def terms(self, squared_norm: Tensor) -> Tensor:
        """Return the penalty of each instance from ‖∇ₓD‖², both of shape (batch_size,)."""
        raise NotImplementedError

    def is_due(self, index: int) -> bool:
        """Return whether step `index` applies the penalty."""
        return index % self.every == 0


class R1(Penalty):
    """The penalty γ/2 ‖∇ₓD(x)‖² on real instances of Mescheder et al. (2018), equation 9.

    It is part of the instance's own term of the loss: whoever removes the instance removes it too.

    Parameters
    ----------
    gamma : float, default=10.0
    every : int, default=1
        Apply it in every so many steps, from the first on, and multiply it by as much.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import R1
    >>> R1(gamma=2.0).terms(torch.tensor([4.0]))
    tensor([4.])
    """

    def __init__(self, gamma=10.0, every=1):
        super().__init__(every)
        self.gamma = gamma

    def terms(self, squared_norm):
        return self.gamma / 2 * squared_norm


class GradientPenalty(Penalty):
    """The penalty λ (‖∇D(x̂)‖ − 1)² between real and generated samples of Gulrajani et al. (2017), equation 3.

    Each x̂ mixes a real instance with a generated one and belongs to the term of the real instance.

    Parameters
    ----------
    weight : float, default=10.0
        λ.
    target : float, default=1.0
        The norm that costs nothing.
    every : int, default=1
        Apply it in every so many steps, from the first on, and multiply it by as much.

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import GradientPenalty
    >>> GradientPenalty().terms(torch.tensor([1.0, 4.0]))
    tensor([ 0., 10.])
    """

    at = "interpolated"

    def __init__(self, weight=10.0, target=1.0, every=1):
        super().__init__(every)
        self.weight = weight
        self.target = target

    def terms(self, squared_norm):
        # The root has an infinite slope at 0, where the norm's own subgradient is 0.
        moved = squared_norm > 0
        norm = squared_norm.where(moved, 1.0).sqrt().where(moved, 0.0)
        return self.weight * (norm - self.target).square()


LOSSES: dict[str, type[AdversarialLoss]] = {
    "non_saturating": NonSaturating,
    "minimax": Minimax,
    "hinge": Hinge,
    "least_squares": LeastSquares,
    "wasserstein": Wasserstein,
}


def resolve_loss(loss) -> AdversarialLoss:
    """Return the loss that a name or a loss object stands for."""
    if isinstance(loss, AdversarialLoss):
        if getattr(loss, "outputs", "logits") not in ("logits", "probabilities"):
            raise ValueError(f"outputs must be 'logits' or 'probabilities'; got {loss!r}.")
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    raise ValueError(f"loss must be one of {sorted(LOSSES)} or an AdversarialLoss object; got {loss!r}.")


def check_penalty(penalty) -> Penalty | None:
    """Return the penalty, or say what is wrong with it."""
    if penalty is None:
        return None
    if not isinstance(penalty, Penalty):
        raise ValueError(f"penalty must be None, R1(), GradientPenalty() or a Penalty of your own; got {penalty!r}.")
    if not isinstance(penalty.every, Integral) or penalty.every < 1:
        raise ValueError(f"every must be a positive integer; got {penalty!r}.")
    return penalty
