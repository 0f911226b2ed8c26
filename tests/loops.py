"""Training loops in the style of the well-known PyTorch tutorials, unchanged but for the recorder's lines.

`weights` stands for what a user cannot do: it multiplies the instances' terms, for finite differences.
"""

from contextlib import nullcontext

import torch
from torch import nn


class DCGAN:
    """The DCGAN tutorial: batch normalisation, a sigmoid at the end, BCELoss, one batch of fakes for both updates."""

    latent = 5

    def __init__(self, dtype=torch.float64, seed=0):
        torch.manual_seed(seed)
        self.netG = nn.Sequential(
            nn.ConvTranspose2d(self.latent, 6, 2, 1, 0, bias=False),
            nn.BatchNorm2d(6),
            nn.Softplus(),
            nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.ConvTranspose2d(4, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        ).to(dtype)
        self.netD = nn.Sequential(
            nn.Conv2d(1, 4, 4, 2, 1, bias=False),
            nn.Softplus(),
            nn.Conv2d(4, 6, 4, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.Softplus(),
            nn.Conv2d(6, 1, 2, 1, 0, bias=False),
            nn.Sigmoid(),
        ).to(dtype)
        for module in (*self.netG.modules(), *self.netD.modules()):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight.data, 0.0, 0.2)
        eps = 1e-4
        self.optimizerD = torch.optim.Adam(self.netD.parameters(), lr=5e-3, betas=(0.5, 0.99), eps=eps)
        self.optimizerG = torch.optim.Adam(self.netG.parameters(), lr=5e-3, betas=(0.5, 0.99), eps=eps)

    def train(self, images, recorder=None, weights=None, n_epochs=2, batch_size=8, sample_every=None, start=0):
        netG, netD, optimizerG, optimizerD = self.netG, self.netD, self.optimizerG, self.optimizerD
        criterion = nn.BCELoss(reduction="none")
        fixed_noise = torch.randn(4, self.latent, 1, 1, dtype=images.dtype)
        iteration = 0
        for _ in range(n_epochs):
            for index in torch.randperm(len(images)).split(batch_size):
                data = images[index]
                noise = torch.randn(len(data), self.latent, 1, 1, dtype=images.dtype)
                iteration += 1
                if iteration <= start:
                    continue
                with nullcontext() if recorder is None else recorder.step(data, index):
                    # (1) Update D network: maximize log(D(x)) + log(1 - D(G(z)))
                    netD.zero_grad()
                    label = torch.full((len(data),), 1.0, dtype=images.dtype)
                    output = netD(data).view(-1)
                    errD_real = criterion(output, label)
                    errD_real = (errD_real if weights is None else errD_real * weights[index]).mean()
                    errD_real.backward()
                    fake = netG(noise)
                    label.fill_(0.0)
                    output = netD(fake.detach()).view(-1)
                    errD_fake = criterion(output, label).mean()
                    errD_fake.backward()
                    optimizerD.step()
                    # (2) Update G network: maximize log(D(G(z)))
                    netG.zero_grad()
                    label.fill_(1.0)
                    output = netD(fake).view(-1)
                    errG = criterion(output, label).mean()
                    errG.backward()
                    optimizerG.step()
                if sample_every is not None and iteration % sample_every == 0:
                    with torch.no_grad():
                        netG(fixed_noise).detach()


class WGANGP:
    """WGAN-GP as it is widely copied: critic steps, one latent for both updates but two calls of the generator."""

    latent = 4

    def __init__(self, dtype=torch.float64, seed=0, dropout=0.0):
        torch.manual_seed(seed)
        self.generator = nn.Sequential(
            nn.Linear(self.latent, 8),
            nn.BatchNorm1d(8, 0.8),
            nn.Softplus(),
            nn.Linear(8, 64),
            nn.Tanh(),
            nn.Unflatten(1, (1, 8, 8)),
        ).to(dtype)
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.Softplus(), nn.Dropout(dropout), nn.Linear(8, 1)
        ).to(dtype)
        self.optimizer_G = torch.optim.Adam(self.generator.parameters(), lr=5e-3, betas=(0.5, 0.9), eps=1e-4)
        self.optimizer_D = torch.optim.Adam(self.discriminator.parameters(), lr=5e-3, betas=(0.5, 0.9), eps=1e-4)

    @staticmethod
    def compute_gradient_penalty(D, real_samples, fake_samples):
        alpha = torch.rand(real_samples.size(0), 1, 1, 1, dtype=real_samples.dtype)
        interpolates = (alpha * real_samples + ((1 - alpha) * fake_samples)).requires_grad_(True)
        d_interpolates = D(interpolates)
        gradients = torch.autograd.grad(
            outputs=d_interpolates,
            inputs=interpolates,
            grad_outputs=torch.ones_like(d_interpolates),
            create_graph=True,
            retain_graph=True,
            only_inputs=True,
        )[0]
        gradients = gradients.view(gradients.size(0), -1)
        return (gradients.norm(2, dim=1) - 1) ** 2

    def train(self, images, recorder=None, weights=None, n_epochs=2, batch_size=8, n_critic=3, lambda_gp=10):
        generator, discriminator = self.generator, self.discriminator
        i = 0
        for _ in range(n_epochs):
            for index in torch.randperm(len(images)).split(batch_size):
                real_imgs = images[index]
                w = torch.ones(len(index), dtype=images.dtype) if weights is None else weights[index]
                with nullcontext() if recorder is None else recorder.step(real_imgs, index):
                    # Train Discriminator
                    self.optimizer_D.zero_grad()
                    z = torch.randn(real_imgs.shape[0], self.latent, dtype=images.dtype)
                    fake_imgs = generator(z)
                    real_validity = discriminator(real_imgs)
                    fake_validity = discriminator(fake_imgs)
                    gradient_penalty = self.compute_gradient_penalty(discriminator, real_imgs.data, fake_imgs.data)
                    d_loss = (
                        -torch.mean(w * real_validity.flatten())
                        + torch.mean(fake_validity)
                        + lambda_gp * (w * gradient_penalty).mean()
                    )
                    d_loss.backward()
                    self.optimizer_D.step()
                    self.optimizer_G.zero_grad()
                    # Train the generator every n_critic steps
                    if i % n_critic == 0:
                        fake_imgs = generator(z)
                        fake_validity = discriminator(fake_imgs)
                        g_loss = -torch.mean(fake_validity)
                        g_loss.backward()
                        self.optimizer_G.step()
                i += 1
