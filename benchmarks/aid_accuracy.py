"""What is the final model alone good for? AID by three solvers and ITD against one epoch of real retraining.

Digits, 8 × 8, a DCGAN-like pair with group normalisation, alternating Adam, float64; the metric is the Fréchet distance
of pixels. Random groups of 5%, and single instances, are removed, and the last epoch is retrained. Beside Kendall's τ
of each solver stand its products, its residual, and the rank correlation of its influences with those of GMRES at the
same damping; "ekfac/10" stops after 10 products, as large networks would, and "gmres/10" too.

    python -m benchmarks.aid_accuracy [--pairs dcgan] [--solvers gmres] [--damping 0.3 1] [--seeds 0] [--quick]
        [--json F]
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID, ITD
from ganclean.exceptions import NonFiniteError
from ganclean.metrics import FID
from ganclean.optim import Adam
from ganclean.validation import counterfactual_retrain

LATENT = 8
SOLVERS = ("gmres", "ekfac", "neumann", "gmres/10", "ekfac/10")


def dcgan(seed: int) -> tuple[nn.Module, nn.Module]:
    """A pair with one transposed convolution, one convolution and one linear layer each, smooth."""
    torch.manual_seed(seed)
    generator = nn.Sequential(
        nn.Linear(LATENT, 8 * 4 * 4),
        nn.Unflatten(1, (8, 4, 4)),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.Conv2d(8, 1, 3, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 1),
    )
    return generator.double(), discriminator.double()


def convolutional(seed: int) -> tuple[nn.Module, nn.Module]:
    """A pair of layers that all have Kronecker factors: convolutions and linear layers alone."""
    torch.manual_seed(seed)
    generator = nn.Sequential(
        nn.Linear(LATENT, 8 * 4 * 4),
        nn.Unflatten(1, (8, 4, 4)),
        nn.SiLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 1, 3, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 1),
    )
    return generator.double(), discriminator.double()


def linear(seed: int) -> tuple[nn.Module, nn.Module]:
    """A pair of perceptrons."""
    torch.manual_seed(seed)
    generator = nn.Sequential(
        nn.Linear(LATENT, 24), nn.SiLU(), nn.Linear(24, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))
    )
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.SiLU(), nn.Linear(24, 1))
    return generator.double(), discriminator.double()


PAIRS = {"dcgan": dcgan, "convolutional": convolutional, "linear": linear}


def solved(trajectory, gradients, name: str, damping: float, quick: bool) -> tuple[np.ndarray, dict]:
    """Influences by one solver, and how well it did."""
    solver, _, limit = name.partition("/")
    max_iter = int(limit) if limit else (50 if quick else 100)
    backend = AID(solver=solver, damping=damping, tol=1e-3, max_iter=max_iter, depth=max_iter)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        backend.fit(trajectory, gradients)
    (key,) = backend.influences_
    info = {k: v for k, v in backend.solver_info_[key].items() if k != "seconds"}
    return backend.influences_[key], {"seconds": time.perf_counter() - begin, **info, **backend.gradient_norms_}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=["dcgan", "convolutional", "linear"], choices=list(PAIRS))
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), help="NAME, or NAME/PRODUCTS to stop earlier")
    parser.add_argument("--damping", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--instances", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--removals", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a fraction of everything, to see that it runs")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.quick:
        args.instances, args.epochs, args.removals = 200, 10, 10
    X = load_digits().images[: args.instances, None] / 8 - 1
    results = []

    def show(pair, seed, damping, name, influence, reference, truths, info):
        row = {"pair": pair, "seed": seed, "damping": damping, "solver": name, **info}
        if reference is not None:
            row["spearman_with_gmres"] = float(spearmanr(reference, influence)[0])
        for kind, (removals, true) in truths.items():
            predicted = np.array([influence[r].sum() for r in removals])
            row[f"tau_{kind}"] = float(kendalltau(predicted, true)[0])
            row[f"pearson_{kind}"] = float(pearsonr(predicted, true)[0])
        results.append(row)
        print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    for pair in args.pairs:
        for seed in args.seeds:
            trainer = GANTrainer(
                n_epochs=args.epochs,
                batch_size=50,
                latent_dim=LATENT,
                # A low rate lets training settle.
                optimizer=Adam(lr=5e-4, betas=(0.5, 0.99), weight_decay=1e-3),
            )
            metric = FID(feature_extractor="pixels", n_samples=500)
            cleanser = GANInfluence(
                *PAIRS[pair](seed), trainer=trainer, metric=metric, backend=ITD(last_epochs=1), random_state=seed
            ).fit(X)
            rng = np.random.default_rng(seed)
            groups = [rng.permutation(len(X))[: len(X) // 20] for _ in range(args.removals)]
            singles = list(rng.permutation(len(X))[: args.removals, None])
            values = np.asarray(counterfactual_retrain(cleanser, [[], *groups, *singles], last_epochs=1))
            true = values[1:] - values[0]
            truths = {"groups": (groups, true[: len(groups)]), "singles": (singles, true[len(groups) :])}
            show(pair, seed, None, "itd", cleanser.influence_, None, truths, {})
            for damping in args.damping:
                reference = None
                for name in args.solvers:
                    try:
                        influence, info = solved(cleanser.trajectory_, cleanser.gradients_, name, damping, args.quick)
                    except NonFiniteError as error:
                        print(f"{pair} damping={damping} {name}: {str(error)[:80]}", flush=True)
                        continue
                    reference = influence if reference is None else reference
                    show(pair, seed, damping, name, influence, reference, truths, info)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_results(args.json, {"settings": settings, "rows": results})


if __name__ == "__main__":
    main()
