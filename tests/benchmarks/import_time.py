"""The time of `import l3rs` against `import optax`, each in new processes."""

from __future__ import annotations

import subprocess
import sys

from tests.benchmarks.timing import in_turn, ratio


def main() -> None:
    def importing(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    seconds = in_turn({"l3rs": lambda: importing("l3rs"), "optax": lambda: importing("optax")}, rounds=9)
    print(f"import l3rs / import optax: {ratio(seconds, 'l3rs', 'optax')}  (wanted: ≤ 1.3)")
