"""The exit codes, as `metatrain --help` and docs/operate/exit-codes.md state them."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from metatrain import cli
from metatrain.config import UserError
from metatrain.ray import retry
from metatrain.waiting import WaitError

PAGE = (Path(__file__).parents[2] / "docs" / "operate" / "exit-codes.md").read_text()


def _ends(monkeypatch: pytest.MonkeyPatch, result: BaseException | None) -> int:
    """The exit code of a command that raises this, or returns."""

    def app(**_: Any) -> int:
        if isinstance(result, typer.Exit):
            return result.exit_code  # as typer does outside its standalone mode
        if result is not None:
            raise result
        return 0

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["metatrain"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (None, 0),
        (typer.Exit(1), 1),
        (typer.Abort(), 1),
        (MemoryError("of the task"), 1),
        (WaitError("no worker"), 1),
        (UserError("name is missing"), 2),
        (PermissionError(errno.EACCES, "denied", "runs"), 2),
        (OSError(errno.ENOSPC, "no space left", "runs"), 3),
        (OSError(errno.EDQUOT, "quota exceeded", "runs"), 3),
    ],
    ids=repr,
)
def test_how_a_command_ends(monkeypatch: pytest.MonkeyPatch, result: BaseException | None, code: int) -> None:
    assert _ends(monkeypatch, result) == code


def test_help_and_page_state_the_same_codes() -> None:
    listed = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)[1:]
    codes = [code for code, _, _ in listed if not set(code) <= {"-", ":", " "}]
    assert codes == ["0", "1", "2", "3", "128 + N"]
    stated = " ".join((cli.__doc__ or "").partition("Exit code ")[2].split())
    assert re.findall(r"(?:^|; )(128 \+ N|\d):", stated) == codes


def test_final_codes_are_those_on_the_page() -> None:
    stated = re.search(r"Codes (\d), (\d) and (\d) end each", PAGE)
    assert stated is not None
    assert tuple(map(int, stated.groups())) == retry.FINAL_CODES
