"""Errors of a user's own task: each becomes one sentence that names the task, the exception and its place."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from tasks.base import TaskError

_MAX_TEXT = 1000  # characters of an error's text that are shown
_ROOT = os.path.dirname(os.path.dirname(__file__))
_OURS = tuple(os.path.join(_ROOT, name, "") for name in ("l3rs", "tasks", "metatrain"))
_PYTHON = ("<", sysconfig.get_paths()["stdlib"])
_LIBRARIES = "site-packages"
_FRAME = re.compile(r'\s*File "([^"]+)", line (\d+)')  # of a traceback as text


@contextlib.contextmanager
def user_code(name: str, what: str = "failed:") -> Iterator[None]:
    """Run code of a user's task.

    Args:
      name: of the task.
      what: the beginning of the sentence about an error.

    Raises:
      TaskError: whatever the code raises, but for a lack of memory.
    """
    try:
        yield
    except (TaskError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        else:
            frames = traceback.extract_tb(error.__traceback__)
            where = _place((frame.filename, frame.lineno or 0) for frame in frames)
        kind = type(error).__name__
        text = first_line(error)
        raise TaskError(_sentence(name, what, f"{kind}: {text}" if text else kind, where)) from error


@contextlib.contextmanager
def callbacks(name: str) -> Iterator[None]:
    """Run compiled code of a task, which may call a user's functions, e.g. through `jax.pure_callback`.

    Raises:
      TaskError: such a function has failed.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter from np.asarray
        frames = [match for line in str(error).splitlines() if (match := _FRAME.match(line))]
        if isinstance(error, TaskError) or "Callback error" not in str(error) or not frames:
            raise
        after = str(error).partition(frames[-1].string)[2].splitlines()
        shown = next((line for line in after if line and not line[0].isspace()), "an exception")[:_MAX_TEXT]
        where = _place((frame[1], int(frame[2])) for frame in frames)
        raise TaskError(_sentence(name, "failed:", shown, where)) from error


class UserFunction:
    """A function of a user's task, whose errors become a `TaskError` each.

    Args:
      name: of the task.
      function: any function.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with user_code(self._name):
            return self._function(*args, **kwargs)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of limited length."""
    try:
        text = str(error).strip().partition("\n")[0]
    except Exception:  # of a user's own class
        return ""
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _sentence(name: str, what: str, shown: str, where: str) -> str:
    return f"task {name!r}: {what} {shown}{f' ({where})' if where else ''}"


def _place(frames: Iterable[tuple[str, int]]) -> str:
    """file:line of the last frame that is the user's; without one, of a library's last frame; else ""."""
    others = [(file, f"{file}:{line}") for file, line in frames if not file.startswith(_OURS)]
    libraries = [place for file, place in others if _LIBRARIES in file]
    own = [place for file, place in others if _LIBRARIES not in file and not file.startswith(_PYTHON)]
    return (own or libraries or [""])[-1]
