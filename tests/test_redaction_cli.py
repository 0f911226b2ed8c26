"""The command redacts, and writes down what came of it."""

import argparse
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from ganclean.cli import redact
from tests.practice import images

QUICK = ["--epochs", "2", "--redaction-epochs", "1", "--latent-dim", "4", "--batch-size", "20", "--features", "pixels"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    redact.add_command(parser.add_subparsers())
    args = parser.parse_args(["redact", *arguments, *QUICK])
    return args.run(args)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Labelled images of 4 × 4 and points in the plane, in the working directory."""
    pictures, y = images(120)
    np.savez(tmp_path / "images.npz", X=pictures[:, :1].astype(np.float32), y=y)
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(120, 2)))
    np.save(tmp_path / "known.npy", np.load(tmp_path / "points.npy")[:40])
    (tmp_path / "rules.py").write_text("def is_left(x): return x[:, 0] < 0.5\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Hardly anything", "ignore:.*the generator has lost variety")
def test_a_label_is_redacted_and_shown(folder, capsys):
    run("images.npz", "--label", "2")
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["invalidity"][1]["n_samples"] == 4000 and report["n_steps"] == 3
    page = (folder / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "label 2" in page and "trained for 2 epochs" in page and "method combined" in page
    assert "invalidity by the criterion" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Hardly anything", "ignore:.*the generator has lost variety")
@pytest.mark.parametrize("what", [["--samples", "known.npy"], ["--criterion", "rules:is_left"]])
def test_known_samples_or_a_rule_say_what_to_redact(what, folder):
    run("points.npy", *what)
    before, after = (load_file(folder / "report" / f"networks_{when}.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys() and {name.split(".")[0] for name in before} == {"generator", "discriminator"}
    assert any(not before[name].equal(after[name]) for name in before)
    page = (folder / "report" / "index.html").read_text()
    assert what[1] in page and "What the same latents become" not in page


@pytest.mark.filterwarnings("ignore:Hardly anything", "ignore:.*the generator has lost variety")
def test_redaction_goes_on_from_the_weights_that_it_wrote(folder):
    run("points.npy", "--criterion", "rules:is_left")
    written = load_file("report/networks_after.safetensors")
    run("points.npy", "--criterion", "rules:is_left", "--weights", "report/networks_after.safetensors", "--report", "b")
    assert "read from report/networks_after.safetensors" in (folder / "b" / "index.html").read_text()
    assert all(written[name].equal(tensor) for name, tensor in load_file("b/networks_before.safetensors").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["points.npy", "--label", "1"], "--label needs labelled data"),
        (["images.npz", "--label", "7"], "No training instance has the label 7"),
        (["images.npz", "--label", "2", "--weights", "wrong.safetensors"], "do not fit the generator"),
    ],
)
def test_what_does_not_fit_is_said(arguments, message, folder):
    from safetensors.numpy import save_file

    save_file({"generator.0.weight": np.zeros(3)}, folder / "wrong.safetensors")
    with pytest.raises(ValueError, match=message):
        run(*arguments)
