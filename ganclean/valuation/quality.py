"""How much credit a generated sample has to give: its quality, as weights of at least zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganclean.data import DataSource
from ganclean.distances import ball_radii, check_features, distances, rows_at_once
from ganclean.dynamics.network import copied


def realism_score(samples: Tensor, reference: Tensor, k: int = 3) -> Tensor:
    """Return how realistic samples are: the largest ratio of a real instance's ball radius to its distance.

    A ball reaches to the k-th nearest real neighbour. Only the half of the balls that are smallest count, since a
    lonely instance's ball is large whatever lies in it. From 1 on, a sample lies in one of these balls.

    Parameters
    ----------
    samples : Tensor of shape (n, n_features), float64
        Features.
    reference : Tensor of shape (n_reference, n_features), float64
        Features of real instances, more than k.
    k : int, default=3

    Returns
    -------
    Tensor of shape (n,), float64
        Infinite for a copy of an instance whose ball counts.

    Raises
    ------
    NonFiniteError
        If a feature is NaN or infinite.
    MetricError
        If there are not more than k real instances.

    References
    ----------
    Kynkäänniemi et al., Improved precision and recall metric for assessing generative models, 2019, section 5.

    Examples
    --------
    >>> import torch
    >>> from ganclean.valuation import realism_score
    >>> reference = torch.arange(6.0, dtype=torch.float64)[:, None]
    >>> realism_score(torch.tensor([[2.5], [9.0]], dtype=torch.float64), reference, k=1)
    tensor([2.0000, 0.2500], dtype=torch.float64)
    """
    return realism(samples, *small_balls(reference, k))


def small_balls(reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the centres and radii of the balls around real instances that are at most the median in size."""
    check_features(reference, k, "real instances")
    radii = ball_radii(reference, k)
    small = radii <= radii.quantile(0.5)
    return reference[small], radii[small]


def realism(samples: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Return the realism of samples, shape (n, n_features), as to the balls of real instances."""
    check_features(samples, 0, "generated samples")

    def largest_ratio(piece: Tensor) -> Tensor:
        # Where instances coincide, a ball has no extent, and a sample at its centre is a copy: 0/0 is one too.
        return (radii / distances(piece, centres)).nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=1)

    return torch.cat([largest_ratio(piece) for piece in samples.split(rows_at_once(len(centres)))])


class DiscriminatorQuality:
    """The quality of samples as a discriminator sees it: the probability that it gives them of being real.

    Parameters
    ----------
    discriminator : torch.nn.Module
        From samples to one logit each. It is copied, and used in evaluation mode.

    Notes
    -----
    A discriminator that has learned the outliers takes them for real, and its logits are seldom calibrated.

    Examples
    --------
    >>> import torch
    >>> from ganclean.valuation import DiscriminatorQuality
    >>> DiscriminatorQuality(torch.nn.Identity())(torch.tensor([[0.0], [100.0]]))
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, discriminator: nn.Module):
        self.discriminator = copied(discriminator).eval()

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Return the probabilities of samples, shape (n, *sample_shape), as a tensor of shape (n,)."""
        parameter = next(self.discriminator.parameters(), None)
        logits = self.discriminator(samples if parameter is None else samples.to(parameter))
        return logits.double().sigmoid().squeeze(1) if logits.ndim > 1 else logits.double().sigmoid()


def quality_of(source: DataSource, quality: Callable[[Tensor], Any]) -> np.ndarray:
    """Return the quality that a function gives each sample, shape (n,), float64.

    Raises
    ------
    ValueError
        If the function does not return one finite number of at least zero for each sample.
    """
    with torch.no_grad():
        return np.concatenate([checked_quality(quality(batch), len(batch)) for batch in source.batches()])


def checked_quality(values: Any, n: int) -> np.ndarray:
    """Return what a quality function gave for n samples as float64, or say what is wrong with it."""
    values = values.detach().cpu() if isinstance(values, Tensor) else values
    weights = np.asarray(values, dtype=np.float64)
    if weights.shape == (n, 1):
        weights = weights[:, 0]
    if weights.shape != (n,) or not (np.isfinite(weights) & (weights >= 0)).all():
        got = f"shape {weights.shape}"
        if weights.shape == (n,):
            got = f"{weights[~(np.isfinite(weights) & (weights >= 0))][0]} for one of them"
        raise ValueError(
            f"The quality function returned {got} for {n} samples; expected shape ({n},), every value finite and at "
            "least zero. Shift or scale what it returns, for instance by torch.sigmoid."
        )
    return weights
