"""The command `metatrain compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metatrain.terminal import console

app = typer.Typer()


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation, with its results.json.")],
    optimizer: Annotated[str, typer.Argument(help="Optimizer to compare with all others, e.g. l3rs or adam/cosine.")],
    by: Annotated[str, typer.Option(help="What to compare on test: accuracy or loss.")] = "accuracy",
    other: Annotated[
        Path | None,
        typer.Option("--with", help="Another evaluation of the same task, whose optimizers are shown, too."),
    ] = None,
) -> None:
    """Compare one optimizer of an evaluation with each of the others: paired differences and 95 % intervals."""
    from metatrain.config import UserError
    from metatrain.evaluation.pairs import Field, find_label, joined
    from metatrain.evaluation.records import Results
    from metatrain.report.pairs import overhead_sentences, pair_table

    fields: dict[str, Field] = {"accuracy": "accuracy", "loss": "loss"}
    if by not in fields:
        raise UserError(f"--by is {by!r}; allowed are {' and '.join(fields)}")
    results = Results.load(folder / "results.json")
    label = find_label(results, optimizer)
    if other is not None:
        results = joined(results, Results.load(other / "results.json"), str(other))
    for setting in results.settings():
        for horizon in results.horizons():
            console.print(pair_table(results, label, setting, horizon, fields[by]))
        for sentence in overhead_sentences(results, setting):
            console.print(sentence)
