"""Precision, recall, density and coverage, read from their definitions: loops over balls and points."""

import numpy as np


def distance(x, y):
    return np.sqrt(((x - y) ** 2).sum())


def radius(points, i, k):
    """The distance from a point to its k-th nearest neighbour."""
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def brute_force_prdc(reference, samples, k):
    """All four quantities of arrays of shape (n_reference, n_features) and (n, n_features)."""
    reference_radii = [radius(reference, i, k) for i in range(len(reference))]
    sample_radii = [radius(samples, j, k) for j in range(len(samples))]
    in_precision = in_recall = in_balls = in_coverage = 0
    for y in samples:
        balls = sum(distance(x, y) <= r for x, r in zip(reference, reference_radii))
        in_balls += balls
        in_precision += balls > 0
    for x, r in zip(reference, reference_radii):
        in_recall += any(distance(x, y) <= s for y, s in zip(samples, sample_radii))
        in_coverage += any(distance(x, y) <= r for y in samples)
    return {
        "precision": in_precision / len(samples),
        "recall": in_recall / len(reference),
        "density": in_balls / (k * len(samples)),
        "coverage": in_coverage / len(reference),
    }
