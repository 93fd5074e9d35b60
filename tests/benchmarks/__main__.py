"""`make bench`: what speed costs, as ratios measured in one run (a machine's own speed drifts)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

BENCHMARKS = ("import_time", "generation", "stepwise", "update", "cluster")


def main() -> None:
    if len(sys.argv) > 1:
        importlib.import_module(f"tests.benchmarks.{sys.argv[1]}").main()
        return
    for name in BENCHMARKS:  # a process each: JAX's devices and threads are fixed once it has started
        subprocess.run([sys.executable, "-m", "tests.benchmarks", name], check=True, env={**os.environ})


if __name__ == "__main__":
    main()
