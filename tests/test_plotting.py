"""Displays show what the numbers say."""

from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import kendalltau
from scipy.stats import t as student

from ganclean.plotting import (
    CleansingCurveDisplay,
    HarmfulnessScatterDisplay,
    ImageGridDisplay,
    InfluenceHistogramDisplay,
    InfluenceScatterDisplay,
)
from ganclean.validation import CleansingCurve, LinearDatamodelingScore, TrustReport, estimation_accuracy
from ganclean.validation.accuracy import Agreement

matplotlib.use("Agg")
FID_BASELINE = np.array([4.0, 6.0, 8.0])
INFLUENCE = np.array([[3.0, 2.0], [5.5, 4.0], [7.0, 4.5]])


def curve_of(n_seeds=3):
    rows = slice(None, n_seeds)
    values = {
        "FID": {
            "influence": INFLUENCE[rows],
            "mine": np.array([[4.0, 4.0], [6.0, 6.5], [8.0, 8.0]])[rows],
            "random": np.array([[4.0, 5.0], [6.0, 7.0], [8.5, 8.0]])[rows],
        },
        "recall": {
            name: np.array([[0.5, 0.4], [0.6, 0.4], [0.5, 0.5]])[rows] for name in ("influence", "mine", "random")
        },
    }
    return CleansingCurve(
        metric="FID",
        greater_is_better={"FID": False, "recall": True},
        rates=np.array([0.1, 0.2]),
        baseline={"FID": FID_BASELINE[rows], "recall": np.array([0.6, 0.6, 0.6])[rows]},
        values=values,
        validation_baseline=FID_BASELINE[rows],
        validation=values["FID"],
        harmfulness=np.zeros((n_seeds, 10)),
    )


def lines_of(display):
    return {line.get_label(): line for line in display.ax_.get_lines()}


def bands_of(display):
    """The lowest and highest value of each band at each rate, in the order of the legend."""
    bands = []
    for band in reversed(display.ax_.collections):
        x, y = band.get_paths()[0].vertices.T
        bands.append(np.array([[y[np.isclose(x, rate)].min(), y[np.isclose(x, rate)].max()] for rate in (0, 10, 20)]))
    return bands


def test_the_curve_starts_at_the_baseline_and_follows_the_means_of_each_selector():
    display = CleansingCurveDisplay.from_curve(curve_of())
    lines = lines_of(display)
    np.testing.assert_allclose(lines["most harmful by influence"].get_xdata(), [0, 10, 20])
    np.testing.assert_allclose(lines["most harmful by influence"].get_ydata(), [6, *INFLUENCE.mean(axis=0)])
    np.testing.assert_allclose(lines["random"].get_ydata(), [6, 18.5 / 3, 20 / 3])
    np.testing.assert_allclose(lines["mine"].get_ydata(), [6, 6, 18.5 / 3])
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["most harmful by influence", "mine", "random"]
    assert "lower is better" in display.ax_.get_ylabel()


@pytest.mark.parametrize("relative", [False, True])
def test_bands_are_the_interval_of_the_paired_change(relative):
    display = CleansingCurveDisplay.from_curve(curve_of(), relative=relative)
    changes = INFLUENCE - FID_BASELINE[:, None]
    half = student.ppf(0.975, 2) * changes.std(axis=0, ddof=1) / np.sqrt(3)
    centre = -changes.mean(axis=0) if relative else 6 + changes.mean(axis=0)
    start = 0 if relative else 6
    expected = np.column_stack([[start, *(centre - half)], [start, *(centre + half)]])
    np.testing.assert_allclose(bands_of(display)[0], expected)
    title = display.ax_.get_legend().get_title().get_text()
    assert "95% interval of the paired change over 3 seeds" in title
    narrow = bands_of(CleansingCurveDisplay.from_curve(curve_of(), relative=relative, level=0.5))[0]
    assert (narrow[1:, 0] > expected[1:, 0]).all() and (narrow[1:, 1] < expected[1:, 1]).all()


def test_the_relative_curve_is_the_comparison_with_no_removal():
    curve = curve_of()
    for metric in ("FID", "recall"):
        display = CleansingCurveDisplay(curve).plot(metric=metric, relative=True)
        for name, label in (("influence", "most harmful by influence"), ("random", "random")):
            improvements = [curve.compare(name, rate=rate, metric=metric).improvement for rate in curve.rates]
            np.testing.assert_allclose(lines_of(display)[label].get_ydata(), [0, *improvements], atol=1e-12)
        comparison = curve.compare("influence", rate=0.2, metric=metric)
        np.testing.assert_allclose(bands_of(display)[0][2], [comparison.low, comparison.high])
        assert "higher is better" in display.ax_.get_ylabel() and metric in display.ax_.get_ylabel()


def test_selectors_differ_in_colour_and_marker():
    lines = list(lines_of(CleansingCurveDisplay.from_curve(curve_of())).values())[:3]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3


def test_labels_of_small_rates_do_not_overlap():
    curve = replace(curve_of(), rates=np.array([0.01, 0.5]))
    display = CleansingCurveDisplay.from_curve(curve)
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == ["0", "50"]
    np.testing.assert_allclose(lines_of(display)["random"].get_xdata(), [0, 1, 50])


def test_a_single_seed_has_no_bands():
    display = CleansingCurveDisplay.from_curve(curve_of(1))
    assert not display.ax_.collections
    assert "one seed" in display.ax_.get_legend().get_title().get_text()


def test_a_metric_that_was_not_evaluated_is_refused():
    with pytest.raises(ValueError, match=r"one of \['FID', 'recall'\]; got 'KID'"):
        CleansingCurveDisplay.from_curve(curve_of(), metric="KID")


def test_displays_plot_into_the_axes_they_are_given():
    ax = plt.figure().subplots()
    display = CleansingCurveDisplay.from_curve(curve_of(), ax=ax)
    assert display.ax_ is ax and display.figure_ is ax.figure


def test_the_scatter_shows_each_removal_and_how_well_they_agree(cleanser):
    display = InfluenceScatterDisplay.from_estimator(cleanser, n_instances=12)
    accuracy = estimation_accuracy(cleanser, 12)
    (points,) = display.ax_.collections
    np.testing.assert_allclose(points.get_offsets(), np.column_stack([accuracy.predicted, accuracy.true]))
    low, high = accuracy.interval("kendall_tau")
    first, second = display.ax_.get_title(loc="left").split("\n")
    assert first == f"τ = {accuracy.kendall_tau:.2f}   (95% bootstrap interval {low:.2f} to {high:.2f})"
    assert second.startswith(f"r = {accuracy.pearson:.2f} ")
    identity = lines_of(display)["predicted = true"]
    assert identity.get_slope() == 1 and identity.get_xy1() == (0, 0)
    assert display.ax_.get_xlim() == display.ax_.get_ylim()
    assert "12 removals" in [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert display.ax_.get_ylabel() == "true change of FID, by retraining"


def test_the_scatter_says_what_the_points_are():
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=30)
    true = predicted + 0.3 * rng.normal(size=30)
    score = LinearDatamodelingScore(predicted, true, [], spearman=0.9, true_by_seed=true[None])
    display = InfluenceScatterDisplay.from_agreement(score)
    assert display.ax_.get_title(loc="left").startswith("ρ = ")
    probe = InfluenceScatterDisplay.from_agreement(TrustReport(1.0, predicted, true, 0.9, 0.1), metric="FID")
    assert f"τ = {kendalltau(predicted, true).statistic:.2f}" in probe.ax_.get_title(loc="left")
    for shown, name in ((display, "30 random subsets"), (probe, "30 random reweightings")):
        assert name in [text.get_text() for text in shown.ax_.get_legend().get_texts()]


def test_a_few_points_have_no_interval():
    display = InfluenceScatterDisplay.from_agreement(Agreement(np.arange(4.0), np.arange(4.0) ** 2, []))
    assert display.ax_.get_title(loc="left") == "τ = 1.00\nr = 0.96"


def test_the_scatter_of_changes_that_are_all_zero_says_so():
    display = InfluenceScatterDisplay.from_agreement(Agreement(np.zeros(5), np.zeros(5), []))
    assert "nothing changes" in display.ax_.get_title(loc="left")


def test_the_histogram_counts_every_instance_once():
    harmfulness = np.linspace(-1, 1, 101)
    removed = harmfulness > 0.5
    display = InfluenceHistogramDisplay(harmfulness, removed, "FID").plot()
    counts = [int(sum(patch.get_height() for patch in bars)) for bars in display.ax_.containers]
    assert counts == [(~removed).sum(), removed.sum()]
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["kept (76)", "removed (25)"]


def test_the_histogram_says_how_many_instances_are_clear_of_zero():
    harmfulness = np.array([-3.0, -1.0, 0.5, 1.0, 4.0])
    removed = np.array([False, False, False, True, True])
    display = InfluenceHistogramDisplay(harmfulness, removed, "FID", np.full(5, 1.0)).plot()
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == [
        "kept (3), 33% of them more than 2 s.e. from 0",
        "removed (2), 50% of them more than 2 s.e. from 0",
    ]


def test_the_histogram_of_a_single_run_has_no_errors(cleanser):
    labels = [
        text.get_text() for text in InfluenceHistogramDisplay.from_estimator(cleanser).ax_.get_legend().get_texts()
    ]
    assert labels == ["kept (12)", "removed (4)"]


def test_points_are_coloured_by_harmfulness_and_the_removed_are_ringed(cleanser, X):
    display = HarmfulnessScatterDisplay.from_estimator(cleanser, X)
    points, rings = display.ax_.collections
    order = np.argsort(np.abs(cleanser.harmfulness_), kind="stable")
    np.testing.assert_allclose(points.get_offsets(), X[order])
    np.testing.assert_allclose(points.get_array(), cleanser.harmfulness_[order])
    assert points.norm.vmin == -points.norm.vmax
    np.testing.assert_allclose(rings.get_offsets(), X[~cleanser.support_])


def test_points_in_the_plane_are_of_tabular_data(cleanser):
    with pytest.raises(ValueError, match="ImageGridDisplay shows images"):
        HarmfulnessScatterDisplay.from_estimator(cleanser, np.zeros((16, 1, 4, 4)))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_each_image_with_its_caption(channels):
    images = np.linspace(-1, 1, 5 * channels * 16).reshape(5, channels, 4, 4)
    display = ImageGridDisplay(images, list("abcde"), n_columns=3).plot()
    assert display.axes_.shape == (2, 3)
    assert [ax.get_xlabel() for ax in display.axes_.flat] == [*"abcde", ""]


def test_the_grid_refuses_what_is_no_image():
    with pytest.raises(ValueError, match="grey or colour images"):
        ImageGridDisplay(np.zeros((2, 5))).plot()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
