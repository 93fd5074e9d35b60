"""The report of an evaluation: a verdict and tables in the terminal, a page, and figures as files."""

from __future__ import annotations

from pathlib import Path

from metatrain.evaluation.analysis import Analysis
from metatrain.report.terminal import table, zoo_tables
from metatrain.report.verdict import verdict

__all__ = ["table", "verdict", "write", "zoo_tables"]


def write(analysis: Analysis, folder: Path) -> Path:
    """Write `report.html`, one self-contained page, and its figures as PNG and SVG beside it.

    Returns:
      The page.
    """
    from metatrain.report.page import write_report  # importing matplotlib takes a while, and only this needs it

    return write_report(analysis, folder)
