from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from metatrain import report
from metatrain.durations import about
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import L3RS
from metatrain.report import formatting
from metatrain.report.plates import log_ticks
from tests.metatrain.synthetic import NOISY, around, made


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.3119, "0.312"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234"), (-0.5, "−0.500"), (0.0, "0"),
     (math.nan, "–"), (math.inf, "∞"), (4.2e-5, "4.2e−5"), (0.02, "0.020")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert formatting.number(value) == text


def test_formats() -> None:
    assert [formatting.tick(x) for x in (3e-4, 1.5e-5, 0.003, 0.5, 20, 2000, -1)] == [
        "3e−4",
        "1.5e−5",
        "0.003",
        "0.5",
        "20",
        "2,000",
        "−1",
    ]
    assert formatting.ticks([63.62, 63.625, 63.63]) == ["63.620", "63.625", "63.630"]
    assert formatting.ticks([0, 0.5, 1]) == ["0", "0.5", "1"]
    assert formatting.listed(["a"]) == "a"
    assert formatting.listed(["a", "b", "c"]) == "a, b and c"
    assert formatting.short("A: x") == "A"
    assert formatting.short("") == "the task"
    assert [formatting.duration(s) for s in (2e-5, 0.5, 60, 544.8, 9000)] == [
        "20.0 µs",
        "500 ms",
        "60.0 s",
        "9.08 min",
        "2.5 h",
    ]
    assert [about(s) for s in (0.1, 400, 9000, 9e5)] == ["1 s", "7 min", "2 h", "10.4 days"]


def test_ticks_are_round_and_few() -> None:
    for low, high in ((0.21, 0.9), (1, 1000), (0.5, 0.52), (3e-4, 0.02)):
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 7
        assert all(low <= tick <= high for tick in ticks)


def test_terminal_table() -> None:
    results = made({L3RS: {10: NOISY}, "adam/a": {10: around(0.5)}, "sgd/a": {10: [math.nan] * 4}})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(Analysis(results), ""))
    text = console.export_text()
    assert "≈ 0.500 (95.0 %)" in text
    assert [text.index(label) for label in ("L3RS", "adam/a", "sgd/a")] == sorted(
        map(text.index, ("L3RS", "adam/a", "sgd/a"))
    )
