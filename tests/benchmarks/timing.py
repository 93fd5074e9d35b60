"""Timing of several functions in turn, so that drift of the machine affects all of them equally."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import numpy as np

_PAUSE = 0.2  # XLA frees large scratch memory late


def use_one_core() -> None:
    """Keep this process, and XLA's threads for one operation, on one core; before JAX is used for the first time."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds of each call, [rounds], after one warm-up.

    With `time.process_time` for a clock it is the CPU time of all threads: other programs hardly change that.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE)
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def medians(seconds: Mapping[str, np.ndarray], steps: int = 1, decimals: int = 1) -> str:
    """The median of each call in milliseconds a step, if a call makes so many: "l3rs 3.1 ms, adamw 2.9 ms"."""
    return ", ".join(f"{name} {1e3 * np.median(s) / steps:.{decimals}f} ms" for name, s in seconds.items())


def ratio(seconds: Mapping[str, np.ndarray], a: str, b: str) -> str:
    """Median and range of a / b over the rounds."""
    r = seconds[a] / seconds[b]
    return f"{np.median(r):.2f} ({r.min():.2f} … {r.max():.2f})"
