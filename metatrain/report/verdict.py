"""The verdict: the analysis of an evaluation in a few sentences, good news or bad."""

from __future__ import annotations

import math

from metatrain.evaluation import statistics
from metatrain.evaluation.analysis import Analysis, Outcome
from metatrain.evaluation.records import L3RS
from metatrain.report import formatting

_PHRASES: dict[Outcome, str] = {"better": "better", "worse": "worse", "undecided": "not distinguishable"}


def verdict(analysis: Analysis) -> list[str]:
    """Sentences: within the range of meta-training, the speed-up, and beyond the range."""
    if not analysis.results.baselines():
        return ["There is no baseline to compare L3RS with."]
    sentences = (_within(analysis), _chance(analysis), _speed(analysis), _beyond(analysis))
    return [sentence for sentence in sentences if sentence]


def _within(analysis: Analysis) -> str:
    if not analysis.inside:
        trained = f"{analysis.low:,.0f} to {analysis.high:,.0f} steps"
        return f"None of the evaluated horizons is in the range of L3RS's meta-training, {trained}."
    tally = analysis.tally
    settings = len(analysis.results.settings())
    cases = formatting.counted(len(analysis.inside), "horizon")
    if settings > 1:
        cases = f"{settings} settings × {cases}"
    if analysis.range_known:
        where = f"Within the range of its meta-training, {analysis.low:,.0f} to {analysis.high:,.0f} steps,"
    else:
        steps = " to ".join(f"{h:,}" for h in dict.fromkeys((analysis.inside[0], analysis.inside[-1])))
        where = f"At {steps} steps (the checkpoint does not say what it was meta-trained on)"
    return (
        f"{where} L3RS has a lower test loss than the best baseline in {tally['lower']} of "
        f"{formatting.counted(tally['all'], 'comparison')} ({cases})."
    )


def _chance(analysis: Analysis) -> str:
    if not analysis.inside:
        return ""
    if analysis.results.seeds() < 2:
        return "There is no interval with one seed, so this may be chance."
    tally = analysis.tally
    return (
        f"By the paired {statistics.LEVEL:.0%} interval it is better in {tally['better']}, worse in "
        f"{tally['worse']} and not distinguishable in {tally['undecided']}.".replace("%", " %")
    )


def _speed(analysis: Analysis) -> str:
    median = analysis.median_speedup
    if median is None:
        return ""
    if math.isinf(median):
        return "The median speed-up in steps is ∞: no baseline reaches its accuracy within the longest horizon."
    return f"The median speed-up in steps is {formatting.ratio(median)} over the quickest baseline."


def _beyond(analysis: Analysis) -> str:
    """One sentence for all horizons beyond the range: in which settings better, worse, undecided."""
    if not analysis.beyond:
        return ""
    clauses = [f"at {horizon:,} steps {_outcomes(analysis, horizon)}" for horizon in analysis.beyond]
    rival = analysis.rival_beyond(analysis.results.settings()[0], analysis.beyond[0])
    name = "the best tuned Adam" if rival.is_adam else "the best baseline"
    return f"Beyond the range, compared with {name}, it is {'; '.join(clauses)}."


def _outcomes(analysis: Analysis, horizon: int) -> str:
    outcomes = analysis.outcomes_beyond(horizon)
    all_settings = analysis.results.settings()
    parts = []
    for outcome, phrase in _PHRASES.items():
        settings = outcomes.get(outcome, [])
        if not settings:
            continue
        if len(all_settings) == 1:
            rival = analysis.rival_beyond(settings[0], horizon).label
            losses = (formatting.number(analysis.mean(settings[0], label, horizon)) for label in (L3RS, rival))
            return f"{phrase} ({' against '.join(losses)})"
        everywhere = len(settings) == len(all_settings)
        names = "all settings" if everywhere else formatting.listed([formatting.short(s) for s in settings])
        parts.append(f"{phrase} in {names}")
    return formatting.listed(parts)
