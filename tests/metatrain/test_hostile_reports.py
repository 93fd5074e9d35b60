"""Pages of results whose names have a meaning for matplotlib, and pages in folders with links."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from metatrain import report
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import Results
from tests.metatrain.synthetic import full


def test_dollar_signs_in_names_and_links_in_the_folder(tmp_path: Path) -> None:
    name = r"A: $\frac{x}$ and $y_{$"
    parts = {}
    for field in ("records", "speedup", "curves", "paths", "coefficients", "switches", "costs"):
        parts[field] = [dataclasses.replace(part, setting=name) for part in getattr(full(1), field)]
    results = dataclasses.replace(full(1), **parts, tuning={name: next(iter(full(1).tuning.values()), {})})
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "results"
    results.save(folder)
    for file in ("report.html", "horizons-loss.png", "horizons-loss.svg"):
        (folder / file).symlink_to(victim)
    page = report.write(Analysis(Results.load(folder / "results.json")), folder)
    assert r"$\frac{x}$" in page.read_text()
    assert victim.read_text() == "mine"
    assert (folder / "horizons-loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "horizons-loss.png").is_symlink()
