r"""Adversarial losses, one value per example, so that a training step can weight them.

A discriminator's loss is ``mean(w * real(D(x))) + mean(fake(D(G(z))))``, a generator's is
``mean(generator(D(G(z))))``; the three functions of a loss take the discriminator's raw outputs (logits).
"""

from __future__ import annotations

from sklearn.base import BaseEstimator
from torch import Tensor
from torch.nn.functional import relu, softplus


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

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import Minimax
    >>> loss, output = Minimax(), torch.zeros(1)
    >>> torch.equal(loss.generator(output), -loss.fake(output))
    True
    """

    def real(self, output):
        return softplus(-output)

    def fake(self, output):
        return softplus(output)

    def generator(self, output):
        return -softplus(output)


class NonSaturating(Minimax):
    """The usual GAN loss of Goodfellow et al. (2014), section 3: the generator maximises log σ(D(G(z))).

    Examples
    --------
    >>> import torch
    >>> from ganclean.losses import NonSaturating
    >>> NonSaturating().generator(torch.zeros(2))
    tensor([0.6931, 0.6931])
    """

    def generator(self, output):
        return softplus(-output)


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
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]()
    raise ValueError(f"loss must be one of {sorted(LOSSES)} or an AdversarialLoss object; got {loss!r}.")
