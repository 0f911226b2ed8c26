"""GMValuator's credit, read from its definition: loops over samples and training instances."""

import math


def distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y)))


def contributors(train, sample, k):
    """The rows of the k nearest training instances, ties by row."""
    return sorted(range(len(train)), key=lambda i: (distance(train[i], sample), i))[:k]


def credit_matrix(train, samples, k, temperature, quality):
    """What each sample gives to each training instance, as lists of lists."""
    matrix = [[0.0] * len(train) for _ in samples]
    for row, sample, q in zip(matrix, samples, quality):
        near = contributors(train, sample, k)
        first = distance(train[near[0]], sample)
        weights = [math.exp(-(distance(train[i], sample) - first) / temperature) for i in near]
        for i, weight in zip(near, weights):
            row[i] = q * weight / sum(weights)
    return matrix


def median_temperature(train, samples, k):
    """The median over samples of how much farther the last contributor is than the first."""
    near = [contributors(train, sample, k) for sample in samples]
    spread = sorted(distance(train[n[-1]], s) - distance(train[n[0]], s) for n, s in zip(near, samples))
    half = len(spread) // 2
    return spread[half] if len(spread) % 2 else (spread[half - 1] + spread[half]) / 2


def realism(sample, reference, k):
    """The largest ratio of a ball's radius to its centre's distance, over the smaller half of the balls."""
    radii = [sorted(distance(x, y) for y in reference)[k] for x in reference]
    ordered = sorted(radii)
    half = len(ordered) // 2
    median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return max(r / distance(x, sample) for x, r in zip(reference, radii) if r <= median)
