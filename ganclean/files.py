"""Data from files: a folder of images, ``.npy`` or ``.npz`` arrays, or the digits that come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ganclean.datasets import load_digits_images
from ganclean.exceptions import missing_extra

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class LoadedData:
    """Instances, ready to train on.

    Parameters
    ----------
    name : str
        What to call them in a report.
    X : ndarray of shape (n_samples, *sample_shape)
        Images channels first, in [−1, 1].
    y : ndarray of shape (n_samples,) of int64, or None
        Labels, where there are any.
    files : list of str or None
        Where each instance came from.
    """

    name: str
    X: np.ndarray
    y: np.ndarray | None = None
    files: list[str] | None = None


def read_data(path: str, image_size: int | None = None) -> LoadedData:
    """Read training data.

    Parameters
    ----------
    path : str
        ``"digits"``; a folder of images, where subfolders name classes; an ``.npy`` array; or an ``.npz`` archive with
        an array ``X`` (or a single one) and perhaps labels ``y``. Arrays of bytes are taken for images with values from
        0 to 255, of shape (n, height, width), (n, height, width, channels) or (n, channels, height, width).
    image_size : int, optional
        Resize the images of a folder to this height and width.

    Raises
    ------
    ValueError
        If there is nothing there that can be read.
    """
    if path == "digits":
        return LoadedData("digits", *load_digits_images())
    place = Path(path)
    if place.is_dir():
        return _read_folder(place, image_size)
    if not place.exists():
        raise ValueError(f"There is no file or folder {path!r}. Expected 'digits', a folder of images, .npy or .npz.")
    if place.suffix == ".npy":
        return LoadedData(place.stem, _scaled(np.load(place)))
    if place.suffix == ".npz":
        with np.load(place) as archive:
            keys = [key for key in archive.files if key != "y"]
            if "X" not in keys and len(keys) != 1:
                raise ValueError(f"{path!r} holds the arrays {keys}; name the one with the instances 'X'.")
            X = _scaled(archive["X" if "X" in keys else keys[0]])
            y = archive["y"].astype(np.int64) if "y" in archive.files else None
        return LoadedData(place.stem, X, y)
    raise ValueError(f"{path!r} cannot be read: expected 'digits', a folder of images, .npy or .npz.")


def _read_folder(folder: Path, image_size: int | None) -> LoadedData:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "cli") from error
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"The folder {str(folder)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    images, grey = [], True
    for path in paths:
        with Image.open(path) as image:
            grey = grey and image.mode in ("L", "1", "I;16")
            pixels = image.convert("RGB")
            if image_size is not None:
                pixels = pixels.resize((image_size, image_size), Image.Resampling.LANCZOS)
            images.append(np.asarray(pixels))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"The images in {str(folder)!r} have {len(shapes)} different sizes. Resize them to one: --image-size 64."
        )
    X = _scaled(np.stack(images))
    files = [str(path.relative_to(folder)) for path in paths]
    classes = sorted({path.parent for path in paths})
    y = np.array([classes.index(path.parent) for path in paths]) if len(classes) > 1 else None
    return LoadedData(folder.name, X[:, :1] if grey else X, y, files)


def _scaled(X: np.ndarray) -> np.ndarray:
    """Return images of bytes channels first in [−1, 1], and anything else as it is."""
    if X.dtype != np.uint8 or X.ndim < 3:
        return X
    if X.ndim == 3:
        X = X[:, None]
    elif X.shape[-1] in (1, 3) and X.shape[1] not in (1, 3):
        X = X.transpose(0, 3, 1, 2)
    return X.astype(np.float32) / 127.5 - 1
