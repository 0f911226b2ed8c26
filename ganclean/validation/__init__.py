"""Is an estimate true, and does removal help? Retraining tells."""

from ganclean.validation.accuracy import EstimationAccuracy, estimation_accuracy
from ganclean.validation.counterfactual import counterfactual_retrain
from ganclean.validation.curve import CleansingCurve, cleansing_curve
from ganclean.validation.significance import PairedComparison, paired_comparison

__all__ = [
    "CleansingCurve",
    "EstimationAccuracy",
    "PairedComparison",
    "cleansing_curve",
    "counterfactual_retrain",
    "estimation_accuracy",
    "paired_comparison",
]
