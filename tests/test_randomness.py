"""Noise in the networks is part of a run: it repeats, derivatives know it, and no two streams are one."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from ganclean import Update
from ganclean.backends import ITD
from ganclean.dynamics.randomness import continued, put_back, random_states, seeded, stream
from ganclean.metrics import FID, SampleMean
from ganclean.runs.replay import Replay
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

X = toy_data()


class Noise(nn.Module):
    """Adds noise with a scale that is learned, and notes what it drew."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 0.7))
        self.drawn = []

    def forward(self, x):
        noise = torch.randn(x.shape, dtype=x.dtype)
        self.drawn.append(noise)
        return x + self.scale * noise


def noisy_networks(width=6):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, width), Noise(width), nn.Tanh(), nn.Linear(width, 2), Noise(2)).double()
    return generator, toy_networks()[1]


def noisy(metric=None, width=6, **settings):
    metric = {"fid": FID(n_samples=80), "mean": SampleMean(n_samples=50)} if metric is None else metric
    return toy_cleanser(noisy_networks(width), metric=metric, **settings)


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.8}, {"update": "simultaneous"}])
def test_a_fit_with_noise_in_the_generator_repeats_to_the_last_bit(settings):
    torch.manual_seed(1)
    first = noisy(**settings).fit(X)
    torch.randn(1000)
    second = noisy(**settings).fit(X)
    assert first.metric_values_ == second.metric_values_
    for name, influence in first.influences_.items():
        assert np.array_equal(influence, second.influences_[name])
    assert np.array_equal(first.score_samples(X[:3] + 1), second.score_samples(X[:3] + 1))
    assert np.array_equal(first.sample(20)[0], second.sample(20)[0])
    assert noisy(**settings).set_params(random_state=1).fit(X).metric_value_ != first.metric_value_


@pytest.mark.parametrize("name", ["1.scale", "4.scale", "0.weight"])
@pytest.mark.parametrize("metric", ["fid", "mean"])
@pytest.mark.parametrize("chunk_size", [500, 30])
def test_the_gradient_in_the_scale_of_noise_is_that_of_the_metrics_value(chunk_size, metric, name):
    cleanser = noisy().fit(X)
    evaluator, state = cleanser.evaluator(80), cleanser.trajectory_.state(9)
    evaluator = type(evaluator)(evaluator.step, evaluator.latents, chunk_size, seed=evaluator.seed)
    chosen = cleanser.metrics_[metric]
    value, gradient = evaluator.gradient(metric, chosen, state)
    samples = evaluator.samples(state, chosen.sample_size)
    assert value == evaluator.value(chosen, state) == pytest.approx(float(chosen(samples)), rel=1e-12)
    params = state.generator
    direction = torch.randn(params[name].shape, dtype=torch.float64)

    def moved(width):
        changed = {**params, name: params[name] + width * direction}
        return evaluator.value(chosen, state._replace(params={**state.params, "G": changed}))

    width = 1e-4
    expected = (8 * (moved(width) - moved(-width)) - (moved(2 * width) - moved(-2 * width))) / (12 * width)
    assert float((gradient.generator[name] * direction).sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("derivative", "tolerance"), [("exact", 1e-5), ("secant", 1e-3)])
def test_influence_knows_the_noise_of_each_step(derivative, tolerance):
    cleanser = noisy(backend=ITD(derivative=derivative, delta=1e-4)).fit(X)
    replay, width = Replay.of(cleanser.trajectory_), 1e-3
    weights = torch.ones(32, 16, dtype=torch.float64)
    for row in range(16):
        weights[2 * row : 2 * row + 2, row] += torch.tensor([width, -width])
    evaluator = cleanser.evaluator(80)
    values = replay.map(lambda state, _: evaluator.value(cleanser.metric_, state), weights, vectorize=False)
    expected = [(below - above) / (2 * width) for above, below in zip(values[::2], values[1::2])]
    np.testing.assert_allclose(cleanser.influence_, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_no_two_draws_of_a_step_are_the_same_numbers():
    # As many numbers in a call as in the latents: from one stream, they would be the same.
    cleanser = noisy(width=3).fit(X)
    trajectory = cleanser.trajectory_
    layers = [m for m in trajectory.step.networks["G"].module.modules() if isinstance(m, Noise)]
    for layer in layers:
        layer.drawn.clear()
    for t in (0, 1):
        trajectory.replay(trajectory.state(t), t)
    drawn = [noise.flatten() for layer in layers for noise in layer.drawn]
    assert len(drawn) == 2 * 2 * len(layers)
    drawn += [draw.flatten() for t in (0, 1) for draw in (trajectory[t].latents_d, trajectory[t].latents_g)]
    for one, other in combinations(drawn, 2):
        n = min(len(one), len(other), 6)
        assert not any(torch.equal(one[:n], other[i : i + n]) for i in range(len(other) - n + 1))


def test_the_latents_of_metrics_are_not_the_noise_in_the_networks():
    cleanser = noisy(width=3).fit(X)
    evaluator = cleanser.evaluator(80)
    layers = [m for m in cleanser.trajectory_.step.networks["G"].module.modules() if isinstance(m, Noise)]
    for layer in layers:
        layer.drawn.clear()
    evaluator.samples(cleanser.trajectory_.state(9), 80)
    assert not any(torch.equal(layer.drawn[-1][:, :2], evaluator.latents[:, :2]) for layer in layers)
    assert not torch.equal(layers[0].drawn[-1][:, :2], layers[1].drawn[-1])


def test_objectives_of_ones_own_draw_from_streams_of_their_own():
    seen = {"D": [], "G": [], "latents": []}

    def of_d(nets, batch, weights):
        own = torch.randn(len(batch.x), 3, dtype=batch.x.dtype)
        seen["D"].append(own), seen["latents"].append(batch.latents)
        real = softplus(-nets.D(batch.x).flatten())
        return (weights * real).mean() + softplus(nets.D(nets.G(own))).mean()

    def of_g(nets, batch, weights):
        own = torch.randn(len(batch.x), 3, dtype=batch.x.dtype)
        seen["G"].append(own), seen["latents"].append(batch.latents)
        return softplus(-nets.D(nets.G(own))).mean()

    rule = OPTIMIZERS["momentum"]
    updates = [Update("D", of_d, rule), Update("G", of_g, rule)]
    cleansers = [noisy(width=3, updates=updates, optimizer=None).fit(X) for _ in range(2)]
    assert cleansers[0].metric_values_ == cleansers[1].metric_values_
    assert np.array_equal(cleansers[0].influence_, cleansers[1].influence_)
    trajectory = cleansers[0].trajectory_
    layers = [m for m in trajectory.step.networks["G"].module.modules() if isinstance(m, Noise)]
    for drawn in [*seen.values(), *(layer.drawn for layer in layers)]:
        drawn.clear()
    trajectory.replay(trajectory.state(0), 0)
    everything = [*seen["D"], *seen["G"], *seen["latents"], *(noise for layer in layers for noise in layer.drawn)]
    assert len(everything) == 4 + 2 * len(layers)
    assert not any(torch.equal(one[:, :2], other[:, :2]) for one, other in combinations(everything, 2))


@pytest.mark.parametrize("names", [("D", 1), ("D", "1"), (1, "D"), ("D1",), ("D", 1, 0), ()])
def test_streams_are_told_apart_by_their_names_and_repeat(names):
    others = {stream(seed, *other) for seed in (0, 1) for other in [("G", 1), ("D", 2), ("D", 11), ("samples", 0)]}
    assert stream(0, *names) == stream(0, *names) not in others
    assert 0 <= stream(2**31, *names) < 2**63


def test_neighbouring_seeds_and_numbers_have_nothing_in_common():
    seeds = [stream(seed, number) for seed in range(60) for number in range(60)]
    assert len(set(seeds)) == len(seeds)
    with_ = [np.random.default_rng(seed).normal() for seed in seeds[:2000]]
    assert abs(np.corrcoef(with_[:-1], with_[1:])[0, 1]) < 0.1


def test_the_global_generator_is_put_back_whatever_happens():
    torch.manual_seed(3)
    before = random_states()
    for block in (seeded(5), continued({"cpu": torch.Generator().manual_seed(9).get_state()})):
        with pytest.raises(RuntimeError, match="stop"), block:
            torch.randn(5)
            raise RuntimeError("stop")
        assert all(torch.equal(state, before[name]) for name, state in random_states().items())
    expected = torch.randn(3)
    put_back(before)
    with continued(before):
        assert torch.equal(torch.randn(3), expected)
    assert torch.equal(torch.randn(3), expected)
