"""The data of the examples: real images, none of which is fetched at run time."""

from __future__ import annotations

from importlib.resources import files
from os import PathLike

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.utils import check_random_state
from torch.nn.functional import interpolate


def load_digits_images() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's handwritten digits as images.

    Returns
    -------
    X : ndarray of shape (1797, 1, 8, 8), float32
        In [−1, 1].
    y : ndarray of shape (1797,), int64

    Examples
    --------
    >>> from ganclean.datasets import load_digits_images
    >>> X, y = load_digits_images()
    >>> X.shape, float(X.min()), float(X.max())
    ((1797, 1, 8, 8), -1.0, 1.0)
    """
    X, y = load_digits(return_X_y=True)
    return (X.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32), y.astype(np.int64)


def load_fashion_mnist(
    split: str = "train", size: int = 28, root: str | PathLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return images of Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017; MIT licence).

    Parameters
    ----------
    split : {"train", "test"}, default="train"
    size : int, default=28
        Height and width to resize to, by averaging.
    root : path, optional
        Where the complete data set lies, as torchvision's ``FashionMNIST(root, download=False)`` finds it; default the
        subset of 2,000 training and 1,000 test images that this package carries.

    Returns
    -------
    X : ndarray of shape (n, 1, size, size), float32
        In [−1, 1].
    y : ndarray of shape (n,), int64

    Examples
    --------
    >>> from ganclean.datasets import load_fashion_mnist
    >>> X, y = load_fashion_mnist("test", size=14)
    >>> X.shape
    (1000, 1, 14, 14)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}.")
    if root is None:
        with np.load(str(files(__package__) / "fashion_mnist_subset.npz")) as subset:
            images, labels = torch.from_numpy(subset[f"{split}_images"]), subset[f"{split}_labels"]
    else:
        from torchvision.datasets import FashionMNIST

        complete = FashionMNIST(str(root), train=split == "train", download=False)
        images, labels = complete.data, complete.targets.numpy()
    pixels = images[:, None].float() / 127.5 - 1
    if size != 28:
        pixels = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return pixels.numpy(), labels.astype(np.int64)


def contaminate(X, foreign, fraction=0.1, random_state=None) -> tuple[np.ndarray, np.ndarray]:
    """Replace some instances by foreign ones.

    Parameters
    ----------
    X : ndarray of shape (n_samples, *sample_shape)
    foreign : ndarray of shape (n_foreign, *sample_shape)
        Drawn from without replacement.
    fraction : float, default=0.1
        Part of the instances to replace.
    random_state : int, RandomState instance or None

    Returns
    -------
    X : ndarray of shape (n_samples, *sample_shape)
        A copy.
    is_foreign : ndarray of shape (n_samples,), bool

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean.datasets import contaminate
    >>> X, is_foreign = contaminate(np.zeros((10, 2)), np.ones((5, 2)), 0.2, random_state=0)
    >>> int(is_foreign.sum()), float(X.sum())
    (2, 4.0)
    """
    rng = check_random_state(random_state)
    n = round(fraction * len(X))
    rows, chosen = rng.permutation(len(X))[:n], rng.permutation(len(foreign))[:n]
    X, is_foreign = X.copy(), np.zeros(len(X), dtype=bool)
    X[rows], is_foreign[rows] = foreign[chosen], True
    return X, is_foreign


__all__ = ["contaminate", "load_digits_images", "load_fashion_mnist"]
