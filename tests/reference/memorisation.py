"""Memorisation metrics read from their definitions: loops over pairs, and a general optimiser for FLD's mixture."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import norm

from tests.reference.prdc import distance


def brute_force_ct(train, test, samples, cells, min_cell_size=1):
    """C_T, where `cells` are the numbers of the cells that training, test instances and samples lie in."""
    total = weight = 0.0
    for cell in set(cells[0]):
        near, real, fake = (points[own == cell] for points, own in zip((train, test, samples), cells))
        n, m = len(real), len(fake)
        if n == 0 or m < min_cell_size:
            continue
        of_real, of_fake = ([min(distance(x, t) for t in near) for x in points] for points in (real, fake))
        u = sum((f > r) + 0.5 * (f == r) for f in of_fake for r in of_real)
        total += n * (u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)
        weight += n
    return total / weight


def brute_force_authenticity(train, samples):
    """The fraction of the samples that their nearest training instance is farther from than from its own neighbours."""
    authentic = 0
    for x in samples:
        i = min(range(len(train)), key=lambda j: distance(x, train[j]))
        authentic += distance(x, train[i]) > min(distance(train[i], train[j]) for j in range(len(train)) if j != i)
    return authentic / len(samples)


def mixture_objective(parameters, centres, data):
    """Negative log-likelihood per feature of data under Gaussians at centres and the background; its gradient too."""
    log_variances, n_features = parameters, data.shape[1]
    squares = ((data[:, None] - centres) ** 2).sum(axis=2)
    background = 0.81 * ((data - data.mean(axis=0)) ** 2).sum(axis=1, keepdims=True)
    squares = np.hstack([squares, background])
    log_densities = -squares / (2 * np.exp(log_variances)) - n_features / 2 * (log_variances + np.log(2 * np.pi))
    log_densities[:, :-1] -= np.log(len(centres))
    totals = logsumexp(log_densities, axis=1)
    shares = np.exp(log_densities - totals[:, None])
    slope = (shares * (squares / (2 * np.exp(log_variances)) - n_features / 2)).sum(axis=0)
    return -totals.mean() / n_features, -slope / len(data) / n_features


def optimised_log_variances(centres, data):
    """The variances that L-BFGS finds from the same start, the background's last, and the objective there."""
    nearest = [min(((x - c) ** 2).sum() for x in data) for c in centres]
    start = np.append(np.log((np.array(nearest) + 1e-3) / data.shape[1]), 0.0)
    options = {"maxiter": 20000, "maxfun": 20000, "ftol": 0.0, "gtol": 1e-10}
    found = minimize(mixture_objective, start, (centres, data), jac=True, method="L-BFGS-B", options=options)
    return found.x, found.fun


def brute_force_mean_log_density(data, centres, log_variances):
    """The mean log-density per feature under equally weighted isotropic Gaussians."""
    total = 0.0
    for x in data:
        total += np.log(np.mean(norm.pdf(x, centres, np.exp(log_variances / 2)[:, None]).prod(axis=1)))
    return total / data.size
