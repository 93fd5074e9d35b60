"""The page of a run in progress, which is drawn again every minute: its CPU time by the number of generations."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from metatrain.report import live
from tests.benchmarks.timing import in_turn, medians
from tests.metatrain.test_live import run_folder

GENERATIONS = (100, 1_000, 10_000)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        calls = {}
        for n in GENERATIONS:
            folder = Path(scratch, str(n))
            folder.mkdir()
            calls[f"{n:,} generations"] = partial(live.write, run_folder(folder, n, total=2 * n))
        seconds = in_turn(calls, 5, time.process_time)
    print(f"page of a run in progress: {medians(seconds)}  (wanted: ≤ 500 ms at 1,000)", flush=True)
