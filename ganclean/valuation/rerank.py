"""A second look at each sample's candidates, by a distance between the samples themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ganclean.exceptions import NetworkError

Distance = Callable[[Tensor, Tensor], Any]


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al., 2018), by torchmetrics: lower is more alike.

    Parameters
    ----------
    net_type : {"alex", "vgg", "squeeze"}, default="alex"
        The network, with its ImageNet weights, which torchvision fetches on first use.

    Raises
    ------
    NetworkError
        If the weights are not on this machine and cannot be fetched.

    Notes
    -----
    Images are grey or colour, in [−1, 1]. Where a side is shorter than 64 pixels, they are enlarged: the networks'
    first layers leave nothing of smaller ones.
    """

    def __init__(self, net_type: str = "alex"):
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            self.network = LearnedPerceptualImagePatchSimilarity(net_type=net_type).net.eval()  # type: ignore[arg-type]
        except (OSError, RuntimeError) as error:
            raise NetworkError(
                f"The weights of LPIPS are not on this machine and could not be fetched ({error}). Connect to a "
                "network once, or compare candidates by rerank='l2' or by a function of your own."
            ) from error
        self.network.requires_grad_(False)

    @torch.no_grad()
    def forward(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Return the distances of images (n, channels, height, width) to a single one (1, channels, height, width)."""
        if candidates.ndim != 4 or candidates.shape[1] not in (1, 3):
            raise ValueError(
                "LPIPS compares grey or colour images, shape (n, 1 or 3, height, width); got instances of shape "
                f"{tuple(candidates.shape[1:])}."
            )
        like = next(self.network.parameters())
        pair = [enlarged(images.to(like)).expand(-1, 3, -1, -1) for images in (query, candidates)]
        return self.network(pair[0].expand_as(pair[1]), pair[1]).reshape(len(candidates))


def euclidean(query: Tensor, candidates: Tensor) -> Tensor:
    """Return the distances of samples (n, *sample_shape) to a single one (1, *sample_shape), pixel by pixel."""
    return (candidates.double() - query.double()).flatten(1).norm(dim=1)


def enlarged(images: Tensor, least: int = 64) -> Tensor:
    """Return images of which no side is shorter than so many pixels."""
    height, width = images.shape[2:]
    factor = least / min(height, width)
    if factor <= 1:
        return images
    return interpolate(images, size=(round(height * factor), round(width * factor)), mode="bilinear")


def resolve_rerank(rerank: Any) -> Distance | None:
    """Return the distance that a parameter stands for."""
    if rerank is None or callable(rerank):
        return rerank
    if rerank == "l2":
        return euclidean
    if rerank == "lpips":
        return LPIPS()
    raise ValueError(
        f"rerank must be None, 'l2', 'lpips' or a function of a sample and its candidates; got {rerank!r}."
    )


def reranked(distance: Distance, query: Tensor, candidates: Tensor) -> np.ndarray:
    """Return the distances of candidates, shape (n, *sample_shape), to a sample of shape (1, *sample_shape).

    Raises
    ------
    ValueError
        If the function does not return one finite distance for each candidate.
    """
    with torch.no_grad():
        values = distance(query, candidates)
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if found.shape != (len(candidates),) or not np.isfinite(found).all():
        got = f"shape {found.shape}" if found.shape != (len(candidates),) else "a value that is not finite"
        raise ValueError(
            f"The function rerank returned {got} for {len(candidates)} candidates; expected one finite distance for "
            f"each, shape ({len(candidates)},), from a sample of shape {tuple(query.shape)} and candidates of shape "
            f"{tuple(candidates.shape)}."
        )
    return found
