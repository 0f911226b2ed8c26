"""Is the estimate true? 2-D normal data, removals against real retraining.

Two settings. "published" is that of Terashita et al. (ICLR 2021, section 5.1): 10,000 points, perceptrons without bias,
simultaneous SGD, 50 epochs, average log-likelihood, 100 single removals. Published with ReLU for the last 1, 5, 10, 20
and 50 epochs, means over 10 seeds: Kendall's τ 0.87, 0.83, 0.855, 0.845, 0.67; Jaccard index 0.575, 0.46, 0.53, 0.435,
0.30. "converged" has 2,000 points and 50 times the learning rate; there groups of 5% are removed too.

    python -m benchmarks.accuracy_normal [--setting published|converged] [--seeds 0 1 2 3 4] [--epochs 1 5] [--json F]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import kendalltau, pearsonr
from torch import nn

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import AverageLogLikelihood
from ganclean.optim import SGD
from ganclean.validation import estimation_accuracy
from ganclean.validation.accuracy import extremes_jaccard

ACTIVATIONS = {"relu": nn.ReLU, "softplus": nn.Softplus}
SETTINGS = {
    "published": {"n": 10_000, "lr": 1e-3, "group_sizes": [1]},
    "converged": {"n": 2_000, "lr": 5e-2, "group_sizes": [1, 100]},
}
SCHEMES = {
    "secant, δ = 1e-2": ITD(),
    "secant, δ = 1e-3": ITD(delta=1e-3),
    "secant, δ = auto": ITD(delta="auto"),
    "exact": ITD(derivative="exact"),
}


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


def fitted(activation: str, setting: str, seed: int, n_epochs: int) -> GANInfluence:
    """Train once and keep the whole trajectory; influence is traced for each window afterwards."""
    chosen = SETTINGS[setting]
    trainer = GANTrainer(
        "non_saturating",
        SGD(lr=chosen["lr"]),
        n_epochs=n_epochs,
        batch_size=100,
        update="simultaneous",
        latent_dim=10,
        checkpoint_every=1,
    )
    return GANInfluence(
        perceptron([10, 32, 32, 2], ACTIVATIONS[activation], seed),
        perceptron([2, 64, 64, 1], ACTIVATIONS[activation], seed + 1),
        trainer=trainer,
        metric=AverageLogLikelihood(),
        # Tracing a single epoch in fit keeps only its states, unless the whole run is what the back-end asks for.
        backend=ITD(),
        random_state=seed,
    ).fit(normal_data(seed, chosen["n"]), X_val=normal_data(1000 + seed, 1_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="published")
    parser.add_argument("--activation", choices=ACTIVATIONS, nargs="*", default=["relu"])
    parser.add_argument("--epochs", type=int, nargs="*", default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--removals", type=int, default=100)
    parser.add_argument("--trained-epochs", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="20 removals after 5 epochs of training")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.removals, args.trained_epochs, args.epochs = 20, 5, [1, 5]
    torch.set_num_threads(1)
    rows = []
    print(
        "activation  seed  epochs  removed  scheme             Kendall τ  Pearson r  Jaccard   seconds of truth, trace"
    )
    for activation in args.activation:
        for seed in args.seeds:
            cleanser = fitted(activation, args.setting, seed, args.trained_epochs)
            for k in args.epochs:
                influences, seconds = {}, {}
                for name, backend in SCHEMES.items():
                    begin = time.perf_counter()
                    traced = backend.set_params(last_epochs=k).fit(cleanser.trajectory_, cleanser.gradients_)
                    influences[name] = traced.influences_[cleanser.metric_name_]
                    seconds[name] = time.perf_counter() - begin
                for size in SETTINGS[args.setting]["group_sizes"]:
                    begin = time.perf_counter()
                    truth = estimation_accuracy(
                        cleanser, args.removals, last_epochs=k, group_size=size, random_state=seed
                    )
                    spent = time.perf_counter() - begin
                    for name, influence in influences.items():
                        predicted = np.array([influence[removed].sum() for removed in truth.removals])
                        row = {
                            "activation": activation,
                            "seed": seed,
                            "last_epochs": k,
                            "group_size": size,
                            "scheme": name,
                            "kendall_tau": float(kendalltau(predicted, truth.true).statistic),
                            "pearson": float(pearsonr(predicted, truth.true).statistic),
                            "jaccard": extremes_jaccard(predicted, truth.true),
                        }
                        rows.append(row)
                        print(
                            f"{activation:10s} {seed:5d} {k:7d} {size:8d}  {name:17s} {row['kendall_tau']:10.3f} "
                            f"{row['pearson']:10.3f} {row['jaccard']:8.2f}  {spent:10.1f} {seconds[name]:6.1f}",
                            flush=True,
                        )
                        write_results(args.json, {"setting": args.setting, "rows": rows})


if __name__ == "__main__":
    main()
