"""What tracing a large run would take: disk, memory and hours, from constants measured here and from the reader's own.

Measured: the bytes of a stored state for each parameter, on networks of several sizes in float32 with Adam's two
moments and a moving average of the generator, and how fast the folder store writes such states to the disk and reads
them from it. From ``benchmarks/results/step_cost.json``: a traced step in units of a training step. From the library's
own planning of runs: which states are kept, and how often a step is recomputed within a memory budget. The time of a
training step and the price of an hour are the reader's, and their defaults are examples. No run of this size was made.

    python -m benchmarks.large_run_plan [--seconds-per-step 0.5] [--price 3] [--steps 100000] [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.environment import write_results
from ganclean import GANTrainer
from ganclean.dynamics.state import TrainingState
from ganclean.optim import Adam
from ganclean.runs.checkpoints import CheckpointPlan, size_of
from ganclean.runs.store import FolderStore

STEP_COST = Path(__file__).parent / "results" / "step_cost.json"
# Parameters of the generator and of the discriminator, in different proportions, so that both weigh in differently.
SIZES = ((100_000, 100_000), (800_000, 200_000), (1_000_000, 4_000_000), (15_000_000, 5_000_000))
GB = 1e9


def state_of(n_generator: int, n_discriminator: int) -> tuple[TrainingState, int, int]:
    """Return a training state of networks with about so many parameters, and their exact numbers."""
    widths = [int(n**0.5) for n in (n_generator, n_discriminator)]
    generator, discriminator = (nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, 1)) for w in widths)
    trainer = GANTrainer(optimizer=Adam(), latent_dim=widths[0], ema_decay=0.999)
    counts = [sum(p.numel() for p in module.parameters()) for module in (generator, discriminator)]
    return trainer.make_step(generator, discriminator).initial_state(), counts[0], counts[1]


def measured(sizes: tuple[int, int], n_states: int, folder: str) -> dict[str, float]:
    """Return the bytes of a stored state, and the bytes per second that the store writes and reads."""
    state, n_generator, n_discriminator = state_of(*sizes)
    store = FolderStore(folder)
    store.start({"n_steps": n_states}, state)
    written, read = [], []
    for index in range(1, n_states + 1):
        begin = time.perf_counter()
        store.checkpoint(index, state)
        on_disk(folder, index)
        written.append(time.perf_counter() - begin)
    for index in range(1, n_states + 1):
        begin = time.perf_counter()
        store.state(index)
        read.append(time.perf_counter() - begin)
    size = state_file(folder, 1).stat().st_size
    return {
        "generator": n_generator,
        "discriminator": n_discriminator,
        "bytes_in_memory": size_of(state),
        "bytes_on_disk": size,
        "written_per_second": size / float(np.median(written)),
        "read_per_second": size / float(np.median(read)),
    }


def state_file(folder: str, index: int) -> Path:
    """Return the file of the state before a step."""
    return Path(folder) / f"state-{index:08d}.safetensors"


def on_disk(folder: str, index: int) -> None:
    """Wait until a state is on the disk, and let go of what the system keeps of it in memory."""
    descriptor = os.open(state_file(folder, index), os.O_RDONLY)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def bytes_per_parameter(found: list[dict[str, float]]) -> tuple[float, float]:
    """Return the bytes of a stored state for each parameter of both networks, by regression."""
    counts = np.array([[one["generator"], one["discriminator"]] for one in found])
    of_generator, of_discriminator = np.linalg.lstsq(counts, [one["bytes_on_disk"] for one in found])[0]
    return float(of_generator), float(of_discriminator)


def row_of(plan: CheckpointPlan, args: argparse.Namespace, ratio: float, speed: dict[str, float]) -> dict[str, float]:
    """Return what tracing by a plan takes."""
    n_traced = plan.n_steps - plan.start
    # An upper bound: as if every traced step were recomputed as often as any is.
    computing = n_traced * args.seconds_per_step * (ratio + plan.recomputations)
    store = plan.bytes_kept / speed["written_per_second"] + plan.bytes_kept / speed["read_per_second"]
    hours = (computing + store) / 3600
    return {
        "traced": n_traced,
        "every": plan.every,
        "kept": plan.n_kept,
        "disk_gb": plan.bytes_kept / GB,
        "memory_gb": plan.bytes_held / GB,
        "recomputations": plan.recomputations,
        "hours_store": store / 3600,
        "hours": hours,
        "price": hours * args.price,
    }


def table(rows: list[dict[str, float]]) -> str:
    """Return a table in Markdown."""
    lines = [
        "| traced steps | a state kept every | kept on disk, GB | held in memory, GB | a step recomputed, at most "
        "| hours of tracing, at most | of these for the disk | price |",
        "| --- |" + " --- |" * 7,
    ]
    for row in rows:
        lines.append(
            f"| {row['traced']:,} | {row['every']:,} | {row['disk_gb']:,.0f} | {row['memory_gb']:,.0f} "
            f"| {row['recomputations']} × | {row['hours']:,.1f} | {row['hours_store']:,.1f} | {row['price']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=float, default=30e6, help="trained parameters")
    parser.add_argument("--discriminator", type=float, default=29e6)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--instances", type=int, default=70_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds-per-step", type=float, default=0.5, help="yours; the default is an example")
    parser.add_argument("--price", type=float, default=3.0, help="of an hour, yours; the default is an example")
    parser.add_argument("--memory", type=float, default=30.0, help="GB for states, where the networks are")
    parser.add_argument("--every", type=int, nargs="*", default=[30, 100, 300, 1000], help="steps between kept states")
    parser.add_argument("--last-epochs", type=int, nargs="*", default=[1, 5, 20], help="beside the whole run")
    parser.add_argument("--quick", action="store_true", help="measure the smallest two sizes only")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for sizes in SIZES[:2] if args.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(sizes, 5, folder))
        one = found[-1]
        print(
            f"{one['generator']:10,.0f} + {one['discriminator']:9,.0f} parameters: "
            f"{one['bytes_in_memory']:11,.0f} bytes in memory, {one['bytes_on_disk']:11,.0f} on disk; "
            f"{one['written_per_second'] / 2**20:,.0f} MiB/s written, {one['read_per_second'] / 2**20:,.0f} MiB/s read"
        )
    of_generator, of_discriminator = bytes_per_parameter(found)
    state_bytes = round(of_generator * args.generator + of_discriminator * args.discriminator)
    secant = json.loads(STEP_COST.read_text())["results"]["secant ITD step"]["ratio"][1]
    training = args.steps * args.seconds_per_step / 3600
    steps_per_epoch = -(-args.instances // args.batch)
    print(
        f"\none state: {of_generator:.2f} bytes for each parameter of the generator, {of_discriminator:.2f} of the "
        f"discriminator; {state_bytes / GB:.3f} GB, of which {args.memory:g} GB of memory hold "
        f"{int(args.memory * GB // state_bytes)}\ntraining: {args.steps:,} steps of {args.seconds_per_step:g} s "
        f"({args.steps / steps_per_epoch:.0f} epochs), {training:.1f} hours, {training * args.price:,.0f} at "
        f"{args.price:g} an hour\ntracing: {secant:.2f} training steps a step, and recomputation\n"
    )
    rows = []
    for epochs in [*args.last_epochs, None]:
        start = 0 if epochs is None else max(0, args.steps - epochs * steps_per_epoch)
        for every in args.every:
            if every < args.steps - start:
                plan = CheckpointPlan(every, args.steps, start, state_bytes, True, round(args.memory * GB))
                rows.append(row_of(plan, args, secant, found[-1]))
    print(table(rows))
    inputs = {k: v for k, v in vars(args).items() if k not in ("json", "quick")}
    write_results(args.json, {"inputs": inputs, "measured": found, "traced_step": secant, "plans": rows})


if __name__ == "__main__":
    main()
