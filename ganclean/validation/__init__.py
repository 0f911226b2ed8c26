"""Is an estimate true, and does removal help? Retraining tells."""

from ganclean.validation.accuracy import EstimationAccuracy, estimation_accuracy
from ganclean.validation.counterfactual import counterfactual_retrain

__all__ = ["EstimationAccuracy", "counterfactual_retrain", "estimation_accuracy"]
