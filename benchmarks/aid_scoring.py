"""What it costs to score 10,000 instances with AID, in units of gradients of single instances.

⟨u_D, ∇ℓ_D(x_j)⟩ for every instance of 28 × 28 images by a DCGAN discriminator of 37,000 parameters, in chunks of 256,
one thread: one forward-mode derivative (``AID(derivative="exact")``), two forward passes (``"secant"``), and for
comparison the gradients of single instances by `vmap(grad)`, multiplied by u_D. All three score the same chunk in turn,
and ratios of processor time are taken chunk by chunk, since machines are noisy. Numbers are compared in float32, and
in float64 on one chunk: those of the forward-mode derivative are the same up to rounding, those of the secant differ by
what it sees in the kinks of LeakyReLU.

    python -m benchmarks.aid_scoring [--instances 10000] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.environment import write_results
from benchmarks.step_cost import LATENT, dcgan
from ganclean import GANTrainer
from ganclean.backends.game import Game, draw_chunks
from ganclean.data import DataSource
from ganclean.dynamics.state import unravel
from ganclean.recipes.adversarial import adversarial_loss

CHUNK = 256
NAMES = {"exact": "forward-mode derivative", "secant": "two forward passes", "vmap": "vmap(grad)"}


def make_game(source: DataSource, dtype: torch.dtype) -> Game:
    """The game of untrained networks on all instances of a source."""
    torch.manual_seed(0)
    step = GANTrainer(latent_dim=LATENT).make_step(*(network.to(dtype) for network in dcgan()))
    return Game(step, step.initial_state(), source, draw_chunks(step, len(source), CHUNK))


def by_single_gradients(game: Game, u: Tensor) -> Tensor:
    """Return ⟨u, ∇ℓ(x)⟩ by the gradients of single instances."""
    theta, judge = game.state.discriminator, adversarial_loss(game.step.updates)
    direction = unravel(game.split(u)["D"], theta)

    def loss(params, x):
        output = functional_call(game.step.discriminator, params, (x[None],)).reshape(1)
        return judge.real(output).sum()

    parts = []
    for record in game.records:
        gradients = vmap(grad(loss), in_dims=(None, 0))(theta, game.source[record.indices])
        parts.append(sum(g.flatten(1) @ direction[n].flatten() for n, g in gradients.items()))
    return torch.cat(parts)  # type: ignore[arg-type]


def largest_errors(found: dict[str, Tensor]) -> dict[str, float]:
    """Return how far the scores are from those by single gradients, relative to the largest of these."""
    expected = found["vmap"]
    return {name: float((found[name] - expected).abs().max() / expected.abs().max()) for name in ("exact", "secant")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.rand(args.instances, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    game = make_game(DataSource(images), torch.float32)
    u = torch.randn(sum(game.sizes), generator=torch.Generator().manual_seed(1))
    runs: dict[str, Callable[[Game, Tensor], Tensor]] = {
        "exact": lambda one, v: replace(one, derivative="exact").along(v),
        "secant": lambda one, v: replace(one, derivative="secant").along(v),
        "vmap": by_single_gradients,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    scores: dict[str, list[Tensor]] = {name: [] for name in runs}
    for run in runs.values():
        run(replace(game, records=game.records[:1]), u)
    for record in game.records:
        chunk = replace(game, records=(record,))
        for name, run in runs.items():
            begin = time.process_time()
            scores[name].append(run(chunk, u))
            seconds[name].append(time.process_time() - begin)
    single = np.array(seconds["vmap"])
    errors = largest_errors({name: torch.cat(parts) for name, parts in scores.items()})
    precise = make_game(DataSource(images[:CHUNK].double()), torch.float64)
    precise_errors = largest_errors({name: run(precise, u.double()) for name, run in runs.items()})
    print(f"{args.instances} instances, {len(game.split(u)['D'])} parameters, chunks of {CHUNK}, one thread")
    results: dict[str, dict] = {}
    for name, values in seconds.items():
        low, median, high = np.quantile(single / np.array(values), [0.25, 0.5, 0.75])
        results[NAMES[name]] = {"seconds": sum(values), "times faster": [low, median, high]}
        line = f"{NAMES[name]:24s} {sum(values):7.2f} s   {median:.2f} × as fast  (quartiles {low:.2f}, {high:.2f})"
        if name in errors:
            results[NAMES[name]] |= {"error float32": errors[name], "error float64": precise_errors[name]}
            line += f"   largest error {errors[name]:.1e}, in float64 {precise_errors[name]:.1e}"
        print(line)
    write_results(args.json, results)


if __name__ == "__main__":
    main()
