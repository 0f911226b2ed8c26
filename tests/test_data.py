import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, TensorDataset

from ganclean.data import DataSource, as_labels, as_source, fingerprint, labels_in, take

VALUES = np.random.default_rng(0).normal(size=(7, 1, 2, 3))


class Items(Dataset):
    """A map-style Dataset whose items have a chosen form."""

    def __init__(self, form, values=VALUES):
        self.form = form
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.form(self.values[index])


def read_only_memmap(folder):
    path = folder / "values.npy"
    np.save(path, VALUES)
    return np.load(path, mmap_mode="r")


CONTAINERS = {
    "array": lambda _: VALUES,
    "array in Fortran order": lambda _: np.asfortranarray(VALUES),
    "strided array": lambda _: np.repeat(VALUES, 2, axis=0)[::2],
    "read-only memmap": read_only_memmap,
    "nested list": lambda _: VALUES.tolist(),
    "tensor": lambda _: torch.from_numpy(VALUES),
    "strided tensor": lambda _: torch.from_numpy(VALUES).flip(3).flip(3),
    "TensorDataset": lambda _: TensorDataset(torch.from_numpy(VALUES), torch.arange(7)),
    "Dataset of tensors": lambda _: Items(torch.from_numpy),
    "Dataset of arrays": lambda _: Items(np.asarray),
    "Dataset of pairs": lambda _: Items(lambda x: (torch.from_numpy(x), 3)),
    "Dataset of lists": lambda _: Items(lambda x: [x, 3]),
    "Dataset of dicts": lambda _: Items(lambda x: {"image": torch.from_numpy(x), "label": 3}),
}


@pytest.fixture(params=CONTAINERS)
def data(request, tmp_path):
    return CONTAINERS[request.param](tmp_path)


def test_any_container_is_a_source_of_the_same_instances(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = DataSource(data)
        batch = source[[4, 0, 4]]
    assert torch.equal(batch, torch.from_numpy(VALUES[[4, 0, 4]]))
    assert len(source) == 7
    assert source.sample_shape == (1, 2, 3)


@pytest.mark.parametrize("indices", [[5, 1], np.array([5, 1]), torch.tensor([5, 1])], ids=["list", "array", "tensor"])
def test_rows_may_be_named_by_any_kind_of_indices(data, indices):
    assert torch.equal(DataSource(data)[indices], torch.from_numpy(VALUES[[5, 1]]))


def test_the_fingerprint_is_that_of_the_content_whatever_holds_it(data):
    assert fingerprint(data) == fingerprint(VALUES)


@given(size=st.integers(1, 10))
def test_batches_are_all_instances_in_order(size):
    batches = list(DataSource(VALUES).batches(size))
    assert torch.equal(torch.cat(batches), torch.from_numpy(VALUES))
    assert all(len(batch) == size for batch in batches[:-1])


def test_batches_are_cast_and_the_original_is_not():
    source = DataSource(np.arange(6, dtype=np.uint8).reshape(3, 2)).cast(torch.float32, torch.device("cpu"))
    assert source[[1]].dtype == torch.float32
    assert source.data.dtype == np.uint8


def test_a_batch_is_a_copy_of_the_data():
    values = VALUES.copy()
    DataSource(values)[[0, 1]].zero_()
    assert np.array_equal(values, VALUES)


def test_a_source_is_not_wrapped_again():
    source = DataSource(VALUES)
    assert as_source(source) is source


@pytest.mark.parametrize(
    "other",
    [VALUES[::-1], VALUES[:-1], VALUES.reshape(7, 6), VALUES.astype(np.float32), np.nextafter(VALUES, 9)],
    ids=["order", "length", "shape", "precision", "last bit"],
)
def test_the_fingerprint_of_other_content_differs(other):
    assert fingerprint(np.ascontiguousarray(other)) != fingerprint(VALUES)


def test_the_fingerprint_sees_the_last_of_many_instances():
    values = np.zeros((3000, 2))
    before = fingerprint(values)
    values[-1, 1] = 1e-300
    assert fingerprint(values) != before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(bad):
    values = np.zeros((2000, 2))
    values[1500:, 1] = bad
    for data in (values, torch.from_numpy(values), TensorDataset(torch.from_numpy(values))):
        with pytest.raises(ValueError, match="contains NaN or infinity: the first in row 1500"):
            fingerprint(data)


CLASSES = [3, 0, 2, 2]


@pytest.mark.parametrize(
    "labels",
    [
        CLASSES,
        *(np.array(CLASSES, dtype=dtype) for dtype in (np.uint8, np.int32, np.uint32, np.int64)),
        torch.tensor(CLASSES, dtype=torch.int16),
        pd.Series(CLASSES, index=[7, 8, 9, 10]),
        np.array(CLASSES)[::-1][::-1],
    ],
)
def test_the_same_classes_of_any_type_are_the_same_labels(labels):
    found = as_labels(labels)
    assert found.dtype == torch.int64 and found.tolist() == CLASSES
    assert fingerprint(DataSource(np.zeros((4, 2)), labels=labels).labels) == fingerprint(torch.tensor(CLASSES))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_for_labels_keep_their_type(dtype):
    values = np.random.default_rng(0).normal(size=(4, 2)).astype(dtype)
    values.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_labels(values)
    assert np.array_equal(found.numpy(), values) and found.numpy().dtype == dtype
    assert torch.equal(as_labels(found), found)


def test_truth_values_are_two_classes_and_brain_floats_are_numbers():
    assert as_labels(np.array([True, False])).tolist() == [1, 0]
    assert as_labels(torch.tensor([0.5, 2.0], dtype=torch.bfloat16)).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("labels", [["cat", "dog"], np.array([1, "2"], dtype=object), np.array([1j, 2])])
def test_labels_that_are_no_numbers_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels y .* must be numbers: .* of type .* sklearn.preprocessing.LabelEnc"):
        as_labels(labels)


def test_words_in_a_dataset_are_refused_for_labels():
    with pytest.raises(ValueError, match=r"labels y .* must be numbers.* got an array of type <U3"):
        labels_in(Items(lambda x: (x, "cat")))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_label_that_is_not_finite_is_named(bad):
    for labels in (np.array([0.0, 1.0, bad, bad]), torch.tensor([[0.0, 1], [2, 3], [4, bad], [bad, 5]])):
        with pytest.raises(ValueError, match="The labels y contain NaN or infinity: the first in row 2"):
            as_labels(labels)


@pytest.mark.parametrize("form", [int, float, torch.tensor, np.array, lambda y: [y, y + 1]])
def test_the_labels_in_a_dataset_are_those_of_its_items(form):
    dataset = Items(lambda x: (x, form(int(10 * x.flat[0]))))
    expected = as_labels([form(int(10 * x.flat[0])) for x in VALUES])
    assert torch.equal(labels_in(dataset), expected)
    assert labels_in(Items(lambda x: x)) is None


ROWS = np.array([5, 0, 3])


def test_rows_of_an_array_are_an_array():
    taken = take(VALUES, ROWS)
    assert type(taken) is np.ndarray
    assert np.array_equal(taken, VALUES[ROWS])


def test_rows_of_a_tensor_are_a_tensor():
    taken = take(torch.from_numpy(VALUES), ROWS)
    assert torch.equal(taken, torch.from_numpy(VALUES[ROWS]))


def test_rows_of_a_data_frame_are_a_data_frame_with_its_index_and_columns():
    frame = pd.DataFrame(VALUES.reshape(7, 6), columns=list("abcdef"), index=range(10, 17))
    taken = take(frame, ROWS)
    pd.testing.assert_frame_equal(taken, frame.loc[[15, 10, 13]])
    pd.testing.assert_series_equal(take(frame["b"], ROWS), frame["b"].loc[[15, 10, 13]])


def test_rows_of_a_list_are_a_list():
    assert take(list("abcdefg"), ROWS) == ["f", "a", "d"]


def test_rows_of_a_dataset_are_a_subset():
    dataset = TensorDataset(torch.from_numpy(VALUES), torch.arange(7))
    taken = take(dataset, ROWS)
    assert isinstance(taken, Subset) and taken.dataset is dataset
    assert [int(label) for _, label in taken] == [5, 0, 3]
    assert fingerprint(taken) == fingerprint(VALUES[ROWS])
