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
            made_for = record.of("G").draws.get("labels")
            fake = generated(theta_g, record.latents_g, made_for)
            labels = () if made_for is None else (made_for,)
            total = total + softplus(-_called(discriminator, theta_d, fake, *labels)).sum() / n
        return total

    def loss_d(theta_d, theta_g):
        total = 0
        for record, drawn in zip(chunks, real):
            made_for, mixing = (record.of("D").draws.get(name) for name in ("labels", "mixing"))
            fake = generated(theta_g, record.latents_d, made_for)
            labels = () if made_for is None else (made_for,)
            total = total + softplus(_called(discriminator, theta_d, fake, *labels)).sum() / n
            losses = instance_losses(discriminator, theta_d, drawn, record.labels, fake, mixing, penalty)
            total = total + losses.sum() / n
        return total

    def both(theta):
        theta_g, theta_d = theta[:n_g], theta[n_g:]
        return torch.cat([grad(loss_g)(theta_g, theta_d), grad(loss_d)(theta_d, theta_g)]) + decay * theta

    return jacrev(both)(theta), both(theta)


def explicit_game(players, updates, chunks, source):
    """∂g/∂θ, ∂(n g)/∂w and g itself of any players and updates, by autograd.

    Each update has the players that it trains, its share of the steps, and a loss ``loss(live, still, x, z, w)``, of
    which the gradient is taken in what is `live`; what is `still` depends on the parameters all the same.
    """
    starts, total = {}, 0
    for player, module in players.items():
        starts[player] = total, len(flat(module))
        total += len(flat(module))
    n = sum(len(record.indices) for record in chunks)

    def calling(theta):
        def call(player, *inputs):
            start, size = starts[player]
            return _called(players[player], theta[start : start + size], *inputs)

        return call

    def gradients(theta, weights):
        g = torch.zeros_like(theta)
        for record, w in zip(chunks, weights.split([len(record.indices) for record in chunks])):
            for name, (trains, share, loss) in updates.items():
                z, x = record.of(name).draws["latents"], source[record.indices]
                live = theta.detach().requires_grad_() if not theta.requires_grad else theta.clone()
                value = loss(calling(live), calling(theta), x, z, w)
                (slope,) = torch.autograd.grad(value, live, create_graph=True)
                mask = torch.zeros_like(theta)
                for player in trains:
                    start, size = starts[player]
                    mask[start : start + size] = 1
                g = g + len(x) / n * share * mask * slope
        return g

    theta, ones = torch.cat([flat(module) for module in players.values()]), torch.ones(n, dtype=torch.float64)
    in_theta, in_weights = torch.autograd.functional.jacobian(gradients, (theta, ones))
    return in_theta, n * in_weights, gradients(theta.requires_grad_(), ones).detach()
