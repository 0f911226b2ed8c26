"""Data are read from files as a GAN needs them: channels first, in [−1, 1]."""

import numpy as np
import pytest
from PIL import Image

from ganclean.files import read_data


def test_digits_come_with_labels():
    data = read_data("digits")
    assert data.X.shape == (1797, 1, 8, 8) and set(data.y) == set(range(10))


def test_a_folder_of_colour_images_is_resized_and_labelled_by_its_subfolders(tmp_path):
    for label, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.new("RGB", (10 + i, 12), colour).save(tmp_path / label / f"{i}.png")
    data = read_data(str(tmp_path), image_size=8)
    assert data.X.shape == (4, 3, 8, 8) and data.y.tolist() == [0, 0, 1, 1]
    assert data.files == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    np.testing.assert_allclose(data.X[0, :, 0, 0], [1, -1, -1])


def test_a_folder_of_grey_images_has_one_channel(tmp_path):
    for i in range(2):
        Image.new("L", (4, 4), 255 * i).save(tmp_path / f"{i}.png")
    data = read_data(str(tmp_path))
    assert data.X.shape == (2, 1, 4, 4) and data.y is None
    np.testing.assert_allclose(data.X[:, 0, 0, 0], [-1, 1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6, 6), (5, 1, 6, 6)), ((5, 6, 6, 3), (5, 3, 6, 6)), ((5, 3, 6, 6), (5, 3, 6, 6)), ((5, 7), (5, 7))],
)
def test_arrays_of_bytes_become_channels_first(tmp_path, shape, expected):
    np.save(tmp_path / "x.npy", np.full(shape, 255, dtype=np.uint8))
    X = read_data(str(tmp_path / "x.npy")).X
    assert X.shape == expected
    assert X.max() == (1 if len(shape) > 2 else 255)


def test_an_archive_holds_instances_and_labels(tmp_path):
    np.savez(tmp_path / "x.npz", X=np.zeros((3, 2)), y=[0, 1, 1])
    data = read_data(str(tmp_path / "x.npz"))
    assert data.X.dtype == np.float64 and data.y.tolist() == [0, 1, 1]


def test_bad_places_are_named(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        read_data(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="holds no images"):
        read_data(str(tmp_path))
    np.savez(tmp_path / "x.npz", a=[1], b=[2])
    with pytest.raises(ValueError, match="name the one with the instances 'X'"):
        read_data(str(tmp_path / "x.npz"))
    (tmp_path / "x.txt").write_text("1")
    with pytest.raises(ValueError, match="cannot be read"):
        read_data(str(tmp_path / "x.txt"))
    for i in range(2):
        Image.new("L", (4 + i, 4)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="--image-size"):
        read_data(str(tmp_path))
