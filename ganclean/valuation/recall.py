"""Nearest items of many queries: every item compared, or candidates from faiss; the distances themselves are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganclean.distances import rows_at_once
from ganclean.exceptions import missing_extra

RECALLS = ("exact", "pq", "hnsw")
SPARE = 16
"""Further candidates of the exact search: where none of them is needed, rounding has left nothing out."""
FEATURES_OF_CODE = 4
"""Features that a product quantiser encodes together."""


class NeighbourIndex:
    """Finds the nearest of some items for each query, by Euclidean distance.

    Parameters
    ----------
    items : ndarray of shape (n_items, n_features)
        Finite.
    recall : {"exact", "pq", "hnsw"}, default="exact"
        How candidates are found:

        - "exact": by the products of every query with every item;
        - "pq": by product quantisation (Jégou, Douze, Schmid, 2011). Of each item a byte is kept for 4 features;
        - "hnsw": by a navigable graph (Malkov, Yashunin, 2018), whose search does not visit every item.

        The last two need faiss. A graph that is built by several threads differs from run to run.
    seed : int, default=0
        Of the quantiser's k-means.

    Raises
    ------
    ValueError
        If `recall` is none of the three.
    MissingExtraError
        If faiss is needed and not installed.

    Notes
    -----
    The distances of the candidates are computed from differences, so that those of equal vectors are exactly zero;
    candidates are sorted by them, ties by row. The exact search checks that the rounding of products has hidden no
    nearer item, and looks again where it may have: that is slow for data whose distance from the origin is millions of
    times their spread. Queries are taken in pieces, so that memory beyond the items, the queries and the result does
    not grow with their number.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.valuation.recall import NeighbourIndex
    >>> distances, rows = NeighbourIndex(np.array([[0.0], [4.0], [1.0]])).search(np.array([[0.5], [5.0]]), 2)
    >>> rows
    array([[0, 2],
           [1, 2]])
    >>> distances
    array([[0.5, 0.5],
           [1. , 4. ]])
    """

    def __init__(self, items: np.ndarray, recall: str = "exact", seed: int = 0):
        if recall not in RECALLS:
            raise ValueError(f"recall must be one of {list(RECALLS)}; got {recall!r}.")
        self.items = torch.from_numpy(np.asarray(items, dtype=np.float64))
        self.halves = torch.linalg.vector_norm(self.items, dim=1).square() / 2
        self.approximate: Any = None if recall == "exact" else faiss_index(self.items, recall, seed)

    def search(self, queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the distances and the rows of the n nearest items of each query, nearest first.

        Parameters
        ----------
        queries : ndarray of shape (n_queries, n_features)
        n : int
            At most as many as there are items.

        Returns
        -------
        distances : ndarray of shape (n_queries, n), float64
        rows : ndarray of shape (n_queries, n), int64
        """
        points = torch.from_numpy(np.asarray(queries, dtype=np.float64))
        # What is in memory at a time: products with all items, and differences to the candidates.
        at_once = rows_at_once(max(len(self.items), (n + SPARE) * self.items.shape[1]))
        # Filled piece by piece: results that are allocated in between would leave holes in memory.
        distances, rows = (
            torch.empty(len(points), n, dtype=points.dtype),
            torch.empty(len(points), n, dtype=torch.int64),
        )
        for start in range(0, len(points), at_once):
            piece = slice(start, start + at_once)
            distances[piece], rows[piece] = self._search(points[piece], n)
        return distances.numpy(), rows.numpy()

    def _search(self, points: Tensor, n: int) -> tuple[Tensor, Tensor]:
        if self.approximate is None or n == len(self.items):
            return self._compared(points, n)
        if hasattr(self.approximate, "hnsw"):
            self.approximate.hnsw.efSearch = max(2 * n, 64)
        rows = torch.from_numpy(self.approximate.search(as_faiss(points), n)[1])
        # A walk through the graph that does not get far enough leaves rows of -1.
        lost = (rows < 0).any(dim=1)
        if lost.any():
            rows[lost] = self._compared(points[lost], n)[1]
        return self._sorted(points, rows)

    def _compared(self, points: Tensor, n: int) -> tuple[Tensor, Tensor]:
        # Half the squared distance, without the part that is the same for all items.
        scores = torch.addmm(self.halves, points, self.items.T, alpha=-1)
        lowest, rows = scores.topk(min(n + SPARE, len(self.items)), largest=False)
        distances, rows = (found[:, :n] for found in self._sorted(points, rows))
        if lowest.shape[1] == len(self.items):
            return distances, rows
        # An item that is no farther than the n-th has a norm of at most `reach`, and by the bound on the rounding of
        # inner products a score of at most `limit`. Where such items may be missing, all of them are looked at again.
        norms, farthest = points.norm(dim=1), distances[:, -1]
        reach = norms + farthest
        rounding = 2 * (points.shape[1] + 8) * torch.finfo(points.dtype).eps
        limit = (farthest - norms) * reach / 2 + rounding * reach.square()
        for j in (lowest[:, -1] <= limit).nonzero()[:, 0]:
            within = (scores[j] <= limit[j]).nonzero()[:, 0]
            distances[j], rows[j] = (found[0, :n] for found in self._sorted(points[j, None], within[None]))
        return distances, rows

    def _sorted(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.sort(dim=1).values
        distances = (self.items[rows] - points[:, None]).square().sum(dim=2).sqrt()
        distances, order = distances.sort(dim=1, stable=True)
        return distances, rows.gather(1, order)


def faiss_index(items: Tensor, recall: str, seed: int) -> Any:
    """Return the items in an index of faiss, "pq" or "hnsw"."""
    try:
        import faiss
    except ImportError as error:
        raise missing_extra("faiss-cpu", "similarity") from error
    vectors = as_faiss(items)
    if recall == "hnsw":
        index: Any = faiss.IndexHNSWFlat(vectors.shape[1], 32)
    else:
        # About 32 items or more for a centroid.
        n_bits = int(np.clip(np.log2(len(vectors) / 32), 1, 8))
        index = faiss.IndexPQ(vectors.shape[1], vectors.shape[1] // FEATURES_OF_CODE, n_bits)
        index.pq.cp.seed = seed
        index.pq.cp.min_points_per_centroid = 1
        index.train(vectors)
    index.add(vectors)
    return index


def as_faiss(points: Tensor) -> np.ndarray:
    """Return vectors in single precision, as faiss takes them, filled up with zeros to whole codes."""
    missing = -points.shape[1] % FEATURES_OF_CODE
    return np.ascontiguousarray(torch.nn.functional.pad(points, (0, missing)).float().numpy())
