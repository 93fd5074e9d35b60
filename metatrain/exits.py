"""How a command that failed ends: one sentence and an exit code, as docs/operate/exit-codes.md lists them."""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer

from metatrain.terminal import printable
from metatrain.waiting import WaitError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}
# A folder without write permission, a file in place of a folder: the user can choose another.
_USER_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, *_NAMES, *_FULL}

_UsageError: Any = typer.BadParameter.__base__  # of Click, whether typer brings its own or not


def exit_code(error: Exception) -> int | None:
    """Print the sentence of an error; returns the exit code, or None for an error of the program."""
    match error:
        case _UsageError():
            message = " ".join(error.format_message().split())  # none for a lack of arguments: that has shown the help
            return refuse(f"{message}; see metatrain --help") if message else 2
        case typer.Abort():
            return 1
        case ValueError() if _is_input_error(error):
            return refuse(str(error))
        case OSError() if error.errno in _USER_ERRNOS:
            refuse(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
            return 3 if error.errno in _FULL else 2
        case WaitError():
            return refuse(str(error), 1)
        case MemoryError():
            return refuse(f"there is not enough memory: {error}", 1)
        case FloatingPointError() if _looks_for_nan():
            found = str(error).partition(". Because")[0][:300]
            return refuse(
                f"JAX found {found}: a candidate or a baseline has diverged, which is no error of a comparison or a "
                "meta-training, but JAX_DEBUG_NANS or JAX_DEBUG_INFS ends the command; unset it"
            )
    return None


def refuse(sentence: str, code: int = 2) -> int:
    """Print a sentence to standard error; returns the exit code."""
    print(f"metatrain: {printable(' '.join(sentence.split()))}", file=sys.stderr)
    return code


def _is_input_error(error: ValueError) -> bool:
    from l3rs import L3RSError
    from metatrain.config import UserError
    from tasks import TaskError

    return isinstance(error, UserError | L3RSError | TaskError)


def _looks_for_nan() -> bool:
    """Whether a mode of JAX's turns infinities or NaN into errors."""
    import jax

    return any(jax.config.values[mode] for mode in ("jax_debug_nans", "jax_debug_infs"))
