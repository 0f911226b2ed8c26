import json
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from ganclean import GANInfluence, Trajectory
from ganclean.backends import ITD
from ganclean.exceptions import TrajectoryError
from ganclean.optim import SGD
from ganclean.training.state import TrainingState, flatten_state, map_state, ravel, unflatten_state, unravel
from ganclean.training.trajectory import FolderStore
from tests.toy_gans import OPTIMIZERS, toy_cleaner, toy_data, toy_networks, toy_trainer

FULL = {"optimizer": OPTIMIZERS["adam"], "ema_decay": 0.9}


def with_dropout():
    generator, discriminator = toy_networks()
    return generator.insert(1, nn.Dropout(0.3)), discriminator


def fitted(X, **settings):
    return toy_cleaner(with_dropout(), **(FULL | settings)).fit(X)


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


def assert_same_run(cleaner, original):
    assert np.array_equal(cleaner.influence_, original.influence_)
    assert cleaner.metric_value_ == original.metric_value_
    for t in range(len(original.trajectory_) + 1):
        expected = flatten_state(original.trajectory_.state(t))
        state = flatten_state(cleaner.trajectory_.state(t))
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
    fitted(X, update=update, store=tmp_path / "run")
    opened = Trajectory.open(tmp_path / "run")
    assert len(opened) == len(in_memory) == 9 and opened.steps_per_epoch == 3
    for t in range(9):
        ours, theirs = opened[t], in_memory[t]
        assert (ours.index, ours.seed) == (theirs.index, theirs.seed) == (t, theirs.seed)
        for name in ("indices", "latents_d", "latents_g"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert (ours.latents_g is ours.latents_d) == (update == "simultaneous")


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
    assert not any(m.any() for m in first.moments_generator["mean"].values())
    assert all(torch.equal(last.average[name], p) for name, p in original.generator_.named_parameters())
    assert all(torch.equal(last.discriminator[name], p) for name, p in original.discriminator_.named_parameters())


def test_only_the_traced_epochs_are_kept_and_the_others_are_recomputed(X, original):
    cleaner = toy_cleaner(with_dropout(), backend=ITD(last_epochs=1), **FULL).fit(X)
    kept = [t for t in range(10) if cleaner.trajectory_.store.has_state(t)]
    assert kept == [0, 6, 7, 8, 9]
    again = cleaner.set_params(backend=ITD()).fit(X, trajectory=cleaner.trajectory_)
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
        toy_cleaner(backend=ITD(last_epochs=epochs)).fit(X)


def test_a_folder_is_traced_again_to_the_same_influences(folder, X, original):
    again = toy_cleaner(with_dropout(), **FULL).fit(X, trajectory=folder)
    assert_same_run(again, original)
    reopened = toy_cleaner(with_dropout(), **FULL).fit(X, trajectory=Trajectory.open(folder))
    assert np.array_equal(reopened.influence_, original.influence_)


def test_a_trajectory_can_be_traced_again_for_another_metric_and_scheme(folder, X):
    settings = {"metric": "log_likelihood", "backend": ITD(last_epochs=2, derivative="exact")}
    again = toy_cleaner(with_dropout(), **settings, **FULL).fit(X, trajectory=folder)
    anew = toy_cleaner(with_dropout(), **settings, **FULL).fit(X)
    assert np.array_equal(again.influence_, anew.influence_)


def test_an_opened_trajectory_says_that_it_knows_no_networks_yet(folder):
    trajectory = Trajectory.open(folder)
    assert trajectory.state(9).average.keys() == trajectory.state(0).generator.keys()
    with pytest.raises(TrajectoryError, match=r"neither networks nor data yet. Pass it to GANInfluence.fit"):
        _ = trajectory.step


def test_a_run_without_its_last_step_is_truncated(folder, X):
    (folder / "step-00000008.safetensors").unlink()
    for read in (Trajectory.open, lambda folder: toy_cleaner(with_dropout(), **FULL).fit(X, trajectory=folder)):
        with pytest.raises(TrajectoryError, match="is truncated: 8 of 9 steps are there"):
            read(folder)


@pytest.mark.parametrize("name", ["state-00000005", "step-00000005", "state-00000009"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_a_damaged_file_is_named(name, content, folder, X):
    (folder / f"{name}.safetensors").write_bytes(content)
    with pytest.raises(TrajectoryError, match=rf"is damaged: {name}\.safetensors cannot be read"):
        toy_cleaner(with_dropout(), **FULL).fit(X, trajectory=folder)


def test_a_lost_state_is_recomputed(folder, X, original):
    (folder / "state-00000005.safetensors").unlink()
    (folder / "state-00000009.safetensors").unlink()
    assert_same_run(toy_cleaner(with_dropout(), **FULL).fit(X, trajectory=folder), original)


def test_a_run_without_its_first_state_is_damaged(folder, X, monkeypatch):
    for path in folder.glob("state-*"):
        path.unlink()
    looked_at = []

    def has_state(store, index):
        looked_at.append(index)
        assert len(looked_at) < 100, "the search for a kept state does not end"
        return False

    monkeypatch.setattr(FolderStore, "has_state", has_state)
    with pytest.raises(TrajectoryError, match="damaged"):
        toy_cleaner(with_dropout(), **FULL).fit(X, trajectory=folder)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"format": 99}', b'{"format": 1}'])
def test_a_folder_that_holds_no_trajectory_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(TrajectoryError, match=rf"{tmp_path.name} (holds no recorded|has a format)"):
        Trajectory.open(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path, X):
    with pytest.raises(TrajectoryError, match="holds no recorded trajectory"):
        toy_cleaner().fit(X, trajectory=tmp_path / "nowhere")


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
    "model": (
        {"networks": wider()},
        {},
        r"of another model: .* \(generator.0.bias: recorded \[6\] float64, given \[7\]",
    ),
    "rule": ({"optimizer": SGD(lr=0.5)}, {}, r"of another model|of other training settings \(optimizer"),
    "loss": ({"loss": "hinge"}, {}, r"other training settings \(loss: recorded NonSaturating\(\), given Hinge\(\)\)"),
    "rate": ({"ema_decay": 0.8}, {}, r"other training settings \(ema_decay: recorded 0.9, given 0.8\)"),
    "epochs": ({"n_epochs": 4}, {}, r"other training settings \(n_epochs: recorded 3, given 4\)"),
    "content": ({}, {"scale": 1.0 + 1e-12}, "of other data: the content of X differs from what was trained on"),
    "length": ({}, {"n_samples": 18}, "of other data: the content of X differs from what was trained on"),
}


@pytest.mark.parametrize(("changes", "data", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_trajectory_of_something_else_is_refused(changes, data, message, folder):
    X = toy_data(data.get("n_samples", 16)) * data.get("scale", 1.0)
    settings = FULL | changes
    networks = settings.pop("networks", None) or with_dropout()
    with pytest.raises(TrajectoryError, match=f"The trajectory is .*{message}"):
        toy_cleaner(networks, **settings).fit(X, trajectory=folder)


def test_a_recorded_trajectory_is_not_overwritten(folder, X):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TrajectoryError, match=r"holds a recorded trajectory already, and it is not overwritten"):
        fitted(X, store=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_settings_may_be_numbers_of_numpy(X, tmp_path):
    settings = {
        "n_epochs": np.int64(2),
        "batch_size": np.int32(8),
        "latent_dim": np.int64(3),
        "ema_decay": np.float32(0.5),
    }
    fitted(X, store=tmp_path / "run", **settings)
    assert len(Trajectory.open(tmp_path / "run")) == 4


def test_no_unfinished_file_is_left(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json"} | {f"state-{t:08d}.safetensors" for t in range(10)} | {
        f"step-{t:08d}.safetensors" for t in range(9)
    }
    assert json.loads((folder / "manifest.json").read_text())["n_steps"] == 9


def test_a_run_that_stops_in_between_leaves_its_steps_on_disk(X, tmp_path, monkeypatch):
    append = FolderStore.append

    def crash(store, record, state):
        if record.index == 5:
            raise KeyboardInterrupt
        append(store, record, state)

    monkeypatch.setattr(FolderStore, "append", crash)
    with pytest.raises(KeyboardInterrupt):
        fitted(X, store=tmp_path / "run")
    with pytest.raises(TrajectoryError, match="is truncated: 5 of 9 steps"):
        Trajectory.open(tmp_path / "run")


@pytest.fixture
def live_states(monkeypatch):
    """A function that counts the states that were read from disk or replayed and are still in memory."""
    references = []

    def watched(method):
        def call(*args):
            state = method(*args)
            references.append(weakref.ref(next(iter(state.generator.values()))))
            return state

        return call

    monkeypatch.setattr(FolderStore, "state", watched(FolderStore.state))
    monkeypatch.setattr(Trajectory, "replay", watched(Trajectory.replay))
    return lambda: sum(reference() is not None for reference in references)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
@pytest.mark.parametrize("checkpoint_every", [1, 2, 5])
def test_memory_in_the_backward_pass_is_one_segment_however_many_steps_are_on_disk(
    checkpoint_every, derivative, X, tmp_path, live_states
):
    def most_at_once(n_epochs):
        settings = {"store": tmp_path / str(n_epochs), "checkpoint_every": checkpoint_every, "n_epochs": n_epochs}
        cleaner = toy_cleaner(**settings).fit(X)
        counts = []
        cleaner.backend_.fit(cleaner.trajectory_, cleaner.gradients_, lambda *_: counts.append(live_states()))
        assert len(counts) == 3 * n_epochs
        return max(counts)

    short, long = most_at_once(2), most_at_once(5)
    assert long == short
    assert min(checkpoint_every, 2) <= long <= checkpoint_every + 2


def test_a_state_survives_flattening(original):
    state = original.trajectory_.state(4)
    flat = flatten_state(state)
    assert "moments_generator/square/0.weight" in flat
    again = unflatten_state(flat)
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
    expected = last.moments_generator["mean"]["0.weight"]
    assert torch.equal(moved.moments_generator["mean"]["0.weight"], expected)


def test_default_networks_can_be_traced_again_from_a_folder(X, tmp_path):
    def cleaner(store=None):
        return GANInfluence(trainer=toy_trainer(store=store, n_epochs=1), random_state=2)

    first = cleaner(tmp_path / "run").fit(X)
    assert np.array_equal(cleaner().fit(X, trajectory=tmp_path / "run").influence_, first.influence_)
