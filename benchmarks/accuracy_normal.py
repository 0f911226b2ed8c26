"""Is the estimate true? 2-D normal data, single removals against real retraining.

The setting of Terashita et al. (ICLR 2021, section 5.1): 10,000 points, perceptrons without bias, simultaneous SGD,
50 epochs, average log-likelihood. Published Kendall's τ (means over 10 seeds) for the last 1, 5, 10, 20 and 50 epochs:
0.87, 0.83, 0.855, 0.845, 0.67.

    python -m benchmarks.accuracy_normal [--activation softplus|relu] [--epochs 1 5 10] [--seeds 0] [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import AverageLogLikelihood
from ganclean.optim import SGD
from ganclean.validation import estimation_accuracy

ACTIVATIONS = {"relu": nn.ReLU, "softplus": nn.Softplus}
PUBLISHED = {1: 0.87, 5: 0.83, 10: 0.855, 20: 0.845, 50: 0.67}


def perceptron(sizes: list[int], activation: type[nn.Module], seed: int) -> nn.Sequential:
    """Linear layers without bias, with an activation between them, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=False), activation()]
    return nn.Sequential(*layers[:-1]).double()


def normal_data(seed: int, n: int) -> np.ndarray:
    """Correlated normal points in the plane."""
    return np.random.default_rng(seed).multivariate_normal([1, 1], [[1, 0.8], [0.8, 1]], size=n)


def fitted(activation: str, seed: int, n_epochs: int) -> GANInfluence:
    """Train once and keep the whole trajectory; influence is traced for each window afterwards."""
    trainer = GANTrainer(
        "non_saturating", SGD(lr=1e-3), n_epochs=n_epochs, batch_size=100, update="simultaneous", latent_dim=10
    )
    return GANInfluence(
        perceptron([10, 32, 32, 2], ACTIVATIONS[activation], seed),
        perceptron([2, 64, 64, 1], ACTIVATIONS[activation], seed + 1),
        trainer=trainer,
        metric=AverageLogLikelihood(),
        backend=ITD(last_epochs=1),
        random_state=seed,
    ).fit(normal_data(seed, 10_000), X_val=normal_data(1000 + seed, 1_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=ACTIVATIONS, nargs="*", default=list(ACTIVATIONS))
    parser.add_argument("--epochs", type=int, nargs="*", default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--delta", type=float, default=1e-2)
    parser.add_argument("--removals", type=int, default=100)
    parser.add_argument("--trained-epochs", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="20 removals after 5 epochs of training")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.removals, args.trained_epochs, args.epochs = 20, 5, [1, 5]
    torch.set_num_threads(1)
    results = []
    print("activation  seed  epochs  scheme   Kendall τ  Pearson r  Jaccard  published τ  seconds")
    for activation in args.activation:
        for seed in args.seeds:
            cleaner = fitted(activation, seed, args.trained_epochs)
            for k in args.epochs:
                for derivative in ("secant", "exact"):
                    cleaner.backend_ = ITD(None, derivative, args.delta)
                    begin = time.perf_counter()
                    accuracy = estimation_accuracy(cleaner, args.removals, last_epochs=k, random_state=seed)
                    row = {
                        "activation": activation,
                        "seed": seed,
                        "last_epochs": k,
                        "derivative": derivative,
                        "kendall_tau": accuracy.kendall_tau,
                        "pearson": accuracy.pearson,
                        "jaccard": accuracy.jaccard,
                    }
                    results.append(row)
                    print(
                        f"{activation:10s} {seed:5d} {k:7d}  {derivative:7s} {accuracy.kendall_tau:10.3f} "
                        f"{accuracy.pearson:10.3f} {accuracy.jaccard:8.2f} {PUBLISHED.get(k, float('nan')):12.3f} "
                        f"{time.perf_counter() - begin:8.1f}",
                        flush=True,
                    )
                    write_results(args.json, {"rows": results})


if __name__ == "__main__":
    main()
