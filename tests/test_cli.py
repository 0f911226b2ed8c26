"""The command trains, cleanses, proves and reports."""

import csv
import re

import numpy as np
import pytest
from safetensors.torch import load_file

from ganclean.cli import main

QUICK = ["--epochs", "2", "--seeds", "2", "--jobs", "1", "--samples", "64", "--last-epochs", "1", "--batch-size", "20"]
QUICK += ["--selectors", "density", "random", "--evaluate", "recall", "--probes", "3"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    command = ["cleanse", "digits", "--remove", "5%", "--rates", "5%", "--report", str(folder)]
    assert main([*command, *QUICK, "--batch-size", "100"]) == 0
    return folder


def test_the_page_shows_both_cases_with_pictures_and_p_values(report):
    page = (report / "index.html").read_text()
    assert page.count("<h2>") == 3 and "replaced by garments" in page
    assert page.count("data:image/png;base64,") == 14
    # Three ways of removal, two metrics, two cases; the verdicts have two each.
    assert len(re.findall(r"p (=|&lt;) [\d.e-]+", page)) == 12 + 4
    assert "small classifier of digits and garments" in page
    assert page.count("Can this be trusted?") == page.count("Over 3 random reweightings") == 2


def test_scores_kept_rows_and_generators_lie_beside_the_page(report):
    with open(report / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "influence", "harmfulness", "kept"]
    kept = np.load(report / "kept.npy")
    assert [int(row["index"]) for row in rows if row["kept"] == "1"] == kept.tolist()
    assert len(rows) - len(kept) == round(0.05 * len(rows))
    worst = max(rows, key=lambda row: float(row["harmfulness"]))
    assert worst["kept"] == "0" and float(worst["influence"]) == -float(worst["harmfulness"])
    before, after = (load_file(report / f"generator_{when}.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)


def test_one_s_own_networks_and_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "mynets.py").write_text(
        "from ganclean.networks import MLPDiscriminator, MLPGenerator\n"
        "def make_generator(shape): return MLPGenerator(shape, latent_dim=4, width=8)\n"
        "def make_discriminator(shape): return MLPDiscriminator(shape, width=8)\n"
    )
    np.savez(tmp_path / "data.npz", X=np.random.default_rng(0).normal(size=(200, 3)))
    monkeypatch.chdir(tmp_path)
    networks = ["--generator", "mynets:make_generator", "--discriminator", "mynets:make_discriminator"]
    assert main(["cleanse", "data.npz", *networks, "--latent-dim", "4", "--metric", "kid", "--rates", "9", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "held-out KID over 2 seeds" in out and "removed, 8%" in out
    for selector in ("nothing", "most harmful by influence", "least probable (Gaussian)", "random"):
        assert re.search(rf"^│ {re.escape(selector)} .*\d", out, re.M)
    assert "isolation forest" not in out
    assert "Most harmful rows" in (tmp_path / "report" / "index.html").read_text()


def test_how_much_to_remove_is_chosen_over_several_runs(tmp_path, capsys):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(100, 2)))
    command = ["cleanse", str(tmp_path / "points.npy"), "--report", str(tmp_path / "report"), "--metric", "mmd", *QUICK]
    assert main([*command, "--remove", "auto", "--runs", "2"]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "report" / "index.html").read_text()
    kept = np.load(tmp_path / "report" / "kept.npy")
    removed = re.search(r"with (\d+) of 60 instances removed", page)
    assert int(removed[1]) == 60 - len(kept)
    assert (
        "held-out MMD over 2 seeds" in out
        and "as many as validation data suggest" in " ".join(out.split())
        and "removed, up to 50%" in out
    )
    assert "mean over 2 trainings" in page and "Where they lie" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npy"], "no file or folder"),
        (["digits", "--generator", "nowhere:make"], "cannot be imported"),
        (["digits", "--remove", "1.5"], "n_remove must be"),
        (["digits", "--epochs", "0"], "n_epochs must be a positive integer"),
        (["digits", "--held-out", "0.7"], "--held-out must lie between"),
        (["digits", "--backend", "none"], "backend must be one of"),
        (["digits", "--probes", "1"], "--probes must be 0 or at least 2"),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["cleanse", *arguments, "--features", "pixels"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remove", "much"], "expected a percentage, a fraction, a count or auto; got 'much'"),
        (["--rates", "auto"], "expected a percentage, a fraction or a count; got 'auto'"),
        (["--selectors", "luck"], "invalid choice: 'luck'"),
    ],
)
def test_options_that_cannot_be_read_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["cleanse", "digits", *arguments])
    assert message in capsys.readouterr().err
