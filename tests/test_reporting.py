"""The report says what the curve, the table and the probes say, in words and numbers."""

import html
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from ganclean.metrics import FID, PRDC
from ganclean.reporting import CleansingCase, write_report
from ganclean.reporting.table import p_text, table_of
from ganclean.validation import CleansingCurve, TrustReport, cleansing_curve, trust_report
from tests.toy_gans import toy_cleanser, toy_data

matplotlib.use("Agg")
SMOOTH = TrustReport(0.98, np.array([1.0, 2.0, 3.0]), np.array([1.1, 1.9, 3.0]), 0.99, 0.05)
ROUGH = TrustReport(0.1, np.array([1.0, 2.0, 3.0]), np.array([-5.0, 9.0, -4.0]), 0.06, 4.0)


@pytest.fixture(scope="module")
def X():
    return toy_data(40)


@pytest.fixture(scope="module")
def cleanser(X):
    return toy_cleanser(n_remove=4).fit(X, X_val=toy_data(30))


@pytest.fixture(scope="module")
def case(cleanser, X):
    metrics = {"recall": PRDC(k=3, quantity="recall"), "coverage": PRDC(k=3, quantity="coverage")}
    selectors = ["influence", "isolation_forest", "random"]
    curve = cleansing_curve(cleanser, toy_data(50)[20:], [0.1, 0.25], selectors=selectors, metrics=metrics, n_seeds=3)
    return CleansingCase("points", X, np.arange(100, 140), cleanser, curve, trust_report(cleanser, n_probes=4))


def page_of(case, folder):
    """The page of a single case, without the bytes of its pictures."""
    page = write_report(folder, [case], {"data": "points"}).read_text("utf8")
    return html.unescape(re.sub('base64,[^"]+', "base64,", page))


def cells_of(page):
    """The rows of the table of effects, as lists of the numbers in their cells."""
    (table,) = re.findall(r'<table class="effects">(.*?)</table>', page, re.S)
    rows = {}
    for row in re.findall(r"<tr>(<td>.*?)</tr>", table, re.S):
        name, *cells = re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)
        rows[name] = [[float(n) for n in re.findall(r"[+-]?\d+\.\d+|(?<=p = )\d+|(?<=p < )\d\.\d+", c)] for c in cells]
    return rows


def test_the_table_holds_every_selector_and_metric_as_the_curve_has_them(case, tmp_path):
    page = page_of(case, tmp_path)
    rows = cells_of(page)
    assert list(rows) == ["nothing", "most harmful by influence", "isolation forest", "random"]
    curve = case.curve
    for i, metric in enumerate(["FID", "recall", "coverage"]):
        mean, deviation = rows["nothing"][i]
        assert mean == pytest.approx(curve.baseline[metric].mean(), rel=1e-2)
        assert deviation == pytest.approx(curve.baseline[metric].std(ddof=1), abs=5e-3)
        for name, selector in (("most harmful by influence", "influence"), ("random", "random")):
            mean, deviation, improvement, p = rows[name][i]
            values = curve.values[metric][selector][:, 0]
            assert mean == pytest.approx(values.mean(), abs=5e-3)
            assert deviation == pytest.approx(values.std(ddof=1), abs=5e-3)
            up = curve.compare_all(selector, metric=metric)[0]
            down = curve.compare_all("none", selector, metric)[0]
            assert improvement == pytest.approx(up.improvement, abs=5e-3)
            assert p == pytest.approx(min(1, 2 * min(up.p_value, down.p_value)), abs=5.1e-3)
    assert "corrected for the 2 rates" in page
    assert page.count("data:image/png;base64,") == 4


def test_tabular_instances_are_listed_with_their_values(case, tmp_path):
    page = page_of(case, tmp_path)
    worst = int(case.cleanser.harmfulness_.argmax())
    value = f"{case.X[worst, 0]:.3g}, {case.X[worst, 1]:.3g}"
    assert re.search(rf"<td>{worst + 100}</td><td class=\"n\">[+-][\d.e-]+</td><td>{re.escape(value)}</td>", page)
    assert "Where they lie" in page and "Samples before" not in page


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        (
            SMOOTH,
            ["0.98 (1 is linear", "responds almost linearly", "correlation 0.99: influence predicts this run well"],
        ),
        (ROUGH, ["0.10 (1 is linear", "Training is rough", "do not act on it without retraining"]),
    ],
)
def test_the_page_says_whether_influence_can_be_trusted(trust, words, case, tmp_path):
    page = page_of(replace(case, trust=trust), tmp_path)
    assert "Can this be trusted?" in page
    assert all(word in page for word in words)


def test_a_report_without_probes_does_not_speak_of_trust(case, tmp_path):
    page = page_of(replace(case, trust=None), tmp_path)
    assert "trusted" not in page and page.count("data:image/png;base64,") == 3


def made(changes, cleanser):
    """A case with the given changes of each metric at the two rates by influence, and hardly any at random."""
    rng = np.random.default_rng(0)
    base = {metric: 1 + rng.random(6) for metric in changes}
    by = {
        metric: {
            "influence": base[metric][:, None] + np.outer(np.linspace(0.9, 1.1, 6), change),
            "random": base[metric][:, None] + 0.01 * rng.standard_normal((6, 2)),
        }
        for metric, change in changes.items()
    }
    curve = CleansingCurve(
        metric=next(iter(changes)),
        greater_is_better={metric: metric != "FID" for metric in changes},
        rates=np.array([0.1, 0.25]),
        baseline=base,
        values=by,
        validation_baseline=base["FID"],
        validation=by["FID"],
        harmfulness=rng.random((6, 40)),
    )
    return CleansingCase("made", toy_data(40), np.arange(40), cleanser, curve)


def test_the_verdict_needs_an_improvement_over_random_removal(cleanser):
    def judged(case, **by):
        """The case with other values of the metric after removal."""
        return replace(case, curve=replace(case.curve, values={"FID": by}))

    helps, harms = made({"FID": [-0.5, -0.2]}, cleanser), made({"FID": [0.5, 0.2]}, cleanser)
    by = helps.curve.values["FID"]["influence"]
    assert helps.helps() and "10% most harmful" in helps.verdict()
    assert "improves the held-out FID, against no removal and against random" in helps.verdict()
    assert not harms.helps() and "worsens the held-out FID" in harms.verdict()
    both = judged(helps, influence=by, random=by)
    assert not both.helps() and "not more than random removal" in both.verdict()
    alone = judged(helps, influence=by)
    assert (
        alone.helps() and "improves the held-out FID against no" in alone.verdict() and "random" not in alone.verdict()
    )


def test_the_page_says_when_variety_pays_for_fidelity(cleanser):
    def price(**changes):
        return made({"FID": [-0.5, -0.5], **{m: [c, c] for m, c in changes.items()}}, cleanser).price()

    assert price() is None
    assert price(precision=0.2, recall=-0.2).startswith("Variety pays for fidelity: ")
    assert price(precision=-0.2, coverage=0.2).startswith("Fidelity pays for variety: ")
    assert price(precision=0.2, recall=0.2) == "Removal of the most harmful makes precision and recall higher."
    assert price(density=0.0, recall=0.0).startswith(
        "Removal of the most harmful leaves density and recall as they were"
    )


def test_worse_and_better_cells_are_marked(cleanser):
    _, rows = table_of(made({"FID": [-0.5, 0], "recall": [-0.2, 0]}, cleanser))
    assert [cell.kind for cell in dict(rows)["most harmful by influence"]] == ["better", "worse"]
    assert [cell.kind for cell in dict(rows)["nothing"]] == ["", ""]


def test_small_p_values_are_bounds():
    assert [p_text(p) for p in (1e-9, 0.0012, 0.25)] == ["p < 0.001", "p = 0.001", "p = 0.25"]


@pytest.mark.filterwarnings("error")
def test_a_single_seed_is_shown_without_tests(cleanser, X, tmp_path):
    case = CleansingCase("one", X, np.arange(40), cleanser, cleansing_curve(cleanser, X, [0.1], n_seeds=1))
    page = page_of(case, tmp_path)
    assert "a single seed does not tell" in page and "p = " not in page and "nan" not in page
    (baseline,) = cells_of(page)["nothing"][0]
    assert baseline == pytest.approx(case.curve.baseline["FID"][0], rel=1e-2)


@pytest.fixture(scope="module")
def automatic(X):
    cleanser = toy_cleanser(n_remove="auto").fit(X, X_val=toy_data(30))
    return CleansingCase("auto", X, np.arange(40), cleanser, cleansing_curve(cleanser, X, [0.1, 0.25], n_seeds=3))


def test_a_rate_that_validation_data_chose_is_judged_on_test_data(automatic, tmp_path):
    page, curve = page_of(automatic, tmp_path), automatic.curve
    assert f"{automatic.n_removed} of 40 instances removed" in page
    up = curve.compare("influence", "none", "auto")
    tried = np.column_stack([curve.baseline["FID"], curve.values["FID"]["influence"]])
    values = tried[np.arange(3), curve.chosen_rates("influence")]
    mean, _, improvement, p = cells_of(page)["most harmful by influence"][0]
    assert (mean, improvement) == pytest.approx((values.mean(), up.improvement), abs=5e-3)
    assert p == pytest.approx(2 * min(up.p_value, 1 - up.p_value), abs=5.1e-3)
    assert "rates that were tried" not in page


@pytest.mark.filterwarnings("error")
def test_where_validation_data_suggest_to_remove_nothing_nothing_is_claimed(automatic):
    curve = replace(
        automatic.curve,
        validation_baseline=np.full(3, -1.0),
        validation={name: np.zeros((3, 2)) for name in ("influence", "random")},
    )
    case = replace(automatic, curve=curve)
    effect = case.effect("influence", "FID")
    assert effect.improvement == 0 and effect.p_value == 1
    assert not case.helps() and "does not improve" in case.verdict()


class Labelled(nn.Module):
    """Adds an embedding of the label to the input of a perceptron."""

    def __init__(self, n_in, n_out, shape):
        super().__init__()
        self.embedding, self.shape = nn.Embedding(2, n_in), shape
        self.layers = nn.Sequential(nn.Linear(n_in, 6), nn.Tanh(), nn.Linear(6, n_out))

    def forward(self, x, label):
        return self.layers(x.flatten(1) + self.embedding(label)).unflatten(1, self.shape)


def test_conditional_images_are_shown_with_their_samples(tmp_path):
    rng = np.random.default_rng(0)
    X, y = np.tanh(rng.normal(size=(24, 1, 4, 4))), rng.integers(2, size=24)
    torch.manual_seed(0)
    networks = Labelled(3, 16, (1, 4, 4)).double(), Labelled(16, 1, (1,)).double()
    cleanser = toy_cleanser(networks, metric=FID("pixels", n_samples=40), conditional=True).fit(X, y)
    curve = cleansing_curve(cleanser, X, [0.25], selectors=["influence"], n_seeds=2)
    page = page_of(CleansingCase("images", X, np.arange(24), cleanser, curve), tmp_path)
    assert page.count("data:image/png;base64,") == 6
    assert all(title in page for title in ("Most harmful", "Most helpful", "Samples before"))
