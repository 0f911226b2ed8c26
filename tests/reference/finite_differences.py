"""Influence by brute force: train again with one example's weight a little higher and a little lower."""

import numpy as np
import torch

from tests.reference.eager_training import Outsider, train_eagerly

STENCIL = {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}


def metric_values(cleanser, X, **changes):
    """All metrics after training a cleanser's networks eagerly, with example weights or an outsider in every batch."""
    _, discriminator, generator = train_eagerly(
        cleanser.generator, cleanser.discriminator, cleanser.trainer, X, cleanser.trajectory_, **changes
    )
    evaluator = cleanser.evaluator(max(metric.sample_size for metric in cleanser.metrics_.values()))
    labels = () if evaluator.labels is None else (evaluator.labels,)
    values = []
    with torch.no_grad():
        samples = generator(evaluator.latents, *labels)
        for metric in cleanser.metrics_.values():
            judge = (lambda x: discriminator(x, *labels),) if metric.uses_discriminator else ()
            values.append(float(metric(samples[: metric.sample_size], *judge)))
    return np.array(values)


def finite_difference_influences(cleanser, X, start=0, width=1e-3, rows=None):
    """Minus the derivative of every metric in each row's weight from step `start`: a dict of arrays (n_rows,)."""

    def derivative(row):
        values = 0
        for offset, factor in STENCIL.items():
            weights = torch.ones(len(X), dtype=torch.float64)
            weights[row] += offset * width
            values = values + factor / width * metric_values(cleanser, X, weights=weights, start=start)
        return -values

    rows = range(len(X)) if rows is None else rows
    return dict(zip(cleanser.metrics_, np.stack([derivative(row) for row in rows], axis=1)))


def finite_difference_outsiders(cleanser, X, outsiders, labels=None, start=0, width=1e-3):
    """Minus the derivative of every metric in the weight of an instance that is added to every batch."""

    def derivative(turn):
        label = None if labels is None else labels[turn]
        values = 0
        for offset, factor in STENCIL.items():
            outsider = Outsider(outsiders[turn], offset * width, label, turn)
            values = values + factor / width * metric_values(cleanser, X, outsider=outsider, start=start)
        return -values

    return dict(zip(cleanser.metrics_, np.stack([derivative(turn) for turn in range(len(outsiders))], axis=1)))


def largest_error(influences, expected):
    """The largest error of any instance's influence on any metric, relative to that very influence."""
    return max(float(np.max(np.abs(influences[name] - expected[name]) / np.abs(expected[name]))) for name in expected)
