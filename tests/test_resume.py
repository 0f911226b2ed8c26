import os
import random
import time
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ganclean import Trajectory
from ganclean.backends import ITD, itd
from ganclean.dynamics.state import flatten_state
from ganclean.dynamics.step import Step
from ganclean.exceptions import TrajectoryError
from ganclean.metrics import FID, AverageLogLikelihood
from ganclean.optim import SGD
from ganclean.runs import tensorfile
from ganclean.runs.store import FolderStore
from tests.practice import practised
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

FULL = {"optimizer": OPTIMIZERS["adam"], "ema_decay": 0.9}
METRICS = {"fid": FID(n_samples=60), "a/log likelihood": AverageLogLikelihood(n_samples=60)}


def make_cleanser(store=None, *, last_epochs=2, networks=None, metric=METRICS, derivative="secant", **settings):
    if networks is None:
        generator, discriminator = toy_networks()
        networks = generator.insert(1, nn.Dropout(0.3)), discriminator
    settings = {"checkpoint_every": 2, "n_epochs": 4, **FULL, **settings}
    return toy_cleanser(networks, metric=metric, backend=ITD(last_epochs, derivative), store=store, **settings)


@pytest.fixture(autouse=True)
def saves_at_once(monkeypatch):
    monkeypatch.setattr(itd, "SECONDS_BETWEEN_SAVES", 0.0)


@pytest.fixture(scope="module")
def undisturbed(X):
    return make_cleanser().fit(X)


def assert_same(cleanser, expected):
    for name, influence in expected.influences_.items():
        assert np.array_equal(cleanser.influences_[name], influence)
    assert cleanser.metric_values_ == expected.metric_values_
    assert cleanser.backend_.growth_ == expected.backend_.growth_
    np.testing.assert_equal(cleanser.backend_.deviation_, expected.backend_.deviation_)
    states = [flatten_state(one.trajectory_.state(len(one.trajectory_))) for one in (cleanser, expected)]
    assert all(torch.equal(tensor, states[0][path]) for path, tensor in states[1].items())


class Killed(BaseException):
    """Stands for the end of the process: nothing in the library catches it."""


def stop_before(monkeypatch, owner, name, number, error):
    """Make the call of a function of that number, from 0, raise an error; return a list of the calls so far."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == number + 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def stop_going_back(monkeypatch, number):
    """Interrupt the backward pass after so many steps."""
    backwards = Trajectory.backwards

    def interrupted(*args, **kwargs):
        yield from islice(backwards(*args, **kwargs), number)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trajectory, "backwards", interrupted)


@pytest.fixture
def counted(monkeypatch):
    """A function that counts the training and the traced steps of a fit."""

    def count_calls(cleanser, X, **options):
        calls = {"steps": 0, "traced": 0}
        step, backwards = Step.__call__, Trajectory.backwards

        def watched_step(*args, **kwargs):
            calls["steps"] += 1
            return step(*args, **kwargs)

        def watched_backwards(*args, **kwargs):
            for item in backwards(*args, **kwargs):
                calls["traced"] += 1
                yield item

        # The probe runs and traces steps too.
        with monkeypatch.context() as patch:
            patch.setattr("ganclean.cleansing.influence.probe_step", lambda *_: None)
            patch.setattr(Step, "__call__", watched_step)
            patch.setattr(Trajectory, "backwards", watched_backwards)
            cleanser.fit(X, **options)
        return calls

    return count_calls


def test_a_complete_run_is_used_again_without_training(X, undisturbed, tmp_path, counted):
    make_cleanser(tmp_path / "run").fit(X)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again = make_cleanser(tmp_path / "run")
    calls = counted(again, X)
    assert_same(again, undisturbed)
    # A record that is given is replayed once without any removal.
    given = counted(make_cleanser(), X, trajectory=tmp_path / "run")
    assert given == {"steps": calls["steps"] + 6, "traced": 6} and calls["traced"] == 6
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("checkpoint_every", [1, 5, 100])
@pytest.mark.parametrize("at", [0, 4, 11])
def test_an_interrupted_training_goes_on_where_it_was(
    at, checkpoint_every, X, undisturbed, tmp_path, monkeypatch, counted
):
    def cleanser():
        return make_cleanser(tmp_path / "run", checkpoint_every=checkpoint_every)

    with monkeypatch.context() as patch:
        patch.setattr("ganclean.cleansing.influence.probe_step", lambda *_: None)
        stop_before(patch, Step, "__call__", at, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            cleanser().fit(X)
    with pytest.raises(
        TrajectoryError, match=rf"is truncated: {at} of 12 steps .* fit with the same GANTrainer\(store="
    ):
        make_cleanser().fit(X, trajectory=tmp_path / "run")
    again, tracing = cleanser(), counted(make_cleanser(tmp_path / "undisturbed", checkpoint_every=checkpoint_every), X)
    calls = counted(again, X)
    assert_same(again, undisturbed)
    assert tracing["steps"] - calls["steps"] == at and calls["traced"] == 6
    assert list(again.trajectory_.store.kept()) == list(FolderStore(tmp_path / "undisturbed").kept())


@pytest.mark.parametrize("feature", ["everything", "spectral norm, hook", "batch norm, cumulative", "one cycle"])
def test_whatever_training_does_goes_on_where_it_was(feature, tmp_path, monkeypatch):
    networks, X, y, settings = practised(feature)
    settings = {"checkpoint_every": 2, "n_epochs": 4, **settings}
    expected = toy_cleanser(networks, **settings).fit(X, y)
    with monkeypatch.context() as patch:
        patch.setattr("ganclean.cleansing.influence.probe_step", lambda *_: None)
        stop_before(patch, Step, "__call__", 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_cleanser(networks, store=tmp_path / "run", **settings).fit(X, y)
    with monkeypatch.context() as patch:
        stop_going_back(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            toy_cleanser(networks, store=tmp_path / "run", **settings).fit(X, y)
    assert_same(toy_cleanser(networks, store=tmp_path / "run", **settings).fit(X, y), expected)


def test_before_the_traced_part_one_passing_checkpoint_is_kept(X, tmp_path, monkeypatch):
    kept = []
    checkpoint = FolderStore.checkpoint
    monkeypatch.setattr(
        FolderStore, "checkpoint", lambda store, *args: kept.append(list(store.kept())) or checkpoint(store, *args)
    )
    make_cleanser(tmp_path / "run", n_epochs=5, last_epochs=1, checkpoint_every=2).fit(X)
    assert kept == [[], [0], [0, 3], [0, 6], [0, 9], [0, 12], [0, 12, 14]]
    assert list(FolderStore(tmp_path / "run").kept()) == [0, 12, 14, 15]


DISTURBANCES = {
    "seed": ({"random_state": 1}, {}, {}, "of another random_state: None draws a new one in every fit"),
    "no seed": ({"random_state": None}, {}, {}, "of another random_state: None draws a new one in every fit"),
    "weights": ({}, {"networks": toy_networks(seed=3)}, {"networks": toy_networks()}, "of other initial weights"),
    "data": ({}, {}, {"scale": 2.0}, "of other data"),
    "rate": ({}, {"optimizer": SGD(lr=0.5)}, {}, "of other training settings|another model"),
    "epochs": ({}, {"n_epochs": 5}, {}, "other training settings .n_epochs: recorded 4, given 5"),
}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(("estimator", "settings", "other", "message"), DISTURBANCES.values(), ids=DISTURBANCES)
def test_another_run_in_the_folder_is_refused(
    estimator, settings, other, message, complete, X, tmp_path, monkeypatch, no_trace_of
):
    first = make_cleanser(tmp_path / "run", networks=other.get("networks"))
    if complete:
        first.fit(X)
    else:
        no_trace_of(first, X)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    second = make_cleanser(tmp_path / "run", **settings).set_params(**estimator)
    with pytest.raises(TrajectoryError, match=rf"The trajectory is (of|{message}).*Choose another folder than .*run"):
        second.fit(X * other.get("scale", 1.0))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.fixture
def no_trace_of(monkeypatch):
    """A function that fits until training is interrupted in the middle."""

    def fit(cleanser, X):
        with monkeypatch.context() as patch:
            patch.setattr("ganclean.cleansing.influence.probe_step", lambda *_: None)
            stop_before(patch, Step, "__call__", 7, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                cleanser.fit(X)

    return fit


def test_other_random_numbers_and_weights_do_not_hinder_tracing_what_is_there(X, undisturbed, tmp_path):
    make_cleanser(tmp_path / "run").fit(X)
    other = toy_networks(seed=5)
    cleanser = make_cleanser(networks=(other[0].insert(1, nn.Dropout(0.3)), other[1])).set_params(random_state=0)
    assert_same(cleanser.fit(X, trajectory=tmp_path / "run"), undisturbed)


def test_parameters_that_are_not_trained_must_be_those_of_the_run(X, tmp_path):
    def cleanser(value, store=None):
        generator, discriminator = toy_networks()
        nn.init.constant_(generator[0].weight.requires_grad_(False), value)
        return make_cleanser(store, networks=(generator, discriminator))

    cleanser(0.5, tmp_path / "run").fit(X)
    assert len(cleanser(0.5).fit(X, trajectory=tmp_path / "run").trajectory_) == 12
    with pytest.raises(TrajectoryError, match="of another model: the values of parameters that are not trained differ"):
        cleanser(0.4).fit(X, trajectory=tmp_path / "run")


def test_a_run_that_diverged_is_not_taken_for_a_complete_one(X, tmp_path):
    for _ in range(2):
        with pytest.raises(ArithmeticError, match=r"Training diverged: .* by step \d+ of 12"):
            make_cleanser(tmp_path / "run", loss="least_squares", optimizer=SGD(lr=1e200)).fit(X)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
@pytest.mark.parametrize("checkpoint_every", [1, 4])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_an_interrupted_backward_pass_goes_on_where_it_was(
    at, checkpoint_every, derivative, X, tmp_path, monkeypatch, counted
):
    expected = make_cleanser(derivative=derivative).fit(X)
    cleanser = make_cleanser(tmp_path / "run", checkpoint_every=checkpoint_every, derivative=derivative)
    with monkeypatch.context() as patch:
        stop_going_back(patch, at)
        with pytest.raises(KeyboardInterrupt):
            cleanser.fit(X)
    assert len(list((tmp_path / "run").glob("progress-*"))) == 1
    calls = counted(cleanser, X)
    assert_same(cleanser, expected)
    assert calls["traced"] == 6 - at
    assert not list((tmp_path / "run").glob("progress-*"))


@pytest.mark.parametrize("where", ["_subtracted", "Reached"])
def test_an_interrupt_at_any_line_finds_influences_and_cotangents_of_one_step(
    where, X, undisturbed, tmp_path, monkeypatch
):
    for at in (2, 3):
        cleanser = make_cleanser(tmp_path / f"run {at}")
        with monkeypatch.context() as patch:
            if where == "Reached":
                stop_before(patch, itd.Reached, "__new__", at, KeyboardInterrupt)
            else:
                stop_before(patch, itd, where, at, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                cleanser.fit(X)
        assert_same(cleanser.fit(X), undisturbed)


def test_progress_of_another_backward_pass_is_left_alone(X, tmp_path, monkeypatch, counted):
    with monkeypatch.context() as patch:
        stop_going_back(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            make_cleanser(tmp_path / "run").fit(X)
    others = [
        make_cleanser(tmp_path / "run", derivative="exact"),
        make_cleanser(tmp_path / "run", last_epochs=3),
        make_cleanser(tmp_path / "run", metric={"fid": FID(n_samples=50)}),
    ]
    assert [counted(other, X)["traced"] for other in others] == [6, 9, 6]
    assert len(list((tmp_path / "run").glob("progress-*"))) == 1
    assert counted(make_cleanser(tmp_path / "run"), X)["traced"] == 3


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda content: b"", lambda content: b"x" * 300])
def test_damaged_progress_is_ignored_with_a_warning(damage, X, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_going_back(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            make_cleanser(tmp_path / "run").fit(X)
    (path,) = (tmp_path / "run").glob("progress-*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"progress-\w+\.safetensors is damaged and ignored"):
        cleanser = make_cleanser(tmp_path / "run").fit(X)
    assert_same(cleanser, undisturbed)
    assert not path.exists()


def test_progress_is_not_saved_all_the_time(X, tmp_path, monkeypatch):
    saved = []
    save = FolderStore.save_progress
    monkeypatch.setattr(FolderStore, "save_progress", lambda *args: saved.append(args[-1]["end"]) or save(*args))
    make_cleanser(tmp_path / "every").fit(X)
    assert saved == [10, 8, 6]
    saved.clear()
    monkeypatch.setattr(itd, "SECONDS_BETWEEN_SAVES", 60.0)
    make_cleanser(tmp_path / "never").fit(X)
    assert saved == []


ALL_STATES = {"checkpoint_every": 1, "last_epochs": None, "n_epochs": 2}


@pytest.mark.parametrize("settings", [{}, ALL_STATES], ids=["sparse", "all"])
def test_a_kill_at_any_change_of_the_folder_costs_at_most_one_checkpoint(settings, X, tmp_path, monkeypatch):
    expected = make_cleanser(**settings).fit(X)

    def killed(folder, number):
        changes = count()

        def killing(change):
            def call(*args, **kwargs):
                if next(changes) == number:
                    raise Killed
                return change(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(tensorfile.os, "replace", killing(os.replace))
            patch.setattr(Path, "unlink", killing(Path.unlink))
            try:
                make_cleanser(folder, **settings).fit(X)
            except Killed:
                return True
        return False

    for number in count():
        folder = tmp_path / str(number)
        done = not killed(folder, number)
        assert_same(make_cleanser(folder, **settings).fit(X), expected)
        assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"manifest.json", "state", "steps"}
        if done:
            break
    assert number > 12


def fit_and_save(folder, path):
    """Fit a cleanser and write its influences; runs in a process of its own, which may be killed."""
    torch.set_num_threads(1)
    itd.SECONDS_BETWEEN_SAVES = 0.0
    cleanser = make_cleanser(folder, n_epochs=10, last_epochs=6)
    influences = cleanser.fit(toy_data()).influences_
    unfinished = Path(path).with_suffix(".tmp.npz")
    np.savez(unfinished, *influences.values())
    os.replace(unfinished, path)


@pytest.fixture(scope="module")
def whole(X):
    """The influences of the undisturbed run, and the seconds that it takes."""
    begin = time.perf_counter()
    cleanser = make_cleanser(n_epochs=10, last_epochs=6).fit(X)
    return list(cleanser.influences_.values()), time.perf_counter() - begin


def kill_at_random(folder, seed, n_kills, whole):
    """Kill a process that fits, at random moments, until it is let go on to its end; check what it then computes."""
    rng, result = random.Random(seed), folder.with_suffix(".npz")
    for wait in [*(rng.uniform(0, whole[1]) for _ in range(n_kills)), None]:
        process = get_context("fork").Process(target=fit_and_save, args=(folder, result))
        process.start()
        process.join(wait)
        if wait is not None:
            process.kill()
            process.join()
            result.unlink(missing_ok=True)
    with np.load(result) as saved:
        assert all(np.array_equal(saved[name], expected) for name, expected in zip(saved.files, whole[0], strict=True))


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")


@needs_fork
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_process_goes_on_with_the_same_numbers(seed, whole, tmp_path):
    kill_at_random(tmp_path / "run", seed, 3, whole)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_killed_processes_go_on_with_the_same_numbers(seed, whole, tmp_path):
    kill_at_random(tmp_path / "run", 100 + seed, 1 + seed % 5, whole)
