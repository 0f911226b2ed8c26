"""Is the estimate true where the paper measured it? Single removals, FID and inception score against retraining.

Terashita et al. (ICLR 2021, section 5.1) replay the last k epochs without one instance, with the same batches and
latents, and compare the change of the metric with its influence. Published, means over 10 seeds of 200 removals, on
10,000 points of a normal distribution in the plane and on 10,000 MNIST images: see `PUBLISHED`.

Here: 10,000 points; 1,400 digits of 8 × 8; Fashion-MNIST at 28 × 28, or at 8 × 8 ("fashion8"), of which 10,000 images
are taken where ``--root`` says where the complete data set lies, else the package's 2,000. The extractor is a small
classifier trained on the very training images. Networks and training: `benchmarks.paper_networks`, 50 epochs.
Everything is in float64: removing one instance of a batch moves a metric by a millionth of itself and less, which
float32 would round away in the *true* differences, before any estimate comes in.

With fewer images an epoch is fewer steps: 14 for the digits, 100 as published, so that k = 7 there traces as many steps
as k = 1 in the paper, and the generator is less trained after 50 epochs; the metrics before and after training are
printed and recorded. ``--trained-epochs`` and ``--lr`` change that; "fashion8" with ``--root`` has the published count.

A finished row (data, pair, seed, k) is written to the file of ``--json`` at once and not computed again.

    python -m benchmarks.reproduction_accuracy [--data normal digits fashion fashion8] [--pair paper modern]
        [--epochs 1 5 10 20 50] [--seeds 0 1 2] [--quick] [--root DIR] [--json FILE] [--raw DIR]
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau, pearsonr

from benchmarks.paper_networks import PAIRS, networks, trainer
from benchmarks.resumable import Rows
from ganclean import GANInfluence
from ganclean.backends import ITD
from ganclean.datasets import load_digits_images, load_fashion_mnist
from ganclean.exceptions import NonFiniteError
from ganclean.metrics import FID, AverageLogLikelihood, InceptionScore, train_classifier
from ganclean.runs.replay import retrained_states
from ganclean.validation.accuracy import extremes_jaccard

DATA = ("normal", "digits", "fashion", "fashion8")
SCHEMES = {
    "secant, δ = 1e-2": ITD(),
    "secant, δ = 1e-3": ITD(delta=1e-3),
    "exact": ITD(derivative="exact"),
}
# Kendall's τ and Jaccard index for each k.
PUBLISHED = {
    "log_likelihood": {1: (0.87, 0.575), 5: (0.83, 0.46), 10: (0.855, 0.53), 20: (0.845, 0.435), 50: (0.67, 0.30)},
    "fid": {1: (0.95, 0.82), 5: (0.87, 0.70), 10: (0.735, 0.50), 20: (0.44, 0.265), 50: (0.235, 0.18)},
    "is": {1: (0.91, 0.78), 5: (0.80, 0.63), 10: (0.68, 0.42), 20: (0.35, 0.235), 50: (0.07, 0.16)},
}


def split(data: str, seed: int, root: str | None = None):
    """Return training data, their labels and validation data."""
    if data == "normal":
        rng = np.random.default_rng(seed)
        points = rng.multivariate_normal([1, 1], [[1, 0.8], [0.8, 1]], size=11_000)
        return points[:10_000], None, points[10_000:]
    if data == "digits":
        X, y = load_digits_images()
        order = np.random.default_rng(seed).permutation(len(X))
        return X[order[:1400]], y[order[:1400]], X[order[1400:]]
    size = 8 if data == "fashion8" else 28
    (X, y), (X_val, _) = (load_fashion_mnist(part, size, root) for part in ("train", "test"))
    return X[:10_000], y[:10_000], X_val


def metrics_for(X, y) -> dict:
    """Return the metrics of the paper; for images with a classifier of these images as their extractor."""
    if y is None:
        return {"log_likelihood": AverageLogLikelihood()}
    classifier = train_classifier(X, y).double()
    return {"fid": FID(classifier.features, n_samples=1000), "is": InceptionScore(classifier, n_samples=1000)}


def fitted(data: str, pair: str, seed: int, args: argparse.Namespace) -> GANInfluence:
    """Train once and keep the states; influence is traced for each window afterwards."""
    X, y, X_val = split(data, seed, args.root)
    return GANInfluence(
        *(network.double() for network in networks(pair, X.shape[1:], seed)),
        trainer=trainer(pair, X.shape[1:], args.trained_epochs, args.lr),
        metric=metrics_for(X, y),
        # The states of the longest window are kept.
        backend=ITD(last_epochs=max(args.epochs)),
        random_state=seed,
    ).fit(X, X_val=X_val)


def measured(cleanser: GANInfluence, k: int, removals: np.ndarray) -> tuple[dict, dict, dict]:
    """Return true and predicted changes of every metric over the last k epochs, and the seconds that each took."""
    begin = time.perf_counter()
    size = max(metric.sample_size for metric in cleanser.metrics_.values())
    evaluator = cleanser.evaluator(size)
    states = retrained_states(cleanser.trajectory_, [[], *removals[:, None]], k)
    values = [[evaluator.value(metric, state) for metric in cleanser.metrics_.values()] for state in states]
    true = dict(zip(cleanser.metrics_, (np.array(values)[1:] - values[0]).T))
    seconds = {"truth": time.perf_counter() - begin}
    predicted: dict[str, dict[str, np.ndarray]] = {}
    for name, backend in SCHEMES.items():
        begin = time.perf_counter()
        try:
            influences = backend.set_params(last_epochs=k).fit(cleanser.trajectory_, cleanser.gradients_).influences_
            predicted[name] = {metric: influence[removals] for metric, influence in influences.items()}
        except NonFiniteError:
            # An adjoint that exploded predicts nothing.
            predicted[name] = {metric: np.zeros(len(removals)) for metric in true}
        seconds[name] = time.perf_counter() - begin
    return true, predicted, seconds


def agreement(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return how well changes are predicted; zeros where nothing was."""
    if not np.ptp(predicted):
        return {"kendall_tau": 0.0, "pearson": 0.0, "jaccard": 0.0}
    return {
        "kendall_tau": float(kendalltau(predicted, true).statistic),
        "pearson": float(pearsonr(predicted, true).statistic),
        "jaccard": extremes_jaccard(predicted, true),
    }


def table(rows: list[dict]) -> str:
    """Return means ± standard deviations over seeds, beside what was published, as a table in Markdown."""
    lines = [
        "| data | pair | metric | k | seeds | scheme | Kendall's τ | Jaccard | published τ / Jaccard |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        for metric, schemes in row["agreement"].items():
            for scheme, values in schemes.items():
                key = row["data"], row["pair"], metric, row["last_epochs"], scheme
                groups.setdefault(key, []).append(values)
    for (data, pair, metric, k, scheme), found in sorted(groups.items(), key=lambda item: item[0][:4]):
        tau, jaccard = ([values[name] for values in found] for name in ("kendall_tau", "jaccard"))
        spread = [np.std(values, ddof=len(found) > 1) for values in (tau, jaccard)]
        published = " / ".join(map(str, PUBLISHED[metric].get(k, ("–", "–"))))
        lines.append(
            f"| {data} | {pair} | {metric} | {k} | {len(found)} | {scheme} | {np.mean(tau):.3f} ± {spread[0]:.3f} | "
            f"{np.mean(jaccard):.2f} ± {spread[1]:.2f} | {published} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, nargs="*", default=["digits"])
    parser.add_argument("--pair", choices=PAIRS, nargs="*", default=["paper"])
    parser.add_argument("--epochs", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--removals", type=int, default=100)
    parser.add_argument("--trained-epochs", type=int, default=50)
    parser.add_argument("--lr", type=float, help="in place of the pair's own learning rate")
    parser.add_argument("--root", help="folder of the complete Fashion-MNIST, as torchvision finds it")
    parser.add_argument("--quick", action="store_true", help="20 removals after 5 epochs of training, k = 1, one seed")
    parser.add_argument("--json", help="results; rows that it holds are not computed again")
    parser.add_argument("--raw", help="folder for the true and predicted changes of every removal")
    args = parser.parse_args()
    if args.quick:
        args.removals, args.trained_epochs, args.epochs, args.seeds = 20, 5, [1], [0]
    torch.set_num_threads(1)
    rows = Rows(args.json)
    for data, pair, seed in product(args.data, args.pair, args.seeds):
        settings = {"data": data, "pair": pair, "seed": seed, "trained_epochs": args.trained_epochs}
        settings |= {"lr": args.lr, "removals": args.removals, "complete": args.root is not None}
        cleanser = None
        for k in args.epochs:
            key = {**settings, "last_epochs": k}
            if rows.having(key):
                continue
            cleanser = cleanser or fitted(data, pair, seed, args)
            n_samples = len(cleanser.influence_)
            removals = np.random.default_rng(seed).permutation(n_samples)[: args.removals]
            true, predicted, seconds = measured(cleanser, k, removals)
            before = cleanser.trajectory_.state(0)
            evaluator = cleanser.evaluator(1000)
            row = {
                **key,
                "n_samples": n_samples,
                "before_training": {m: evaluator.value(metric, before) for m, metric in cleanser.metrics_.items()},
                "after_training": cleanser.metric_values_,
                "agreement": {
                    m: {scheme: agreement(changes[m], true[m]) for scheme, changes in predicted.items()} for m in true
                },
                "seconds": seconds,
            }
            rows.add(row)
            if args.raw is not None:
                Path(args.raw).mkdir(parents=True, exist_ok=True)
                changes = {f"{m}, {scheme}": predicted[scheme][m] for m in true for scheme in predicted}
                np.savez(Path(args.raw) / f"{data}_{pair}_{seed}_{k}.npz", removals=removals, **true, **changes)
            for m, schemes in row["agreement"].items():
                found = ", ".join(
                    f"{scheme}: {v['kendall_tau']:.3f} / {v['jaccard']:.2f}" for scheme, v in schemes.items()
                )
                trained = f"{row['before_training'][m]:.4g} → {row['after_training'][m]:.4g}"
                print(
                    f"{data} {pair} seed {seed}, k = {k}, {m} ({trained}): {found}; {seconds['truth']:.0f} s",
                    flush=True,
                )
    print(table(rows.rows))


if __name__ == "__main__":
    main()
