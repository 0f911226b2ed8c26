"""The HTML report of a cleansing."""

from ganclean.reporting.report import CleansingCase, write_report

__all__ = ["CleansingCase", "write_report"]
