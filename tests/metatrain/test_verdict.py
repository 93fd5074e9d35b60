from __future__ import annotations

import dataclasses

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import L3RS, Results, Speedup
from metatrain.report import verdict
from tests.metatrain.synthetic import NOISY, around, made

WITHIN = "Within the range of its meta-training, 10 to 100 steps, L3RS has a lower test loss than the best baseline in "


def said(results: Results) -> str:
    return " ".join(verdict(Analysis(results)))


def joined(*parts: Results) -> Results:
    return dataclasses.replace(parts[0], records=[r for part in parts for r in part.records])


def test_verdict_won() -> None:
    ours, theirs, worse = ({10: around(x), 100: around(x / 2)} for x in (0.5, 0.8, 0.9))
    ratios = [
        Speedup("", label, horizon, ratio, ratio, ratio)
        for label, horizon, ratio in (
            ("adam/a", 10, 2.0),
            ("adam/a", 100, 4.0),
            ("sgd/a", 10, 3.0),
            ("sgd/a", 100, 3.5),
        )
    ]
    found = made({L3RS: ours, "adam/a": theirs, "sgd/a": worse}, speedup=ratios)
    assert said(found) == (
        f"{WITHIN}2 of 2 comparisons (2 horizons). By the paired 95 % interval it is better in 2, worse in 0 and not "
        "distinguishable in 0. The median speed-up in steps is 2.00× over the quickest baseline."
    )


def test_verdict_lost() -> None:
    found = made({L3RS: {10: around(0.9)}, "adam/a": {10: around(0.5)}, "sgd/a": {10: around(2.0)}})
    assert said(found) == (
        f"{WITHIN}0 of 1 comparison (1 horizon). By the paired 95 % interval it is better in 0, worse in 1 and not "
        "distinguishable in 0."
    )


def test_verdict_undecided_although_the_mean_is_lower() -> None:
    found = made({L3RS: {10: NOISY}, "adam/a": {10: [0.6, 0.4, 0.5, 0.55]}})
    assert said(found) == (
        f"{WITHIN}1 of 1 comparison (1 horizon). By the paired 95 % interval it is better in 0, worse in 0 and not "
        "distinguishable in 1."
    )


def test_verdict_beyond_the_range_names_settings() -> None:
    def one(setting: str, beyond: float | list[float]) -> Results:
        theirs = {10: around(0.8), 500: around(0.5)}
        row = beyond if isinstance(beyond, list) else around(beyond)
        return made(
            {L3RS: {10: around(0.5), 500: row}, "adam/a": theirs, "sgd/a": {10: around(0.9), 500: around(0.1)}}, setting
        )

    found = joined(one("A: x", 0.3), one("B: x", 0.9), one("C: x", NOISY), one("D: x", 0.4))
    sentences = verdict(Analysis(found))
    assert sentences[0] == f"{WITHIN}4 of 4 comparisons (4 settings × 1 horizon)."
    assert sentences[-1] == (
        "Beyond the range, compared with the best tuned Adam, it is at 500 steps better in A and D, worse in B and "
        "not distinguishable in C."
    )


def test_verdict_beyond_the_range_in_one_setting_has_the_losses() -> None:
    losses = {
        L3RS: {10: around(0.5), 500: around(0.9), 1000: NOISY},
        "sgd/a": {10: around(0.8), 500: around(0.2), 1000: around(0.5)},
    }
    assert verdict(Analysis(made(losses)))[-1] == (
        "Beyond the range, compared with the best baseline, it is at 500 steps worse (0.900 against 0.200); at 1,000 "
        "steps not distinguishable (0.500 against 0.500)."
    )


def test_verdict_of_one_seed_claims_nothing() -> None:
    found = said(made({L3RS: {10: [0.1], 500: [0.1]}, "adam/a": {10: [0.9], 500: [0.9]}}))
    assert f"{WITHIN}1 of 1 comparison (1 horizon)" in found
    assert "one seed" in found
    assert "better" not in found
    assert "at 500 steps not distinguishable (0.100 against 0.900)" in found


def test_verdict_without_a_range_or_within_none_of_it_or_without_baselines() -> None:
    losses = {L3RS: {20: around(0.5)}, "adam/a": {20: around(0.9)}}
    assert said(made(losses, trained=None)).startswith(
        "At 20 steps (the checkpoint does not say what it was meta-trained on) L3RS has a lower "
        "test loss than the best baseline in 1 of 1 comparison (1 horizon)."
    )
    assert said(made(losses, trained=(1, 10))) == (
        "None of the evaluated horizons is in the range of L3RS's meta-training, 1 to 10 steps. Beyond the range, "
        "compared with the best tuned Adam, it is at 20 steps better (0.500 against 0.900)."
    )
    assert said(made({L3RS: {20: [0.5]}})) == "There is no baseline to compare L3RS with."
