"""Back-ends that predict nothing rank by what they are named for, and take part in everything that others do."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import IsolationForest
from torch import nn

from ganclean.backends import GradientDot, IsolationForestScore, RandomScore
from ganclean.dynamics.adjoint import exact_adjoint
from ganclean.metrics import AverageLogLikelihood, DiscriminatorLoss
from tests.toy_gans import toy_cleanser, toy_data

OUTLIERS = np.array([[30.0, 30.0], [-40.0, 20.0]])


@pytest.fixture(scope="module")
def contaminated():
    return np.concatenate([toy_data(30), OUTLIERS])


@pytest.mark.parametrize("metric", [None, AverageLogLikelihood(n_samples=60)], ids=["low is good", "high is good"])
def test_the_forest_removes_outliers_whichever_way_the_metric_goes(metric, contaminated):
    backend = IsolationForestScore(random_state=3)
    cleanser = toy_cleanser(backend=backend, metric=metric, n_remove=2).fit(contaminated)
    expected = -IsolationForest(random_state=3).fit(contaminated).score_samples(contaminated)
    np.testing.assert_allclose(cleanser.harmfulness_, expected)
    assert cleanser.get_support(indices=True).tolist() == list(range(30))
    sign = 1 if cleanser.metric_.greater_is_better else -1
    np.testing.assert_array_equal(cleanser.influence_, sign * cleanser.harmfulness_)
    new = np.concatenate([toy_data(40)[30:], OUTLIERS + 1])
    np.testing.assert_allclose(
        cleanser.score_samples(new), -IsolationForest(random_state=3).fit(contaminated).score_samples(new)
    )
    assert len(cleanser.transform(new)) <= 10


def test_the_forest_sees_features(contaminated):
    torch.manual_seed(0)
    extractor = nn.Linear(2, 3)
    cleanser = toy_cleanser(backend=IsolationForestScore(extractor, random_state=0)).fit(contaminated)
    with torch.no_grad():
        features = extractor(torch.from_numpy(contaminated).float()).double().numpy()
    expected = -IsolationForest(random_state=0).fit(features).score_samples(features)
    np.testing.assert_allclose(cleanser.harmfulness_, expected)


def test_random_scores_repeat_with_their_seed(X):
    def fitted(seed):
        return toy_cleanser(backend=RandomScore(seed), n_epochs=1).fit(X)

    first, again, other = fitted(0), fitted(0), fitted(1)
    assert np.array_equal(first.harmfulness_, again.harmfulness_)
    assert not np.array_equal(first.harmfulness_, other.harmfulness_)
    assert np.array_equal(first.score_samples(X[:5]), again.score_samples(X[:5]))
    assert (first.harmfulness_ >= 0).all() and len(set(first.harmfulness_)) == 16


def test_gradients_that_are_not_followed_are_dot_products_with_the_final_gradient(X):
    cleanser = toy_cleanser(metric=DiscriminatorLoss(n_samples=60), backend=GradientDot(derivative="exact")).fit(X)
    trajectory, gradient = cleanser.trajectory_, cleanser.gradients_["DiscriminatorLoss"]
    expected = np.zeros(16)
    for t in range(len(trajectory)):
        record, states = trajectory[t], (trajectory.state(t), trajectory.state(t + 1))
        (one,) = exact_adjoint(trajectory.step, *states, record, trajectory.source[record.indices], [gradient])
        np.subtract.at(expected, record.indices.numpy(), one.weights.numpy())
    np.testing.assert_allclose(cleanser.influence_, expected, rtol=1e-9, atol=1e-14)
    secant = toy_cleanser(metric=DiscriminatorLoss(n_samples=60), backend=GradientDot(delta=1e-4)).fit(X)
    np.testing.assert_allclose(secant.influence_, expected, rtol=1e-3, atol=1e-9)


def test_without_cross_jacobians_nothing_reaches_the_generator_of_a_simultaneous_update(X):
    backend = GradientDot(derivative="exact")
    assert not toy_cleanser(backend=backend, update="simultaneous").fit(X).influence_.any()
    assert toy_cleanser(backend=backend).fit(X).influence_.any()


@pytest.mark.parametrize("name", ["random", "isolation_forest", "gradient_dot"])
def test_they_are_known_by_name(name, X):
    assert np.isfinite(toy_cleanser(backend=name, n_epochs=1).fit(X).harmfulness_).all()
