"""Loops of the usual GAN in the ways in which people really write them."""

import copy
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import one_hot, softplus
from torch.nn.utils import parametrizations

from ganclean import Average, GANInfluence, Recorder
from ganclean.backends import ITD
from ganclean.losses import R1, GradientPenalty
from ganclean.metrics import FID

N, LATENT = 16, 3
DTYPE = torch.float64


def points():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(N, 2)))


def classes():
    return torch.arange(N) % 2


def normal(n, latent=LATENT):
    return torch.randn(n, latent, dtype=DTYPE)


def perceptron(*sizes, last=nn.Identity):
    layers = [nn.Linear(sizes[0], sizes[1]), nn.Softplus(), nn.Linear(sizes[1], sizes[2])]
    return nn.Sequential(*layers).double()


class Loop:
    """A loop over batches of 8 rows in random order; a shape of loop says what it does with one."""

    declared = MappingProxyType({})
    batch_size = 8
    y = None

    def __init__(self):
        torch.manual_seed(0)
        self.X = points()
        self.G, self.D = self.networks()
        self.opt_g, self.opt_d = self.optimizers()
        self.t = 0

    def networks(self):
        return perceptron(LATENT, 6, 2), perceptron(2, 6, 1)

    def optimizers(self):
        settings = {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3}
        return tuple(torch.optim.Adam(net.parameters(), **settings) for net in (self.G, self.D))

    def recorder(self, **settings):
        settings = {"checkpoint_every": 1, "random_state": 0} | dict(self.declared) | settings
        return Recorder(self.G, self.D, self.opt_g, self.opt_d, **settings)

    def train(self, recorder=None, weights=None, n_epochs=3):
        weights = torch.ones(N, dtype=DTYPE) if weights is None else weights
        for _ in range(n_epochs):
            for index in torch.randperm(N).split(self.batch_size):
                x = self.augmented(self.X[index])
                y = {} if self.y is None else {"y": self.y[index]}
                with nullcontext() if recorder is None else recorder.step(x, index, **y):
                    self.step(x, weights[index], **y)
                self.between()
                self.t += 1
        return recorder

    def augmented(self, x):
        return x

    def between(self):
        pass

    def update_d(self, x, w, fake):
        self.opt_d.zero_grad()
        ((w * softplus(-self.D(x)).flatten()).mean() + softplus(self.D(fake.detach())).mean()).backward()
        self.opt_d.step()

    def update_g(self, fake):
        self.opt_g.zero_grad()
        softplus(-self.D(fake)).mean().backward()
        self.opt_g.step()

    def step(self, x, w):
        fake = self.G(normal(len(x)))
        self.update_d(x, w, fake)
        self.update_g(fake)


class GeneratorFirst(Loop):
    """Shape 1: the generator first, then the discriminator on the same samples; its loss is halved."""

    declared = MappingProxyType({"scale": 0.5})

    def step(self, x, w):
        valid, fake = torch.ones(len(x), 1, dtype=DTYPE), torch.zeros(len(x), 1, dtype=DTYPE)
        self.opt_g.zero_grad()
        gen_imgs = self.G(normal(len(x)))
        bce(self.D(gen_imgs), valid).backward()
        self.opt_g.step()
        self.opt_d.zero_grad()
        real_loss = (w * bce(self.D(x), valid, reduction="none").flatten()).mean()
        fake_loss = bce(self.D(gen_imgs.detach()), fake)
        ((real_loss + fake_loss) / 2).backward()
        self.opt_d.step()


class UpdatedGenerator(Loop):
    """Shape 2: the generator first; the discriminator meets new samples of the updated one."""

    def step(self, x, w):
        self.update_g(self.G(normal(len(x))))
        with torch.no_grad():
            fake = self.G(normal(len(x)))
        self.update_d(x, w, fake)


class GeneratedFirst(Loop):
    """Shape 3: the discriminator judges generated before real samples, with spectral and batch normalisation."""

    def networks(self):
        G = nn.Sequential(nn.Linear(LATENT, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 2))
        D = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(2, 6)), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 1)
        )
        return G.double(), D.double()

    def step(self, x, w):
        fake = self.G(normal(len(x)))
        self.opt_d.zero_grad()
        rejected = softplus(self.D(fake.detach())).mean()
        accepted = (w * softplus(-self.D(x)).flatten()).mean()
        (rejected + accepted).backward()
        self.opt_d.step()
        self.update_g(fake)


class LabelledGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Embedding(2, 2), perceptron(LATENT + 2, 6, 2)

    def forward(self, z, y):
        return self.net(torch.cat([z, self.embed(y)], dim=1))


class LabelledDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Embedding(2, 2), perceptron(4, 6, 1)

    def forward(self, x, y=None):
        return self.net(torch.cat([x, self.embed(y)], dim=1))


class Joined(Loop):
    """Shape 4: one call of the discriminator on generated and real samples, with the labels of both."""

    y = classes()
    batch_size = 6

    def networks(self):
        return LabelledGenerator().double(), LabelledDiscriminator().double()

    def step(self, x, w, y):
        fake_labels = torch.randint(2, (len(x),))
        with torch.no_grad():
            fake = self.G(normal(len(x)), fake_labels)
        self.opt_d.zero_grad()
        both = self.D(torch.cat([fake, x], 0), y=torch.cat([fake_labels, y], 0))
        of_fake, of_real = torch.split(both, [len(fake), len(x)])
        ((w * softplus(-of_real).flatten()).mean() + softplus(of_fake).mean()).backward()
        self.opt_d.step()
        self.opt_g.zero_grad()
        fake_labels = torch.randint(2, (len(x),))
        softplus(-self.D(self.G(normal(len(x)), fake_labels), fake_labels)).mean().backward()
        self.opt_g.step()


class Toggled(Loop):
    """Shape 5: the player that rests is switched off; one update of the generator for three of the critic."""

    declared = MappingProxyType({"loss": "wasserstein", "penalty": GradientPenalty()})

    def penalty(self, x, fake, w):
        alpha = torch.rand(len(x), 1, dtype=DTYPE)
        mixed = (alpha * x + (1 - alpha) * fake).requires_grad_(True)
        slope = torch.autograd.grad(self.D(mixed).sum(), mixed, create_graph=True)[0]
        return 10 * (w * (slope.norm(2, dim=1) - 1) ** 2).mean()

    def toggle(self, trained, resting):
        trained.requires_grad_(True)
        resting.requires_grad_(False)

    def step(self, x, w):
        self.toggle(self.D, self.G)
        self.opt_d.zero_grad()
        fake = self.G(normal(len(x)))
        (self.D(fake).mean() - (w * self.D(x).flatten()).mean() + self.penalty(x, fake, w)).backward()
        self.opt_d.step()
        if self.t % 3 == 2:
            self.toggle(self.G, self.D)
            self.opt_g.zero_grad()
            (-self.D(self.G(normal(len(x)))).mean()).backward()
            self.opt_g.step()


class SeveralOnOneBatch(Loop):
    """Shape 6: five updates of the critic on one and the same batch."""

    declared = MappingProxyType({"loss": "wasserstein", "penalty": R1(gamma=1.0)})

    def step(self, x, w):
        for _ in range(5):
            self.opt_d.zero_grad()
            fake = self.G(normal(len(x))).detach()
            x = x.requires_grad_()
            real = self.D(x)
            slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0]
            loss = self.D(fake).mean() - (w * real.flatten()).mean() + 0.5 * (w * slope.square().sum(1)).mean()
            loss.backward()
            self.opt_d.step()
        self.opt_g.zero_grad()
        (-self.D(self.G(normal(len(x)))).mean()).backward()
        self.opt_g.step()


def clip(params):
    return {name: p.clamp(-0.3, 0.3) for name, p in params.items()}


class Clipped(Loop):
    """Shape 7: weights are clipped after the critic's step, in the block."""

    declared = MappingProxyType({"loss": "wasserstein", "after": clip})

    def optimizers(self):
        return tuple(torch.optim.RMSprop(net.parameters(), lr=5e-3, eps=1e-2) for net in (self.G, self.D))

    def step(self, x, w):
        fake = self.G(normal(len(x)))
        self.opt_d.zero_grad()
        (self.D(fake.detach()).mean() - (w * self.D(x).flatten()).mean()).backward()
        self.opt_d.step()
        self.clip()
        self.opt_g.zero_grad()
        (-self.D(fake).mean()).backward()
        self.opt_g.step()

    def clip(self):
        for p in self.D.parameters():
            p.data.clamp_(-0.3, 0.3)


class ClippedOutside(Clipped):
    """Shape 7, outside the block: what is found."""

    declared = MappingProxyType({"loss": "wasserstein"})
    step_of_loop = Clipped.clip

    def clip(self):
        pass

    def between(self):
        self.step_of_loop()


def uniform(n):
    return torch.rand(n, LATENT, dtype=DTYPE) * 2 - 1


def sphere(n):
    z = normal(n)
    return z / z.norm(dim=1, keepdim=True)


def codes(n):
    return torch.cat([one_hot(torch.randint(2, (n,)), 2).to(DTYPE), torch.rand(n, 1, dtype=DTYPE)], dim=1)


class OtherLatents(Loop):
    """Shape 8: latents that are not normal."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def step(self, x, w):
        fake = self.G(self.draw(len(x)))
        self.update_d(x, w, fake)
        self.update_g(fake)


class StyleGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.mapping, self.first, self.last = nn.Linear(LATENT, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, styles, inject_index=None, return_latents=False):
        w = [torch.tanh(self.mapping(z)) for z in styles]
        first, second = (w[0], w[0]) if len(w) == 1 else (w[0], w[1])
        if inject_index == 2:
            second = (first + second) / 2
        return self.last(second * torch.tanh(self.first(first))), (w if return_latents else None)


class Mixing(Loop):
    """Shape 9: styles are mixed outside of the generator, which takes a list and a number and returns a tuple."""

    def networks(self):
        return StyleGenerator().double(), perceptron(2, 6, 1)

    def generated(self, n):
        styles = [normal(n)] if self.t % 3 == 0 else [normal(n), normal(n)]
        return self.G(styles, inject_index=None if len(styles) == 1 else 1 + self.t % 2, return_latents=True)[0]

    def step(self, x, w):
        fake = self.generated(len(x))
        self.update_d(x, w, fake)
        self.update_g(self.generated(len(x)))


def ramp(t):
    return 0.0 if t < 2 else 0.8


class Averaged(GeneratedFirst):
    """Shape 21: an average from the third step on, followed in every second step, with copies of the buffers."""

    def __init__(self):
        super().__init__()
        self.ema = copy.deepcopy(self.G)
        self.declared = {"ema": self.ema, "ema_decay": Average(ramp, every=2, buffers="copied")}

    def step(self, x, w):
        super().step(x, w)
        if (self.t + 1) % 2:
            return
        with torch.no_grad():
            for old, new in zip(self.ema.parameters(), self.G.parameters()):
                old.copy_(ramp(self.t) * old + (1 - ramp(self.t)) * new)
            for old, new in zip(self.ema.buffers(), self.G.buffers()):
                old.copy_(new)


class Groups(Loop):
    """Shape 25: two rates in one optimiser, decayed by hand, one of them earlier than the other."""

    def optimizers(self):
        groups = [{"params": self.G[0].parameters(), "lr": 1e-3}, {"params": self.G[2].parameters()}]
        opt_g = torch.optim.Adam(groups, lr=1e-2, betas=(0.5, 0.9), eps=1e-3)
        return opt_g, torch.optim.SGD(self.D.parameters(), lr=0.1, momentum=0.5)

    def between(self):
        self.opt_g.param_groups[self.t % 2]["lr"] *= 0.8
        for group in self.opt_d.param_groups:
            group["lr"] = 0.1 * 0.9**self.t


class Parallel(Loop):
    """Shape 27: wrapped for several devices, of which there is one."""

    def networks(self):
        return tuple(map(nn.DataParallel, super().networks()))


class AugmentedBefore(Loop):
    """Shape 29: instances are augmented at random before the block."""

    declared = MappingProxyType({"store_x": True})

    def augmented(self, x):
        return x + 0.1 * torch.randn_like(x)


class SlopeApart(Loop):
    """The penalty's slope is taken in a call of its own."""

    declared = MappingProxyType({"penalty": R1(gamma=1.0, every=2)})

    def networks(self):
        G, D = super().networks()
        return G, nn.Sequential(parametrizations.spectral_norm(D[0]), *D[1:])

    def update_d(self, x, w, fake):
        self.opt_d.zero_grad()
        loss = (w * softplus(-self.D(x)).flatten()).mean() + softplus(self.D(fake.detach())).mean()
        if self.t % 2 == 0:
            x = x.clone().requires_grad_()
            slope = torch.autograd.grad(self.D(x).sum(), x, create_graph=True)[0]
            loss = loss + 2 * 0.5 * (w * slope.square().sum(1)).mean()
        loss.backward()
        self.opt_d.step()


class Monitored(GeneratedFirst):
    """Accuracies and samples for a picture are computed in between, in training mode, of which no loss knows."""

    def step(self, x, w):
        self.G(normal(len(x)))
        fake = self.G(normal(len(x)))
        self.D(x)
        self.opt_d.zero_grad()
        rejected = softplus(self.D(fake.detach())).mean()
        with torch.no_grad():
            self.D(x)
        accepted = (w * softplus(-self.D(x)).flatten()).mean()
        (rejected + accepted).backward()
        self.opt_d.step()
        self.D(x)
        self.update_g(fake)


class MonitoredAfter(Monitored):
    """The same, and once more when the last optimiser has stepped."""

    def step(self, x, w):
        super().step(x, w)
        self.D(x), self.G(normal(len(x)))


class Simultaneous(Loop):
    """Both losses first, then both steps, the generator's first; in the discriminator's loss, samples of their own."""

    def step(self, x, w):
        for_d, for_g = self.G(normal(len(x))), self.G(normal(len(x)))
        self.opt_d.zero_grad()
        self.opt_g.zero_grad()
        of_d = (w * softplus(-self.D(x)).flatten()).mean() + softplus(self.D(for_d.detach())).mean()
        of_g = softplus(-self.D(for_g)).mean()
        gradient = torch.autograd.grad(of_g, list(self.G.parameters()))
        of_d.backward()
        for p, g in zip(self.G.parameters(), gradient):
            p.grad = g
        self.opt_g.step()
        self.opt_d.step()


SHAPES = {
    "usual": Loop,
    "1, generator first": GeneratorFirst,
    "2, updated generator": UpdatedGenerator,
    "3, generated first": GeneratedFirst,
    "4, joined": Joined,
    "5, toggled": Toggled,
    "6, several on one batch": SeveralOnOneBatch,
    "7, clipped": Clipped,
    "8, uniform": partial(OtherLatents, uniform),
    "8, sphere": partial(OtherLatents, sphere),
    "8, codes": partial(OtherLatents, codes),
    "9, mixing": Mixing,
    "21, average": Averaged,
    "25, groups": Groups,
    "27, parallel": Parallel,
    "29, augmented": AugmentedBefore,
    "slope apart": SlopeApart,
    "monitored": Monitored,
    "monitored after": MonitoredAfter,
    "simultaneous": Simultaneous,
}


def trained(make, recorded=True, weights=None, **settings):
    loop = make()
    recorder = loop.recorder(**settings) if recorded else None
    torch.manual_seed(1)
    loop.train(recorder, weights)
    return loop, recorder


def fitted(loop, trajectory, backend=None):
    cleanser = GANInfluence(metric=FID(n_samples=60), backend=backend or ITD(derivative="exact"), random_state=0)
    return cleanser.fit(loop.X, loop.y, trajectory=trajectory)


def bare(module):
    return module.module if isinstance(module, nn.DataParallel) else module


def tensors_of(module):
    return {name: t.detach() for name, t in (*bare(module).named_parameters(), *bare(module).named_buffers())}
