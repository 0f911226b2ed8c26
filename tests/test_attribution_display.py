"""The gallery shows what samples owe to the training data."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ganclean.plotting import AttributionDisplay
from ganclean.valuation import GMValuator

matplotlib.use("Agg")
RNG = np.random.default_rng(0)
X, SAMPLES = (RNG.uniform(-1, 1, size=(n, 1, 4, 4)).astype(np.float32) for n in (30, 12))


@pytest.fixture(scope="module")
def valuator():
    return GMValuator(k=5, feature_extractor="pixels").fit(X, X_gen=SAMPLES)


def shown(ax):
    """The image in some Axes, in [−1, 1]."""
    return 2 * np.asarray(ax.get_images()[0].get_array()) - 1


@pytest.mark.parametrize("given", [None, SAMPLES, torch.from_numpy(SAMPLES)])
def test_each_sample_stands_beside_those_that_it_owes_most_to(given, valuator):
    display = AttributionDisplay.from_estimator(valuator, X, given, n_shown=3, k=4)
    assert display.axes_.shape == (3, 5)
    credit = valuator.attributions_.toarray()
    for j, (left, *others) in enumerate(display.axes_):
        np.testing.assert_allclose(shown(left), SAMPLES[j, 0], atol=1e-6)
        for ax, row in zip(others, np.argsort(-credit[j])):
            np.testing.assert_allclose(shown(ax), X[row, 0], atol=1e-6)
            assert ax.get_xlabel() == f"{credit[j, row]:.0%}"
        assert left.get_xlabel() == "sample"


def test_no_more_are_shown_than_there_are(valuator):
    display = AttributionDisplay.from_estimator(valuator, X, n_shown=99, k=99)
    assert display.axes_.shape == (12, 6)
    np.testing.assert_allclose(display.shares.sum(axis=1), 1)


def test_shares_are_of_the_credit_that_a_sample_has(valuator):
    halved = GMValuator(k=5, feature_extractor="pixels", quality=lambda x: torch.full((len(x),), 0.5))
    display = AttributionDisplay.from_estimator(halved.fit(X, X_gen=SAMPLES), X, k=5)
    np.testing.assert_allclose(display.shares.sum(axis=1), 1)


def test_what_is_no_image_is_refused():
    valuator = GMValuator(k=2).fit(np.eye(4), X_gen=np.eye(4))
    with pytest.raises(ValueError, match="grey or colour images"):
        AttributionDisplay.from_estimator(valuator, np.eye(4))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
