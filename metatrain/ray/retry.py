"""Start a command again when it dies: `python -m metatrain.ray.retry RETRIES COMMAND …`.

`metatrain submit --retries N` starts a run's driver through this. Every later start has `--resume`, so it continues
from the newest checkpoint. Exit codes that another start would not change (see docs/operate/exit-codes.md) end it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from metatrain.log_lines import log_line

_LONGEST_WAIT = 60.0  # seconds before a start
FINAL_CODES = (0, 2, 3)  # done or stopped on request; the input is wrong; the disk is full


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its last exit code, 128 + N if signal N ended it."""
    retries, command = int(arguments[0]), list(arguments[1:])
    stopping = _Stopping()
    attempt = 0
    while True:
        code = subprocess.Popen(command).wait()
        if code in FINAL_CODES or stopping or attempt == retries:
            return code if code >= 0 else 128 - code
        attempt += 1
        wait = min(2.0 ** (attempt - 1), _LONGEST_WAIT)
        ended = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        sentence = f"the driver {ended}; it resumes in {wait:.0f} s, start {attempt} of {retries} after the first"
        print(log_line(sentence, level=30), file=sys.stderr, flush=True)
        if stopping.within(wait):
            return 0
        if "--resume" not in command:
            command.append("--resume")


class _Stopping:
    """Whether SIGTERM or SIGINT has asked this process to stop. Ray sends them to the command, too."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def __bool__(self) -> bool:
        return self._asked

    def within(self, seconds: float) -> bool:
        """Wait; returns whether the process is asked to stop in the meantime."""
        deadline = time.monotonic() + seconds
        while not self._asked and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._asked

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
