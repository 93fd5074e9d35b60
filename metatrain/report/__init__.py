"""What an evaluation shows a person: a verdict and tables in the terminal, one page, and figures as files."""

from __future__ import annotations

from pathlib import Path

from metatrain.evaluation.analysis import Findings
from metatrain.evaluation.results import Results
from metatrain.report.terminal import table

__all__ = ["table", "verdict", "write"]


def verdict(results: Results) -> str:
    """Two or three sentences with numbers, also when it is bad news."""
    return " ".join(Findings(results).verdict())


def write(results: Results, folder: Path) -> Path:
    """Write `report.html`, one page that needs nothing but itself, and its figures as PNG and SVG beside it.

    Returns:
      The page.
    """
    from metatrain.report.page import write_report  # matplotlib takes a while to import, and only this needs it

    return write_report(Findings(results), folder)
