"""The game Jacobian as an explicit matrix, from losses that are written out here."""

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import softplus

from ganclean.losses import R1, GradientPenalty


def flat(module):
    return nn.utils.parameters_to_vector(p for p in module.parameters() if p.requires_grad).detach()


def _called(module, vector, *inputs):
    params, start = {}, 0
    for name, p in module.named_parameters():
        if p.requires_grad:
            params[name] = vector[start : start + p.numel()].view_as(p)
            start += p.numel()
    return functional_call(module, params, inputs)


def instance_losses(discriminator, theta_d, real, labels, fake, mixing, penalty):
    """softplus(−D(x)) and the penalty, for each instance."""
    with_labels = () if labels is None else (labels,)
    losses = softplus(-_called(discriminator, theta_d, real, *with_labels).reshape(-1))
    if penalty is None:
        return losses
    points = real if isinstance(penalty, R1) else mixing[:, None] * real + (1 - mixing[:, None]) * fake

    def judged(x, *y):
        return _called(discriminator, theta_d, x[None], *(label[None] for label in y)).sum()

    slopes = vmap(grad(judged))(points, *with_labels).square().sum(1)
    if isinstance(penalty, R1):
        return losses + penalty.gamma / 2 * slopes
    assert isinstance(penalty, GradientPenalty)
    return losses + penalty.weight * (slopes.sqrt() - penalty.target).square()


def game_jacobian(generator, discriminator, chunks, source, penalty=None, decay=0.0):
    """∂(g_G, g_D)/∂(θ_G, θ_D) of the non-saturating game, and (g_G, g_D) itself."""
    theta = torch.cat([flat(generator), flat(discriminator)])
    n_g, n = len(flat(generator)), sum(len(record.indices) for record in chunks)
    # Looked up here, since early versions of torch cannot within a transform.
    real = [source[record.indices] for record in chunks]

    def generated(theta_g, latents, labels):
        return _called(generator, theta_g, latents, *(() if labels is None else (labels,)))

    def loss_g(theta_g, theta_d):
        total = 0
        for record in chunks:
            fake = generated(theta_g, record.latents_g, record.labels_g)
            labels = () if record.labels_g is None else (record.labels_g,)
            total = total + softplus(-_called(discriminator, theta_d, fake, *labels)).sum() / n
        return total

    def loss_d(theta_d, theta_g):
        total = 0
        for record, drawn in zip(chunks, real):
            fake = generated(theta_g, record.latents_d, record.labels_d)
            labels = () if record.labels_d is None else (record.labels_d,)
            total = total + softplus(_called(discriminator, theta_d, fake, *labels)).sum() / n
            losses = instance_losses(discriminator, theta_d, drawn, record.labels, fake, record.mixing, penalty)
            total = total + losses.sum() / n
        return total

    def both(theta):
        theta_g, theta_d = theta[:n_g], theta[n_g:]
        return torch.cat([grad(loss_g)(theta_g, theta_d), grad(loss_d)(theta_d, theta_g)]) + decay * theta

    return jacrev(both)(theta), both(theta)
