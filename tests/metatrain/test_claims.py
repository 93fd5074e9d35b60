"""A recipe of configs/claims, shortened, from the evaluation to the comparison that docs/claims.md quotes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from metatrain.cli import app
from metatrain.evaluation.records import Results

RECIPE = Path(__file__).parents[2] / "configs" / "claims" / "iomt.yaml"


@pytest.mark.slow
def test_iomt_s_recipe_decides_between_chosen_and_other_switches(tmp_path: Path) -> None:
    options = "--settings head-mnist --horizons 500 --seeds 2 --tuning-seeds 1 --baselines sgd,adam,iomt,iomt_random"
    run = CliRunner()
    evaluated = run.invoke(app, ["evaluate", "-", str(RECIPE), *options.split(), "--out", str(tmp_path / "found")])
    assert evaluated.exit_code == 0, evaluated.output
    results = Results.load(tmp_path / "found" / "results.json")
    (setting,) = results.settings()
    chosen = {history.optimizer: [stage["chosen"] for stage in history.stages] for history in results.switches}
    assert chosen == {
        "iomt/constant": 20 * ["initial"] + 30 * ["surrogate"],
        "iomt_random/constant": 50 * ["random"],
    }
    for label in results.optimizers():
        assert results.mean(setting, label, 500, "accuracy") > 0.8
    compared = run.invoke(app, ["compare", str(tmp_path / "found"), "iomt"])
    assert compared.exit_code == 0
    for label in results.optimizers():
        assert label in compared.output
    assert "50 stages" in compared.output
