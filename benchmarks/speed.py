"""What makes it fast: compiled steps, several metrics at once, one matrix square root.

Everything runs in turn on one thread, and ratios of processor time are taken turn by turn, since machines are noisy.
The cost of a traced step in units of an eager training step is `benchmarks.step_cost`.

    python -m benchmarks.speed [--quick] [--turns 60] [--only compiled metrics fid] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy_normal import perceptron
from benchmarks.environment import write_results
from benchmarks.pairing import in_turn, quartiles, shown
from benchmarks.step_cost import dcgan
from ganclean import GANTrainer
from ganclean.data import DataSource
from ganclean.dynamics.adjoint import exact_adjoint, secant_adjoint
from ganclean.dynamics.state import map_state
from ganclean.metrics import FID
from ganclean.optim import SGD, Adam

BATCH = 100
MINI_BATCH = 16


def perceptrons() -> tuple[nn.Module, nn.Module]:
    """The networks of the 2-D normal data (Terashita et al., 2021)."""
    return perceptron([10, 32, 32, 2], nn.ReLU, 0), perceptron([2, 64, 64, 1], nn.ReLU, 1)


NETWORKS: dict[str, tuple[Callable, tuple[int, ...], dict[str, Any]]] = {
    "perceptrons, SGD": (perceptrons, (2,), {"optimizer": SGD(lr=1e-3), "update": "simultaneous", "latent_dim": 10}),
    "perceptrons, Adam": (perceptrons, (2,), {"optimizer": Adam(lr=1e-3), "latent_dim": 10}),
    "DCGAN, Adam": (dcgan, (1, 28, 28), {"optimizer": Adam(lr=2e-4, betas=(0.5, 0.99)), "latent_dim": 64}),
}


class OneStep:
    """One step of a run, to be made and traced again and again."""

    def __init__(self, name: str, compile: bool = False):
        make, shape, settings = NETWORKS[name]
        torch.manual_seed(0)
        source = DataSource(torch.randn(1000, *shape).tanh())
        trainer = GANTrainer(batch_size=BATCH, compile=compile, **settings)
        self.step = trainer.make_step(*(network.float() for network in make()))
        self.state = self.step.initial_state()
        for record, _ in zip(trainer.draw(self.step, source, 0), range(3)):
            self.record = self.step.drawn(record, source)
            self.real = source[record.indices]
            self.before, self.state = self.state, self.step.plain(self.state, self.record, self.real)
        torch.manual_seed(1)
        like = self.step.differentiable(self.state)
        self.cotangents = [map_state(torch.randn_like, like) for _ in range(8)]

    def train(self):
        return self.step(self.before, self.record, self.real)

    def trace(self, n_metrics: int = 1, stacked: bool = False, adjoint: Callable = secant_adjoint):
        args = self.step, self.before, self.state, self.record, self.real, self.cotangents[:n_metrics]
        return adjoint(*args, stacked=stacked)


def compiled(turns: int, names: list[str]) -> dict[str, Any]:
    """Return how many times faster the steps of small networks are as compiled graphs."""
    results = {}
    for name in names:
        plain, fast = OneStep(name), OneStep(name, compile=True)
        begin = time.perf_counter()
        fast.train(), fast.trace()
        seconds = time.perf_counter() - begin
        times = in_turn(
            {"train": plain.train, "train, graph": fast.train, "trace": plain.trace, "trace, graph": fast.trace}, turns
        )
        row: dict[str, Any] = {"seconds to compile": seconds}
        for what in ("train", "trace"):
            ratios = times[what] / times[f"{what}, graph"]
            before, after = (1e3 * float(np.median(times[key])) for key in (what, f"{what}, graph"))
            row[what] = {"milliseconds": [before, after], "ratio": quartiles(ratios)}
            print(
                f"{name}: {what} {before:.2f} ms, as a graph {after:.2f} ms: {shown(ratios)} times faster", flush=True
            )
        print(f"{name}: {seconds:.0f} s to compile both graphs", flush=True)
        results[name] = row
    return results


def several_metrics(turns: int, names: list[str], counts: tuple[int, ...] = (2, 4, 8)) -> dict[str, Any]:
    """Return what tracing K metrics in one pass takes, in units of K single passes."""
    results: dict[str, Any] = {}
    for name in names:
        for scheme, adjoint in (("secant", secant_adjoint), ("exact", exact_adjoint)):
            one = OneStep(name)
            runs: dict[str, Callable[[], object]] = {"1": lambda one=one, a=adjoint: one.trace(1, adjoint=a)}
            for k in counts:
                runs[f"{k}, one after another"] = lambda one=one, a=adjoint, k=k: one.trace(k, adjoint=a)
                runs[f"{k}, stacked"] = lambda one=one, a=adjoint, k=k: one.trace(k, True, a)
            times = in_turn(runs, turns)
            row = {}
            for way, seconds in times.items():
                if way != "1":
                    ratios = seconds / (int(way.partition(",")[0]) * times["1"])
                    row[way] = quartiles(ratios)
                    print(f"{name}, {scheme}: {way}: {shown(ratios)} of as many single passes", flush=True)
            results[f"{name}, {scheme}"] = row
    return results


def fid_gradient(turns: int, n_samples: int, n_features: int) -> dict[str, Any]:
    """Return how many times faster FID's gradient in all features is by one square root than by one per mini-batch."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(n_features, n_features, generator=rng) / n_features**0.5
    metric = FID("pixels").fit(torch.randn(n_samples, n_features, generator=rng) @ mix + 0.1)
    features = torch.randn(n_samples, n_features, generator=rng).double() @ mix.double()

    def whole() -> torch.Tensor:
        leaf = features.clone().requires_grad_()
        return torch.autograd.grad(metric.reduce(leaf), leaf)[0]

    def mini_batch() -> torch.Tensor:
        # The distance is a function of all samples, of which a mini-batch has a graph.
        leaf = features[:MINI_BATCH].clone().requires_grad_()
        return torch.autograd.grad(metric.reduce(torch.cat([leaf, features[MINI_BATCH:]])), leaf)[0]

    deviation = float((whole()[:MINI_BATCH] - mini_batch()).norm() / mini_batch().norm())
    times = in_turn({"whole": whole, "mini-batch": mini_batch}, turns)
    n_batches = -(-n_samples // MINI_BATCH)
    ratios = n_batches * times["mini-batch"] / times["whole"]
    seconds = [float(np.median(times[name])) for name in ("whole", "mini-batch")]
    print(
        f"FID's gradient, {n_samples} samples of {n_features} features: {seconds[0]:.1f} s; {n_batches} mini-batches "
        f"of {MINI_BATCH} at {seconds[1]:.1f} s each: {shown(ratios)} times faster; they agree to {deviation:.0e}"
    )
    return {
        "samples": n_samples,
        "features": n_features,
        "seconds": dict(zip(("whole", "one mini-batch"), seconds)),
        "ratio": quartiles(ratios),
        "deviation": deviation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns, small sizes")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=["compiled", "metrics", "fid"])
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    turns = 3 if args.quick else args.turns
    names = list(NETWORKS)[1:2] if args.quick else list(NETWORKS)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "compiled": lambda: compiled(turns, names[:2]),
        "metrics": lambda: several_metrics(turns // 2 + 1, names),
        "fid": lambda: fid_gradient(1 if args.quick else 3, *((500, 128) if args.quick else (5000, 2048))),
    }
    write_results(args.json, {name: parts[name]() for name in args.only or parts})


if __name__ == "__main__":
    main()
