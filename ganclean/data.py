"""Arrays, tensors and Datasets as one indexed source of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor
from torch.utils.data import Dataset, Subset


class DataSource:
    """Instances by their row number, whatever holds them.

    Parameters
    ----------
    data : array-like, Tensor or map-style Dataset of shape (n_samples, *sample_shape)
        A Dataset's item is the instance, or a tuple, list or mapping whose first entry is. It must return the same
        instance for the same row: random augmentation in the Dataset would change the data that is scored.
    dtype : torch.dtype, optional
        What batches are cast to; default as they are.
    device : torch.device, optional
    labels : array-like or Tensor of shape (n_samples, ...), optional
        What conditional networks take as their second input: integers for classes, or vectors; see `as_labels`.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.data import DataSource
    >>> source = DataSource(np.arange(6.0).reshape(3, 2))
    >>> source[[2, 0]]
    tensor([[4., 5.],
            [0., 1.]], dtype=torch.float64)
    """

    def __init__(
        self, data: Any, dtype: torch.dtype | None = None, device: torch.device | None = None, labels: Any = None
    ):
        if not isinstance(data, (Tensor, np.ndarray, Dataset)):
            data = np.asarray(data)
        self.data = data
        self.dtype = dtype
        self.device = device
        self.labels = None if labels is None else as_labels(labels)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def sample_shape(self) -> torch.Size:
        """The shape of one instance."""
        return self[[0]].shape[1:]

    def __getitem__(self, indices) -> Tensor:
        """Return the instances of some rows as one tensor of shape (len(indices), *sample_shape)."""
        rows = indices.tolist() if isinstance(indices, Tensor) else indices
        if isinstance(self.data, Tensor):
            batch = self.data[rows]
        elif isinstance(self.data, np.ndarray):
            batch = torch.from_numpy(np.ascontiguousarray(self.data[rows]))
        else:
            batch = torch.stack([_instance(self.data[int(row)]) for row in rows])
        return batch.to(device=self.device, dtype=self.dtype)

    def labels_of(self, indices: Tensor) -> Tensor:
        """Return the labels of some rows; those that are no integers have the type of the instances."""
        assert self.labels is not None, "conditional networks need labels"
        labels = self.labels[indices]
        return labels.to(device=self.device, dtype=self.dtype if labels.is_floating_point() else torch.int64)

    def batches(self, size: int = 1024) -> Iterator[Tensor]:
        """Yield all instances in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[list(range(start, min(start + size, len(self))))]

    def labelled_batches(self, size: int = 1024) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield all instances in order with their labels, `size` at a time."""
        start = 0
        for batch in self.batches(size):
            rows = torch.arange(start, start + len(batch))
            yield batch, None if self.labels is None else self.labels_of(rows)
            start += len(batch)

    def cast(self, dtype: torch.dtype | None, device: torch.device | None) -> DataSource:
        """Return the same data with batches of another type or on another device."""
        return DataSource(self.data, dtype, device, self.labels)


class Indexed(Dataset):
    """A map-style Dataset whose items bring their row number along, as the last entry.

    Parameters
    ----------
    dataset : map-style Dataset, Tensor or array-like
        An item that is a tuple keeps its entries, ``(x, y)`` becoming ``(x, y, row)``; any other becomes ``(x, row)``.

    Examples
    --------
    >>> import torch
    >>> from ganclean.data import Indexed
    >>> loader = torch.utils.data.DataLoader(Indexed(torch.zeros(4, 2)), batch_size=4)
    >>> x, index = next(iter(loader))
    >>> x.shape, index
    (torch.Size([4, 2]), tensor([0, 1, 2, 3]))
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple:
        item = self.dataset[row]
        return (*item, row) if isinstance(item, (tuple, list)) else (item, row)


def as_source(data: Any) -> DataSource:
    """Return `data` as a `DataSource`."""
    return data if isinstance(data, DataSource) else DataSource(data)


def fingerprint(data: Any) -> str:
    """Return a hash of the instances' content, equal for equal values in an array, a tensor or a Dataset.

    Raises
    ------
    ValueError
        If an instance holds NaN or an infinite value.
    """
    source = as_source(data)
    digest = hashlib.blake2b(digest_size=16)
    for batch in finite_batches(source):
        values = batch.detach().cpu().contiguous().numpy()
        digest.update(f"{values.dtype}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def batch_hash(samples: Tensor) -> str:
    """Return a short hash of a batch, equal for the same values in single and in double precision."""
    values = samples.detach().cpu().float().contiguous()
    return hashlib.blake2b(f"{tuple(values.shape)}".encode() + values.numpy().tobytes(), digest_size=8).hexdigest()


def finite_batches(source: DataSource) -> Iterator[Tensor]:
    """Yield all instances in order, and raise `ValueError` where one holds NaN or an infinite value."""
    row = 0
    for batch in source.batches():
        finite = torch.isfinite(batch).reshape(len(batch), -1).all(dim=1)
        if not finite.all():
            bad = row + int((~finite).nonzero()[0])
            raise ValueError(
                f"Input X contains NaN or infinity: the first in row {bad}. Remove such rows or impute them "
                "(sklearn.impute.SimpleImputer) before training."
            )
        row += len(batch)
        yield batch


def checked_data(X: Any, estimator: BaseEstimator | None = None, reset: bool = True):
    """Return X as an array, a tensor or a Dataset that can be trained on."""
    minimum = 2 if reset else 1
    if isinstance(X, Dataset):
        if not hasattr(X, "__len__") or len(X) < minimum:
            raise ValueError(f"A Dataset must be map-style and hold at least {minimum} instances.")
        for _ in finite_batches(DataSource(X)):
            pass
        return X
    if isinstance(X, Tensor):
        if X.ndim < 2 or len(X) < minimum:
            raise ValueError(
                f"A tensor of instances must have shape (n_samples, ...) with at least {minimum} instances; got "
                f"{tuple(X.shape)}."
            )
        for _ in finite_batches(DataSource(X)):
            pass
        return X.detach()
    n_dims = X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim
    if estimator is None or n_dims > 2:
        # validate_data would take the number of channels for the number of features.
        return check_array(X, allow_nd=True, ensure_min_samples=minimum)
    return validate_data(estimator, X, reset=reset, ensure_min_samples=minimum)


def as_labels(labels: Any) -> Tensor:
    """Return labels as a tensor: of int64 where they are integers, else of the floating-point type that they have.

    Raises
    ------
    ValueError
        If they are no numbers, or hold NaN or an infinite value.
    """
    if isinstance(labels, Tensor):
        # NumPy has no bfloat16.
        labels = (labels.float() if labels.dtype == torch.bfloat16 else labels).detach().cpu().numpy()
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            "The labels y of conditional networks must be numbers: integers for classes, or vectors; got an array of "
            f"type {labels.dtype}. Encode them first: sklearn.preprocessing.LabelEncoder gives the classes that an "
            "embedding takes, OneHotEncoder vectors."
        )
    if labels.dtype.kind != "f":
        return torch.from_numpy(labels.astype(np.int64))
    finite = np.isfinite(labels).reshape(len(labels), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"The labels y contain NaN or infinity: the first in row {np.flatnonzero(~finite)[0]}. Remove such rows, "
            "or give them a class of their own."
        )
    return torch.from_numpy(np.array(labels, order="C"))


def labels_in(data: Any) -> Tensor | None:
    """Return the second entries of a Dataset's items as one tensor; None where there are none."""
    if not isinstance(data, Dataset) or isinstance(data, Tensor) or not len(data):  # type: ignore[arg-type]
        return None

    def second(item: Any) -> Any:
        values = list(item.values()) if isinstance(item, Mapping) else item
        return values[1] if isinstance(values, (tuple, list)) and len(values) > 1 else None

    labels = [second(data[row]) for row in range(len(data))]  # type: ignore[arg-type]
    if labels[0] is None:
        return None
    return as_labels(torch.stack(labels) if isinstance(labels[0], Tensor) else labels)


def take(data: Any, indices: np.ndarray) -> Any:
    """Return some rows of `data` in the container that it came in; a Dataset gives a `torch.utils.data.Subset`."""
    if isinstance(data, Dataset) and not isinstance(data, Tensor):
        return Subset(data, indices.tolist())
    if isinstance(data, Tensor):
        return data[torch.from_numpy(indices).to(data.device)]
    if hasattr(data, "iloc"):
        return data.iloc[indices]
    if isinstance(data, (list, tuple)):
        return [data[i] for i in indices]
    return np.asarray(data)[indices]


def _instance(item: Any) -> Tensor:
    if isinstance(item, Mapping):
        item = next(iter(item.values()))
    elif isinstance(item, (tuple, list)):
        item = item[0]
    return torch.as_tensor(item)
