"""Is an estimate true, and does removal help? Retraining tells."""

from ganclean.validation.accuracy import (
    EstimationAccuracy,
    LinearDatamodelingScore,
    estimation_accuracy,
    linear_datamodeling_score,
)
from ganclean.validation.counterfactual import counterfactual_retrain
from ganclean.validation.curve import CleansingCurve, cleansing_curve
from ganclean.validation.panel import MetricPanel, metric_panel
from ganclean.validation.significance import PairedComparison, paired_comparison
from ganclean.validation.trust import TrustReport, trust_report

__all__ = [
    "CleansingCurve",
    "EstimationAccuracy",
    "LinearDatamodelingScore",
    "MetricPanel",
    "PairedComparison",
    "TrustReport",
    "cleansing_curve",
    "counterfactual_retrain",
    "estimation_accuracy",
    "linear_datamodeling_score",
    "metric_panel",
    "paired_comparison",
    "trust_report",
]
