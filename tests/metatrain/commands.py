"""Commands of `metatrain` as the tests run them: in this process, or each in its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from metatrain import cli

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
COMMAND = [sys.executable, "-m", "metatrain.cli"]


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def metatrain(*words: str | Path) -> Done:
    """Run a command in this process: a fraction of a second, where a new one first imports JAX."""
    out, err = io.StringIO(), io.StringIO()
    old, sys.argv = sys.argv, ["metatrain", *map(str, words)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(cli, "_use_cores"),  # JAX runs here already
        ):
            cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = old
    return Done(code, out.getvalue(), err.getvalue())


def metatrain_process(*words: str | Path, folder: Path = ROOT) -> Done:
    """Run a command in a process of its own, in a folder."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr)


def refused(done: Done) -> str:
    """The one sentence with which a command is refused."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
