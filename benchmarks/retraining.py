"""How fast many counterfactual runs are: one after another, with their common beginning shared, and all at once.

The last epoch without each of 100 instances, for the perceptrons of the 2-D normal data, a small convolutional pair and
the DCGAN pair. "One by one" replays the whole epoch for each removal; the library starts each run where it departs from
the recorded one, and stacks the runs of small networks by `torch.func.vmap`; or, where the trainer compiles, makes them
one after another by compiled steps. The ways run in turn on one thread; the ratios of processor time are taken turn by
turn, since machines are noisy.

    python -m benchmarks.retraining [--turns 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy_images import conv_pair
from benchmarks.accuracy_normal import perceptron
from benchmarks.environment import write_results
from benchmarks.step_cost import dcgan
from ganclean import GANTrainer
from ganclean.data import DataSource
from ganclean.optim import SGD, Adam
from ganclean.runs.replay import Replay, weights_without

N_RUNS = 100


def replay_of(networks, sample_shape, n_samples, **settings) -> Replay:
    """Train two epochs and return the replay of the last one."""
    trainer = GANTrainer(n_epochs=2, **settings)
    step = trainer.make_step(*networks)
    like = next(step.generator.parameters())
    data = np.tanh(np.random.default_rng(0).normal(size=(n_samples, *sample_shape)))
    source = DataSource(data).cast(like.dtype, like.device)
    trajectory = trainer.train(step, source, trainer.describe(step, n_samples, ""), traced_epochs=1, random_state=0)
    return Replay.of(trajectory, trajectory.start_of_last(1))


def normal(**settings) -> Replay:
    """The perceptrons of the 2-D normal data (Terashita et al., 2021), 10,000 points, batches of 100."""
    networks = perceptron([10, 32, 32, 2], nn.ReLU, 0), perceptron([2, 64, 64, 1], nn.ReLU, 1)
    return replay_of(
        networks,
        (2,),
        10_000,
        optimizer=SGD(lr=1e-3),
        update="simultaneous",
        latent_dim=10,
        batch_size=100,
        **settings,
    )


def small_convolutions(**settings) -> Replay:
    """An 8-channel pair in float64 on 14 × 14 images, batches of 50."""
    settings |= {"optimizer": Adam(lr=1e-3), "latent_dim": 16, "batch_size": 50}
    return replay_of(conv_pair(nn.SiLU, 0), (1, 14, 14), 1000, **settings)


def large_convolutions(**settings) -> Replay:
    """A DCGAN pair of 271,000 parameters on 28 × 28 images, batches of 100."""
    settings |= {"optimizer": Adam(lr=2e-4), "latent_dim": 64, "batch_size": 100}
    return replay_of(dcgan(), (1, 28, 28), 1000, **settings)


CASES: dict[str, tuple[Callable[..., Replay], int]] = {
    # How many of the runs are really made one by one, since they all take the same time.
    "2-D normal, perceptrons": (normal, 5),
    "14 × 14, 8 channels": (small_convolutions, 5),
    "28 × 28, DCGAN": (large_convolutions, 2),
}


def one_by_one(replay: Replay, weights: torch.Tensor) -> None:
    """Replay all steps for each row of weights."""
    for row in weights:
        replay._alone(replay.first, replay.steps.start, row, renormalize=False)


def measured(replay: Replay, compiled: Replay, n_alone: int, turns: int) -> dict[str, list[float]]:
    """Return for each way the seconds of a run, in each turn."""
    n_samples = len(replay.source)
    rows = np.random.default_rng(0).permutation(n_samples)[:N_RUNS, None]
    weights = weights_without(list(rows), n_samples)
    # Of those that take the same time each, a few are enough. They depart when all do.
    n_shared = 4 * n_alone
    n_together = N_RUNS if replay._is_dispatch_bound() else 8
    ways = {
        "one by one": (partial(one_by_one, replay, weights[:n_alone]), n_alone),
        "shared beginning": (partial(replay.map, _nothing, weights[:n_shared], vectorize=False), n_shared),
        "compiled": (partial(compiled.map, _nothing, weights[:n_shared], vectorize=False), n_shared),
        "all at once": (partial(replay.map, _nothing, weights[:n_together], vectorize=True), n_together),
    }
    compiled.map(_nothing, weights[:1], vectorize=False)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, (way, n) in ways.items():
            begin = time.process_time()
            way()
            seconds[name].append((time.process_time() - begin) / n)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for case in args.case:
        make, n_alone = CASES[case]
        replay = make()
        seconds = measured(replay, make(compile=True), n_alone, args.turns)
        automatic = "all at once" if replay._is_dispatch_bound() else "shared beginning"
        reference = np.array(seconds["one by one"])
        results[case] = {}
        print(f"{case}; the library takes: {automatic}")
        for name, each in seconds.items():
            factors = reference / np.array(each)
            results[case][name] = {"seconds_per_run": float(np.median(each)), "factors": factors.tolist()}
            print(
                f"  {name:17s} {np.median(each):8.3f} s a run   {np.median(factors):5.1f} times as fast "
                f"({factors.min():.1f} to {factors.max():.1f})",
                flush=True,
            )
        write_results(args.json, results)


def _nothing(state, run) -> None:
    """Take a final state and do nothing with it: what is timed is the training."""


if __name__ == "__main__":
    main()
