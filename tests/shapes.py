"""Small smooth trainings in float64, one for each way in which published code really trains, as objectives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gumbel_softmax, softplus

from ganclean import Average, Update
from ganclean.optim import SGD, Adam, Grouped
from ganclean.recipes import acgan, image_to_image, relativistic, stylegan2, vae, wgan_gp

ADAM = Adam(lr=1e-2, betas=(0.5, 0.9), eps=1e-3)
LATENT, N, BATCH = 3, 16, 8


@dataclass
class Shape:
    """One way to train: the networks, the data, the updates, and what else the trainer is told."""

    players: Callable[[], dict[str, nn.Module]]
    data: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    updates: list[Update]
    settings: Mapping[str, Any] = field(default_factory=dict)


def points(seed=0, n=N, d=2):
    return (
        np.random.default_rng(seed).normal(size=(n, d)) @ np.triu(np.full((d, d), 0.4), 1)
        + 0.5
        + (np.random.default_rng(seed).normal(size=(n, d)))
    )


def plain_points():
    return points(), None


def classes():
    return points(), np.arange(N) % 3


def mlp(n_in, n_out, hidden=6, activation=nn.Tanh, norm=None):
    layers = [nn.Linear(n_in, hidden), *([norm(hidden)] if norm else []), activation(), nn.Linear(hidden, n_out)]
    return nn.Sequential(*layers).double()


def pair(norm_g=None, norm_d=None):
    return lambda: {
        "G": mlp(LATENT, 2, norm=norm_g),
        "D": mlp(2, 1, activation=nn.Softplus, norm=norm_d),
    }


def critic(nets, batch, weights):
    fake = nets.G(batch.latents).detach()
    return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(fake)).mean()


def deceiver(nets, batch, weights):
    return softplus(-nets.D(nets.G(batch.latents))).mean()


# --- 10: mapping and synthesis apart, noise in every layer, an average of both


class Noisy(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.layer, self.scale = nn.Linear(n_in, n_out), nn.Parameter(torch.full((n_out,), 0.3))

    def forward(self, x):
        x = self.layer(x)
        return x + self.scale * torch.randn_like(x)


class Styled(nn.Module):
    def __init__(self, noisy=True, d=2):
        super().__init__()
        make = Noisy if noisy else nn.Linear
        self.mapping = nn.Sequential(nn.Linear(LATENT, 4), nn.Tanh())
        self.synthesis = nn.Sequential(make(4, 5), nn.Tanh(), make(5, d))

    def forward(self, z):
        return self.synthesis(self.mapping(z))


def style_critic(nets, batch, weights):
    with torch.no_grad():
        w = nets.G.mapping(torch.randn(len(batch.x), LATENT, dtype=batch.x.dtype))
        fake = nets.G.synthesis(w) * 1.0
    return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(fake)).mean()


def style_deceiver(nets, batch, weights):
    w = nets.G.mapping(torch.randn(len(batch.x), LATENT, dtype=batch.x.dtype))
    mixed = torch.lerp(w, nets.G.mapping(torch.randn(len(batch.x), LATENT, dtype=batch.x.dtype)), torch.rand(()).item())
    return softplus(-nets.D(nets.G.synthesis(mixed))).mean()


# --- 12: augmentation outside of the discriminator, its probability adapted


def augment(x, p):
    flipped = torch.where(torch.rand(len(x), 1, dtype=x.dtype) < p, -x, x)
    return flipped * (1 + 0.2 * torch.randn(len(x), 1, dtype=x.dtype))


def augmented_critic(nets, batch, weights):
    p = batch.carried["p"]
    real = nets.D(augment(batch.x, p)).flatten()
    fake = nets.D(augment(nets.G(batch.latents), p)).flatten()
    with torch.no_grad():
        overfit = torch.tanh(real).mean()
        batch.carried["p"] = (p + 0.02 * (overfit - 0.2)).clamp(0, 0.8)
    return (weights * softplus(-real)).mean() + softplus(fake).mean()


def augmented_deceiver(nets, batch, weights):
    return softplus(-nets.D(augment(nets.G(batch.latents), batch.carried["p"]))).mean()


# --- 13: an auxiliary classifier


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(3, LATENT), mlp(LATENT, 2)

    def forward(self, z, y):
        return self.body(z + self.embed(y))


class TwoHeads(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 6), nn.Softplus())
        self.validity, self.classes = nn.Linear(6, 1), nn.Linear(6, n_classes)

    def forward(self, x):
        h = self.trunk(x)
        return self.validity(h), self.classes(h)


# --- 14: information about a code, by a third optimiser over G and a head of D


class Informed(TwoHeads):
    def __init__(self):
        super().__init__(1)

    def judge(self, x):
        return self.validity(self.trunk(x))


def informed_critic(nets, batch, weights):
    fake = nets.G(batch.latents)
    return (weights * softplus(-nets.D.judge(batch.x).flatten())).mean() + softplus(nets.D.judge(fake.detach())).mean()


def informed_deceiver(nets, batch, weights):
    return softplus(-nets.D.judge(nets.G(batch.latents))).mean()


def information(nets, batch, weights):
    _, code = nets.D(nets.G(batch.latents))
    return (code.flatten() - batch.latents[:, 0]).square().mean()


# --- 16: feature matching, a distance to a target, a frozen network


class Featured(nn.Module):
    def __init__(self, n_in=2):
        super().__init__()
        self.features, self.last = nn.Sequential(nn.Linear(n_in, 6), nn.Softplus()), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(self.features(x))


def perceptual():
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh()).double().requires_grad_(False)

    def restorer(nets, batch, weights):
        image = nets.G(batch.y)
        target = nets.D.features(batch.x).detach()
        matched = (nets.D.features(image) - target).square().mean(1)
        apart = (image - batch.x).abs().mean(1) + (network(image) - network(batch.x)).square().mean(1)
        return (weights * (matched + apart)).mean() + softplus(-nets.D(image)).mean()

    return restorer


def restored_critic(nets, batch, weights):
    image = nets.G(batch.y).detach()
    return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(image)).mean()


def low_resolution():
    return points(), points(3, d=LATENT)


def from_inputs(nets, latents, labels):
    return nets.G(labels)


# --- 17: paired images, patches


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Softplus(), nn.Conv2d(3, 1, 1))

    def forward(self, x):
        return self.body(x)


def paired_images():
    rng = np.random.default_rng(2)
    return np.tanh(rng.normal(size=(N, 1, 3, 3))), np.tanh(rng.normal(size=(N, 1, 3, 3)))


def translators():
    generator = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1), nn.Tanh())
    return {"G": generator.double(), "D": Patches().double()}


# --- 18: two of each, cycles, identities, and a history of what was generated


def cycle_generators(nets, batch, weights):
    a, b = batch.x.chunk(2, dim=1)
    to_b, to_a = nets.G(a), nets.F(b)
    cycles = (nets.F(to_b) - a).square().mean(1) + (nets.G(to_a) - b).square().mean(1)
    identities = (nets.G(b) - b).square().mean(1) + (nets.F(a) - a).square().mean(1)
    return (
        (nets.D(to_b) - 1).square().mean()
        + (nets.C(to_a) - 1).square().mean()
        + (weights * (2 * cycles + identities)).mean()
    )


def history_critic(player, generator, side):
    def objective(nets, batch, weights):
        sides = batch.x.chunk(2, dim=1)
        real, source = sides[side], sides[1 - side]
        fake = nets[generator](source) if hasattr(nets, "__getitem__") else getattr(nets, generator)(source)
        old = batch.carried[f"pool_{player}"]
        judged = torch.where(torch.rand(len(fake), 1, dtype=fake.dtype) < 0.5, fake.detach(), old)
        batch.carried[f"pool_{player}"] = fake.detach()
        judge = nets[player] if hasattr(nets, "__getitem__") else getattr(nets, player)
        return ((weights * (judge(real).flatten() - 1).square()).mean() + judge(judged).square().mean()) / 2

    return objective


def unpaired():
    return points(4, d=4), None


# --- 19: rows of mixed types, packs, conditions

PAC = 2


def activated(rows):
    return torch.cat([torch.tanh(rows[:, :1]), gumbel_softmax(rows[:, 1:], tau=0.7)], dim=1)


def conditions(batch):
    return nn.functional.one_hot(batch.y, 3).to(batch.x.dtype)


def packed(rows, condition):
    return torch.cat([rows, condition], dim=1).reshape(len(rows) // PAC, -1)


def tabular_critic(nets, batch, weights):
    condition = conditions(batch)
    fake = activated(nets.G(torch.cat([batch.latents, condition], dim=1)))
    real, made = packed(batch.x, condition), packed(fake, condition)
    share = torch.rand(len(real), 1, dtype=real.dtype)
    _, slope = nets.slope(nets.D, share * real + (1 - share) * made.detach())
    penalty = ((slope.square().sum(1) + 1e-6).sqrt() - 1).square()
    # A row that is removed takes its share of its pack with it.
    own = weights.reshape(-1, PAC).mean(1)
    return nets.D(made).mean() + (own * (2.0 * penalty - nets.D(real).flatten())).mean()


def tabular_deceiver(nets, batch, weights):
    condition = conditions(batch)
    rows = nets.G(torch.cat([batch.latents, condition], dim=1))
    return -nets.D(packed(activated(rows), condition)).mean() + cross_entropy(rows[:, 1:], batch.y)


def table():
    rng = np.random.default_rng(6)
    kinds = np.arange(N) % 3
    return np.concatenate([np.tanh(rng.normal(size=(N, 1))), np.eye(3)[kinds]], axis=1), kinds


def tabular_sampler(nets, latents, labels):
    condition = nn.functional.one_hot(labels, 3).to(latents.dtype)
    return activated(nets.G(torch.cat([latents, condition], dim=1)))


# --- 22: random targets, flipped now and then


def smoothed_critic(nets, batch, weights):
    target = 0.8 + 0.2 * torch.rand(len(batch.x), dtype=batch.x.dtype)
    real, fake = nets.D(batch.x).flatten(), nets.D(nets.G(batch.latents).detach()).flatten()
    if batch.number % 3 == 2:
        real, fake = -real, -fake
    own = target * softplus(-real) + (1 - target) * softplus(real)
    return (weights * own).mean() + softplus(fake).mean()


# --- 23: a balance that is carried


def reconstruction(nets, x):
    return (nets.D(x) - x).square().mean(1)


def balanced_critic(nets, batch, weights):
    k = batch.carried["k"]
    real = (weights * reconstruction(nets, batch.x)).mean()
    fake = reconstruction(nets, nets.G(batch.latents)).mean()
    batch.carried["k"] = (k + 0.1 * (0.5 * real - fake)).detach()
    return real - k * fake


def balanced_deceiver(nets, batch, weights):
    return reconstruction(nets, nets.G(batch.latents)).mean()


# --- 24: moving statistics of the outputs, and consistency under augmentation


def lecam_critic(nets, batch, weights):
    real, fake = nets.D(batch.x).flatten(), nets.D(nets.G(batch.latents).detach()).flatten()
    anchors = {name: batch.carried[name] for name in ("real", "fake")}
    batch.carried["real"] = (0.9 * anchors["real"] + 0.1 * real.mean()).detach()
    batch.carried["fake"] = (0.9 * anchors["fake"] + 0.1 * fake.mean()).detach()
    near = (real - batch.carried["fake"]).square() + (fake - batch.carried["real"]).square().mean()
    moved = batch.x + 0.1 * torch.randn_like(batch.x)
    consistent = (nets.D(moved).flatten() - real.detach()).square()
    return (weights * (softplus(-real) + 0.3 * near + consistent)).mean() + softplus(fake).mean()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(2, 2 * LATENT)

    def forward(self, x):
        return self.body(x).chunk(2, dim=1)


def clipped(params):
    return {name: p.clamp(-0.3, 0.3) for name, p in params.items()}


def usual(of_d=ADAM, of_g=ADAM, **settings_of_d):
    return [Update("D", critic, of_d, **settings_of_d), Update("G", deceiver, of_g)]


SHAPES = {
    "weight clipping": Shape(pair(), plain_points, usual(SGD(lr=0.1), after=clipped)),
    "critic steps": Shape(pair(), plain_points, [*usual()[:1], Update("G", deceiver, ADAM, due=2)]),
    "simultaneous": Shape(pair(), plain_points, [*usual()[:1], Update("G", deceiver, ADAM, meets="before")]),
    "generator first": Shape(pair(), plain_points, usual()[::-1]),
    "gradient penalty": Shape(pair(), plain_points, wgan_gp(ADAM, ADAM, weight=2.0, n_critic=2)),
    "mapping and synthesis": Shape(
        lambda: {"G": Styled().double(), "D": mlp(2, 1, activation=nn.Softplus)},
        plain_points,
        [Update("D", style_critic, ADAM), Update("G", style_deceiver, ADAM)],
        {"ema_decay": 0.7},
    ),
    "lazy regularisers": Shape(
        lambda: {"G": Styled(noisy=False).double(), "D": mlp(2, 1, activation=nn.Softplus)},
        plain_points,
        stylegan2(ADAM, ADAM, gamma=0.5, path_length=0.5, r1_every=3, path_every=2, style_mixing=0.0),
        {"ema_decay": 0.7},
    ),
    "augmentation outside": Shape(
        pair(),
        plain_points,
        [Update("D", augmented_critic, ADAM), Update("G", augmented_deceiver, ADAM)],
        {"carried": {"p": 0.3}},
    ),
    "auxiliary classifier": Shape(
        lambda: {"G": Labelled().double(), "D": TwoHeads().double()}, classes, acgan("non_saturating", ADAM, ADAM)
    ),
    "information": Shape(
        lambda: {"G": mlp(LATENT, 2), "D": Informed().double()},
        plain_points,
        [
            Update(("D.trunk", "D.validity"), informed_critic, ADAM),
            Update("G", informed_deceiver, ADAM),
            Update(("G", "D.classes"), information, SGD(lr=0.05), name="info"),
        ],
    ),
    "relativistic": Shape(pair(), plain_points, relativistic(ADAM, ADAM)),
    "feature matching": Shape(
        lambda: {"G": mlp(LATENT, 2), "D": Featured().double()},
        low_resolution,
        [Update("D", restored_critic, ADAM), Update("G", perceptual(), ADAM)],
        {"sampler": from_inputs},
    ),
    "image to image": Shape(translators, paired_images, image_to_image(weight=2.0, optimizer_g=ADAM, optimizer_d=ADAM)),
    "cycles": Shape(
        lambda: {"G": mlp(2, 2), "F": mlp(2, 2), "D": mlp(2, 1), "C": mlp(2, 1)},
        unpaired,
        [
            Update(("G", "F"), cycle_generators, ADAM),
            Update("D", history_critic("D", "G", 1), ADAM),
            Update("C", history_critic("C", "F", 0), ADAM),
        ],
        {
            "carried": {"pool_D": torch.zeros(BATCH, 2), "pool_C": torch.zeros(BATCH, 2)},
            "sampler": lambda nets, latents, labels: torch.cat([nets.F(latents), nets.G(latents)], dim=1),
            "latent_dim": 2,
        },
    ),
    "tabular": Shape(
        lambda: {"G": mlp(LATENT + 3, 4), "D": mlp(PAC * 7, 1, activation=nn.Softplus)},
        table,
        [Update("D", tabular_critic, ADAM), Update("G", tabular_deceiver, ADAM)],
        {"sampler": tabular_sampler},
    ),
    "accumulation": Shape(
        pair(norm_g=nn.BatchNorm1d, norm_d=nn.BatchNorm1d),
        plain_points,
        [Update("D", critic, ADAM, micro=2), Update("G", deceiver, ADAM, micro=2)],
    ),
    "average with ramp-up": Shape(
        pair(norm_g=nn.BatchNorm1d),
        plain_points,
        usual(),
        {"ema_decay": Average(decay=lambda t: 0.0 if t < 2 else min(0.8, t / 6), every=2, buffers="copied")},
    ),
    "random targets": Shape(pair(), plain_points, [Update("D", smoothed_critic, ADAM), Update("G", deceiver, ADAM)]),
    "balance": Shape(
        lambda: {"G": mlp(LATENT, 2), "D": mlp(2, 2)},
        plain_points,
        [Update("D", balanced_critic, ADAM), Update("G", balanced_deceiver, ADAM)],
        {"carried": {"k": 0.2}},
    ),
    "moving statistics": Shape(
        pair(),
        plain_points,
        [Update("D", lecam_critic, ADAM), Update("G", deceiver, ADAM)],
        {"carried": {"real": 0.3, "fake": -0.3}},
    ),
    "two rates": Shape(
        pair(),
        plain_points,
        usual(of_g=Grouped({"G.0": SGD(lr=0.05, momentum=0.5), "*": SGD(lr=0.1)})),
    ),
    "autoencoder": Shape(lambda: {"E": Encoder().double(), "G": mlp(LATENT, 2)}, plain_points, vae(ADAM)),
}
