"""What averaging buys: influence of one run and of five, with and without augmented copies of the instances.

1,000 digits, the default networks, 15 epochs, FID. The truth is training anew, with other initial weights, batches and
latents, on random halves of the data: what influence would have to know about the data rather than about one run. Its
linear datamodelling score is given for single runs and for averages, beside how alike the influences of two runs are,
and the variance over runs: the mean over instances, relative to the variance over instances of the mean over runs.

    python -m benchmarks.averaging [--subsets 30] [--seeds 6] [--runs 5] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
from itertools import combinations

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.base import clone

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer
from ganclean.augmentation import DiffAugment
from ganclean.backends import ITD
from ganclean.datasets import load_digits_images
from ganclean.metrics import FID, train_classifier
from ganclean.optim import Adam
from ganclean.validation import linear_datamodeling_score

N_TRAIN, N_VALIDATION = 1000, 400
WAYS = {
    "as drawn": ITD(),
    "8 shifted copies": ITD(augmentation=DiffAugment(policy="translation").train(), n_augmentations=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=6, help="trainings of each half")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--quick", action="store_true", help="3 epochs, 8 halves, 2 trainings of each, 2 runs")
    parser.add_argument("--json")
    args = parser.parse_args()
    n_epochs = 15
    if args.quick:
        n_epochs, args.subsets, args.seeds, args.runs = 3, 8, 2, 2
    torch.set_num_threads(1)
    X, y = load_digits_images()
    rows = np.random.default_rng(0).permutation(len(X))
    train, held = rows[:N_TRAIN], rows[N_TRAIN : N_TRAIN + N_VALIDATION]
    cleanser = GANInfluence(
        trainer=GANTrainer(
            optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=n_epochs, batch_size=50, latent_dim=16, ema_decay=0.99
        ),
        metric=FID(train_classifier(X, y, n_features=16).features, n_samples=1000),
    )
    traced: dict[str, list[np.ndarray]] = {name: [] for name in WAYS}
    for seed in range(args.runs):
        fitted = clone(cleanser).set_params(random_state=seed).fit(X[train], X_val=X[held])
        for name, backend in WAYS.items():
            influences = clone(backend).fit(fitted.trajectory_, fitted.gradients_).influences_
            traced[name].append(next(iter(influences.values())))
    truth = linear_datamodeling_score(fitted, args.subsets, seeds=range(1000, 1000 + args.seeds), n_jobs=args.jobs)
    halves = truth.true_by_seed[::2].mean(axis=0), truth.true_by_seed[1::2].mean(axis=0)
    results: dict[str, object] = {"truth with itself": float(spearmanr(*halves).statistic)}
    print(f"truth of one half of the seeds with that of the other: ρ = {results['truth with itself']:.2f}")
    variance = {}
    for name, runs in traced.items():
        scores = [score_of(influence, truth) for influence in runs]
        averaged = score_of(np.mean(runs, axis=0), truth)
        alike = [float(spearmanr(a, b).statistic) for a, b in combinations(runs, 2)]
        variance[name] = float(np.var(runs, axis=0, ddof=1).mean() / np.mean(runs, axis=0).var())
        results[name] = {
            "single_runs": scores,
            "averaged": averaged,
            "between_runs": alike,
            "variance": variance[name],
        }
        print(
            f"{name:17s} LDS of single runs {np.mean(scores):+.2f} ({min(scores):+.2f} to {max(scores):+.2f}), of "
            f"{args.runs} runs averaged {averaged:+.2f}; two runs agree with ρ = {np.mean(alike):.2f}, "
            f"relative variance {variance[name]:.2f}"
        )
    saved = 1 - variance["8 shifted copies"] / variance["as drawn"]
    results["variance_saved"] = saved
    print(f"augmented copies save {saved:.0%} of the relative variance over runs")
    write_results(args.json, results)


def score_of(influence: np.ndarray, truth) -> float:
    """Return the linear datamodelling score of an influence against the same truth."""
    predicted = [influence[removed].sum() for removed in truth.removals]
    return float(spearmanr(predicted, truth.true).statistic)


if __name__ == "__main__":
    main()
