"""Displays show what the numbers say."""

import matplotlib
import numpy as np
import pytest

from ganclean.plotting import CleansingCurveDisplay, ImageGridDisplay, InfluenceHistogramDisplay
from ganclean.validation import CleansingCurve

matplotlib.use("Agg")


@pytest.fixture
def curve():
    return CleansingCurve(
        metric="FID",
        greater_is_better=False,
        rates=np.array([0.1, 0.2]),
        baseline=np.array([4.0, 6.0]),
        values={"influence": np.array([[3.0, 2.0], [5.0, 4.0]]), "random": np.array([[4.0, 5.0], [6.0, 7.0]])},
        harmfulness=np.zeros((2, 10)),
    )


def test_the_curve_starts_at_the_baseline_and_follows_the_means(curve):
    ax = CleansingCurveDisplay.from_curve(curve).ax_
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["most harmful removed"].get_xdata(), [0, 10, 20])
    np.testing.assert_allclose(lines["most harmful removed"].get_ydata(), [5, 4, 3])
    np.testing.assert_allclose(lines["as many random ones removed"].get_ydata(), [5, 5, 6])
    assert "lower is better" in ax.get_ylabel()


def test_comparisons_are_signed_so_that_positive_is_better(curve):
    assert curve.compare("influence", "none", 0.2).improvement == 2
    assert curve.compare("influence", "random", 0.2).improvement == 3
    assert curve.compare("random", "none", 0.2).improvement == -1


def test_the_histogram_counts_every_instance_once():
    harmfulness = np.linspace(-1, 1, 101)
    display = InfluenceHistogramDisplay(harmfulness, 0.5, "FID").plot()
    counts = [int(sum(patch.get_height() for patch in bars)) for bars in display.ax_.containers]
    assert counts == [(harmfulness <= 0.5).sum(), (harmfulness > 0.5).sum()]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_each_image_with_its_caption(channels):
    images = np.linspace(-1, 1, 5 * channels * 16).reshape(5, channels, 4, 4)
    display = ImageGridDisplay(images, list("abcde"), n_columns=3).plot()
    assert display.axes_.shape == (2, 3)
    assert [ax.get_xlabel() for ax in display.axes_.flat] == [*"abcde", ""]


def test_the_grid_refuses_what_is_no_image():
    with pytest.raises(ValueError, match="grey or colour images"):
        ImageGridDisplay(np.zeros((2, 5))).plot()
