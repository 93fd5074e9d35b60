"""`make bench`: what speed costs, as ratios measured in one run (a machine's own speed drifts)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

BENCHMARKS = ("import_time", "generation", "stepwise", "update", "update_torch", "iomt", "cluster")


def main() -> None:
    if len(sys.argv) > 1:
        importlib.import_module(f"tests.benchmarks.{sys.argv[1]}").main()
        return
    for name in BENCHMARKS:  # a process each: JAX's devices and threads are fixed once it has started
        if name == "update_torch" and importlib.util.find_spec("torch") is None:
            print("update in PyTorch: not measured, torch is not installed")
            continue
        subprocess.run([sys.executable, "-m", "tests.benchmarks", name], check=True, env={**os.environ})


if __name__ == "__main__":
    main()
