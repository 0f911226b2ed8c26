"""Distances between feature vectors, and nearest neighbours: for metrics, valuation and memorisation alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ganclean.exceptions import MetricError, NonFiniteError

ENTRIES_AT_ONCE = 2**22


def ball_radii(features: Tensor, k: int) -> Tensor:
    """Return each feature vector's distance to its k-th nearest neighbour, itself not counted, shape (n,)."""
    pieces = features.split(rows_at_once(len(features)))
    # The nearest of all is the vector itself, at distance zero.
    return torch.cat([distances(piece, features).topk(k + 1, dim=1, largest=False).values[:, -1] for piece in pieces])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return all Euclidean distances, shape (len(x), len(y)); those of equal vectors are zero to the last bit."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def rows_at_once(n: int) -> int:
    """Return how many rows of distances to n instances are computed at a time."""
    return max(1, ENTRIES_AT_ONCE // max(n, 1))


def check_features(features: Tensor, k: int, whose: str) -> None:
    """Raise an error where features are not finite or too few to have a k-th neighbour."""
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        raise NonFiniteError(
            f"The features of {int(bad.sum())} of {len(features)} {whose} are NaN or infinite, the first in row "
            f"{int(bad.nonzero()[0])}. Check the feature extractor, and whether the samples themselves are sound."
        )
    if len(features) <= k:
        raise MetricError(
            f"k={k} nearest neighbours need more than {k} {whose}; got {len(features)}. Give more of them or a "
            "smaller k."
        )


def nearest(points: Tensor, centres: Tensor, itself: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance from each point to its nearest centre, and that centre's row.

    Products of matrices find the centre; the distance is then computed from the difference, so that it is exactly zero
    for copies.

    Parameters
    ----------
    points : Tensor of shape (n, n_features)
    centres : Tensor of shape (n_centres, n_features)
    itself : Tensor of shape (n,), int64, optional
        A centre that does not count for each point, where the points are centres themselves.

    Returns
    -------
    distances : Tensor of shape (n,)
    rows : Tensor of shape (n,), int64
    """
    # Distances do not change, and the smaller the vectors are the less the differences of products lose.
    origin = centres.mean(dim=0)
    around, found = centres - origin, []
    for rows in torch.arange(len(points), device=points.device).split(rows_at_once(len(centres))):
        between = torch.cdist(points[rows] - origin, around, compute_mode="use_mm_for_euclid_dist")
        if itself is not None:
            between.scatter_(1, itself[rows, None], math.inf)
        found.append(between.argmin(dim=1))
    chosen = torch.cat(found)
    return (points - centres[chosen]).norm(dim=1), chosen
