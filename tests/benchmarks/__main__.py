"""`make bench`: running times as ratios measured in one run, because the speed of a machine drifts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

BENCHMARKS = (
    "import_time",
    "generation",
    "stepwise",
    "resnet20_torch",
    "update",
    "training",
    "update_torch",
    "training_torch",
    "iomt",
    "driver",
    "live_page",
    "cluster",
)


def main() -> None:
    if len(sys.argv) > 1:
        importlib.import_module(f"tests.benchmarks.{sys.argv[1]}").main()
        return
    for name in BENCHMARKS:  # one process each, because JAX's devices and threads are fixed once it has started
        if name.endswith("_torch") and importlib.util.find_spec("torch") is None:
            print(f"{name.removesuffix('_torch')} in PyTorch: not measured, torch is not installed")
            continue
        subprocess.run([sys.executable, "-m", "tests.benchmarks", name], check=True, env={**os.environ})


if __name__ == "__main__":
    main()
