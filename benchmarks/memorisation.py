"""What does each metric see? Real data, noise, missing classes, copies and outliers in the place of generated samples.

Digits in 16 principal components, divided at random into training data, test data and fresh data of equal size. Each
kind of sample is evaluated by a metric of each family against test and training data. The first row, fresh real data,
is what a perfect generator would have; what lies within its scatter over divisions is not seen. "densest half" is what
`DensitySelector` keeps of the fresh data, beside a random half: variety pays for fidelity. The classifier of the
Inception score is a logistic regression on all digits.

    python -m benchmarks.memorisation [--sizes 150 300 590] [--splits 8] [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.environment import write_results
from ganclean.validation.panel import fitted_metrics, metric_values
from ganclean.valuation import DensitySelector

N_COMPONENTS = 16


def kinds_of_samples(train: Tensor, fresh: Tensor, y: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return what stands in the place of generated samples; `y` are the classes of the fresh data."""

    def noisy(X: Tensor, scale: float) -> Tensor:
        return X + scale * fresh.std(dim=0) * torch.from_numpy(rng.normal(size=X.shape))

    n_outliers = len(fresh) // 5
    half = len(fresh) // 2
    dense = DensitySelector(half / len(fresh)).fit(fresh)
    return {
        "fresh real data": fresh,
        "noise, 0.3 sd": noisy(fresh, 0.3),
        "noise, 1 sd": noisy(fresh, 1.0),
        "five classes of ten": fresh[y < 5],
        "copies of training data": train,
        "copies, 0.1 sd": noisy(train, 0.1),
        "20% outliers, 4 sd": torch.cat([noisy(fresh[:n_outliers], 4.0), fresh[n_outliers:]]),
        "random half": fresh[:half],
        "densest half": fresh[torch.from_numpy(dense.support_)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[150, 300, 590], help="of each of the three parts")
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a fraction of everything, to see that it runs")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.splits = [150], 2
    X, y = load_digits(return_X_y=True)
    X = PCA(N_COMPONENTS, random_state=0).fit_transform(X / 16)
    classifier = LogisticRegression(max_iter=1000).fit(X, y)
    begin, rows = time.perf_counter(), []
    for n in args.sizes:
        found: dict[str, list[dict[str, float]]] = {}
        for split in range(args.splits):
            rng = np.random.default_rng(split)
            parts = rng.permutation(len(X))[: 3 * n].reshape(3, n)
            train, test, fresh = (torch.from_numpy(X[part]) for part in parts)
            metrics = fitted_metrics(test, train)
            for kind, samples in kinds_of_samples(train, fresh, y[parts[2]], rng).items():
                logits = torch.from_numpy(classifier.decision_function(samples.numpy()))
                found.setdefault(kind, []).append(metric_values(metrics, samples, logits))
        names = list(found["fresh real data"][0])
        print(f"\n{n} training, test and fresh instances: mean (sd) over {args.splits} divisions")
        print(f"{'':<25}" + "".join(f"{name:>20}" for name in names))
        for kind, values in found.items():
            table = {name: np.array([value[name] for value in values]) for name in names}
            row = {name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1))} for name, v in table.items()}
            rows.append({"n": n, "samples": kind, **row})
            cells = (f"{cell['mean']:.3g} ({cell['sd']:.2g})" for cell in row.values())
            print(f"{kind:<25}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_results(args.json, {"settings": settings, "seconds": time.perf_counter() - begin, "rows": rows})


if __name__ == "__main__":
    main()
