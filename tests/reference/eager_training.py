"""A GAN's training as anybody would write it: modules, torch.nn.functional, and the optimisers of torch.optim."""

import copy

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, relu

from ganclean.optim import SGD, Adam

TORCH_OPTIMIZERS = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}


def cross_entropy(output, target):
    return binary_cross_entropy_with_logits(output, torch.full_like(output, target), reduction="none")


def half_square(output, target):
    return mse_loss(output, torch.full_like(output, target), reduction="none") / 2


LOSSES = {
    "non_saturating": (lambda d: cross_entropy(d, 1), lambda d: cross_entropy(d, 0), lambda d: cross_entropy(d, 1)),
    "minimax": (lambda d: cross_entropy(d, 1), lambda d: cross_entropy(d, 0), lambda d: -cross_entropy(d, 0)),
    "hinge": (lambda d: relu(1 - d), lambda d: relu(1 + d), lambda d: -d),
    "least_squares": (lambda d: half_square(d, 1), lambda d: half_square(d, 0), lambda d: half_square(d, 1)),
    "wasserstein": (lambda d: -d, lambda d: d, lambda d: -d),
}


def torch_optimizer(rule, module):
    """The optimiser of torch.optim with the hyper-parameters of a rule, on the trainable parameters of a module."""
    return TORCH_OPTIMIZERS[type(rule)]([p for p in module.parameters() if p.requires_grad], **rule.get_params())


def train_eagerly(generator, discriminator, trainer, X, trajectory, weights=None, start=0, outsider=None):
    """Train copies of two networks on the batches and latents that a trajectory drew.

    From step `start`, `weights` of shape (n_samples,) multiply the instances' terms; `outsider`, an instance and its
    weight, is added to every batch. Returns the trained generator, discriminator and averaged generator.
    """
    generator, discriminator = copy.deepcopy(generator).train(), copy.deepcopy(discriminator).train()
    average = copy.deepcopy(generator)
    real, fake, deceive = LOSSES[trainer.loss]
    optimizer_g = torch_optimizer(trainer.optimizer_generator or trainer.optimizer, generator)
    optimizer_d = torch_optimizer(trainer.optimizer_discriminator or trainer.optimizer, discriminator)
    for t in range(len(trajectory)):
        record = trajectory[t]
        batch = X[record.indices]
        terms = real(discriminator(batch).flatten())
        if weights is not None and t >= start:
            terms = terms * weights[record.indices]
        loss_d = terms.sum() / len(batch) + fake(discriminator(generator(record.latents_d).detach()).flatten()).mean()
        if outsider is not None and t >= start:
            instance, weight = outsider
            loss_d = loss_d + weight * real(discriminator(instance[None]).flatten())[0] / len(batch)
        optimizer_d.zero_grad()
        loss_d.backward()
        if trainer.update == "alternating":
            optimizer_d.step()
        optimizer_g.zero_grad()
        trained = [p for p in generator.parameters() if p.requires_grad]
        loss_g = deceive(discriminator(generator(record.latents_g)).flatten()).mean()
        for p, gradient in zip(trained, torch.autograd.grad(loss_g, trained)):
            p.grad = gradient
        if trainer.update == "simultaneous":
            optimizer_d.step()
        optimizer_g.step()
        if trainer.ema_decay is not None:
            with torch.no_grad():
                for old, new in zip(average.parameters(), generator.parameters()):
                    old.mul_(trainer.ema_decay).add_((1 - trainer.ema_decay) * new)
    return generator.eval(), discriminator.eval(), (generator if trainer.ema_decay is None else average).eval()
