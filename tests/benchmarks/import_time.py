"""The CPU time of `import l3rs` against `import optax`, and of `import l3rs.torch` against `import torch`.

Each is imported in a process of its own.
"""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys

from tests.benchmarks.timing import in_turn, ratio


def main() -> None:
    compare("l3rs", "optax", wanted=1.3)
    if importlib.util.find_spec("torch") is None:
        print("import l3rs.torch: not measured, torch is not installed")
    else:
        compare("l3rs.torch", "torch", wanted=1.1)


def compare(ours: str, theirs: str, wanted: float) -> None:
    def importing(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    calls = {ours: lambda: importing(ours), theirs: lambda: importing(theirs)}
    seconds = in_turn(calls, rounds=9, clock=_children_seconds)
    print(f"import {ours} / import {theirs}: {ratio(seconds, ours, theirs)}  (wanted: ≤ {wanted})")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
