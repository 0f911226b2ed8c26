"""The densities of instance selection, from their formulas."""

import numpy as np


def gaussian_log_density(features, ridge):
    """Of each row under the Gaussian of all rows, with a ridge on the covariance's diagonal."""
    centred = features - features.mean(axis=0)
    covariance = centred.T @ centred / len(features) + ridge * np.eye(features.shape[1])
    squares = np.array([x @ np.linalg.solve(covariance, x) for x in centred])
    return -(squares + np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2


def distance_to_neighbour(features, k):
    """From each row to the k-th nearest of the others."""
    return np.array(
        [sorted(np.linalg.norm(x - other) for j, other in enumerate(features) if j != i)[k - 1]
         for i, x in enumerate(features)]
    )  # fmt: skip
