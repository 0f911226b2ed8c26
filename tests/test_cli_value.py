"""The command values data for the samples of a GAN, its own or given."""

import csv
import re

import numpy as np
import pytest
from scipy.sparse import load_npz

from ganclean.cli import main
from ganclean.datasets import load_digits_images
from ganclean.valuation import GMValuator


@pytest.fixture(scope="module")
def digits():
    return load_digits_images()[0][:200]


def test_given_samples_get_the_credit_that_the_valuator_gives(digits, tmp_path, capsys):
    X, samples = digits[:120], digits[120:]
    np.save(tmp_path / "data.npy", X)
    np.save(tmp_path / "samples.npy", samples)
    folder = tmp_path / "report"
    command = ["value", str(tmp_path / "data.npy"), "--samples", str(tmp_path / "samples.npy"), "--features", "pixels"]
    assert main([*command, "--quality", "realism", "--remove", "12", "--report", str(folder)]) == 0
    expected = GMValuator(feature_extractor="pixels", quality="realism", n_remove=12).fit(X, X_gen=samples)
    with open(folder / "values.csv") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["value"]) for row in rows], expected.values_)
    np.testing.assert_array_equal([row["kept"] == "1" for row in rows], expected.support_)
    np.testing.assert_array_equal(np.load(folder / "kept.npy"), expected.sample_indices_)
    np.testing.assert_allclose(load_npz(folder / "attributions.npz").toarray(), expected.attributions_.toarray())
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "quality realism" in page
    assert "80 samples give" in " ".join(capsys.readouterr().out.split())


def test_a_gan_is_trained_where_there_are_no_samples(tmp_path, capsys):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(80, 2)))
    command = ["value", str(tmp_path / "points.npy"), "--report", str(tmp_path / "report"), "--epochs", "2"]
    assert main([*command, "--batch-size", "20"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    credits = [float(value) for value in re.findall(r'<td class="n">([\d.e-]+)</td>', page)]
    # The twelve rows with most and with least credit.
    assert len(credits) == 24 and credits[0] == max(credits) > credits[-1]
    assert "trained for 2 epochs" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "missing.npy"], "no file or folder"),
        (["--neighbours", "0"], "k must be a positive integer"),
        (["--remove", "1.5"], "n_remove must be"),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", np.random.default_rng(0).normal(size=(40, 2)))
    assert main(["value", "points.npy", "--epochs", "1", "--batch-size", "20", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
