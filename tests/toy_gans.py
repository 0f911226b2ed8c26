"""Small smooth GANs in float64 that train in a fraction of a second."""

import numpy as np
import torch
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import FID
from ganclean.optim import SGD, Adam

OPTIMIZERS = {
    "sgd": SGD(lr=0.1, weight_decay=1e-2),
    "momentum": SGD(lr=0.05, momentum=0.8),
    "nesterov": SGD(lr=0.05, momentum=0.8, nesterov=True),
    "adam": Adam(lr=1e-2, betas=(0.5, 0.9), eps=1e-3),
}


def toy_data(n_samples=16):
    return np.random.default_rng(0).normal(size=(n_samples, 2)) @ [[1.0, 0.4], [0.0, 0.7]] + 0.5


def toy_networks(seed=0):
    torch.manual_seed(seed)
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    discriminator = nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1)).double()
    return generator, discriminator


def toy_trainer(**settings):
    defaults = {"optimizer": OPTIMIZERS["momentum"], "n_epochs": 3, "batch_size": 6, "latent_dim": 3}
    return GANTrainer(**(defaults | settings))


def toy_cleanser(networks=None, *, metric=None, backend=None, n_remove=0.25, select=None, **settings):
    generator, discriminator = toy_networks() if networks is None else networks
    return GANInfluence(
        generator,
        discriminator,
        trainer=toy_trainer(**settings),
        metric=FID(n_samples=60) if metric is None else metric,
        backend=ITD() if backend is None else backend,
        n_remove=n_remove,
        select=select,
        random_state=0,
    )
