"""A linear generator against a quadratic discriminator: the stationary point to machine precision."""

import torch
from torch import nn
from torch.func import jacrev

DECAY = 0.4


class Quadratic(nn.Module):
    """D(x) = ½ xᵀWx + wᵀx."""

    def __init__(self, n_features):
        super().__init__()
        self.quadratic = nn.Parameter(torch.zeros(n_features, n_features, dtype=torch.float64))
        self.linear = nn.Parameter(torch.zeros(n_features, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * ((x @ self.quadratic) * x).sum(1) + x @ self.linear


def lq_networks():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(2, 2).double(), Quadratic(2)
    with torch.no_grad():
        generator.weight.copy_(torch.eye(2))
    return generator, discriminator


def residual(theta, weights, X, z_d, z_g):
    """Both players' gradients by hand, Wasserstein losses and weight decay: zero at the stationary point.

    θ = (A, b, W, w) with G(z) = Az + b; instances enter by Σ weights_j D(x_j) / n.
    """
    A, b, W, w = theta[:4].view(2, 2), theta[4:6], theta[6:10].view(2, 2), theta[10:]
    n, fake, made = len(X), z_d @ A.T + b, z_g @ A.T + b
    slope = made @ (W + W.T) / 2 + w
    return torch.cat(
        [
            (-(slope.T @ z_g) / len(z_g) + DECAY * A).reshape(-1),
            -slope.mean(0) + DECAY * b,
            (((fake.T @ fake) / len(fake) - (X.T * weights) @ X / n) / 2 + DECAY * W).reshape(-1),
            fake.mean(0) - (weights[:, None] * X).sum(0) / n + DECAY * w,
        ]
    )


def stationary(theta, weights, *data):
    """Newton's method from `theta`."""
    for _ in range(30):
        move = torch.linalg.solve(jacrev(residual)(theta, weights, *data), residual(theta, weights, *data))
        theta = theta - move
        if move.norm() < 1e-14 * theta.norm():
            break
    assert residual(theta, weights, *data).norm() < 1e-12
    return theta


def descended(theta, *data, lr=0.1, n_steps=2000):
    """Simultaneous gradient descent, which leads near the stationary point."""
    for _ in range(n_steps):
        theta = theta - lr * residual(theta, torch.ones(len(data[0]), dtype=theta.dtype), *data)
    return theta


def loaded_lq(theta):
    """Networks with these parameters."""
    generator, discriminator = lq_networks()
    nn.utils.vector_to_parameters(theta[:6], generator.parameters())
    nn.utils.vector_to_parameters(theta[6:], discriminator.parameters())
    return generator, discriminator
