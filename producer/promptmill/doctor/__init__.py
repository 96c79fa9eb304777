"""What ``promptmill doctor`` finds out."""

from promptmill.doctor.examine import examine
from promptmill.doctor.report import Check, Report

__all__ = ["Check", "Report", "examine"]
