"""Influence is exact for what people do when they train: every feature alone, and all of them together."""

import pytest
import torch

from ganclean.backends import ITD
from ganclean.metrics import FID, SampleMean
from tests.practice import PRACTICE, practised
from tests.reference.finite_differences import finite_difference_influences, largest_error
from tests.toy_gans import toy_cleanser

SOME, ALL = [0, 3, 6, 10, 13], list(range(16))
SCHEMES = [(ITD(derivative="exact"), 1e-4), (ITD(derivative="secant", delta=1e-4), 1e-2)]


def first_values(x):
    return x.flatten(1)[:, :6]


@pytest.mark.parametrize("rows", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("feature", PRACTICE)
def test_influence_is_the_derivative_in_the_weights(feature, rows):
    expected = None
    for backend, tolerance in SCHEMES:
        networks, X, y, settings = practised(feature)
        metric = {"fid": FID(first_values, n_samples=60), "mean": SampleMean(first_values, n_samples=60)}
        cleanser = toy_cleanser(networks, metric=metric, backend=backend, **settings).fit(X, y)
        # Clipping has kinks, which a narrow difference does not meet.
        expected = expected or finite_difference_influences(cleanser, torch.from_numpy(X), width=3e-4, rows=rows)
        found = {name: influence[rows] for name, influence in cleanser.influences_.items()}
        assert largest_error(found, expected) < tolerance, backend
