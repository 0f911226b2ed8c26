"""Influence equals finite differences of the final metric in the example weights of an eager PyTorch run."""

import pytest
import torch
from torch import nn

from ganclean.backends import ITD
from ganclean.metrics import FID, KID, AverageLogLikelihood, DiscriminatorLoss, InceptionScore, SampleMean
from tests.reference.finite_differences import finite_difference_influences, largest_error
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data

SCHEMES = [(ITD(derivative="exact"), 1e-5), (ITD(derivative="secant", delta=1e-4), 1e-3)]


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


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_influence_is_the_derivative_in_the_weights(optimizer, update):
    X, expected = toy_data(), None
    for backend, tolerance in SCHEMES:
        settings = {"optimizer": OPTIMIZERS[optimizer], "update": update, "n_epochs": 5}
        cleanser = toy_cleanser(metric=metrics(), backend=backend, **settings).fit(X, X_val=X[:12] + 0.1)
        expected = expected or finite_difference_influences(cleanser, torch.from_numpy(X))
        for name, influence in cleanser.influences_.items():
            assert largest_error({name: influence}, {name: expected[name]}) < tolerance, (backend, name)
