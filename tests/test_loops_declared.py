"""Influence is exact for every shape of objective, against eager training with the modules and torch.optim."""

import numpy as np
import pytest
import torch

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import SampleMean
from ganclean.validation import counterfactual_retrain
from tests.reference.eager_updates import train_by_objectives
from tests.reference.finite_differences import STENCIL
from tests.shapes import BATCH, LATENT, SHAPES

SCHEMES = [(ITD(derivative="exact"), 1e-4), (ITD(delta=1e-4), 1e-2)]


def features(x):
    flat = x.flatten(1)
    return torch.cat([flat, flat.square(), (flat[:, :1] * flat[:, 1:2])], dim=1)


def trained(shape, backend=None, n_epochs=3, **settings):
    """A cleanser fitted to a shape, its networks, and the data as tensors."""
    torch.manual_seed(0)
    players = shape.players()
    X, y = shape.data()
    chosen = {"updates": shape.updates, "n_epochs": n_epochs, "batch_size": BATCH, "latent_dim": LATENT}
    trainer = GANTrainer(**(chosen | dict(shape.settings) | settings))
    others = {name: module for name, module in players.items() if name not in "GD"}
    cleanser = GANInfluence(
        players["G"],
        players.get("D"),
        players=others,
        trainer=trainer,
        metric={"mean": SampleMean(features, n_samples=40)},
        backend=ITD() if backend is None else backend,
        random_state=0,
    ).fit(X, y)
    return cleanser, players, torch.from_numpy(X), None if y is None else torch.from_numpy(y)


def eager_value(cleanser, players, X, y, weights=None):
    """The metric after eager training with some weights of the instances."""
    step = cleanser.trajectory_.step
    modules, averages = train_by_objectives(step, players, X, y, cleanser.trajectory_, weights)
    final = cleanser.trajectory_.state(len(cleanser.trajectory_))
    named = {
        name: {**dict(module.named_parameters()), **dict(module.named_buffers()), **averages.get(name, {})}
        for name, module in modules.items()
    }
    params = {name: {n: named[name][n].detach() for n in tensors} for name, tensors in final.params.items()}
    buffers = {name: {n: named[name][n] for n in tensors} for name, tensors in final.buffers.items()}
    evaluator = cleanser.evaluator(40)
    state = final._replace(params=params, buffers=buffers, averages={})
    return evaluator.value(cleanser.metric_, state)


@pytest.mark.parametrize("name", SHAPES)
def test_influence_is_the_derivative_in_the_weights(name):
    shape, expected = SHAPES[name], None
    for backend, tolerance in SCHEMES:
        cleanser, players, X, y = trained(shape, backend)
        assert cleanser.metric_value_ == pytest.approx(eager_value(cleanser, players, X, y), rel=1e-9)
        if expected is None:
            expected = np.zeros(len(X))
            for row in range(len(X)):
                for offset, factor in STENCIL.items():
                    weights = torch.ones(len(X), dtype=torch.float64)
                    weights[row] += offset * 1e-3
                    expected[row] -= factor / 1e-3 * eager_value(cleanser, players, X, y, weights)
        error = np.abs(cleanser.influence_ - expected) / np.abs(expected)
        assert error.max() < tolerance, (backend, error)


@pytest.mark.parametrize("name", SHAPES)
def test_a_replay_without_removal_is_the_run_and_groups_are_predicted(name):
    # Beyond the first steps, in which Adam divides by what it has hardly seen.
    cleanser, *_ = trained(SHAPES[name], ITD(last_epochs=2), n_epochs=8)
    assert counterfactual_retrain(cleanser, [[]])[0] == pytest.approx(cleanser.metric_value_, rel=1e-6)
    groups = [np.random.default_rng(i).permutation(16)[:2] for i in range(12)]
    true = counterfactual_retrain(cleanser, groups, last_epochs=2) - cleanser.metric_value_
    predicted = np.array([cleanser.influence_[group].sum() for group in groups])
    assert np.corrcoef(predicted, true)[0, 1] > 0.9
