"""The squared maximum mean discrepancy under a Gaussian kernel, pair by pair."""

import itertools
import math

import numpy as np


def gaussian(x, y, bandwidth):
    return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y)) / (2 * bandwidth**2))


def brute_force_mmd(x, y, bandwidth, unbiased=True):
    """The estimate from arrays of shape (n, n_features) and (m, n_features)."""

    def mean_within(points):
        pairs = itertools.permutations(points, 2) if unbiased else itertools.product(points, points)
        return np.mean([gaussian(a, b, bandwidth) for a, b in pairs])

    return mean_within(x) + mean_within(y) - 2 * np.mean([gaussian(a, b, bandwidth) for a in x for b in y])


def brute_force_median_distance(x):
    """The median distance between two rows of an array."""
    return np.median([math.dist(a, b) for a, b in itertools.combinations(x, 2)])
