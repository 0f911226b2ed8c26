"""Influence equals finite differences of the final metric in the example weights."""

import numpy as np
import pytest
import torch
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import FID, KID, AverageLogLikelihood, DiscriminatorLoss, InceptionScore, SampleMean
from ganclean.optim import SGD, Adam
from tests.reference.finite_differences import finite_difference_influence

OPTIMIZERS = {
    "sgd": SGD(lr=0.1, weight_decay=1e-2),
    "momentum": SGD(lr=0.05, momentum=0.8),
    "nesterov": SGD(lr=0.05, momentum=0.8, nesterov=True),
    "adam": Adam(lr=1e-2, betas=(0.5, 0.9), eps=1e-3),
}


def networks():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    discriminator = nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1)).double()
    return generator, discriminator


def metrics():
    torch.manual_seed(1)
    classifier = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return {
        "log_likelihood": AverageLogLikelihood(n_samples=60),
        "fid": FID(n_samples=60),
        "inception_score": InceptionScore(classifier, n_samples=60),
        "kid": KID(n_samples=60),
        "mean": SampleMean(n_samples=60),
        "discriminator_loss": DiscriminatorLoss(n_samples=60),
    }


def fitted(optimizer, update, derivative, *, loss="non_saturating", last_epochs=None, ema_decay=None, delta=1e-4):
    generator, discriminator = networks()
    trainer = GANTrainer(
        loss, optimizer, n_epochs=5, batch_size=6, update=update, latent_dim=3, ema_decay=ema_decay
    )
    X = np.random.default_rng(0).normal(size=(16, 2)) @ [[1.0, 0.4], [0.0, 0.7]] + 0.5
    return GANInfluence(
        generator,
        discriminator,
        trainer=trainer,
        metric=metrics(),
        backend=ITD(last_epochs, derivative, delta),
        random_state=0,
    ).fit(X, X_val=X[:12] + 0.1)


def assert_exact(cleaner, tolerance, start=0):
    for name, metric in cleaner.metrics_.items():
        expected = finite_difference_influence(cleaner, metric, range(16), start)
        relative = np.abs(cleaner.influences_[name] - expected) / np.abs(expected)
        assert relative.max() < tolerance, f"{name}: {relative.max():.2g}"


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("derivative", "tolerance"), [("exact", 1e-5), ("secant", 1e-3)])
def test_influence_is_the_derivative_in_the_weights(optimizer, update, derivative, tolerance):
    assert_exact(fitted(OPTIMIZERS[optimizer], update, derivative), tolerance)
