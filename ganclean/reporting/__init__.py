"""The HTML report of a cleansing."""

from ganclean.reporting.report import CleansingCase, window, write_report

__all__ = ["CleansingCase", "window", "write_report"]
