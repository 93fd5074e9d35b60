from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import l3rs
from metatrain import report
from metatrain.config import UserError
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.records import L3RS, Curve, MultiplierGrid, Results
from metatrain.evaluation.zoo import Count, summarize, zoo_rows
from tests.metatrain.common import small_config
from tests.metatrain.pages import check_page
from tests.metatrain.quadratic import regression
from tests.metatrain.synthetic import around, made

USUAL = {"name": "adamw", "learning_rate": 1e-3, "label": "usual"}


def zoo_results() -> Results:
    """Two settings at 10 and 1,000 steps: ahead; close; behind the untuned AdamW; diverged."""
    theirs = {"usual": 0.8, "adamw": 0.6, "sgdm": 0.5}
    ours = {("A: x", 10): around(0.4), ("A: x", 1000): around(0.52), ("B: y", 10): around(0.9)}
    parts = []
    for setting in ("A: x", "B: y"):
        losses = {L3RS: {h: ours.get((setting, h), [math.nan] * 4) for h in (10, 1000)}}
        for name, loss in theirs.items():
            for schedule, worse in (("constant", 0.0), ("cosine", 0.01)):
                losses[f"{name}/{schedule}"] = {h: around(loss + worse) for h in (10, 1000)}
        parts.append(made(losses, setting))
    return dataclasses.replace(
        parts[0],
        records=[record for part in parts for record in part.records],
        curves=[Curve("B: y", L3RS, 10, [0, 10], [0.85, 0.9], [0.1, 0.1])],
        multipliers=[
            MultiplierGrid("A: x", 10, [0.1, 1.0, 3.0], [0.9, 0.4, 0.5], 1.0, 0.41, 0.9),
            MultiplierGrid("B: y", 10, [0.1, 1.0, 3.0], [0.7, 0.9, None], 0.1, 0.7, 0.9),
        ],
        config={"evaluation": {"baselines": ["adamw", "sgdm", USUAL]}},
    )


def test_a_row_has_the_rivals_and_the_multiplier() -> None:
    first, second, third, diverged = zoo_rows(Analysis(zoo_results()))
    assert (first.setting, first.horizon, first.loss) == ("A: x", 10, pytest.approx(0.4))
    assert first.untuned is not None
    assert first.adamw is not None
    assert first.sgdm is not None
    assert first.best == first.sgdm
    assert [r.label for r in (first.untuned, first.adamw, first.sgdm)] == [
        "usual/constant", "adamw/constant", "sgdm/constant"
    ]  # fmt: skip
    assert first.sgdm.outcome == "better"
    assert first.relative == pytest.approx(-0.2)
    assert first.multiplier is not None
    assert (first.multiplier.best, second.multiplier) == (1.0, None)
    assert third.untuned is not None
    assert (third.untuned.outcome, third.start) == ("worse", 0.85)
    assert diverged.diverged
    assert [row.diverged for row in (first, second, third)] == [False] * 3


def test_the_summary_counts_by_hand() -> None:
    found = summarize(zoo_rows(Analysis(zoo_results())))
    assert found.not_above_adamw == Count(2, 4)
    assert found.ahead_of_all == Count(1, 4)
    assert found.close_to_best == Count(2, 4)
    assert found.right_scale == Count(1, 2)
    assert found.diverged == Count(1, 4)
    assert found.above_start == Count(1, 1)
    assert found.worse_than_untuned == Count(2, 4)
    assert found.settings_worse_than_untuned == Count(1, 2)


def test_the_zoo_is_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    analysis = Analysis(zoo_results())
    page = check_page(report.write(analysis, tmp_path))
    console = Console(width=200, record=True, file=io.StringIO())
    for table in report.zoo_tables(analysis):
        console.print(table)
    for text in (page.text, console.export_text()):
        for fact in ("best step multiplier between 0.5 and 2", "1 of 2", "beyond the range", "−20 %", "AdamW 0.001"):
            assert fact in text
    usual = made({L3RS: {10: around(0.4)}, "adam/constant": {10: around(0.5)}})
    assert report.zoo_tables(Analysis(usual)) == []
    assert "Out of the box" not in report.write(Analysis(usual), tmp_path).read_text()


@pytest.fixture(scope="module")
def optimizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = l3rs.Spec.create(regression().params_shape(), hidden=(4,), embedding_dim=2)
    return l3rs.save(tmp_path_factory.mktemp("o") / "opt", l3rs.init_meta_params(jax.random.key(0), spec), spec)


@pytest.mark.parametrize("plan", ["fused", "stepwise"])
def test_multipliers_are_measured(optimizer: Path, plan: str) -> None:
    config = small_config(execution={"plan": plan}, evaluation={"baselines": [], "curve_points": 2})
    one = evaluate(optimizer, config, horizons=(20,), seeds=3, multipliers=(1.0,))
    (alone,) = one.multipliers
    assert alone.best == 1.0
    assert alone.loss == pytest.approx(one.mean("regression", L3RS, 20), rel=1e-5)  # compiled apart
    many = evaluate(optimizer, config, horizons=(20,), seeds=3, tuning_seeds=2, multipliers=(1.0, 100.0, 10.0))
    (grid,) = many.multipliers
    assert grid.multipliers == [1.0, 10.0, 100.0]
    losses = np.array([np.inf if loss is None else loss for loss in grid.inner_valid_loss])
    assert grid.best == grid.multipliers[int(losses.argmin())]
    assert grid.best > 1  # the steps of an optimizer without meta-training are small
    assert grid.loss < one.mean("regression", L3RS, 20)
    with pytest.raises(UserError, match=r"multipliers\.0: .*greater than 0, found 0"):
        evaluate(optimizer, config, multipliers=(0,))


def test_multipliers_are_kept_in_the_file(tmp_path: Path) -> None:
    results = zoo_results()
    assert Results.load(results.save(tmp_path)).multipliers == results.multipliers
