import json
import weakref
from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from ganclean import GANInfluence, Trajectory
from ganclean.backends import ITD
from ganclean.dynamics.state import (
    TrainingState,
    empty_parts,
    flatten_state,
    map_state,
    ravel,
    unflatten_state,
    unravel,
)
from ganclean.exceptions import NetworkError, ReplayMismatchError, TrajectoryError
from ganclean.metrics import SampleMean
from ganclean.optim import SGD
from ganclean.runs.checkpoints import size_of
from ganclean.runs.store import FolderStore
from ganclean.validation import counterfactual_retrain
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks, toy_trainer

FULL = {"optimizer": OPTIMIZERS["adam"], "ema_decay": 0.9}


def with_dropout():
    generator, discriminator = toy_networks()
    return generator.insert(1, nn.Dropout(0.3)), discriminator


def fitted(X, **settings):
    return toy_cleanser(with_dropout(), **(FULL | settings)).fit(X)


@pytest.fixture(scope="module")
def original(X):
    return fitted(X)


@pytest.fixture(scope="module")
def recorded_folder(X, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    fitted(X, store=folder)
    return folder


@pytest.fixture
def folder(recorded_folder, tmp_path):
    """A copy of a recorded trajectory, to be damaged."""
    copied = tmp_path / "run"
    copied.mkdir()
    for path in recorded_folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def assert_same_run(cleanser, original):
    assert np.array_equal(cleanser.influence_, original.influence_)
    assert cleanser.metric_value_ == original.metric_value_
    for t in range(len(original.trajectory_) + 1):
        expected = flatten_state(original.trajectory_.state(t))
        state = flatten_state(cleanser.trajectory_.state(t))
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[path]) for path, tensor in state.items())


@pytest.mark.parametrize("checkpoint_every", [1, 3, 7, 100])
@pytest.mark.parametrize("on_disk", [False, True])
def test_store_and_checkpoints_change_neither_states_nor_influences(checkpoint_every, on_disk, X, original, tmp_path):
    store = tmp_path / "run" if on_disk else None
    assert_same_run(fitted(X, store=store, checkpoint_every=checkpoint_every), original)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_a_folder_gives_back_what_each_step_drew(update, X, tmp_path):
    in_memory = fitted(X, update=update).trajectory_
    on_disk = fitted(X, update=update, store=tmp_path / "run").trajectory_
    opened = Trajectory.open(tmp_path / "run")
    assert len(opened) == len(in_memory) == 9 and opened.steps_per_epoch == 3
    for t in range(9):
        ours, theirs = on_disk[t], in_memory[t]
        assert (ours.index, ours.seed) == (theirs.index, theirs.seed) == (t, theirs.seed)
        for name in ("indices", "latents_d", "latents_g"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert (ours.latents_g is ours.latents_d) == (update == "simultaneous")
        assert opened[t].latents_d is None and torch.equal(opened[t].indices, theirs.indices)


def test_a_trajectory_is_indexed_as_a_sequence(original):
    trajectory = original.trajectory_
    assert trajectory[-1].index == 8
    for index in (9, -10):
        with pytest.raises(IndexError, match=f"step {index} of a trajectory of 9 steps"):
            trajectory[index]
    for index in (10, -1):
        with pytest.raises(IndexError, match=f"state {index} of a trajectory of 9 steps"):
            trajectory.state(index)


def test_the_first_state_is_that_of_the_given_networks_and_the_last_that_of_the_trained_ones(original):
    first, last = original.trajectory_.state(0), original.trajectory_.state(9)
    generator, discriminator = with_dropout()
    assert all(torch.equal(first.generator[name], p) for name, p in generator.named_parameters())
    assert all(torch.equal(first.average[name], p) for name, p in generator.named_parameters())
    assert all(torch.equal(first.discriminator[name], p) for name, p in discriminator.named_parameters())
    assert not any(m.any() for m in first.moments["G"]["mean"].values())
    assert all(torch.equal(last.average[name], p) for name, p in original.generator_.named_parameters())
    assert all(torch.equal(last.discriminator[name], p) for name, p in original.discriminator_.named_parameters())


def test_only_the_traced_epochs_are_kept_and_the_others_are_recomputed(X, original):
    cleanser = toy_cleanser(with_dropout(), backend=ITD(last_epochs=1), **FULL).fit(X)
    assert list(cleanser.trajectory_.store.kept()) == [0, 6, 7, 8, 9]
    again = cleanser.set_params(backend=ITD()).fit(X, trajectory=cleanser.trajectory_)
    assert np.array_equal(again.influence_, original.influence_)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 2, 5, 8])
def test_backwards_yields_each_step_between_the_states_around_it(checkpoint_every, start, X):
    trajectory = fitted(X, checkpoint_every=checkpoint_every).trajectory_
    steps = list(trajectory.backwards(start))
    assert [record.index for record, _, _ in steps] == list(range(8, start - 1, -1))
    for record, before, after in steps:
        for state, t in ((before, record.index), (after, record.index + 1)):
            assert torch.equal(ravel(state.generator), ravel(trajectory.state(t).generator))


@pytest.mark.parametrize(("epochs", "start"), [(None, 0), (3, 0), (2, 3), (1, 6)])
def test_the_last_epochs_start_at_the_beginning_of_an_epoch(epochs, start, original):
    assert original.trajectory_.start_of_last(epochs) == start


@pytest.mark.parametrize("epochs", [0, 4, -1, 1.5])
def test_more_epochs_than_trained_cannot_be_traced(epochs, X):
    with pytest.raises(
        ValueError, match=r"last_epochs must be None \(the whole run\) or from 1 to the 3 trained epochs"
    ):
        toy_cleanser(backend=ITD(last_epochs=epochs)).fit(X)


def test_a_folder_is_traced_again_to_the_same_influences(folder, X, original):
    again = toy_cleanser(with_dropout(), **FULL).fit(X, trajectory=folder)
    assert_same_run(again, original)
    reopened = toy_cleanser(with_dropout(), **FULL).fit(X, trajectory=Trajectory.open(folder))
    assert np.array_equal(reopened.influence_, original.influence_)


def test_a_trajectory_can_be_traced_again_for_another_metric_and_scheme(folder, X):
    settings = {"metric": "log_likelihood", "backend": ITD(last_epochs=2, derivative="exact")}
    again = toy_cleanser(with_dropout(), **settings, **FULL).fit(X, trajectory=folder)
    anew = toy_cleanser(with_dropout(), **settings, **FULL).fit(X)
    assert np.array_equal(again.influence_, anew.influence_)


def test_an_opened_trajectory_says_that_it_knows_no_networks_yet(folder):
    trajectory = Trajectory.open(folder)
    assert trajectory.state(9).average.keys() == trajectory.state(0).generator.keys()
    with pytest.raises(TrajectoryError, match=r"neither networks nor data yet. Pass it to GANInfluence.fit"):
        _ = trajectory.step


def test_a_lost_state_is_recomputed(folder, X, original):
    (folder / "state-00000005.safetensors").unlink()
    (folder / "state-00000009.safetensors").unlink()
    assert_same_run(toy_cleanser(with_dropout(), **FULL).fit(X, trajectory=folder), original)


def wider():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 7), nn.Dropout(0.3), nn.Tanh(), nn.Linear(7, 2)).double()
    return generator, toy_networks()[1]


def other_activation():
    generator, discriminator = with_dropout()
    generator[2] = nn.Softsign()
    return generator, discriminator


MISMATCHES = {
    "function": ({"networks": other_activation()}, {}, "of another model"),
    "model": ({"networks": wider()}, {}, r"of another model: .* \(G.0.bias: recorded \[6\] float64, given \[7\]"),
    "rule": ({"optimizer": SGD(lr=0.5)}, {}, r"of other training settings \(update D, optimizer, class: .*Adam, .*SGD"),
    "rule's parameter": (
        {"optimizer": clone(FULL["optimizer"]).set_params(eps=1e-4)},
        {},
        r"of other training settings \(update D, optimizer, eps: recorded 0.001, given 0.0001\)",
    ),
    "loss": (
        {"loss": "hinge"},
        {},
        r"other training settings \(update D, objective, loss, class: recorded .*NonSaturating, given .*Hinge\)",
    ),
    "rate": ({"ema_decay": 0.8}, {}, r"other training settings \(averages, G, decay: recorded 0.9, given 0.8\)"),
    "epochs": ({"n_epochs": 4}, {}, r"other training settings \(n_epochs: recorded 3, given 4\)"),
    "content": ({}, {"scale": 1.0 + 1e-12}, "of other data: the content of X differs from what was trained on"),
    "length": ({}, {"n_samples": 18}, "of other data: the content of X differs from what was trained on"),
}


@pytest.mark.parametrize(("key", "name"), [("version", "ganclean"), ("torch", "PyTorch")])
def test_a_trajectory_of_other_versions_is_traced_with_a_warning(key, name, folder, X, original):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, key: "0.0.1"}))
    with pytest.warns(UserWarning, match=rf"was recorded with {name} 0\.0\.1, and this is \d+\."):
        assert_same_run(toy_cleanser(with_dropout(), **FULL).fit(X, trajectory=folder), original)


@pytest.mark.filterwarnings("error")
def test_a_trajectory_of_the_same_versions_is_traced_without_a_warning(folder, X):
    toy_cleanser(with_dropout(), **FULL).fit(X, trajectory=folder)


def test_the_trajectory_of_another_estimator_is_left_as_it_was(X):
    first = fitted(X)
    trajectory, step, influence = first.trajectory_, first.trajectory_.step, first.influence_.copy()
    source, budget = trajectory.source, trajectory.memory_budget
    second = toy_cleanser(with_dropout(), memory_budget=10_000, **FULL)
    second.fit(X.astype(np.float64).copy(), trajectory=first.trajectory_)
    assert first.trajectory_ is trajectory and second.trajectory_ is not trajectory
    assert trajectory.step is step and trajectory.source is source and trajectory.memory_budget == budget
    assert second.trajectory_.step is not step and second.trajectory_.memory_budget == 10_000
    assert np.array_equal(second.influence_, influence) and np.array_equal(first.influence_, influence)
    assert np.array_equal(first.score_samples(X[:3] + 1), second.score_samples(X[:3] + 1))


@pytest.mark.parametrize(("changes", "data", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_trajectory_of_something_else_is_refused(changes, data, message, folder):
    X = toy_data(data.get("n_samples", 16)) * data.get("scale", 1.0)
    settings = FULL | changes
    networks = settings.pop("networks", None) or with_dropout()
    with pytest.raises(TrajectoryError, match=f"The trajectory is .*{message}"):
        toy_cleanser(networks, **settings).fit(X, trajectory=folder)


def test_settings_may_be_numbers_of_numpy(X, tmp_path):
    settings = {
        "n_epochs": np.int64(2),
        "batch_size": np.int32(8),
        "latent_dim": np.int64(3),
        "ema_decay": np.float32(0.5),
    }
    fitted(X, store=tmp_path / "run", **settings)
    assert len(Trajectory.open(tmp_path / "run")) == 4


@pytest.fixture
def live_states(monkeypatch):
    """A function that counts the states that were read from disk or replayed and are still in memory."""
    references = []

    def watched(method):
        def call(*args):
            state = method(*args)
            references.append(weakref.ref(next(iter(state.generator.values()))))
            counts.append(count())
            return state

        return call

    def count():
        return sum(reference() is not None for reference in references)

    counts = []
    monkeypatch.setattr(FolderStore, "state", watched(FolderStore.state))
    monkeypatch.setattr(Trajectory, "replay", watched(Trajectory.replay))

    def most(walk):
        references.clear()
        counts.clear()
        walk()
        return max(counts)

    return most


@pytest.mark.parametrize("derivative", ["secant", "exact"])
@pytest.mark.parametrize("checkpoint_every", [1, 2, 5])
def test_memory_in_the_backward_pass_is_one_segment_however_many_steps_are_on_disk(
    checkpoint_every, derivative, X, tmp_path, live_states
):
    def most_at_once(n_epochs):
        settings = {"store": tmp_path / str(n_epochs), "checkpoint_every": checkpoint_every, "n_epochs": n_epochs}
        cleanser = toy_cleanser(**settings).fit(X)
        return live_states(lambda: cleanser.backend_.fit(cleanser.trajectory_, cleanser.gradients_))

    short, long = most_at_once(2), most_at_once(5)
    assert long == short
    assert min(checkpoint_every, 2) <= long <= checkpoint_every + 2


@pytest.fixture(scope="module")
def sparse(X, tmp_path_factory):
    """A run in a folder of which only the first and the last state are kept."""
    folder = tmp_path_factory.mktemp("sparse") / "run"
    return fitted(X, store=folder, checkpoint_every=100, n_epochs=14).trajectory_


@pytest.mark.parametrize("max_states", [4, 5, 6, 9, 20, 45, 100])
def test_the_backward_pass_holds_no_more_states_than_it_may(max_states, sparse, live_states):
    assert list(sparse.store.kept()) == [0, 42]
    expected = {t: ravel(sparse.state(t).generator) for t in (0, 13, 29, 42)}
    visited = []

    def walk():
        for record, before, after in sparse.backwards(0, max_states=max_states):
            visited.append(record.index)
            for t, state in ((record.index, before), (record.index + 1, after)):
                assert t not in expected or torch.equal(ravel(state.generator), expected[t])
            del before, after, state

    most = live_states(walk)
    assert visited == list(range(41, -1, -1))
    assert most <= max_states
    assert most >= min(max_states, 44)


def test_the_memory_budget_bounds_what_the_backward_pass_holds(X, sparse, live_states):
    opened = Trajectory.open(sparse.store.folder).bind(sparse.step, sparse.source)
    size = size_of(opened.state(0))
    counts = {}
    for room in (0, 9, 1000):
        opened.memory_budget = room * size
        counts[room] = live_states(lambda: deque(opened.backwards(0), maxlen=0))
    # Without any room, still as many as make do with five recomputations, which is 3 and those in use.
    assert counts[0] <= 6 and counts[9] <= 9 and counts[1000] == 44


def test_a_tiny_budget_changes_no_influence(X, original, tmp_path):
    for store in (None, tmp_path / "run"):
        with pytest.warns(UserWarning, match=r"memory_budget=1 is too small to trace 9 steps: .* it takes \d+ bytes"):
            assert_same_run(fitted(X, store=store, memory_budget=1), original)


@pytest.mark.parametrize("max_states", [3, 0, -1])
def test_three_states_are_too_few_to_go_backwards(max_states, sparse):
    with pytest.raises(ValueError, match="max_states must be at least 4"):
        next(sparse.backwards(0, max_states=max_states))


@pytest.mark.parametrize("checkpoint_every", [1, 4, 100])
@pytest.mark.parametrize(("start", "end"), [(0, 9), (0, 8), (2, 7), (4, 5), (3, 3)])
def test_the_way_back_may_begin_anywhere(checkpoint_every, start, end, X, original):
    trajectory = fitted(X, checkpoint_every=checkpoint_every).trajectory_
    steps = list(trajectory.backwards(start, end))
    assert [record.index for record, _, _ in steps] == list(range(end - 1, start - 1, -1))
    for record, before, after in steps:
        for state, t in ((before, record.index), (after, record.index + 1)):
            assert torch.equal(ravel(state.generator), ravel(original.trajectory_.state(t).generator))


def spoiled(state, path, relative):
    """Return a state with one number changed, relative to the largest magnitude of its tensor."""
    flat = {name: tensor.clone() for name, tensor in flatten_state(state).items()}
    flat[path].view(-1)[0] += relative * float(flat[path].abs().max())
    return unflatten_state(flat, empty_parts(state))


PATHS = ["params/G/0.weight", "params/D/2.bias", "moments/G/square/G.3.weight", "averages/G/0.bias"]


@pytest.mark.parametrize("path", PATHS)
def test_recomputation_that_does_not_lead_to_the_kept_state_is_named(path, X):
    trajectory = fitted(X, checkpoint_every=4).trajectory_
    trajectory.store.checkpoint(8, spoiled(trajectory.state(8), path, 1e-5))
    message = (
        rf"Recomputing the steps up to step 8 did not lead to the recorded state: {path} deviates by 1.0e-05 of its "
        r"largest magnitude, 1e-07 is allowed.*not deterministic.*smaller checkpoint_every"
    )
    with pytest.raises(ReplayMismatchError, match=message):
        list(trajectory.backwards(0))


def test_a_deviation_of_rounding_is_no_mismatch(X):
    trajectory = fitted(X, checkpoint_every=4).trajectory_
    trajectory.store.checkpoint(8, spoiled(trajectory.state(8), PATHS[0], 1e-9))
    assert len(list(trajectory.backwards(0))) == 9


@pytest.mark.parametrize(("relative", "matches"), [(1e-4, True), (1e-2, False), (float("nan"), False)])
def test_single_precision_is_compared_more_loosely(relative, matches, X):
    networks = [network.float() for network in toy_networks()]
    trajectory = toy_cleanser(networks, checkpoint_every=4).fit(X).trajectory_
    trajectory.store.checkpoint(8, spoiled(trajectory.state(8), PATHS[0], relative))
    with nullcontext() if matches else pytest.raises(ReplayMismatchError, match="1e-03 is allowed"):
        list(trajectory.backwards(0))


class Unsteady(nn.Module):
    """Adds noise that no seed determines, after some calls that are without."""

    def __init__(self, n_steady):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.n_steady = n_steady

    def forward(self, x):
        self.n_steady -= 1
        return x if self.n_steady >= 0 else x + 1e-2 * self.rng.normal()


def test_an_operation_that_is_not_deterministic_is_noticed_before_training(X):
    generator, discriminator = toy_networks()
    with pytest.raises(NetworkError, match="random numbers that are not torch's"):
        toy_cleanser((generator.insert(1, Unsteady(0)), discriminator)).fit(X)


def test_an_operation_that_becomes_random_in_training_is_noticed_by_replay(X):
    generator, discriminator = toy_networks()
    with pytest.raises(ReplayMismatchError, match=r"Recomputing the steps up to step 9 .* not deterministic"):
        toy_cleanser((generator.insert(1, Unsteady(25)), discriminator), checkpoint_every=5).fit(X)


def convolutional():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(13, 5 * 9), nn.SiLU(), nn.Unflatten(1, (5, 3, 3)), nn.ConvTranspose2d(5, 1, 3))
    discriminator = nn.Sequential(nn.Conv2d(1, 7, 3), nn.SiLU(), nn.Flatten(), nn.Linear(63, 37), nn.SiLU())
    return generator, discriminator.append(nn.Linear(37, 1))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_states_read_from_disk_and_recomputed_ones_are_the_same_to_the_last_bit_in_single_precision(
    optimizer, tmp_path
):
    images = np.random.default_rng(0).normal(size=(60, 1, 5, 5)).astype(np.float32)

    def influence(**settings):
        settings = {"optimizer": OPTIMIZERS[optimizer], "latent_dim": 13, "batch_size": 17, **settings}
        return toy_cleanser(convolutional(), metric=SampleMean(n_samples=60), **settings).fit(images).influence_

    expected = influence()
    assert np.array_equal(influence(checkpoint_every=5), expected)
    assert np.array_equal(influence(store=tmp_path / "all"), expected)
    assert np.array_equal(influence(store=tmp_path / "some", checkpoint_every=5), expected)


@pytest.mark.parametrize("settings", [{"checkpoint_every": 5}, {"memory_budget": 1}, {"checkpoint_every": 2}])
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_retraining_without_instances_does_not_depend_on_what_is_kept(settings, X, original, tmp_path):
    removals = [[], [3], [1, 5]]
    expected = {k: counterfactual_retrain(original, removals, last_epochs=k) for k in (1, None)}
    for store in (None, tmp_path / "run"):
        cleanser = toy_cleanser(with_dropout(), backend=ITD(last_epochs=1), store=store, **FULL, **settings).fit(X)
        for last_epochs, values in expected.items():
            assert np.array_equal(counterfactual_retrain(cleanser, removals, last_epochs=last_epochs), values)


def test_a_state_survives_flattening(original):
    state = original.trajectory_.state(4)
    flat = flatten_state(state)
    assert "moments/G/square/G.0.weight" in flat
    again = unflatten_state(flat, empty_parts(state))
    assert isinstance(again, TrainingState)
    assert flatten_state(again).keys() == flat.keys()
    assert all(torch.equal(tensor, flat[path]) for path, tensor in flatten_state(again).items())


def test_a_vector_of_parameters_keeps_names_and_shapes(original):
    params = original.trajectory_.state(4).generator
    again = unravel(ravel(params), params)
    assert list(again) == list(params)
    assert all(torch.equal(again[name], p) for name, p in params.items())


def test_a_function_of_states_is_applied_to_corresponding_tensors(original):
    first, last = original.trajectory_.state(0), original.trajectory_.state(9)
    moved = map_state(torch.sub, last, first)
    expected = last.moments["G"]["mean"]["G.0.weight"]
    assert torch.equal(moved.moments["G"]["mean"]["G.0.weight"], expected)


def test_default_networks_can_be_traced_again_from_a_folder(X, tmp_path):
    def cleanser(store=None):
        return GANInfluence(trainer=toy_trainer(store=store, n_epochs=1), random_state=2)

    first = cleanser(tmp_path / "run").fit(X)
    assert np.array_equal(cleanser().fit(X, trajectory=tmp_path / "run").influence_, first.influence_)
