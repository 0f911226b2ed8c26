"""How long does it take to credit training instances for generated samples, and how much memory?

10,000 samples, 60,000 training instances, 64 features, k = 10. Features are those of 200 clusters in 16 dimensions,
seen through a random linear map, with a little noise. Each kind of recall runs in a process of its own; its memory is
the growth of the peak from where the data were there. Recall is the part of the true contributors that were found.

    python -m benchmarks.valuation_speed [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks.environment import write_results
from ganclean.valuation import GMValuator
from ganclean.valuation.recall import RECALLS, NeighbourIndex

FULL = {"n_train": 60_000, "n_gen": 10_000, "n_features": 64}
QUICK = {"n_train": 6_000, "n_gen": 1_000, "n_features": 64}


def clusters(n_train: int, n_gen: int, n_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Training instances and samples of the same clusters, float32."""
    rng = np.random.default_rng(0)
    centres, view = 3 * rng.normal(size=(200, 16)), rng.normal(size=(16, n_features)) / 4
    n = n_train + n_gen
    inner = centres[rng.integers(200, size=n)] + rng.normal(size=(n, 16))
    points = (inner @ view + 0.1 * rng.normal(size=(n, n_features))).astype(np.float32)
    return points[:n_train], points[n_train:]


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(recall: str, size: dict[str, int], n_threads: int) -> dict[str, Any]:
    """Seconds and memory of a fit, and the part of the true contributors that it found for the first samples."""
    torch.set_num_threads(n_threads)
    if recall != "exact":
        import faiss

        faiss.omp_set_num_threads(n_threads)
    X, samples = clusters(**size)
    warm = GMValuator(recall=recall, random_state=0).fit(X[:500], X_gen=samples[:50])
    before = peak_bytes()
    begin = time.perf_counter()
    valuator = warm.fit(X, X_gen=samples)
    seconds = time.perf_counter() - begin
    grown = peak_bytes() - before
    begin = time.perf_counter()
    rows = valuator.kneighbors(samples)[1]
    search = time.perf_counter() - begin
    true = NeighbourIndex(X).search(samples[:500], rows.shape[1])[1]
    found = np.mean([len(np.intersect1d(*both)) / rows.shape[1] for both in zip(rows, true)])
    assert abs(valuator.values_.sum() - len(samples)) < 1e-6
    return {
        "fit_seconds": seconds,
        "attribution_seconds": search,
        "peak_megabytes": grown / 1e6,
        "megabytes_of_all_distances": 8e-6 * size["n_train"] * size["n_gen"],
        "recall": float(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    print(f"{size['n_gen']} samples × {size['n_train']} instances × {size['n_features']} features, k = 10")
    results: dict[str, Any] = {"size": size}
    for recall in RECALLS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            measured = pool.submit(measure, recall, size, torch.get_num_threads()).result()
        results[recall] = measured
        print(
            f"{recall:6s} fit {measured['fit_seconds']:6.2f} s   attribution alone "
            f"{measured['attribution_seconds']:6.2f} s   "
            f"peak {measured['peak_megabytes']:5.0f} MB   recall {measured['recall']:.4f}",
            flush=True,
        )
    write_results(args.json, results)


if __name__ == "__main__":
    main()
