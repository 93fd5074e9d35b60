"""Durations, formatted for a reader."""

from __future__ import annotations


def about(seconds: float) -> str:
    """A duration that is only an estimate."""
    for limit, unit, name in ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (172_800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{max(seconds / unit, 1):.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
