"""Compiled steps do what the step does."""

import logging
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from ganclean import GANTrainer, Update
from ganclean.backends import ITD
from ganclean.dynamics import capture
from ganclean.dynamics.adjoint import exact_adjoint, secant_adjoint
from ganclean.dynamics.capture import CompiledStep
from ganclean.dynamics.state import flatten_state, map_state
from ganclean.metrics import FID, SampleMean
from ganclean.optim import Adam
from ganclean.validation import counterfactual_retrain
from tests.practice import PRACTICE, practised
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

X = toy_data()
QUICK = ("adamw", "conditional")


@pytest.fixture
def quick(monkeypatch):
    """Graphs are captured, but run as they are: to translate one to machine code takes half a minute."""
    monkeypatch.setattr(capture.torch, "compile", lambda module, **_: module)


@pytest.fixture
def told():
    """What the library has logged; torch logs much of its own."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("ganclean").addHandler(handler)
    yield records
    logging.getLogger("ganclean").removeHandler(handler)


def steps_of(feature, n_steps=2):
    """A run with some feature, step by step: a compiled step, the record, the instances, the states around it."""
    networks, data, y, settings = practised(feature)
    cleanser = toy_cleanser(networks, **{"n_epochs": 2, **settings}).fit(data, y)
    trajectory = cleanser.trajectory_
    step = CompiledStep(trajectory.step)
    return step, [
        (trajectory[t], trajectory.source[trajectory[t].indices], trajectory.state(t), trajectory.state(t + 1))
        for t in range(n_steps)
    ]


def assert_same(found, expected, tolerance=1e-9):
    for name, tensor in flatten_state(expected).items():
        size = max(float(tensor.abs().max()), 1e-3) if tensor.numel() else 1.0
        torch.testing.assert_close(flatten_state(found)[name], tensor, rtol=0, atol=tolerance * size, msg=name)


def assert_steps_agree(feature):
    step, run = steps_of(feature)
    # Twice: a graph's first call returns what it is compared with.
    for record, real, before, after in run * 2:
        assert_same(step(before, record, real), after)
    record, real, before, after = run[-1]
    cotangents = [map_state(lambda t, s=s: torch.sin(s + 10 * t), step.differentiable(after)) for s in (0.0, 1.0)]
    for adjoint in (exact_adjoint, secant_adjoint):
        for _ in range(2):
            found = adjoint(step, before, after, record, real, cotangents)
        for one, other in zip(found, adjoint(step.plain, before, after, record, real, cotangents)):
            assert_same(one.cotangent, other.cotangent, 1e-7)
            torch.testing.assert_close(one.weights, other.weights, rtol=1e-7, atol=1e-12)
    return step


@pytest.mark.parametrize("feature", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in PRACTICE])
def test_a_compiled_step_is_the_step(feature, quick, told):
    step = assert_steps_agree(feature)
    # Nothing was given up, but for networks whose randomness a graph would not repeat.
    assert (not told) == all(step._graphs._graphs.values())


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["adamw", "batch norm", "everything"])
def test_a_step_in_machine_code_is_the_step(feature, told):
    step = assert_steps_agree(feature)
    assert (not told) == all(step._graphs._graphs.values())


def test_influence_of_a_compiled_run(quick, told):
    settings = {"optimizer": OPTIMIZERS["adam"], "metric": {"fid": FID(n_samples=60), "mean": SampleMean()}}
    plain, compiled = (toy_cleanser(**settings, select="fid", compile=c).fit(X) for c in (False, True))
    for name, expected in plain.influences_.items():
        np.testing.assert_allclose(compiled.influences_[name], expected, rtol=1e-6, atol=1e-9)
    values = [counterfactual_retrain(c, [[3], [5, 9]], vectorize=False) for c in (plain, compiled)]
    np.testing.assert_allclose(*values, rtol=1e-7)
    assert not told


def test_compiled_runs_are_made_one_after_another(quick, monkeypatch):
    cleanser = toy_cleanser(compile=True).fit(X)
    expected = counterfactual_retrain(toy_cleanser().fit(X), [[3], [5, 9]])
    monkeypatch.setattr("ganclean.runs.replay.Replay._together", None)
    np.testing.assert_allclose(counterfactual_retrain(cleanser, [[3], [5, 9]]), expected, rtol=1e-7)


@pytest.mark.parametrize(
    "scheduler", [partial(StepLR, step_size=1, gamma=0.9), partial(OneCycleLR, max_lr=2e-2, total_steps=15)]
)
def test_what_changes_from_step_to_step_needs_no_new_graph(scheduler, quick):
    cleansers = [toy_cleanser(optimizer=Adam(lr=1e-2), scheduler=scheduler, n_epochs=5, compile=c) for c in (0, 1)]
    plain, compiled = (cleanser.fit(X) for cleanser in cleansers)
    np.testing.assert_allclose(compiled.influence_, plain.influence_, rtol=1e-6)
    # 16 instances in batches of 6: two sizes, for the step and its adjoint.
    assert len(compiled.trajectory_.step._graphs._graphs) == 4


def test_another_process_makes_its_own_graphs(quick):
    step, run = steps_of(next(iter(PRACTICE)), 1)
    record, real, before, after = run[0]
    step(before, record, real)
    copy = pickle.loads(pickle.dumps(step))
    assert step._graphs._graphs and not copy._graphs._graphs
    assert_same(copy(before, record, real), after)


def test_random_networks_run_without_a_graph_and_one_line_says_so(quick, told):
    def make():
        generator, discriminator = toy_networks()
        return generator, nn.Sequential(*discriminator[:2], nn.Dropout(0.5), discriminator[2])

    plain, compiled = (toy_cleanser(make(), compile=c).fit(X) for c in (False, True))
    np.testing.assert_array_equal(compiled.influence_, plain.influence_)
    assert len(told) == 1 and "random numbers" in told[0].getMessage()


def broken_compiler(*_, **__):
    raise OSError("there is no compiler\nand more about it")


def lying_compiler(module, **_):
    return lambda *inputs: [output + 1 for output in module(*inputs)]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(broken_compiler, "OSError: there is no compiler"), (lying_compiler, "results of one deviate")],
)
def test_a_compiler_that_fails_costs_nothing_but_time(compiler, reason, monkeypatch, told):
    monkeypatch.setattr(capture.torch, "compile", compiler)
    plain, compiled = (toy_cleanser(compile=c).fit(X) for c in (False, True))
    np.testing.assert_array_equal(compiled.influence_, plain.influence_)
    assert len(told) == 1 and reason in told[0].getMessage()


def test_a_form_that_fails_leaves_the_graphs_of_others_alone(monkeypatch, told):
    compiled = []

    def failing_once(module, **_):
        compiled.append(module)
        if len(compiled) == 1:
            raise OSError("this one is too hard")
        return module

    monkeypatch.setattr(capture.torch, "compile", failing_once)
    plain, cleanser = (toy_cleanser(compile=c).fit(X) for c in (False, True))
    np.testing.assert_allclose(cleanser.influence_, plain.influence_, rtol=1e-6)
    # Two sizes of batches, for the step and its adjoint; what failed is not tried again.
    graphs = list(cleanser.trajectory_.step._graphs._graphs.values())
    assert len(graphs) == len(compiled) == 4 and [graph is None for graph in graphs] == [True, False, False, False]
    assert len(told) == 1 and "this one is too hard" in told[0].getMessage()


def test_objectives_of_ones_own_run_without_a_graph_and_one_line_says_so(quick, told):
    def of_d(nets, batch, weights):
        real = nn.functional.softplus(-nets.D(batch.x).flatten())
        return (weights * real).mean() + nn.functional.softplus(nets.D(nets.G(batch.latents))).mean()

    def of_g(nets, batch, weights):
        return nn.functional.softplus(-nets.D(nets.G(batch.latents))).mean()

    rule = OPTIMIZERS["momentum"]
    updates = {"updates": [Update("D", of_d, rule), Update("G", of_g, rule)], "optimizer": None}
    plain, compiled = (toy_cleanser(**updates, compile=c).fit(X) for c in (False, True))
    np.testing.assert_array_equal(compiled.influence_, plain.influence_)
    assert len(told) == 1 and "objectives of one's own" in told[0].getMessage()


def test_too_many_forms_of_a_step_run_without_a_graph(quick, monkeypatch, told):
    monkeypatch.setattr(capture, "MAX_GRAPHS", 1)
    plain, compiled = (toy_cleanser(compile=c).fit(X) for c in (False, True))
    np.testing.assert_allclose(compiled.influence_, plain.influence_, rtol=1e-6)
    assert len(told) == 1 and "1 graphs already" in told[0].getMessage()


def test_compilation_is_a_parameter_of_the_trainer():
    assert isinstance(GANTrainer(compile=True).make_step(*toy_networks()), CompiledStep)
    assert not isinstance(GANTrainer().set_params(compile=False).make_step(*toy_networks()), CompiledStep)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_metrics_traced_at_once_are_traced_as_one_by_one(derivative):
    metrics = {"fid": FID(n_samples=60), "mean": SampleMean(), "more": FID(n_samples=40)}
    together = toy_cleanser(metric=metrics, select="fid", backend=ITD(derivative=derivative)).fit(X)
    for name, metric in metrics.items():
        alone = toy_cleanser(metric=metric, backend=ITD(derivative=derivative)).fit(X)
        np.testing.assert_allclose(together.influences_[name], alone.influence_, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("adjoint", [exact_adjoint, secant_adjoint])
@pytest.mark.parametrize("feature", PRACTICE)
def test_a_stack_of_cotangents_is_pulled_back_as_each(feature, adjoint):
    step, run = steps_of(feature)
    record, real, before, after = run[-1]
    cotangents = [map_state(lambda t, s=s: torch.sin(s + 10 * t), step.differentiable(after)) for s in (0.0, 1.0)]
    args = step.plain, before, after, replace(record), real, cotangents
    for one, other in zip(adjoint(*args, stacked=True), adjoint(*args)):
        assert_same(one.cotangent, other.cotangent, 1e-7)
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-7, atol=1e-12)
