"""A replay is the recorded run with other weights, however it is run."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ganclean.dynamics.state import flatten_state, map_state
from ganclean.metrics import FID
from ganclean.runs.replay import Replay, weights_without
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_networks


def by_hand(trajectory, weights, start=0, renormalize=False):
    """The final state after plain steps with a row of weights."""
    state = trajectory.state(start)
    for t in range(start, len(trajectory)):
        record = trajectory[t]
        own = weights[record.indices]
        if renormalize:
            own = own * len(own) / own.sum().clamp(min=1)
        state = trajectory.step(state, record, trajectory.source[record.indices], own)
    return state


def assert_equal(state, other, **tolerances):
    theirs = flatten_state(other)
    for path, tensor in flatten_state(state).items():
        np.testing.assert_allclose(tensor.numpy(), theirs[path].numpy(), err_msg=path, **tolerances)


@pytest.fixture(scope="module")
def adam(X):
    return toy_cleanser(optimizer=OPTIMIZERS["adam"], ema_decay=0.8).fit(X)


@pytest.mark.parametrize("start", [0, 4, 9])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("settings", [{"vectorize": False}, {"vectorize": True}, {"vectorize": True, "chunk_size": 2}])
def test_every_way_of_running_ends_where_plain_steps_do(settings, renormalize, start, adam):
    trajectory = adam.trajectory_
    weights = torch.rand(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    weights[1] = 1
    weights[2, torch.arange(16) != trajectory[8].indices[0]] = 1
    states = Replay.of(trajectory, start).map(lambda state, run: state, weights, renormalize=renormalize, **settings)
    for state, row in zip(states, weights):
        assert_equal(state, by_hand(trajectory, row, start, renormalize), rtol=1e-9, atol=1e-12)


def test_a_run_departs_with_the_first_step_that_draws_a_changed_instance(adam):
    trajectory = adam.trajectory_
    replay = Replay.of(trajectory, 3)
    last = int(trajectory[8].indices[0])
    weights = weights_without([[], [last], [0, 1]], 16)
    drawn = [set(trajectory[t].indices.tolist()) for t in range(9)]
    first, pair = (next(t for t in range(3, 9) if rows & drawn[t]) for rows in ({last}, {0, 1}))
    assert replay._departures(weights).tolist() == [9, first, pair]


def test_common_steps_are_run_once(adam, monkeypatch):
    trajectory = adam.trajectory_
    replay = Replay.of(trajectory, 6)
    late = [int(row) for row in trajectory[8].indices]
    steps = []
    original = type(trajectory.step).__call__

    def counted(self, state, record, *args, **kwargs):
        steps.append(record.index)
        return original(self, state, record, *args, **kwargs)

    monkeypatch.setattr(type(trajectory.step), "__call__", counted)
    replay.map(lambda state, run: state, weights_without([[row] for row in late], 16), vectorize=False)
    # An epoch draws each instance once: all of these runs are the recorded one until step 8.
    assert steps == [6, 7] + [8] * len(late)


def test_results_are_in_the_order_of_the_weights(adam):
    weights = weights_without([[row] for row in range(16)], 16)
    replay = Replay.of(adam.trajectory_, 3)
    for vectorize in (True, False):
        assert replay.map(lambda state, run: run, weights, vectorize=vectorize) == list(range(16))


def test_an_unchanged_run_is_the_recorded_one_to_the_last_bit(adam):
    final = adam.trajectory_.state(9)
    for vectorize in (True, False):
        (state,) = Replay.of(adam.trajectory_).map(lambda s, _: s, torch.ones(1, 16), vectorize=vectorize)
        assert_equal(state, map_state(lambda tensor: tensor, final), rtol=0)


def test_no_step_left_leaves_the_state(adam):
    states = Replay.of(adam.trajectory_, 9).map(lambda s, _: s, torch.zeros(3, 16))
    for state in states:
        assert_equal(state, adam.trajectory_.state(9), rtol=0)


@pytest.mark.parametrize("start", [-1, 10, 1.5, None])
def test_a_replay_starts_at_a_step_of_the_run(start, adam):
    with pytest.raises(ValueError, match="first step must be from 0 to 9"):
        Replay.of(adam.trajectory_, start)


def test_what_is_sent_to_another_process_holds_one_state_and_no_trajectory(X):
    cleanser = toy_cleanser(checkpoint_every=1, n_epochs=10).fit(X)
    replay = Replay.of(cleanser.trajectory_, 27)
    portable = pickle.loads(pickle.dumps(replay.portable()))
    assert all(portable.record_of(t).index == t for t in (27, 28, 29))
    assert len(pickle.dumps(replay.portable())) < 0.2 * len(pickle.dumps(replay))
    weights = weights_without([[3], [5, 9]], 16)
    ends = [one.map(lambda s, _: s, weights, vectorize=False) for one in (replay, portable)]
    for ours, theirs in zip(*ends):
        assert_equal(ours, theirs, rtol=0)


def test_small_networks_are_run_at_once_and_large_ones_one_after_another(adam):
    assert Replay.of(adam.trajectory_)._is_dispatch_bound()
    torch.manual_seed(0)
    wide = (
        nn.Sequential(nn.Linear(3, 2048), nn.SiLU(), nn.Linear(2048, 2)).double(),
        nn.Sequential(nn.Linear(2, 2048), nn.SiLU(), nn.Linear(2048, 1024), nn.SiLU(), nn.Linear(1024, 1)).double(),
    )
    large = toy_cleanser(wide, n_epochs=1).fit(np.random.default_rng(0).normal(size=(16, 2)))
    assert not Replay.of(large.trajectory_)._is_dispatch_bound()


def test_the_budget_bounds_how_many_run_at_once(adam):
    replay = Replay.of(adam.trajectory_)
    sizes = [replay._chunk_size("auto", budget) for budget in (1, 10**6, 10**7)]
    assert sizes[0] == 1 and 1 < sizes[1] < sizes[2] and sizes[2] == pytest.approx(10 * sizes[1], rel=0.1)
    assert replay._chunk_size(7, 1) == 7


def test_networks_with_spectral_norm_are_run_at_once_too(X):
    generator, discriminator = toy_networks()
    discriminator[0] = spectral_norm(discriminator[0])
    cleanser = toy_cleanser((generator, discriminator)).fit(X)
    replay, weights = Replay.of(cleanser.trajectory_), weights_without([[], [3], [4, 8]], 16)
    together, alone = (replay.map(lambda s, _: s, weights, vectorize=v) for v in ("auto", False))
    for ours, theirs in zip(together, alone):
        assert_equal(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "all"])
def test_an_impossible_chunk_is_refused(chunk_size, adam):
    with pytest.raises(ValueError, match="chunk_size must be a positive integer or 'auto'"):
        Replay.of(adam.trajectory_).map(lambda s, _: s, torch.ones(2, 16), vectorize=True, chunk_size=chunk_size)


def test_an_unknown_way_of_running_is_refused(adam):
    with pytest.raises(ValueError, match="vectorize must be True, False or 'auto'"):
        Replay.of(adam.trajectory_).map(lambda s, _: s, torch.ones(2, 16), vectorize="yes")


class OldStyle(torch.autograd.Function):
    """A function that `torch.func` cannot transform: no setup_context."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Doubled(nn.Module):
    def forward(self, x):
        return OldStyle.apply(x)


def test_modules_that_cannot_be_transformed_run_one_after_another(X):
    generator, discriminator = toy_networks()
    cleanser = toy_cleanser((generator, nn.Sequential(Doubled(), *discriminator)), metric=FID(n_samples=60)).fit(X)
    replay, weights = Replay.of(cleanser.trajectory_), weights_without([[], [3], [4, 8]], 16)
    automatic, alone = (replay.map(lambda s, _: s, weights, vectorize=v) for v in ("auto", False))
    for ours, theirs in zip(automatic, alone):
        assert_equal(ours, theirs, rtol=0)
    with pytest.raises(RuntimeError):
        replay.map(lambda s, _: s, weights, vectorize=True)
