"""A long run traced completely in little memory: 20,000 steps of a GAN of a million parameters.

The trajectory lies in a folder with few of its states; the others are recomputed during the backward pass. What a
traced step costs, in processor time of one thread, is compared with a short run of the same networks whose states are
all in memory, before and after.

    python -m benchmarks.long_run [--steps 20000] [--budget-mib 700] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.environment import write_results
from ganclean import GANTrainer
from ganclean.backends import ITD
from ganclean.data import DataSource
from ganclean.metrics import SampleMean
from ganclean.metrics.evaluation import Evaluator
from ganclean.optim import Adam

BATCH, LATENT, WIDTH, N_SAMPLES = 64, 64, 660, 3200


def pair() -> tuple[nn.Module, nn.Module]:
    """Two perceptrons with a million parameters together."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(LATENT, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 64)
    )
    discriminator = nn.Sequential(
        nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)
    )
    return generator, discriminator


class Clock:
    """Notes when each phase began and ended, by the time that the processor spent on it: machines are shared."""

    def __init__(self):
        self.begun: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.process_time()
        if phase not in self.begun:
            # The first step of a phase comes with what prepares it.
            self.begun[phase], self.steps[phase] = now, -done
        self.seconds[phase] = now - self.begun[phase]
        if done == total:
            self.steps[phase] += total
            print(f"{phase}: {self.per_step(phase) * 1e3:.1f} ms a step", flush=True)

    def per_step(self, phase: str) -> float:
        return self.seconds[phase] / self.steps[phase]


def run(n_steps: int, trainer: GANTrainer) -> dict[str, float]:
    """Train and trace, and return the seconds of a step and the peak of memory."""
    torch.set_num_threads(1)
    clock = Clock()
    X = np.random.default_rng(0).normal(size=(N_SAMPLES, 64)).astype(np.float32)
    trainer.set_params(n_epochs=n_steps // (N_SAMPLES // BATCH))
    step, source = trainer.make_step(*pair()), DataSource(X)
    trajectory = trainer.train(step, source, trainer.describe(step, len(X), ""), random_state=0, progress=clock)
    latents = torch.randn(500, LATENT, generator=torch.Generator().manual_seed(0))
    metric = SampleMean(n_samples=500).fit(X)
    _, gradient = Evaluator(step, latents).gradient("mean", metric, trajectory.state(len(trajectory)))
    # What is measured here is cost: over so many steps the adjoint may grow by more than would be trusted.
    backend = ITD(max_growth=1e15).fit(trajectory, {"mean": gradient}, progress=clock)
    return {
        "training": clock.per_step("training"),
        "tracing": clock.per_step("tracing"),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "growth": backend.growth_["mean"],
    }


def trainer_of(**settings) -> GANTrainer:
    """The trainer of both runs."""
    return GANTrainer(
        optimizer=Adam(lr=5e-6, betas=(0.5, 0.99)), batch_size=BATCH, latent_dim=LATENT, ema_decay=0.999, **settings
    )


def in_child(n_steps: int, trainer: GANTrainer) -> dict[str, float]:
    """Run in a process of its own, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (n_steps, trainer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--budget-mib", type=int, default=700)
    parser.add_argument("--json")
    args = parser.parse_args()
    short = [in_child(100, trainer_of(checkpoint_every=1))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(store=folder, memory_budget=args.budget_mib * 2**20)
        long = in_child(args.steps, trainer)
        disk = sum(file.stat().st_size for file in Path(folder).iterdir())
        n_states = len(list(Path(folder).glob("state-*")))
    short.append(in_child(100, trainer_of(checkpoint_every=1)))
    reference = float(np.mean([one["tracing"] for one in short]))
    results = {
        "steps": args.steps,
        "parameters": sum(p.numel() for module in pair() for p in module.parameters()),
        "states_on_disk": n_states,
        "disk_mib": disk / 2**20,
        "peak_mib": long["peak_mib"],
        "training_ms": 1e3 * long["training"],
        "tracing_ms": 1e3 * long["tracing"],
        "tracing_in_memory_ms": [1e3 * one["tracing"] for one in short],
        "ratio": long["tracing"] / reference,
        "growth": long["growth"],
    }
    print(json.dumps(results, indent=1))
    write_results(args.json, results)


if __name__ == "__main__":
    main()
