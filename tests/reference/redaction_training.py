"""Redaction as anybody would write it: modules, torch.nn.functional, and the optimisers of torch.optim."""

import copy

import torch

from ganclean.dynamics.randomness import stream
from ganclean.losses import R1, GradientPenalty
from tests.reference.eager_training import LOSSES, EagerPlayer, follow, squared_slope


def redact_eagerly(generator, discriminator, trainer, X, records, lam, score=None, guide="penalty", smoothing=(0, 0)):
    """Train copies of two networks on the batches, latents and negatives that records hold.

    Returns the trained generator, discriminator and averaged generator.
    """
    sure_real, sure_fake, deceive = LOSSES[trainer.loss]

    def real(output):
        return (1 - smoothing[0]) * sure_real(output) + smoothing[0] * sure_fake(output)

    def fake(output):
        return (1 - smoothing[1]) * sure_fake(output) + smoothing[1] * sure_real(output)

    G = EagerPlayer(generator, trainer.optimizer_generator or trainer.optimizer, trainer.scheduler)
    D = EagerPlayer(discriminator, trainer.optimizer_discriminator or trainer.optimizer, trainer.scheduler)
    average = copy.deepcopy(G.module)
    penalty = trainer.penalty
    for record in records:
        due = penalty is not None and record.index % penalty.every == 0
        of_d, of_g = record.of("D"), record.of("G")
        # The streams of random numbers of a step's calls: update, slice, player, call.
        streams = iter([stream(record.seed, 0, 0, "D", i) for i in range(4)])
        batch = X[record.indices].requires_grad_(due)
        fakes = G(stream(record.seed, 0, 0, "G", 0), record.latents_d, of_d.draws.get("labels"))
        output = D(next(streams), batch, record.labels).flatten()
        loss = real(output).mean()
        if due and isinstance(penalty, R1):
            loss = loss + (penalty.every * penalty.gamma / 2 * squared_slope(output, batch)).mean()
        loss = loss + lam * fake(D(next(streams), fakes.detach(), of_d.draws.get("labels")).flatten()).mean()
        rejected = D(next(streams), of_d.draws["negatives"], of_d.draws.get("labels_negatives")).flatten()
        loss = loss + (1 - lam) * fake(rejected).mean()
        if due and isinstance(penalty, GradientPenalty):
            share = of_d.draws["mixing"].view(-1, *[1] * (batch.ndim - 1))
            mixed = (share * batch + (1 - share) * fakes).detach().requires_grad_()
            slope = squared_slope(D(next(streams), mixed, record.labels), mixed).sqrt()
            loss = loss + (penalty.every * penalty.weight * (slope - penalty.target) ** 2).mean()
        D.differentiate(loss)
        if trainer.update == "alternating":
            D.update()
        if of_g is not None:
            labels = of_g.draws.get("labels")
            if record.latents_g is not record.latents_d:
                fakes = G(stream(record.seed, 1, 0, "G", 0), record.latents_g, labels)
            output = D(stream(record.seed, 1, 0, "D", 0), fakes, labels).flatten()
            G.differentiate(generator_loss(deceive, output, fakes, score, guide))
        if trainer.update == "simultaneous":
            D.update()
        if of_g is not None:
            G.update()
            follow(average, G.module, trainer.ema_decay)
    average.load_state_dict(dict(G.module.named_buffers()), strict=False)
    return G.module, D.module, G.module if trainer.ema_decay is None else average


def generator_loss(deceive, output, fakes, score, guide):
    """The generator's loss with what a classifier adds: a floor of -4 in the guide, a weight of 1 in the penalty."""
    if score is None:
        return deceive(output).mean()
    if guide == "guide":
        share = torch.minimum(score(fakes), torch.ones(()).to(output))
        return deceive(share * output + (1 - share) * -4).mean()
    return deceive(output).mean() - torch.log(score(fakes)).mean()
