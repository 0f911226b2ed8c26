import json
import shutil

import pytest
import torch

from ganclean import Trajectory
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import flatten_state
from ganclean.exceptions import TrajectoryError
from ganclean.runs.store import FolderStore, MemoryStore
from tests.toy_gans import toy_cleanser, toy_networks, toy_trainer

DESCRIPTION = {
    "n_steps": 6,
    "steps_per_epoch": 3,
    "data": "none",
    "parameters": {},
    "modules": {},
    "settings": {},
}
STATES = [f"state-{t:08d}" for t in (0, 4, 8, 9)]
SEGMENTS = ["steps-00000000-00000004", "steps-00000004-00000008", "steps-00000008-00000009"]


def initial_state():
    return toy_trainer().make_step(*toy_networks()).initial_state()


def make_record(index, **changes):
    return StepRecord(index, torch.tensor([3, 1]), 7 + index, **changes)


@pytest.fixture(params=["memory", "folder", "reopened folder"])
def written(request, tmp_path):
    """A function that stores records, and returns the store that they can be read from."""

    def write(*records):
        store = MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "run")
        store.start(DESCRIPTION, initial_state())
        for record in records:
            store.add(record)
            if record.index % 2:
                store.checkpoint(record.index + 1, initial_state())
        if request.param == "reopened folder":
            store.checkpoint(len(records), initial_state())
            store = FolderStore(tmp_path / "run")
        assert store.n_steps() == len(records)
        return store

    return write


def assert_same(one, other, name=""):
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    elif isinstance(one, (StepRecord, UpdateRecord)):
        for field in one.__dataclass_fields__:
            assert_same(getattr(one, field), getattr(other, field), f"{name}/{field}")
    elif isinstance(one, dict):
        assert list(one) == list(other), name
        for key in one:
            assert_same(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other), name
        for i, both in enumerate(zip(one, other)):
            assert_same(*both, f"{name}/{i}")
    else:
        assert one == other, name


LATENTS = torch.arange(6.0).view(2, 3)
LABELS = torch.tensor([1, 0]), torch.tensor([0, 2])
SETTINGS = {"lr": 0.1 + 0.2, "betas": (0.5, 0.9), "nesterov": True}


def of_d(**changes):
    return UpdateRecord("D", **changes)


def of_g(**changes):
    return UpdateRecord("G", **changes)


RECORDS = {
    "of a seed": {"updates": (of_d(), of_g())},
    "alternating": {"updates": (of_d(draws={"latents": LATENTS}), of_g(draws={"latents": LATENTS + 1}))},
    "critic": {"updates": (of_d(draws={"latents": LATENTS}, number=5),)},
    "conditional": {
        "updates": (
            of_d(draws={"labels": LABELS[0], "mixing": torch.tensor([0.1, 1])}),
            of_g(draws={"labels": LABELS[1]}),
        ),
    },
    "scheduled": {"updates": (of_d(settings=SETTINGS), of_g(settings={"lr": 1e-300}))},
    "simultaneous": {"updates": (of_d(), of_g(samples_of=0, meets={"D": 0}))},
    "of one's own loop": {
        "updates": (
            of_g(passes=("generator",), calls={"G": (0,), "D": (0, 2)}),
            of_d(
                draws={
                    "inputs": (([LATENTS, LATENTS + 1],), {"inject_index": 3, "names": ["a", None], "scale": 0.5}),
                    "output": (0,),
                    "beside": {"real": ((LABELS[0],), {})},
                }
            ),
        ),
        "x": torch.ones(2, 5),
        "shifts": {"G/1.running_mean": torch.tensor([0.5])},
        "random": {"cpu": torch.get_rng_state()},
    },
}


@pytest.mark.parametrize("changes", RECORDS.values(), ids=RECORDS)
def test_a_record_is_kept_as_it_was_given(changes, written):
    records = [make_record(t, **changes) for t in range(5)]
    store = written(*records)
    for t in (0, 4, 1, 3, 2):
        assert_same(store.record(t), records[t])


def test_shared_latents_stay_one_tensor(written):
    shared = of_d(draws={"latents": LATENTS}), of_g(draws={"latents": LATENTS})
    store = written(make_record(0, updates=shared), make_record(1))
    assert store.record(0).latents_g is store.record(0).latents_d is not None or isinstance(store, FolderStore)
    record = store.record(0)
    assert record.latents_g is record.latents_d and torch.equal(record.latents_d, LATENTS)
    assert store.record(1).latents_g is store.record(1).latents_d is None


def test_labels_belong_to_the_data_and_are_not_kept(written):
    assert written(make_record(0, labels=torch.tensor([1, 2]))).record(0).labels is None


def test_states_can_be_discarded_and_replaced(written):
    store = written(*(make_record(t) for t in range(5)))
    assert [t for t in store.kept() if t < 5] == [0, 2, 4]
    store.discard(2)
    assert [t for t in store.kept() if t < 5] == [0, 4]
    other = toy_trainer().make_step(*toy_networks(seed=1)).initial_state()
    store.checkpoint(4, other)
    assert torch.equal(store.state(4).generator["0.weight"], other.generator["0.weight"])
    assert [t for t in store.kept() if t < 5] == [0, 4]


def test_a_run_of_many_steps_is_small_on_disk_and_read_once(tmp_path, monkeypatch):
    store = FolderStore(tmp_path / "run")
    store.start(DESCRIPTION, initial_state())
    for t in range(2000):
        store.add(make_record(t, updates=(of_d(settings={"lr": 0.1}),)))
    store.checkpoint(2000, initial_state())
    size = sum(path.stat().st_size for path in (tmp_path / "run").glob("steps-*"))
    assert size < 2000 * 400
    reads = []
    read = FolderStore._read_segment
    monkeypatch.setattr(FolderStore, "_read_segment", lambda *args: reads.append(args) or read(*args))
    opened = FolderStore(tmp_path / "run")
    assert [opened.record(t).seed for t in range(1999, -1, -1)] == list(range(2006, 6, -1))
    assert len(reads) == 1


def test_the_way_over_the_border_of_two_segments_and_back_reads_each_once(recorded, monkeypatch):
    reads = []
    read = FolderStore._read_segment
    monkeypatch.setattr(FolderStore, "_read_segment", lambda *args: reads.append(args[1:]) or read(*args))
    opened = FolderStore(recorded)
    for t in (8, 7, 8, 7, 4, 8, 7, 3, 4, 3):
        opened.record(t)
    assert reads == [(8, 9), (4, 8), (0, 4)]


@pytest.fixture(scope="module")
def recorded(X, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    toy_cleanser(store=folder, checkpoint_every=4).fit(X)
    return folder


@pytest.fixture
def folder(recorded, tmp_path):
    """A copy of a recorded trajectory, to be damaged."""
    return shutil.copytree(recorded, tmp_path / "run")


def trace(folder, X):
    return toy_cleanser(checkpoint_every=4).fit(X, trajectory=folder)


def resume(folder, X):
    return toy_cleanser(store=folder, checkpoint_every=4).fit(X)


def test_the_files_of_a_run(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", *(f"{name}.safetensors" for name in STATES + SEGMENTS)}
    assert json.loads((folder / "manifest.json").read_text())["n_steps"] == 9


@pytest.mark.parametrize("read", [trace, resume])
@pytest.mark.parametrize("name", [STATES[1], STATES[-1], SEGMENTS[0], SEGMENTS[-1]])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100, "truncated"])
def test_a_damaged_file_is_named(name, content, read, folder, X):
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-40] if content == "truncated" else content)
    with pytest.raises(TrajectoryError, match=rf"is damaged: {name}\.safetensors cannot be read"):
        read(folder, X)


@pytest.mark.parametrize("read", [trace, resume])
@pytest.mark.parametrize("name", [STATES[1], SEGMENTS[0]])
def test_a_file_of_another_run_is_named(name, read, folder, X, tmp_path):
    toy_cleanser(store=tmp_path / "other", checkpoint_every=4).fit(X)
    shutil.copy(tmp_path / "other" / f"{name}.safetensors", folder)
    with pytest.raises(TrajectoryError, match=rf"is damaged: {name}\.safetensors belongs to another run"):
        read(folder, X)


@pytest.mark.parametrize("read", [trace, resume])
@pytest.mark.parametrize(
    ("name", "source"), [(STATES[1], SEGMENTS[0]), (SEGMENTS[1], STATES[1]), (SEGMENTS[1], SEGMENTS[0])]
)
def test_a_file_in_the_place_of_another_is_named(name, source, read, folder, X):
    shutil.copy(folder / f"{source}.safetensors", folder / f"{name}.safetensors")
    with pytest.raises(TrajectoryError, match=rf"is damaged: {name}\.safetensors (holds no|does not hold)"):
        read(folder, X)


@pytest.mark.parametrize("read", [trace, resume])
def test_steps_that_are_missing_in_between_are_named(read, folder, X):
    (folder / f"{SEGMENTS[1]}.safetensors").unlink()
    with pytest.raises(TrajectoryError, match="is damaged: the file of step 4 is missing"):
        read(folder, X)


@pytest.mark.parametrize("read", [trace, resume])
@pytest.mark.parametrize("left", [[], STATES[2:]])
def test_a_run_without_its_first_state_is_damaged(left, read, folder, X):
    for name in set(STATES) - set(left):
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(TrajectoryError, match="is damaged: its first state is missing"):
        read(folder, X)


def test_steps_without_their_manifest_are_not_overwritten(folder, X):
    (folder / "manifest.json").unlink()
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(TrajectoryError, match=r"holds steps of a recorded run without its manifest\.json"):
        resume(folder, X)
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"format": 3}', b'{"format": 99}'])
def test_a_folder_that_holds_no_trajectory_is_refused(content, folder, X):
    for path in folder.iterdir():
        path.unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    message = "run (holds no recorded trajectory .* Expected a folder that GANTrainer|has a format that this version)"
    for read in [Trajectory.open, lambda folder: trace(folder, X), lambda folder: resume(folder, X)]:
        if content is not None or read is Trajectory.open:
            with pytest.raises(TrajectoryError, match=message):
                read(folder)


@pytest.mark.parametrize("older", [1, 2])
def test_an_older_format_is_refused_by_name(older, folder, X):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": older}))
    with pytest.raises(TrajectoryError, match=r"has a format that this version does not read\. Train again"):
        trace(folder, X)


def test_unfinished_files_do_no_harm_and_are_cleared_away(folder, recorded, X):
    for name in ("manifest", STATES[2], SEGMENTS[1], "progress-0123"):
        (folder / f"{name}.unfinished").write_bytes(b"half a fi")
    assert len(trace(folder, X).trajectory_) == 9
    resume(folder, X)
    assert {path.name for path in folder.iterdir()} == {path.name for path in recorded.iterdir()}


def test_progress_is_kept_under_its_key(folder, tmp_path):
    store = FolderStore(folder)
    assert store.load_progress("one") is None
    tensors = {"b": torch.arange(3), "a/x": torch.tensor(0.5, dtype=torch.float64), "c": torch.ones(2, 0)}
    store.save_progress("one", tensors, {"end": 7})
    store.save_progress("two", {"d": torch.zeros(1)}, {"end": 8})
    loaded, metadata = FolderStore(folder).load_progress("one")
    assert list(loaded) == list(tensors) and metadata == {"end": 7}
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    store.discard_progress("one")
    store.discard_progress("one")
    assert store.load_progress("one") is None and store.load_progress("two")[1] == {"end": 8}


def test_memory_keeps_no_progress():
    store = MemoryStore()
    store.save_progress("one", {"a": torch.ones(2)}, {})
    assert store.load_progress("one") is None
    store.discard_progress("one")


def test_a_state_is_read_back_with_its_order_types_and_alignment(folder, X):
    state = flatten_state(FolderStore(folder).state(8))
    kept = flatten_state(toy_cleanser(checkpoint_every=4).fit(X).trajectory_.state(8))
    assert list(state) == list(kept)
    for path, tensor in state.items():
        assert torch.equal(tensor, kept[path]) and tensor.dtype == kept[path].dtype
        assert tensor.data_ptr() % 64 == kept[path].data_ptr() % 64
