"""The command `metatrain specialize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metatrain.terminal import console

app = typer.Typer()


@app.command()
def specialize(
    task: Annotated[str, typer.Argument(help="Function that returns a task, package.module:function.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of the task, e.g. batch_size=32.", show_default=False)
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for meta-training and evaluation together.")] = 30.0,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps of the longest fine-tunings that it is for.", show_default="what fits, up to 200"),
    ] = None,
    start: Annotated[str, typer.Option(help="Checkpoint to begin with.")] = "universal",
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/FUNCTION")] = None,
) -> None:
    """Meta-train an optimizer for your own model, beginning with a checkpoint, and compare it with AdamW and SGDM."""
    from metatrain import report
    from metatrain.config import UserError
    from metatrain.inner.devices import use_cores
    from metatrain.specialize import StoppedError
    from metatrain.specialize import specialize as specialize_task
    from metatrain.system import search_current_folder
    from metatrain.yaml_text import YamlError, read_yaml, resolve

    use_cores()
    search_current_folder()
    if bad := [option for option in options or () if "=" not in option]:
        raise UserError(f"{bad[0]!r} is not an option of the task; write key=value, e.g. batch_size=32")
    folder = out or Path("runs") / task.rpartition(":")[2]
    try:
        values = resolve(read_yaml("{}", options or ()))
    except YamlError as error:
        raise UserError(f"an option of the task: {error}") from None
    try:
        found = specialize_task(task, minutes, folder, values, start, console.print, steps)
    except StoppedError as stopped:
        console.print(str(stopped))
        return
    for setting in found.analysis.results.settings():
        console.print(report.table(found.analysis, setting))
    console.print(f"{found.sentence}\noptimizer: {found.optimizer}\nreport: {folder / 'evaluation' / 'report.html'}")
