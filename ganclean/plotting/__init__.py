"""Displays, in scikit-learn's way: ``Display.from_…(…)`` computes and plots, ``.plot(ax=…)`` plots again."""

from ganclean.plotting.agreement import InfluenceScatterDisplay
from ganclean.plotting.attribution import AttributionDisplay
from ganclean.plotting.credit import CreditShareDisplay
from ganclean.plotting.curve import CleansingCurveDisplay
from ganclean.plotting.gallery import HarmfulnessScatterDisplay, ImageGridDisplay
from ganclean.plotting.histogram import InfluenceHistogramDisplay
from ganclean.plotting.redaction import InvalidityCurveDisplay, RedactionDisplay

__all__ = [
    "AttributionDisplay",
    "CleansingCurveDisplay",
    "CreditShareDisplay",
    "HarmfulnessScatterDisplay",
    "ImageGridDisplay",
    "InfluenceHistogramDisplay",
    "InfluenceScatterDisplay",
    "InvalidityCurveDisplay",
    "RedactionDisplay",
]
