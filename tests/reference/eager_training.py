"""A GAN's training as anybody would write it: modules, torch.nn.functional, and the optimisers of torch.optim."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, relu

from ganclean.dynamics.randomness import stream
from ganclean.losses import R1, GradientPenalty
from ganclean.optim import SGD, Adam, AdamW, Clipped, RMSprop

TORCH_OPTIMIZERS = {
    SGD: torch.optim.SGD,
    Adam: torch.optim.Adam,
    AdamW: torch.optim.AdamW,
    RMSprop: torch.optim.RMSprop,
}


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


def trained_parameters(module):
    return [p for p in module.parameters() if p.requires_grad]


def torch_optimizer(rule, module):
    """The optimiser of torch.optim with the hyper-parameters of a rule, on the trainable parameters of a module."""
    rule = rule.optimizer if isinstance(rule, Clipped) else rule
    return TORCH_OPTIMIZERS[type(rule)](trained_parameters(module), **rule.get_params())


class Outsider(NamedTuple):
    """An instance that is added to every batch with a weight; its turn among a penalty's points is its own."""

    instance: Tensor
    weight: float
    label: Tensor | None = None
    turn: int = 0


class EagerPlayer:
    """A network with its optimiser, its gradient clipping and its schedule."""

    def __init__(self, module, rule, scheduler):
        self.module = copy.deepcopy(module).train()
        self.rule = rule
        self.optimizer = torch_optimizer(rule, self.module)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)

    def __call__(self, seed, *inputs):
        torch.manual_seed(seed)
        return self.module(*[x for x in inputs if x is not None])

    def unchanged(self, *inputs):
        """The outputs in the state that the last call left behind, for networks that no mode changes otherwise."""
        # Copies, since the next call writes into them.
        buffers = {name: b.clone() for name, b in self.module.eval().named_buffers()}
        output = torch.func.functional_call(self.module, buffers, tuple(x for x in inputs if x is not None))
        self.module.train()
        return output

    def differentiate(self, loss):
        """Set the gradients, clipped as the rule says."""
        params = trained_parameters(self.module)
        for p, gradient in zip(params, torch.autograd.grad(loss, params)):
            p.grad = gradient
        if isinstance(self.rule, Clipped):
            if self.rule.max_value is not None:
                torch.nn.utils.clip_grad_value_(params, self.rule.max_value)
            if self.rule.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, self.rule.max_norm)

    def update(self):
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()


@torch.no_grad()
def follow(average, module, decay):
    """Move an average of a network's parameters towards them; None keeps no average."""
    if decay is not None:
        for old, new in zip(average.parameters(), module.parameters()):
            old.mul_(decay).add_((1 - decay) * new)


def squared_slope(output, samples):
    (slope,) = torch.autograd.grad(output.sum(), samples, create_graph=True)
    return slope.flatten(1).square().sum(dim=1)


def train_eagerly(generator, discriminator, trainer, X, trajectory, weights=None, start=0, outsider=None):
    """Train copies of two networks on the batches and latents that a trajectory drew.

    From step `start`, `weights` of shape (n_samples,) multiply the instances' terms; an `outsider` is added to every
    batch. Returns the trained generator, discriminator and averaged generator.
    """
    real, fake, deceive = LOSSES[trainer.loss]
    G = EagerPlayer(generator, trainer.optimizer_generator or trainer.optimizer, trainer.scheduler)
    D = EagerPlayer(discriminator, trainer.optimizer_discriminator or trainer.optimizer, trainer.scheduler)
    average = copy.deepcopy(G.module)
    penalty = trainer.penalty
    for t in range(len(trajectory)):
        record = trajectory[t]
        due = penalty is not None and t % penalty.every == 0
        of_d, of_g = record.of("D"), record.of("G")
        shared = record.latents_g is record.latents_d
        # The streams of random numbers of a step's calls: update, slice, player, call.
        D.streams = iter([stream(record.seed, 0, 0, "D", i) for i in range(2 + ("mixing" in of_d.draws))])
        visited = outsider is not None and t >= start
        batch = X[record.indices].requires_grad_(due)
        fakes = G(stream(record.seed, 0, 0, "G", 0), record.latents_d, of_d.draws.get("labels"))
        output = D(next(D.streams), batch, record.labels).flatten()
        terms = real(output)
        if due and isinstance(penalty, R1):
            terms = terms + penalty.every * penalty.gamma / 2 * squared_slope(output, batch)
        if visited:
            alone, label = outsider.instance[None].requires_grad_(due), None
            if outsider.label is not None:
                label = outsider.label[None]
            output = D.unchanged(alone, label).flatten()
            term = real(output)
            if due and isinstance(penalty, R1):
                term = term + penalty.every * penalty.gamma / 2 * squared_slope(output, alone)
        judged = D(next(D.streams), fakes.detach(), of_d.draws.get("labels")).flatten()
        if due and isinstance(penalty, GradientPenalty):
            share = of_d.draws["mixing"].view(-1, *[1] * (batch.ndim - 1))
            mixed = (share * batch + (1 - share) * fakes.detach()).detach().requires_grad_()
            slope = squared_slope(D(next(D.streams), mixed, record.labels), mixed).sqrt()
            terms = terms + penalty.every * penalty.weight * (slope - penalty.target) ** 2
            if visited:
                turn = outsider.turn % len(batch)
                mixed = share[turn] * alone + (1 - share[turn]) * fakes[turn].detach()
                mixed = mixed.detach().requires_grad_()
                slope = squared_slope(D.unchanged(mixed, label), mixed).sqrt()
                term = term + penalty.every * penalty.weight * (slope - penalty.target) ** 2
        if weights is not None and t >= start:
            terms = terms * weights[record.indices]
        loss_d = terms.sum() / len(batch) + fake(judged).mean()
        if visited:
            loss_d = loss_d + outsider.weight * term[0] / len(batch)
        D.differentiate(loss_d)
        if trainer.update == "alternating":
            D.update()
        if of_g is not None:
            labels = of_g.draws.get("labels")
            if not shared:
                fakes = G(stream(record.seed, 1, 0, "G", 0), record.latents_g, labels)
            G.differentiate(deceive(D(stream(record.seed, 1, 0, "D", 0), fakes, labels).flatten()).mean())
        if trainer.update == "simultaneous":
            D.update()
        if of_g is not None:
            G.update()
            follow(average, G.module, trainer.ema_decay)
    average.load_state_dict(dict(G.module.named_buffers()), strict=False)
    trained = G.module if trainer.ema_decay is None else average
    return G.module.eval(), D.module.eval(), trained.eval()
