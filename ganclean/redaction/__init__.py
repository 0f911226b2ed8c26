"""Redaction: make a trained GAN stop producing certain samples."""

from ganclean.redaction.baselines import DeletionFineTuner, RejectionSampler, RetrainingRedactor
from ganclean.redaction.criteria import AnyOf, ClassifierCriterion, Criterion, SampleCriterion, ValidityCriterion
from ganclean.redaction.invalidity import Invalidity, residual_invalidity
from ganclean.redaction.redactor import GANRedactor
from ganclean.redaction.refit import CrossEntropyRefit
from ganclean.redaction.report import RedactionReport

__all__ = [
    "AnyOf",
    "ClassifierCriterion",
    "Criterion",
    "CrossEntropyRefit",
    "DeletionFineTuner",
    "GANRedactor",
    "Invalidity",
    "RedactionReport",
    "RejectionSampler",
    "RetrainingRedactor",
    "SampleCriterion",
    "ValidityCriterion",
    "residual_invalidity",
]
