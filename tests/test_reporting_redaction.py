"""The page of a redaction says what its report says, in words, numbers and pictures."""

import html
import json
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ganclean import GANTrainer
from ganclean.plotting import InvalidityCurveDisplay
from ganclean.redaction import GANRedactor, Invalidity, RedactionReport, SampleCriterion
from ganclean.reporting.redaction import price, verdict, write_redaction
from tests.practice import images
from tests.toy_gans import toy_data, toy_networks, toy_trainer

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUALITY = {"frechet_distance": 12.34, "precision": 0.5, "recall": 0.75, "density": 0.4, "coverage": 0.6}


def share(n_invalid, n=1000):
    return Invalidity.of(np.arange(n) >= n_invalid)


def report_of(before, after, evaluated=None):
    worse = QUALITY | {"frechet_distance": 15.0, "recall": 0.625}
    return RedactionReport((share(before), share(after)), evaluated, (QUALITY, worse), n_queries=7, n_steps=9)


def page_of(folder, redactor, report):
    """The page without the bytes of its pictures."""
    page = write_redaction(folder, "points", redactor, report, {"data": "sixteen points"}).read_text("utf8")
    return html.unescape(re.sub('base64,[^"]+', "base64,", page))


@pytest.fixture(scope="module")
def redactor():
    trainer = toy_trainer(n_epochs=2)
    settings = {"queries_per_epoch": 100, "n_draws": 200, "random_state": 0}
    return GANRedactor(*toy_networks(), lambda x: x[:, 0] < 0.2, trainer=trainer, **settings).fit(toy_data())


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((100, 10), "rarer by 90%: by the criterion, 10.00% [8.29%, 12.02%] of the samples were invalid"),
        ((100, 90), "cannot be told from 1000"),
        ((10, 100), "Redaction has failed"),
    ],
)
def test_the_verdict_follows_from_the_intervals(counts, said):
    assert said in verdict(report_of(*counts))


def test_an_independent_evaluator_has_the_last_word():
    report = report_of(100, 0, evaluated=(share(100), share(95), share(3)))
    assert "cannot be told" in verdict(report) and "by the evaluator" in verdict(report)


def test_what_was_not_measured_is_not_judged():
    unknown = replace(report_of(1, 1), invalidity=(Invalidity(), Invalidity()))
    assert "was not measured" in verdict(unknown)


def test_the_price_is_told_in_distance_and_variety():
    said = price(report_of(100, 10))
    assert "from 12.3 to 15, and recall, the variety of the samples, from 0.75 to 0.625." in said


def test_lost_variety_is_told():
    report = report_of(100, 10)
    assert price(report).endswith("The generator has lost variety.")
    assert "lost variety" not in price(replace(report, quality=(QUALITY, QUALITY)))


def test_the_table_holds_every_quantity_before_and_after(redactor, tmp_path):
    page = page_of(tmp_path, redactor, report_of(100, 10, evaluated=(share(120), share(20), share(3))))
    rows = re.findall(r"<tr><td>(.*?)<br>.*?</td>\n(.*?)</tr>", page, re.S)
    found = {name: re.findall(r"[\d.]+", re.sub("<[^>]*>", " ", cells)) for name, cells in rows}
    assert found["invalidity by the criterion"] == ["10.00", "8.29", "12.02", "1.00", "0.54", "1.83"]
    assert [found["invalidity by the evaluator"][i] for i in (0, 3)] == ["12.00", "2.00"]
    assert found["Fréchet distance"] == ["12.34", "15"]
    assert found["recall"] == ["0.750", "0.625"] and found["coverage"] == ["0.600", "0.600"]
    assert "0.30% [0.10%, 0.88%] of the valid reference data" in page and "flatters" not in page


def test_the_files_beside_the_page_hold_the_numbers_and_the_networks(redactor, tmp_path):
    report = redactor.report(toy_data(40), feature_extractor="pixels", n=100)
    page = page_of(tmp_path, redactor, report)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["history"] == redactor.history_ and written["n_steps"] == redactor.n_steps_
    assert written["quality"][1]["recall"] == report.quality[1]["recall"]
    for when, networks in (
        ("before", (redactor.generator, redactor.discriminator)),
        ("after", (redactor.generator_, redactor.discriminator_)),
    ):
        tensors = load_file(tmp_path / f"networks_{when}.safetensors")
        for player, module in zip(("generator", "discriminator"), networks):
            assert all(torch.equal(tensors[f"{player}.{name}"], t) for name, t in module.state_dict().items())
    assert "Redaction is not erasure" in page and "sixteen points" in page and "flatters" in page
    assert page.count("data:image/png;base64,") == 1 and "Invalidity by epoch" in page


def test_images_are_shown_before_and_after_and_without_a_judge_there_is_no_curve(tmp_path):
    X = images(24)[0][:, :1]
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4))).double()
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    trainer = GANTrainer(n_epochs=1, latent_dim=3, batch_size=8)
    redactor = GANRedactor(generator, discriminator, SampleCriterion(X[:6]), trainer=trainer, random_state=0).fit(X)
    page = page_of(tmp_path, redactor, redactor.report(X[6:], feature_extractor="pixels", n=50))
    assert page.count("data:image/png;base64,") == 1
    assert "What the same latents become" in page and "framed" not in page and "Invalidity by epoch" not in page
    assert json.loads((tmp_path / "report.json").read_text())["history"]["invalidity"] == [None, None]
    with pytest.raises(ValueError, match="Nothing was judged between the epochs of method='data'"):
        InvalidityCurveDisplay.from_estimator(redactor)


def test_the_curve_shows_the_history_with_its_intervals(redactor):
    ax = InvalidityCurveDisplay.from_estimator(redactor).ax_
    np.testing.assert_allclose(ax.lines[0].get_ydata(), redactor.history_["invalidity"])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), redactor.history_["epoch"])
    band = ax.collections[0].get_paths()[0].vertices
    intervals = [Invalidity.of(np.arange(100) >= round(100 * rate)) for rate in redactor.history_["invalidity"]]
    assert band[:, 1].min() == pytest.approx(min(part.low for part in intervals))
    assert band[:, 1].max() == pytest.approx(max(part.high for part in intervals))
