"""The HTML report of a cleansing."""

from ganclean.reporting.case import CleansingCase, Effect, window
from ganclean.reporting.report import write_report

__all__ = ["CleansingCase", "Effect", "window", "write_report"]
