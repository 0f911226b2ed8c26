"""Credit: what each generated sample owes to the training instances that it is nearest to."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.special import softmax


def credits(distances: np.ndarray, temperature: float, quality: np.ndarray) -> np.ndarray:
    """Return the credit of each sample's contributors: its quality, shared out by a softmax of −distance / temperature.

    Parameters
    ----------
    distances : ndarray of shape (n_gen, k)
        To the contributors; an infinite one gets nothing.
    temperature : float
        In the unit of the distances; infinite for equal shares.
    quality : ndarray of shape (n_gen,)
        What the credits of each sample sum to.

    Returns
    -------
    ndarray of shape (n_gen, k), float64

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.valuation.credit import credits
    >>> credits(np.array([[0.0, np.log(3.0)], [5.0, 5.0]]), 1.0, np.array([1.0, 0.5]))
    array([[0.75, 0.25],
           [0.25, 0.25]])
    """
    # The nearest is at zero: no temperature is so low that nobody gets anything.
    ahead = distances - distances.min(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        return softmax(-ahead / temperature, axis=1) * quality[:, None]


def median_temperature(distances: np.ndarray) -> float:
    """Return the median over samples of how much farther the last contributor is than the first.

    At this temperature, a typical sample's last contributor gets 1/e of what its first one gets.

    Parameters
    ----------
    distances : ndarray of shape (n_gen, k)
        Sorted along rows.

    Returns
    -------
    float
        Where the median is zero the mean, and 1 where that is zero too: then all shares are equal at any temperature.
    """
    spread = distances[:, -1] - distances[:, 0]
    return float(np.median(spread) or np.mean(spread) or 1.0)


def credit_matrix(
    distances: np.ndarray, rows: np.ndarray, temperature: float, quality: np.ndarray, n_train: int
) -> csr_array:
    """Return the credits as a sparse matrix of shape (n_gen, n_train), with k entries in each row.

    Parameters
    ----------
    distances, rows : ndarray of shape (n_gen, k)
        Of each sample's contributors.
    temperature, quality
        As of `credits`.
    n_train : int

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.valuation.credit import credit_matrix
    >>> matrix = credit_matrix(np.zeros((1, 2)), np.array([[3, 0]]), 1.0, np.ones(1), 4)
    >>> matrix.toarray()
    array([[0.5, 0. , 0. , 0.5]])
    """
    n_gen, k = rows.shape
    shares = credits(distances, temperature, quality).ravel()
    matrix = csr_array((shares, rows.ravel(), np.arange(0, n_gen * k + 1, k)), shape=(n_gen, n_train))
    matrix.sort_indices()
    return matrix


def top_contributors(attributions: csr_array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k training instances that each sample owes most to, and their shares of its credit.

    Parameters
    ----------
    attributions : CSR matrix of shape (n_gen, n_train)
        As of `GMValuator.attribute`.
    k : int

    Returns
    -------
    rows : ndarray of shape (n_gen, k), int64
        The highest credit first, ties by row.
    shares : ndarray of shape (n_gen, k), float64
        Of all credit of the sample; zero where it has none to give.

    Raises
    ------
    ValueError
        If a sample has fewer than k contributors.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse import csr_array
    >>> from ganclean.valuation import top_contributors
    >>> rows, shares = top_contributors(csr_array(np.array([[0.5, 0.0, 1.5], [1.0, 3.0, 0.0]])), k=1)
    >>> rows.ravel(), shares.ravel()
    (array([2, 1]), array([0.75, 0.75]))
    """
    matrix = csr_array(attributions)
    counts = np.diff(matrix.indptr)
    fewest = int(counts.min())
    if not 1 <= k <= fewest:
        raise ValueError(
            f"k must be at least 1 and at most the {fewest} contributors that each sample has; got {k!r}. "
            "GMValuator(k=...) credits more of them."
        )
    totals = matrix.sum(axis=1)
    of_row = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((matrix.indices, -matrix.data, of_row))
    first = order[matrix.indptr[:-1, None] + np.arange(k)]
    credit = matrix.data[first]
    shares = np.divide(credit, totals[:, None], out=np.zeros_like(credit), where=totals[:, None] > 0)
    return matrix.indices[first].astype(np.int64), shares
