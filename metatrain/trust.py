"""What is believed of a run's folder from elsewhere.

A task or baseline `package.module:function` is code that is imported and called. A configuration that this user has
written may name any; one from elsewhere only if the user agrees. A folder with links or pipes is not used at all: a run
would write through them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from metatrain.config import Config, UserError


def require_trust(config: Config, files: Sequence[Path] | None, where: str, overrides: Sequence[str] = ()) -> None:
    """Refuse a configuration from elsewhere that names code.

    Args:
      config: the configuration.
      files: what it was read from, and the folder where it lies, as far as both must be this user's; None: a URL.
      where: names it in the message.
      overrides: by this user: code that they name is trusted.

    Raises:
      UserError: another user owns one of the files, or they come from a URL, and the configuration names code.
    """
    names = [name for name in config.own_code() if not any(name in override for override in overrides)]
    if names and (files is None or any(not _is_own(file) for file in files)):
        origin = "comes from a URL" if files is None else "belongs to another user"
        raise UserError(
            f"{where} {origin} and would import {', '.join(names)[:500]}; "
            "look at that code, and add --trust-task if you trust it"
        )


def _is_own(file: Path) -> bool:
    """Whether this user or the system's administrator owns a file."""
    return not hasattr(os, "getuid") or file.stat().st_uid in (os.getuid(), 0)  # Windows has none


def refuse_links(folder: Path, name: str) -> None:
    """Refuse a run's folder that holds anything but folders and regular files.

    Args:
      folder: the run's local folder; it may itself be a link.
      name: what to call it in the message.

    Raises:
      UserError: there is a link, a pipe or a device in it.
    """
    pending = [folder]
    while pending:
        # A run that is going removes folders in the meantime.
        with contextlib.suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise UserError(f"{name}: {Path(entry.path).relative_to(folder)} is a link or not a regular file")
