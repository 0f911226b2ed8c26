"""What one traced step costs, in units of an eager PyTorch training step on the same networks.

A DCGAN pair of 271,000 parameters on 28 × 28 images, batch 100, alternating Adam, one thread. The eager step, the
recorded training step and the traced step, of the recipe and of the same GAN as objectives, run in turn, and the
ratios of processor time are taken turn by turn, since machines are noisy.

    python -m benchmarks.step_cost [--turns 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import softplus

from benchmarks.environment import write_results
from benchmarks.pairing import in_turn, quartiles, shown
from ganclean import GANTrainer, Update
from ganclean.data import DataSource
from ganclean.dynamics.adjoint import exact_adjoint, secant_adjoint
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import map_state
from ganclean.optim import Adam

BATCH, LATENT = 100, 64


def dcgan() -> tuple[nn.Module, nn.Module]:
    """A DCGAN pair with about 270,000 parameters."""
    generator = nn.Sequential(
        nn.Linear(LATENT, 64 * 7 * 7, bias=False),
        nn.Unflatten(1, (64, 7, 7)),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1),
    )
    return generator, discriminator


class EagerStep:
    """The training step as any PyTorch tutorial writes it."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module):
        self.generator, self.discriminator = copy.deepcopy(generator), copy.deepcopy(discriminator)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.99))
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.99))

    def __call__(self, real: torch.Tensor, z_d: torch.Tensor, z_g: torch.Tensor) -> None:
        self.opt_d.zero_grad()
        fake = self.generator(z_d).detach()
        loss = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake)).mean()
        loss.backward()
        self.opt_d.step()
        self.opt_g.zero_grad()
        softplus(-self.discriminator(self.generator(z_g))).mean().backward()
        self.opt_g.step()


def discriminator_loss(nets, batch, weights):
    fake = nets.G(torch.randn(len(batch.x), LATENT)).detach()
    return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(fake)).mean()


def generator_loss(nets, batch, weights):
    return softplus(-nets.D(nets.G(torch.randn(len(batch.x), LATENT)))).mean()


def objectives() -> list[Update]:
    """The training step as objectives of one's own."""
    rule = Adam(lr=2e-4, betas=(0.5, 0.99))
    return [Update("D", discriminator_loss, rule), Update("G", generator_loss, rule)]


def record_of(step, record: StepRecord) -> StepRecord:
    """Return a record of the same instances and updates."""
    return replace(record, updates=tuple(replace(done, draws={}) for done in record.updates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator, discriminator = dcgan()
    source = DataSource(torch.rand(1000, 1, 28, 28) * 2 - 1)
    trainer = GANTrainer(optimizer=Adam(lr=2e-4, betas=(0.5, 0.99)), batch_size=BATCH, latent_dim=LATENT)
    step = trainer.make_step(generator, discriminator)
    eager = EagerStep(generator, discriminator)
    state = step.initial_state()
    warm = (step.drawn(record, source) for record in trainer.draw(step, source, 0))
    for _ in range(3):
        record = next(warm)
        state = step(state, record, source[record.indices])
    record = next(warm)
    real = source[record.indices]
    after = step(state, record, real)
    cotangents = [map_state(torch.randn_like, step.differentiable(after))]
    # The same GAN as two functions that draw their own latents.
    form = GANTrainer(updates=objectives(), batch_size=BATCH, latent_dim=LATENT).make_step(generator, discriminator)
    after_form = form(state, record_of(form, record), real)
    runs = {
        "eager training step": lambda: eager(source[record.indices], record.latents_d, record.latents_g),
        "recorded training step": lambda: step(state, record, source[record.indices]),
        "secant ITD step": lambda: secant_adjoint(step, state, after, record, source[record.indices], cotangents),
        "exact ITD step": lambda: exact_adjoint(step, state, after, record, source[record.indices], cotangents),
        "recorded, as objectives": lambda: form(state, record_of(form, record), source[record.indices]),
        "secant, as objectives": lambda: secant_adjoint(
            form, state, after_form, record_of(form, record), source[record.indices], cotangents
        ),
    }
    seconds = in_turn(runs, args.turns)
    n_parameters = sum(p.numel() for module in (generator, discriminator) for p in module.parameters())
    print(f"{n_parameters} parameters, batch {BATCH}, {args.turns} turns, one thread")
    results = {}
    for name, values in seconds.items():
        ratios = values / seconds["eager training step"]
        results[name] = {"milliseconds": 1e3 * float(np.median(values)), "ratio": quartiles(ratios)}
        print(f"{name:24s} {1e3 * np.median(values):7.1f} ms   × eager: {shown(ratios)}")
    write_results(args.json, results)


if __name__ == "__main__":
    main()
