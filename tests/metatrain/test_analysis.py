from __future__ import annotations

import dataclasses
import math

import pytest

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.payback import paybacks
from metatrain.evaluation.records import L3RS, Cost, Speedup
from metatrain.evaluation.statistics import Interval
from metatrain.report import formatting
from metatrain.report.tables import fine_tunings
from metatrain.specialize import sentence
from tests.metatrain.synthetic import around, costs, made


def test_a_diverged_baseline_proves_nothing_and_a_diverged_l3rs_has_lost() -> None:
    nan = [math.nan, 0.9, 0.9, 0.9]
    theirs = Analysis(made({L3RS: {10: around(0.5)}, "adam/a": {10: nan}}))
    assert theirs.tally == {"all": 1, "lower": 1, "better": 0, "worse": 0, "undecided": 1}
    ours = Analysis(made({L3RS: {10: nan}, "adam/a": {10: around(0.5)}}))
    assert ours.tally == {"all": 1, "lower": 0, "better": 0, "worse": 1, "undecided": 0}


def test_infinite_speedups() -> None:
    losses = {label: dict.fromkeys((10, 100), [x] * 5) for label, x in ((L3RS, 0.5), ("adam/a", 0.9))}
    ratios = [Speedup("", "adam/a", h, None, None if h == 100 else 3.0, None) for h in (10, 100)]
    analysis = Analysis(made(losses, speedup=ratios))
    assert analysis.speedup("", "adam/a", 10) == Interval(math.inf, 3.0, math.inf)
    assert analysis.speedup("", "adam/a", 100) == Interval(math.inf, math.inf, math.inf)
    assert analysis.median_speedup == math.inf
    for seeds in (1, 4):
        few = made({k: {h: row[:seeds] for h, row in v.items()} for k, v in losses.items()}, speedup=ratios)
        found = Analysis(few).speedup("", "adam/a", 10)
        assert found is not None
        assert formatting.bounds(found, "ratio") == ""
    diverged = made({**losses, L3RS: {10: [math.nan] * 5, 100: [0.5] * 5}}, speedup=ratios)
    assert Analysis(diverged).speedup("", "adam/a", 10) is None


def test_strongest_is_the_best_schedule_of_each_family() -> None:
    losses = {L3RS: 0.1, "a/constant": 0.9, "a/cosine": 0.2, "b/constant": 0.3, "b/cosine": 0.4, "c/cosine": math.nan}
    analysis = Analysis(made({label: {h: [x * h] for h in (1, 10)} for label, x in losses.items()}))
    assert analysis.strongest(9) == ["a/cosine", "b/constant", "c/cosine"]
    assert analysis.strongest(1) == ["a/cosine"]
    assert analysis.ranked == [L3RS, "a/cosine", "b/constant", "b/cosine", "a/constant", "c/cosine"]


def test_payback_by_hand() -> None:
    """Adam needs 40 steps for the accuracy that L3RS has after 10: 40 · 0.5 − 10 · 1.0 = 10 s saved."""
    losses = {L3RS: {10: [0.5] * 2, 40: [0.4] * 2}, "adam/a": {10: [0.9] * 2, 40: [0.5] * 2}}
    grid = {"inner_valid_loss": [1.0] * 5, "seeds": 2, "chosen": 1.0, "at_edge": False, "learning_rate": [1.0] * 5}
    found = made(losses, trained=(10, 10), costs=costs(1.0, 0.5), spent={"seconds": 95.0})
    found = dataclasses.replace(found, tuning={"": {"adam/a": {"10": grid, "40": grid}}})
    (paid,) = paybacks(Analysis(found))
    assert (paid.steps, paid.baseline_steps, paid.reached) == (10, pytest.approx(40), True)
    assert paid.saved == pytest.approx(10)
    assert paid.fine_tunings == 10
    assert paid.runs == 10
    assert paid.saved_tuned == pytest.approx(10 + 10 * 20)
    assert paid.fine_tunings_tuned == 1


@pytest.mark.parametrize("reached", [False, True])
def test_the_sentence_of_specialize_names_the_baseline_that_it_pays_against(reached: bool) -> None:
    """That with the lowest loss in the end need not be the quickest to the accuracy of L3RS, here after 40 steps."""
    late = 0.2 if reached else 0.4
    losses = {
        L3RS: {10: 0.9, 40: 0.3, 80: 0.1},
        "slow/cosine": {10: 0.9, 40: 0.5, 80: late},
        "quick/constant": {10: 0.9, 40: 0.7, 80: late + 0.05},
    }
    spread = {label: {h: [x + 0.001 * i for i in range(6)] for h, x in row.items()} for label, row in losses.items()}
    grid = {"inner_valid_loss": [1.0] * 5, "seeds": 2, "chosen": 0.25, "at_edge": False, "learning_rate": [1.0] * 5}
    timed = [Cost("", label, s, 2.0) for label, s in ((L3RS, 1.0), ("slow/cosine", 9.0), ("quick/constant", 0.5))]
    tuning = {"": {label: {str(h): grid for h in row} for label, row in losses.items() if label != L3RS}}
    found = dataclasses.replace(made(spread, trained=(10, 40), spent={"seconds": 95.0}), costs=timed, tuning=tuning)
    said = sentence(Analysis(found))
    assert "best tuned baseline (slow/cosine)" in said
    [paid] = paybacks(Analysis(found))
    assert (paid.baseline, paid.reached) == ("quick/constant", reached)
    number = f"{'' if reached else 'at most '}{paid.fine_tunings_tuned:,.0f}"
    assert f"paid after {number} fine-tunings that would each tune quick/constant, which" in said
    assert ("as no baseline does" in said) is not reached


def test_payback_never_and_never_reached() -> None:
    losses = {L3RS: {10: [0.5] * 2, 40: [0.4] * 2}, "adam/a": {10: [0.9] * 2, 40: [0.5] * 2}}
    slow = made(losses, trained=(10, 10), costs=costs(9.0, 0.5), spent={"seconds": 95.0})
    assert math.isinf(paybacks(Analysis(slow))[0].fine_tunings)
    unreached = {**losses, "adam/a": {10: [0.9] * 2, 40: [0.8] * 2}}
    (paid,) = paybacks(Analysis(made(unreached, trained=(10, 10), costs=costs(1.0, 0.5), spent={"seconds": 95.0})))
    assert not paid.reached
    assert (paid.saved, paid.fine_tunings) == (pytest.approx(10), 10)  # of the 40 steps it had at most
    assert fine_tunings(paid, paid.fine_tunings) == "≤ 10"
    assert fine_tunings(paid, math.inf) == "not known"
    assert fine_tunings(paybacks(Analysis(slow))[0], math.inf) == "never"
    assert paybacks(Analysis(made(losses))) == []
