"""Is the estimate true on images? Fashion-MNIST, convolutional pair, removal of groups against real retraining.

2,000 images of 14 × 14, batch 50, 8-channel pair with group normalisation, alternating Adam, 20 epochs, float64; the
metric is the Fréchet distance in 12 features. Random groups of 5% are removed and the last epochs are retrained. Beside
the two schemes of ITD stand the published approximation, which takes Adam's moments for constants, and variants of the
secant: its width, noise in the parameters, layers moved in turn, and influence averaged over the runs of all seeds.

    python -m benchmarks.accuracy_images [--activation silu leaky_relu relu] [--last-epochs 1 3] [--variants] [--json F]
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from scipy.stats import kendalltau, pearsonr
from sklearn.base import clone
from torch import nn

from benchmarks.environment import write_results
from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.datasets import load_fashion_mnist
from ganclean.exceptions import NonFiniteError
from ganclean.metrics import FID, train_classifier
from ganclean.optim import Adam
from ganclean.validation import estimation_accuracy

ACTIVATIONS = {"silu": nn.SiLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "relu": nn.ReLU}
LATENT = 16


def conv_pair(activation, seed: int) -> tuple[nn.Module, nn.Module]:
    """An 8-channel convolutional pair for 14 × 14 images, in float64."""
    torch.manual_seed(seed)
    generator = nn.Sequential(
        nn.Linear(LATENT, 8 * 7 * 7),
        nn.Unflatten(1, (8, 7, 7)),
        nn.GroupNorm(4, 8),
        activation(),
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1),
        nn.GroupNorm(4, 8),
        activation(),
        nn.Conv2d(8, 1, 3, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        activation(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GroupNorm(4, 8),
        activation(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 1),
    )
    return generator.double(), discriminator.double()


class FrozenMoments(ITD):
    """The published approximation: the derivative does not flow through Adam's moments."""

    def _adjoint(self, delta):
        adjoint = super()._adjoint(delta)

        def without_moments(step, state, after, record, real, cotangents, **settings):
            frozen = [
                c._replace(
                    moments_generator=_zeros(c.moments_generator), moments_discriminator=_zeros(c.moments_discriminator)
                )
                for c in cotangents
            ]
            return adjoint(step, state, after, record, real, frozen, **settings)

        return without_moments


def _zeros(moments):
    return {moment: {name: torch.zeros_like(t) for name, t in tensors.items()} for moment, tensors in moments.items()}


class LayersInTurn(ITD):
    """Moves tensors in turn whose relative moves differ by more than a factor: each layer gets a width of its own."""

    spread = 3.0

    def _adjoint(self, delta):
        adjoint = super()._adjoint(delta)
        return partial(adjoint.func, secant=adjoint.keywords["secant"]._replace(spread=self.spread))


SCHEMES = {
    "secant, δ = 1e-2": ITD(),
    "exact": ITD(derivative="exact"),
    "exact, moments frozen": FrozenMoments(derivative="exact"),
    "secant, δ = 1e-3": ITD(delta=1e-3),
    "secant, δ = 3e-2": ITD(delta=3e-2),
}
VARIANTS = {
    "secant, δ = 2e-2": ITD(delta=2e-2),
    "secant, δ = 6e-2": ITD(delta=6e-2),
    "secant, δ = auto": ITD(delta="auto"),
    "secant, 4 draws of noise": ITD(n_perturbations=4),
    "secant, δ = 2e-2, 4 draws of noise": ITD(delta=2e-2, n_perturbations=4),
    "secant, layers in turn": LayersInTurn(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=ACTIVATIONS, nargs="*", default=list(ACTIVATIONS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--last-epochs", type=int, nargs="*", default=[1])
    parser.add_argument("--removals", type=int, default=40)
    parser.add_argument("--variants", action="store_true", help="try all variants of the secant")
    parser.add_argument("--quick", action="store_true", help="10 removals after 4 epochs of training")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n_epochs, removals = (4, 10) if args.quick else (20, args.removals)
    X, y = load_fashion_mnist("train", size=14)
    X_val, _ = load_fashion_mnist("test", size=14)
    extractor = train_classifier(X, y, n_features=12).double().features
    schemes = SCHEMES | VARIANTS if args.variants else SCHEMES
    rows = []
    print("activation  epochs  seed  scheme                              Kendall τ  Pearson r  growth")
    for activation in args.activation:
        for last_epochs in args.last_epochs:
            truths, traced = [], {name: [] for name in schemes}
            for seed in args.seeds:
                cleanser = GANInfluence(
                    *conv_pair(ACTIVATIONS[activation], seed),
                    trainer=GANTrainer(
                        optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)),
                        n_epochs=n_epochs,
                        batch_size=50,
                        latent_dim=LATENT,
                        checkpoint_every=1,
                    ),
                    metric=FID(extractor, n_samples=1000),
                    backend=ITD(last_epochs=last_epochs),
                    random_state=seed,
                ).fit(X, X_val=X_val)
                truth = estimation_accuracy(cleanser, removals, last_epochs, group_size=100, random_state=seed)
                truths.append(truth)
                for name, backend in schemes.items():
                    backend = clone(backend).set_params(last_epochs=last_epochs)
                    try:
                        influence = backend.fit(cleanser.trajectory_, cleanser.gradients_).influences_["FID"]
                        growth = backend.growth_["FID"]
                    except NonFiniteError:
                        influence, growth = np.zeros(len(X)), float("inf")
                    traced[name].append(influence)
                    report(rows, args.json, activation, last_epochs, seed, name, influence, truth, growth)
            for name in ("secant, δ = 1e-2", "secant, δ = 3e-2") if len(args.seeds) > 1 else ():
                mean = np.mean([influence / np.linalg.norm(influence) for influence in traced[name]], axis=0)
                for seed, truth in zip(args.seeds, truths):
                    report(rows, args.json, activation, last_epochs, seed, f"{name}, mean of runs", mean, truth)


def report(rows, path, activation, last_epochs, seed, scheme, influence, truth, growth=float("nan")) -> None:
    """Compare the summed influence of the removed groups with the truth, print and write it."""
    predicted = np.array([influence[removed].sum() for removed in truth.removals])
    # An adjoint that exploded predicts nothing.
    constant = not np.ptp(predicted)
    tau = 0.0 if constant else float(kendalltau(predicted, truth.true).statistic)
    r = 0.0 if constant else float(pearsonr(predicted, truth.true).statistic)
    rows.append(
        {
            "activation": activation,
            "last_epochs": last_epochs,
            "seed": seed,
            "scheme": scheme,
            "kendall_tau": tau,
            "pearson": r,
            "growth": growth,
        }
    )
    print(f"{activation:10s} {last_epochs:7d} {seed:5d}  {scheme:35s} {tau:9.2f} {r:10.2f}  {growth:.1e}", flush=True)
    write_results(path, {"rows": rows})


if __name__ == "__main__":
    main()
