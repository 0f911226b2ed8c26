"""Does AID by EK-FAC fit a StyleGAN2-like pair on a small machine? 20 million frozen parameters, low rank.

A mapping perceptron, modulated 3 × 3 convolutions with demodulation, 32 × 32 colour images, a residual discriminator;
every linear layer and convolution of both networks carries a trained correction of rank 8, nothing else is trained.
Printed are the peak of the resident memory, and the seconds for the factors, the solution, and the score of one
instance beside a plain forward pass of it through the discriminator.

The networks are random: this measures cost, not accuracy.

    python -m benchmarks.lora_scale [--instances 64] [--products 3] [--quick] [--json F]
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from itertools import pairwise

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torch.nn import functional as F

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID
from ganclean.backends.ekfac import GameInverse
from ganclean.backends.solvers import Settings, solve
from ganclean.dynamics.network import Call
from ganclean.metrics import FID


class LowRank(nn.Module):
    """A frozen Linear or Conv2d layer and a trained correction of low rank."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        if isinstance(base, nn.Linear):
            self.down: nn.Module = nn.Linear(base.in_features, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, base.out_features, bias=False)
        else:
            # The kernel belongs to the second factor: so the largest Kronecker factor is as large as the channels.
            self.down = nn.Conv2d(base.in_channels, rank, 1, bias=False)
            self.up = nn.Conv2d(
                rank, base.out_channels, base.kernel_size, stride=base.stride, padding=base.padding, bias=False
            )
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_low_rank(module: nn.Module, rank: int) -> nn.Module:
    """Freeze a module and give each Linear and Conv2d inside a correction."""
    module.requires_grad_(False)
    for name, child in list(module.named_children()):
        if type(child) in (nn.Linear, nn.Conv2d):
            setattr(module, name, LowRank(child, rank))
        else:
            with_low_rank(child, rank)
    return module


class Modulated(nn.Module):
    """A convolution of features scaled by a style, normalised afterwards: StyleGAN2's, with the scale at the input."""

    def __init__(self, width_in: int, width_out: int, width_style: int):
        super().__init__()
        self.style = nn.Linear(width_style, width_in)
        self.convolution = nn.Conv2d(width_in, width_out, 3, padding=1)

    def forward(self, x, w):
        x = self.convolution(x * (1 + self.style(w))[:, :, None, None])
        return F.silu(x * x.square().mean((1, 2, 3), keepdim=True).add(1e-8).rsqrt())


class Generator(nn.Module):
    """Mapping network and synthesis from 4 × 4 to 32 × 32."""

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(latent_dim, width), nn.SiLU())
        for _ in range(7):
            self.mapping.extend([nn.Linear(width, width), nn.SiLU()])
        self.constant = nn.Parameter(torch.randn(width, 4, 4))
        widths = [width, width, width, width // 2, width // 4, width // 8]
        self.blocks = nn.ModuleList(Modulated(a, b, width) for a, b in pairwise(widths))
        self.image = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, z):
        w = self.mapping(F.normalize(z, dim=1) * z.shape[1] ** 0.5)
        x = self.constant.expand(len(z), -1, -1, -1)
        for i, block in enumerate(self.blocks):
            x = block(x if i < 2 else F.interpolate(x, scale_factor=2.0), w)
        return torch.tanh(self.image(x))


class Block(nn.Module):
    """A residual block that halves the sides."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.first = nn.Conv2d(width_in, width_in, 3, padding=1)
        self.second = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1, bias=False)

    def forward(self, x):
        y = F.avg_pool2d(F.silu(self.second(F.silu(self.first(x)))), 2)
        return (y + self.skip(F.avg_pool2d(x, 2))) / 2**0.5


def discriminator(width: int) -> nn.Module:
    """A residual discriminator of 32 × 32 images."""
    widths = [width // 8, width // 4, width // 2, width]
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 1),
        nn.SiLU(),
        *(Block(a, b) for a, b in pairwise(widths)),
        nn.Conv2d(width, width, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(width * 4, width),
        nn.SiLU(),
        nn.Linear(width, 1),
    )


class Printed(dict):
    """Results that are printed as they come."""

    def __setitem__(self, key: str, value: float) -> None:
        super().__setitem__(key, value)
        print(f"{key:36s} {value:,.3f}" if isinstance(value, float) else f"{key:36s} {value:,}", flush=True)


def clocked(function, *args):
    """Return what a function returns, and its seconds."""
    begin = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - begin


def peak() -> float:
    """Return the largest resident memory so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--instances", type=int, default=64, help="that are scored")
    parser.add_argument("--batch", type=int, default=16, help="instances that the Jacobian is computed from")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--products", type=int, default=3)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--compare", action="store_true", help="solve by gmres too, with as many products")
    parser.add_argument("--quick", action="store_true", help="a narrow pair, to see that it runs")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.width = 64
    torch.manual_seed(0)
    X = torch.rand(args.instances, 3, 32, 32) * 2 - 1
    pair = [with_low_rank(m, args.rank) for m in (Generator(args.width, args.width), discriminator(args.width))]
    results = Printed()
    results["parameters"] = sum(p.numel() for m in pair for p in m.parameters())
    results["trained"] = sum(p.numel() for m in pair for p in m.parameters() if p.requires_grad)
    cleanser = GANInfluence(
        *pair,
        trainer=GANTrainer(latent_dim=args.width, batch_size=args.chunk),
        metric=FID(feature_extractor=nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), n_samples=64),
        backend=AID(
            solver="ekfac",
            damping=args.damping,
            max_iter=args.products,
            n_batch=args.batch,
            batch_size=args.chunk,
            tol=1e-2,
        ),
        random_state=0,
    )
    warnings.simplefilter("ignore", ConvergenceWarning)
    _, results["seconds_fit"] = clocked(lambda: cleanser.fit(X, trained=True))
    results["peak_gib_fit"] = peak()

    trajectory, backend = cleanser.trajectory_, cleanser.backend_
    (info,) = backend.solver_info_.values()
    results["products"], results["damped_residual"] = info["iterations"], info["damped_residual"]
    results["seconds_solution_with_factors"] = info["seconds"]
    game = backend._game(trajectory, trajectory.source, args.batch)
    (gradient,) = cleanser.gradients_.values()
    b = game.cotangent(gradient)
    inverse, results["seconds_factors"] = clocked(GameInverse, game, args.damping)
    _, results["seconds_one_sweep"] = clocked(inverse, b)
    _, results["seconds_one_product"] = clocked(game.rmatvec, b)
    if args.compare:
        settings = Settings(damping=args.damping, tol=1e-2, max_iter=args.products)
        (_, info), results["seconds_solution_gmres"] = clocked(solve, "gmres", game, b, settings)
        results["products_gmres"], results["damped_residual_gmres"] = info["iterations"], info["damped_residual"]
    u = torch.randn(sum(game.sizes))

    every = backend._game(trajectory, trajectory.source)
    forward = 0.0
    state = trajectory.state(len(trajectory))
    with torch.no_grad():
        for record in every.records:
            real = X[record.indices]
            judge = trajectory.step.networks["D"]
            forward += clocked(judge, state.discriminator, {}, Call((real,)))[1]
    _, scoring = clocked(every.along, u)
    results["milliseconds_score_of_an_instance"] = 1e3 * scoring / args.instances
    results["milliseconds_forward_of_an_instance"] = 1e3 * forward / args.instances
    results["score_in_forwards"] = scoring / forward
    results["peak_gib"] = peak()
    results["threads"] = torch.get_num_threads()
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_results(args.json, {"settings": settings, **results})


if __name__ == "__main__":
    main()
