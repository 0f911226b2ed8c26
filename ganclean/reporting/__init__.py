"""Reports in HTML."""

from ganclean.reporting.case import CleansingCase, Effect, window
from ganclean.reporting.cleansing import write_report

__all__ = ["CleansingCase", "Effect", "window", "write_report"]
