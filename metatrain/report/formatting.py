"""Numbers and names, formatted for a reader."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from metatrain.evaluation.records import L3RS, setting_name
from metatrain.evaluation.statistics import Interval

MISSING = "–"


def number(value: float) -> str:
    """Three significant digits, but all of an integer part; a dash for NaN."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 100 or value == int(value):
        text = f"{value:,.0f}"
    elif size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{min(2 - math.floor(math.log10(size)), 3)}f}"
    return text.replace("-", "−")


def tick(value: float) -> str:
    """A round value, as short as possible."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}").replace("-", "−")


def ticks(values: Sequence[float]) -> list[str]:
    """Labels of increasing values: as `tick`, with as many digits as tell them apart."""
    labels = [tick(value) for value in values]
    if len(set(labels)) == len(labels):
        return labels
    gap = min(high - low for low, high in itertools.pairwise(values))
    return [f"{value:,.{max(math.ceil(-math.log10(gap)), 0)}f}".replace("-", "−") for value in values]


def signed(value: float) -> str:
    """`number` with a plus where it is positive."""
    text = number(value)
    return text if text.startswith(("−", MISSING)) or value == 0 else f"+{text}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return MISSING if math.isnan(share) else f"{100 * share:.{digits}f}".replace("-", "−") + " %"


def percent_change(change: float) -> str:
    """A relative change as a percentage, with a plus where it is positive."""
    return f"+{percent(change, 0)}" if change > 0 else percent(change, 0)


def ratio(value: float) -> str:
    """A speed-up."""
    if not math.isfinite(value):
        return number(value)
    return f"{value:.2f}×" if value < 10 else f"{value:,.0f}×"


def duration(seconds: float) -> str:
    """A measured duration, in the unit that suits it."""
    if not math.isfinite(seconds):
        return number(seconds)
    for limit, unit, name in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit:
            shown = seconds / unit
            return f"{shown:.{2 if shown < 10 else 1 if shown < 100 else 0}f} {name}"
    return f"{seconds / 3600:,.1f} h"


def bounds(interval: Interval, kind: str = "number") -> str:
    """The ends of an interval; empty where there is none (a single seed, a run that diverged)."""
    if math.isnan(interval.low) or math.isnan(interval.high) or interval.low == -math.inf:
        return ""
    if kind == "percent":
        return f"{100 * interval.low:.1f} … {100 * interval.high:.1f}".replace("-", "−")
    if kind == "signed":
        return f"{signed(interval.low)} … {signed(interval.high)}"
    shown = ratio if kind == "ratio" else number
    return f"{shown(interval.low)} … {shown(interval.high)}".replace("×", "")


def optimizer(label: str) -> str:
    """An optimizer's label as it is shown."""
    return "L3RS" if label == L3RS else label


def short(setting: str) -> str:
    """`A` of `A: resnet8(imagenet → places)`; the whole name where it has no such prefix."""
    return setting_name(setting) or setting or "the task"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def counted(count: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
