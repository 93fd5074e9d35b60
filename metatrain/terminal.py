"""What the command line's modules share: the console, and the arguments that name a configuration."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from metatrain.config import Config

# Tables need more than the 80 columns assumed for a pipe; names and messages may contain [brackets].
console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


ConfigFile = Annotated[Path, typer.Argument(help="Configuration, a YAML file, e.g. configs/digits.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values that replace the configuration's, e.g. outer.sigma=0.1.")
]
AllowOtherVersion = Annotated[
    bool, typer.Option("--allow-other-version", help="Resume a run that another version of the code has begun.")
]


TrustTask = Annotated[
    bool,
    typer.Option(
        "--trust-task", help="Import tasks and baselines named package.module:function though another user named them."
    ),
]


def printable(text: str) -> str:
    """A text from elsewhere without characters that control a terminal, and without halves of characters."""
    shown = re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], text)
    return shown.encode(errors="backslashreplace").decode()


def load(config: Path, overrides: Sequence[str] | None, trust_task: bool = False) -> Config:
    """Read a configuration; if its task is the user's own, the current folder may hold it.

    Raises:
      UserError: it cannot be read, or names code though another user has written it, and `trust_task` is false.
    """
    from metatrain.config import load_config
    from metatrain.trust import require_trust

    loaded = load_config(config, overrides or ())
    if not trust_task:
        require_trust(loaded, [config], str(config), overrides or ())
    if loaded.own_code():
        from metatrain.system import search_current_folder

        search_current_folder()
    return loaded


def print_news(sentence: str) -> None:
    """News for the user that is not the command's result."""
    print(sentence, file=sys.stderr)
