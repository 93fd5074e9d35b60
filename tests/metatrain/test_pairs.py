"""One optimizer of an evaluation compared with each of the others, and the overhead of IOMT."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from metatrain.cli import app
from metatrain.config import UserError
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.pairs import find_label, joined, overheads, pairs
from metatrain.evaluation.records import Cost, Record, Results, SwitchHistory
from metatrain.evaluation.statistics import mean_interval
from metatrain.report.pairs import pair_table
from tests.metatrain.common import REGRESSION, small_config
from tests.metatrain.synthetic import switched

ACCURACIES = {
    "iomt/constant": [0.90, 0.91, 0.92, 0.93],
    "adam/constant": [0.80, 0.82, 0.81, 0.83],  # clearly behind
    "sgd/constant": [0.91, 0.90, 0.93, 0.92],  # level
    "sgd/cosine": [0.95, 0.96, 0.97, 0.98],  # clearly ahead
}


@pytest.fixture
def results() -> Results:
    records = [
        Record("a", label, 200, seed, 1 - accuracy, accuracy, 0.1, {}, 1.0)
        for label, row in ACCURACIES.items()
        for seed, accuracy in enumerate(row)
    ]
    stages, losses = switched()  # 20 stages of 10 steps, the controller takes 0.01 s in each
    return Results(
        "-",
        records,
        [],
        {},
        switches=[SwitchHistory("a", "iomt/constant", stages, losses)],
        costs=[Cost("a", "iomt/constant", 0.011, 2.0)],  # 2.2 s in all: 2 of training and 0.2 of the controller
    )


@pytest.mark.parametrize("field", ["accuracy", "loss"])
def test_differences_are_paired_and_the_best_comes_first(results: Results, field: str) -> None:
    found = pairs(results, "iomt/constant", "a", 200, field)  # type: ignore[arg-type]
    assert [pair.optimizer for pair in found] == ["sgd/cosine", "sgd/constant", "adam/constant"]
    assert [pair.outcome for pair in found] == ["worse", "undecided", "better"]
    sign = 1 if field == "accuracy" else -1
    for pair in found:
        differences = sign * (np.array(ACCURACIES["iomt/constant"]) - ACCURACIES[pair.optimizer])
        assert pair.difference == pytest.approx(mean_interval(differences))


def test_a_run_without_a_finite_loss_ranks_last_and_decides_nothing(results: Results) -> None:
    lost = [Record("a", "lion/constant", 200, seed, math.nan, 0.1, 0.1, {}, math.nan) for seed in range(4)]
    results.records.extend(lost)
    last = pairs(results, "iomt/constant", "a", 200, "loss")[-1]
    assert (last.optimizer, last.outcome) == ("lion/constant", "undecided")
    assert pairs(results, "iomt/constant", "a", 200, "accuracy")[-1].outcome == "better"


def test_a_name_may_lack_the_schedule_where_there_is_one(results: Results) -> None:
    assert find_label(results, "adam") == "adam/constant"
    assert find_label(results, "sgd/cosine") == "sgd/cosine"
    with pytest.raises(UserError, match=r"2 optimizers are called sgd; choose one of iomt/constant, .*sgd/cosine"):
        find_label(results, "sgd")
    with pytest.raises(UserError, match=r"no optimizer is called lion; choose one of"):
        find_label(results, "lion")


def test_the_overhead_is_the_controllers_share_of_training(results: Results) -> None:
    (found,) = overheads(results, "a")
    assert (found.optimizer, found.stages) == ("iomt/constant", 20)
    assert found.seconds == pytest.approx(0.2)
    assert found.share == pytest.approx(0.1)
    assert overheads(results, "b") == []


def test_the_command_prints_the_table_and_the_overhead(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path)
    shown = CliRunner().invoke(app, ["compare", str(tmp_path), "iomt"])
    assert shown.exit_code == 0
    assert "+10.00" in shown.output  # points ahead of Adam
    assert "10.0 % of the training" in shown.output
    shown = CliRunner().invoke(app, ["compare", str(tmp_path), "iomt", "--by", "time"])
    assert isinstance(shown.exception, UserError)


def test_two_evaluations_are_joined_on_the_runs_that_they_share(results: Results) -> None:
    ours = dataclasses.replace(results, config={"seed": 0, "task": {"name": "digits"}})
    rows = [Record("a", "l3rs", steps, seed, 0.2, 0.9, 0.1, {}, 1.0) for steps in (100, 200) for seed in range(1, 6)]
    rows = [dataclasses.replace(row, accuracy=0.9 + 0.01 * row.seed**2) for row in rows]
    other = Results("universal", rows[::-1], [], {}, config=ours.config)  # a file may have them in any order
    both = joined(ours, other, "other")
    assert both.horizons() == [200]
    assert {record.seed for record in both.records} == {1, 2, 3}
    assert both.values("a", "iomt/constant", 200).tolist() == ours.values("a", "iomt/constant", 200).tolist()[1:]
    (pair,) = [p for p in pairs(both, "iomt/constant", "a", 200, "accuracy") if p.optimizer == "l3rs of other"]
    assert pair.difference == pytest.approx(mean_interval(np.array([0.91, 0.92, 0.93]) - [0.91, 0.94, 0.99]))
    for wrong in (rows + rows[5:6], rows[:6] + rows[7:] + [dataclasses.replace(rows[6], optimizer="sgd")]):
        with pytest.raises(UserError, match="l3rs of other has not one run of 200 steps for each seed that both"):
            joined(ours, dataclasses.replace(other, records=wrong), "other")
    with pytest.raises(UserError, match="other has no setting, horizon and seed in common"):
        joined(ours, dataclasses.replace(other, records=rows[:5]), "other")
    for one, two, where in (
        (results, other, "the first evaluation"),
        (ours, dataclasses.replace(other, config={}), "other"),
    ):
        with pytest.raises(UserError, match=f"^{where} is of an earlier version and does not say what its task is"):
            joined(one, two, "other")
    for odd in ({"evaluation": 3}, {"evaluation": {"settings": []}}, {"evaluation": None}):
        assert joined(ours, dataclasses.replace(other, config=ours.config | odd), "other").horizons() == [200]


def test_evaluations_of_different_tasks_are_not_joined(tmp_path: Path) -> None:
    """On what `evaluate` writes: the same seed of the same task has the same result."""
    sgd = {"name": "sgd", "learning_rate": 0.1, "label": "sgd"}
    kept = {"settings": {"few": {"examples": 32}}, "baselines": [sgd], "schedules": ["constant"], "seeds": 2}
    changes: dict[str, dict] = {
        "one": {},
        "same": {},
        "batch": {"evaluation": {**kept, "settings": {"few": {"examples": 48}}}},
        "seed": {"seed": 1},
        "task": {"task": {"name": REGRESSION, "dimension": 6}},
    }
    for name, change in changes.items():
        evaluate(
            "-", small_config(**{"evaluation": kept, **change}), horizons=(5,), schedules=["constant"], seeds=2
        ).save(tmp_path / name)

    def compare(other: str) -> Result:
        return CliRunner().invoke(app, ["compare", str(tmp_path / "one"), "sgd", "--with", str(tmp_path / other)])

    same = compare("same")
    assert "constant of " in same.output
    assert "+0.00" in same.output
    for name, sentence in (
        ("batch", r"batch is not of the same task: evaluation\.settings\.few\.examples is 48 there and 32 here"),
        ("seed", "seed is not of the same task: seed is 1 there and 0 here"),
        ("task", r"task is not of the same task: task\.dimension is 6 there and not given here"),
    ):
        assert re.search(sentence, str(compare(name).exception))


def test_one_seed_has_no_interval(results: Results) -> None:
    first = Results("-", [record for record in results.records if record.seed == 0], [], {})
    for pair in pairs(first, "iomt/constant", "a", 200, "accuracy"):
        assert pair.outcome == "undecided"
        assert pair.difference.low == -math.inf
    console = Console(width=140)
    with console.capture() as text:
        console.print(pair_table(first, "iomt/constant", "a", 200, "accuracy"))
    assert "90.00 %" in text.get()  # without a deviation
