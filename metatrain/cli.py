"""Meta-train learned optimizers, and compare them with tuned baselines.

Exit code 0: done, or stopped on request and saved; 1: any other error, and a bad line of `doctor`; 2: the input is
wrong; 3: the disk is full; 128 + N: killed by signal N.
"""

from __future__ import annotations

import os
import sys

# `python -m metatrain.cli` puts the current folder first on the path, where a `tasks.py` would hide ours.
if __name__ == "__main__" and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit(
        "metatrain: this command needs more packages than the optimizer: pip install 'l3rs[metatrain]' "
        "('.[metatrain]' in a checkout)"
    )

from rich.text import Text

from metatrain import cluster_commands, compare_command, doctor_command, specialize_command
from metatrain.exits import exit_code, refuse
from metatrain.log_lines import LogFormatter, print_line
from metatrain.terminal import AllowOtherVersion, ConfigFile, Overrides, TrustTask, console, load, printable

# What a command needs beyond this it imports when it is called: JAX and Ray take seconds.
if TYPE_CHECKING:
    from metatrain.outer.loop import Run

# Loggers of libraries. A callback that fails is logged with its traceback, and raised as well.
_OTHERS = {"absl": logging.ERROR, "jax._src.callback": logging.CRITICAL, "jax._src.debugging": logging.CRITICAL}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def main() -> None:
    """Entry point: turns errors of the user's input into one sentence."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    for name, level in _OTHERS.items():
        logging.getLogger(name).setLevel(level)
    if any("\0" in word for word in sys.argv):
        sys.exit(refuse("an argument contains a NUL character"))
    try:
        sys.exit(app(standalone_mode=False))  # the code of typer.Exit; a command returns None
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"metatrain (l3rs {version('l3rs')})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # its callback has printed it


def _use_cores() -> None:
    """Prepare JAX for a command that computes."""
    from metatrain.inner.devices import use_cores

    use_cores()


def _numbers(text: str, option: str, example: str) -> list[int]:
    return sorted({int(number) for number in _split(text, r"[0-9]{1,12}", option, example)})


def _factors(text: str | None) -> list[float] | None:
    pattern = r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]{1,3})?"
    return None if text is None else [float(number) for number in _split(text, pattern, "--multipliers", ".1,1,10")]


def _split(text: str, pattern: str, option: str, example: str) -> list[str]:
    from metatrain.config import UserError

    numbers = [number.strip() for number in text.split(",")]
    if not all(re.fullmatch(pattern, number) for number in numbers):
        raise UserError(f"{option} is {text[:100]!r}; write numbers separated by commas, e.g. {example}")
    return numbers


def _names(text: str | None) -> list[str] | None:
    return text.split(",") if text else None


_Checkpoint = "Optimizer to use: a checkpoint's folder, the name of a shipped one, or a URL"


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Folder or URL of the run.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in that folder if there is one.")] = False,
    allow_other_version: AllowOtherVersion = False,
    trust_task: TrustTask = False,
) -> None:
    """Meta-train an optimizer."""
    from metatrain.outer import loop
    from metatrain.ray.jobs import check_client

    _use_cores()
    _log_as_driver()
    check_client()
    loaded = load(config, overrides, trust_task)
    _conclude(loop.run(loaded, out, resume_run=resume, allow_other_version=allow_other_version))


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(help="Folder or URL of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="New values in the sections execution, checkpoint or logging; or a larger outer.steps."),
    ] = None,
    allow_other_version: AllowOtherVersion = False,
    trust_task: TrustTask = False,
) -> None:
    """Resume an interrupted run."""
    from metatrain.outer import loop

    _use_cores()
    _log_as_driver()
    done = loop.resume(folder, overrides or (), trust_task=trust_task, allow_other_version=allow_other_version)
    _conclude(done)


def _show_setup() -> None:
    """Show what the tasks log while they are built, e.g. how far pretraining is."""
    logging.getLogger("tasks").setLevel(logging.INFO)


def _log_as_driver() -> None:
    """Show what is logged during a run; with time and level where nobody looks at a terminal."""
    _show_setup()
    logging.getLogger("metatrain").setLevel(logging.INFO)
    if not sys.stderr.isatty():
        for handler in logging.getLogger().handlers:
            handler.setFormatter(LogFormatter())


def _conclude(run: Run) -> None:
    if run.finished:
        print_line(f"meta-trained for {run.generation} generations; the optimizer is in {run.optimizer}")


@app.command()
def evaluate(
    optimizer: Annotated[str, typer.Argument(help=f"{_Checkpoint}; - for baselines alone.")],
    config: ConfigFile,
    overrides: Overrides = None,
    horizons: Annotated[
        str | None, typer.Option(help="Numbers of training steps to compare at, comma-separated.")
    ] = None,
    settings: Annotated[
        str | None, typer.Option(help="Names from evaluation.settings, comma-separated.", show_default="all")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Training runs per optimizer and horizon.")] = None,
    tuning_seeds: Annotated[
        int | None, typer.Option(help="Training runs that tune the baselines.", show_default="all seeds")
    ] = None,
    baselines: Annotated[str | None, typer.Option(help="Baselines to compare with, comma-separated, or all.")] = None,
    schedules: Annotated[str | None, typer.Option(help="Learning-rate schedules to compare, comma-separated.")] = None,
    multipliers: Annotated[
        str | None, typer.Option(help="Factors of L3RS's steps to compare, comma-separated, e.g. .1,.3,1,3,10.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Results folder.", show_default="runs/evaluation-NAME; runs/baselines-CONFIG for -"),
    ] = None,
    trust_task: TrustTask = False,
) -> None:
    """Compare an optimizer with tuned baselines in each setting of the configuration.

    Options that are not given are taken from the configuration's section `evaluation`. The same command again continues
    an evaluation that was interrupted, as long as code, configuration and data are the same.
    """
    from metatrain import report
    from metatrain.config import UserError
    from metatrain.evaluation import comparison
    from metatrain.evaluation.analysis import Analysis
    from metatrain.evaluation.records import NO_OPTIMIZER
    from metatrain.system import check_destination

    _use_cores()
    no_optimizer = optimizer == NO_OPTIMIZER
    name = f"baselines-{config.stem}" if no_optimizer else f"evaluation-{Path(optimizer).name}"
    folder = out or Path("runs") / name
    if (folder / "results.json").exists():
        raise UserError(f"{folder / 'results.json'} exists; choose another folder with --out")
    check_destination(folder, "results.json", "report.html")
    try:
        results = comparison.evaluate(
            optimizer,
            load(config, overrides, trust_task),
            settings=_names(settings),
            log=console.print,
            out=folder,
            horizons=_numbers(horizons, "--horizons", "10,30,100") if horizons else None,
            seeds=seeds,
            tuning_seeds=tuning_seeds,
            baselines=_names(baselines),
            schedules=_names(schedules),
            multipliers=_factors(multipliers),
        )
    except KeyboardInterrupt:
        console.print("stopped; the same command continues with what each optimizer has finished")
        sys.stdout.flush()
        os._exit(130)  # not after the runs that are under way
    analysis = Analysis(results)
    for setting in results.settings():
        console.print(report.table(analysis, setting))
    for table in report.zoo_tables(analysis):
        console.print(table)
    for note in results.notes:
        console.print(f"note: {note}")
    if not no_optimizer:  # the page is about L3RS
        console.print(f"{' '.join(report.verdict(analysis))}\nreport: {report.write(analysis, folder)}")
    console.print(f"results: {folder / 'results.json'}")


@app.command("report")
def report_(
    folder: Annotated[Path, typer.Argument(help="Folder of an evaluation (with results.json) or of a run.")],
) -> None:
    """Write the page of an evaluation or of a run again."""
    from metatrain import report
    from metatrain.config import UserError
    from metatrain.evaluation.analysis import Analysis
    from metatrain.evaluation.records import NO_OPTIMIZER, Results
    from metatrain.report import live
    from metatrain.system import check_destination

    if folder.is_dir():
        check_destination(folder, "report.html")
    if (folder / "results.json").is_file():
        results = Results.load(folder / "results.json")
        if results.optimizer == NO_OPTIMIZER:
            raise UserError(f"{folder} compares baselines alone; a report needs an optimizer of ours")
        console.print(f"report: {report.write(Analysis(results), folder)}")
    elif (folder / "config.yaml").is_file():
        console.print(f"report: {live.write(folder, going=False)}")
    else:
        raise UserError(f"{folder} is neither an evaluation, with a results.json, nor a run, with a config.yaml")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="Folder or URL of the run.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    results: Annotated[
        Path | None, typer.Option(help="An evaluation's results.json whose summary goes into the checkpoint.")
    ] = None,
) -> None:
    """Write the optimizer of a run's newest checkpoint, whether the run is finished or not."""
    from metatrain.config import UserError
    from metatrain.evaluation.records import Results
    from metatrain.outer.export import export as export_run
    from metatrain.system import check_destination

    _use_cores()
    if os.path.lexists(destination):
        raise UserError(f"{destination} exists; choose another folder")
    check_destination(destination)
    measured = None if results is None else Results.load(results).summary()
    console.print(f"the optimizer is in {export_run(folder, destination, measured)}")


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Download and prepare a task's data sets. Those of TFDS need the extra l3rs\\[prepare]."""
    from tasks import prepare_task

    setup = load(config, overrides)
    forms = setup.task.forms() + [setup.task.form(options) for options in setup.evaluation.settings.values()]
    prepared = [location for name, options in forms for location in prepare_task(name, options)]
    for location in dict.fromkeys(prepared or ["nothing to prepare"]):
        console.print(location)


@app.command()
def pretrain(config: ConfigFile, overrides: Overrides = None, trust_task: TrustTask = False) -> None:
    """Pretrain the networks that a task starts from and cache them. `run` does so, too, if they are missing."""
    from tasks import make_task

    _use_cores()
    _show_setup()
    for name, options in load(config, overrides, trust_task).task.forms():
        task = make_task(name, options)
        meta_train, held_out = (len(task.pools[pool]) for pool in ("meta_train", "held_out"))
        console.print(f"{task.name}: {meta_train} inits for meta-training, {held_out} held out")


@app.command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[
        str, typer.Option(help="Numbers of workers to estimate for, comma-separated.")
    ] = "1,2,4,8,16,32,64,128",
    trust_task: TrustTask = False,
) -> None:
    """Estimate the cost of a run from a short measurement on this machine.

    With execution.backend=ray it counts the shards that the run would hand out, the work of its driver, and what Ray
    takes for a shard: metatrain estimate configs/digits.yaml execution.backend=ray --workers 8,64
    """
    from metatrain.outer.estimate import check_workers, table
    from metatrain.outer.estimate import estimate as measure

    _use_cores()
    _show_setup()
    counts = _numbers(workers, "--workers", "1,8,64")
    check_workers(counts)
    setup = load(config, overrides, trust_task)
    found = measure(setup, console.print)
    kind = "workers of Ray" if found.ray else "devices of one process"
    console.print(
        f"{setup.name}: {setup.outer.steps:,} generations of {found.population} candidates, "
        f"{found.candidate_steps:,} candidate-steps, in calls of {found.members_per_call} candidates by {kind}\n"
        f"measured on one core or accelerator of this machine: {1e3 * found.seconds_per_step:.3g} ms per "
        f"candidate-step, {1e3 * found.seconds_per_call:.3g} ms per call in addition"
    )
    console.print(table(found, counts))


app.add_typer(cluster_commands.app)
app.add_typer(specialize_command.app)
app.add_typer(compare_command.app)
app.add_typer(doctor_command.app)


@app.command()
def inspect(
    optimizer: Annotated[str, typer.Argument(help=f"{_Checkpoint}.")],
    network: Annotated[
        Path | None,
        typer.Option(help="Network whose layers to map: a configuration, or a safetensors file of a PyTorch model."),
    ] = None,
    match: Annotated[str, typer.Option(help="How to match the layers of --network: auto, path or order.")] = "auto",
    on_unknown: Annotated[str, typer.Option(help="What to do with a layer without a match: error or mean.")] = "error",
    rename: Annotated[
        list[str] | None, typer.Option(help="Pair of layer paths, NETWORK=CHECKPOINT; can be repeated.")
    ] = None,
    trust_task: TrustTask = False,
) -> None:
    """Show a checkpoint's origin and layers, or how it maps the layers of a network."""
    from metatrain.config import UserError
    from metatrain.describe import describe

    _use_cores()
    if network is not None:
        if network.suffix != ".safetensors":
            load(network, (), trust_task)  # finds a task in the current folder
        _print_matches(optimizer, network, {"rename": _renames(rename), "by": match, "on_unknown": on_unknown})
        return
    if rename or (match, on_unknown) != ("auto", "error"):
        raise UserError("--rename, --match and --on-unknown say how to map a network's layers: they need --network")
    for line in describe(optimizer):
        console.print(printable(line))


def _print_matches(optimizer: str, network: Path, how: Mapping[str, Any]) -> None:
    from metatrain.inspection.network_layers import network_matches

    for name, layers in network_matches(optimizer, network, how):
        console.print(f"{name} ← {optimizer}")
        width = max(len(layer.name or "") for layer in layers)
        for layer in layers:
            console.print(f"  {layer.name or '':{width}}  {list(layer.shape)}  ← {layer.source}")


def _renames(pairs: Sequence[str] | None) -> dict[str, str]:
    from metatrain.config import UserError

    for pair in pairs or ():
        if "=" not in pair:
            raise UserError(f"--rename is {pair!r}; write NETWORK=CHECKPOINT, e.g. fc/kernel=head/kernel")
    return dict(pair.split("=", 1) for pair in pairs or ())


@app.command("list-tasks")
def list_tasks() -> None:
    """List the tasks and their options."""
    from inspect import signature

    from tasks import TASKS

    for name, builder in TASKS.items():
        summary = (builder.__doc__ or "").strip().splitlines()[0]
        console.print(Text.assemble((name, "bold"), f"  {summary}"))
        for option in signature(builder).parameters.values():
            console.print(f"    {str(option).replace(': ', '  ', 1)}")


if __name__ == "__main__":
    main()
