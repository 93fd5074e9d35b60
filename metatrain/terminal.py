"""What the command line's modules share: the console, and the arguments that name a configuration."""

from __future__ import annotations

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


def load(config: Path, overrides: Sequence[str] | None) -> Config:
    """Read a configuration; if its task is the user's own, the current folder may hold it."""
    from metatrain.config import load_config
    from metatrain.system import search_current_folder

    loaded = load_config(config, overrides or ())
    own_baselines = any(":" in str(baseline) for baseline in loaded.evaluation.baselines)
    if loaded.task.is_imported or own_baselines:
        search_current_folder()
    return loaded
