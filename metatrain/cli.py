"""The command `metatrain`. Exit code 0: done, or stopped on request and saved; 2: bad input; 1: anything else."""

from __future__ import annotations

import errno
import inspect as python_inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.text import Text

import l3rs
from l3rs import L3RSError
from metatrain import networks, report
from metatrain.config import UserError, load_config
from metatrain.evaluation.evaluate import NO_OPTIMIZER
from metatrain.evaluation.evaluate import evaluate as compare
from metatrain.evaluation.results import Results
from metatrain.inner.devices import use_cores
from metatrain.outer import cost as estimate
from metatrain.outer import loop as trainer
from metatrain.ray import jobs
from metatrain.report import live
from tasks import TASKS, TaskError, make_task, prepare_task

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
# Tables are wider than the 80 columns that a pipe is taken for; a name or a message may hold [brackets].
_console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)

# A folder that cannot be written, a file in a folder's place, a full disk: no bug of this program.
_FOR_THE_USER_TO_MEND = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
}


def main() -> None:
    """Entry point: turns errors of the user's input into one sentence."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.path.insert(0, str(Path.cwd()))  # a task of the user's own is beside the configuration
    use_cores()
    try:
        app()
    except (UserError, L3RSError, TaskError) as error:
        sys.exit(_refuse(str(error)))
    except OSError as error:
        if error.errno not in _FOR_THE_USER_TO_MEND:
            raise
        sys.exit(_refuse(f"{error.filename or 'a file'} cannot be written: {error.strerror}"))


def _refuse(sentence: str) -> int:
    print(f"metatrain: {sentence}", file=sys.stderr)
    return 2


def _whole_numbers(text: str, option: str, example: str) -> list[int]:
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise UserError(f"{option} is {text!r}; write numbers separated by commas, e.g. {example}") from None


def _names(text: str | None) -> list[str] | None:
    return text.split(",") if text else None


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. configs/digits.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. outer.sigma=0.1")] = None,
    out: Annotated[str | None, typer.Option(help="the run's folder or URL; runs/NAME when not given")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the folder's run if there is one")] = False,
) -> None:
    """Meta-train an optimizer."""
    jobs.check_client()
    _conclude(trainer.run(load_config(config, overrides or ()), out, resume_run=resume))


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(help="a run's folder or URL")],
    overrides: Annotated[list[str] | None, typer.Argument(help="of execution, e.g. execution.workers=8")] = None,
) -> None:
    """Go on with an interrupted run."""
    _conclude(trainer.resume(folder, overrides or ()))


def _conclude(run: trainer.Run) -> None:
    if run.finished:
        _console.print(f"meta-trained for {run.generation} generations; the optimizer is in {run.optimizer}")


@app.command()
def evaluate(
    optimizer: Annotated[
        str, typer.Argument(help="a checkpoint: a folder, shipped name or URL; - for baselines alone")
    ],
    config: Annotated[Path, typer.Argument(help="the configuration whose task is used")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. task.target=uci")] = None,
    horizons: Annotated[str | None, typer.Option(help="numbers of steps, separated by commas")] = None,
    settings: Annotated[str | None, typer.Option(help="of evaluation.settings, e.g. A,B; all if not given")] = None,
    seeds: Annotated[int | None, typer.Option(help="training runs of each optimizer and horizon")] = None,
    tuning_seeds: Annotated[
        int | None, typer.Option(help="how many of them tune the baselines; all if not given")
    ] = None,
    baselines: Annotated[str | None, typer.Option(help="names separated by commas, or all")] = None,
    schedules: Annotated[str | None, typer.Option(help="of the learning rate")] = None,
    out: Annotated[Path | None, typer.Option(help="where the results go")] = None,
) -> None:
    """Compare an optimizer with tuned baselines, in each of the configuration's settings.

    What is not given here is what the configuration's `evaluation` says.
    """
    name = f"baselines-{config.stem}" if optimizer == NO_OPTIMIZER else f"evaluation-{Path(optimizer).name}"
    folder = out or Path("runs") / name
    if (folder / "results.json").exists():
        raise UserError(f"{folder / 'results.json'} exists; choose another folder with --out")
    results = compare(
        optimizer,
        load_config(config, overrides or ()),
        settings=_names(settings),
        say=_console.print,
        horizons=_whole_numbers(horizons, "--horizons", "10,30,100") if horizons else None,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        baselines=_names(baselines),
        schedules=_names(schedules),
    )
    saved = results.save(folder)
    for setting in results.settings():
        _console.print(report.table(results, setting))
    for note in results.notes:
        _console.print(f"note: {note}")
    if optimizer != NO_OPTIMIZER:  # the page is about L3RS
        _console.print(f"{report.verdict(results)}\nreport: {report.write(results, folder)}")
    _console.print(f"results: {saved}")


@app.command("report")
def report_(
    folder: Annotated[Path, typer.Argument(help="an evaluation's folder with its results.json, or a run's folder")],
) -> None:
    """Write the page of an evaluation, or of a run, again."""
    if (folder / "results.json").is_file():
        results = Results.load(folder / "results.json")
        if results.optimizer == NO_OPTIMIZER:
            raise UserError(f"{folder} compares baselines alone; the page is about an optimizer of ours")
        _console.print(f"report: {report.write(results, folder)}")
    elif (folder / "config.yaml").is_file():
        _console.print(f"report: {live.write(folder, going=False)}")
    else:
        raise UserError(f"{folder} is neither an evaluation, with a results.json, nor a run, with a config.yaml")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="a run's folder or URL")],
    destination: Annotated[Path, typer.Argument(help="the folder to make")],
    results: Annotated[
        Path | None, typer.Option(help="an evaluation's results.json, to go into the checkpoint")
    ] = None,
) -> None:
    """Write the optimizer of a run's newest checkpoint, finished or not."""
    measured = None if results is None else Results.load(results).summary()
    _console.print(f"the optimizer is in {trainer.export(folder, destination, measured)}")


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(help="the configuration whose data is needed")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. task.target.tfds=cifar100")] = None,
) -> None:
    """Download and prepare a task's data (TFDS; needs l3rs[prepare])."""
    setup = load_config(config, overrides or ())
    forms = setup.task.forms() + [setup.task.form(options) for options in setup.evaluation.settings.values()]
    places = [place for name, options in forms for place in prepare_task(name, options)]
    for place in dict.fromkeys(places or ["nothing to prepare"]):
        _console.print(place)


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="the configuration whose task's init is pretrained")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. task.init.seeds=8")] = None,
) -> None:
    """Pretrain a task's init distribution and keep it in the resident cache; `run` does it by itself, too."""
    logging.getLogger("tasks").setLevel(logging.INFO)
    for name, options in load_config(config, overrides or ()).task.forms():
        task = make_task(name, options)
        meta_train, held_out = (len(task.pools[pool]) for pool in ("meta_train", "held_out"))
        _console.print(f"{task.name}: {meta_train} inits for meta-training, {held_out} held out")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    workers: Annotated[str, typer.Option(help="numbers of workers, separated by commas")] = "1,2,4,8,16,32,64,128",
) -> None:
    """Say what a run will cost: a short measurement on this machine, and arithmetic."""
    setup = load_config(config, overrides or ())
    counts = _whole_numbers(workers, "--workers", "1,8,64")
    found = estimate.estimate(setup)
    _console.print(
        f"{setup.name}: {setup.outer.steps:,} generations of {found.population} candidates, "
        f"{found.candidate_steps:,} candidate-steps; a shard is {found.members_per_shard} candidates\n"
        f"measured here, one core or accelerator: {1e3 * found.seconds_a_step:.3g} ms a candidate-step, "
        f"{1e3 * found.seconds_a_call:.3g} ms a shard beside"
    )
    _console.print(estimate.table(found, counts))


_Address = Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="of the cluster's dashboard")]
_Open = Annotated[
    bool, typer.Option("--allow-unauthenticated", help="use a cluster that others can reach, without Ray's token")
]
_Name = Annotated[str, typer.Argument(help="of the run, or of the job")]
_DASHBOARD = "http://127.0.0.1:8265"


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. execution.workers=64")] = None,
    out: Annotated[str | None, typer.Option(help="the run's folder as the cluster sees it, or URL")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run of that name")] = False,
    address: _Address = _DASHBOARD,
    allow_unauthenticated: _Open = False,
) -> None:
    """Start a run as a job of a Ray cluster."""
    setup = load_config(config, overrides or ())
    if allow_unauthenticated:
        execution = setup.execution.model_copy(update={"allow_unauthenticated": True})
        setup = setup.model_copy(update={"execution": execution})
    folder = out or str(Path("runs").absolute() / setup.name)
    if "://" not in folder and not Path(folder).is_absolute():
        raise UserError(f"--out is {folder}; a job runs elsewhere, so it must be an absolute path or a URL")
    job = jobs.submit(jobs.client(address, allow_unauthenticated), setup, folder, resume=resume, say=_console.print)
    _console.print(f"{job.name} is {job.status.lower()}; see: metatrain status {job.name}")


@app.command("list")
def list_(address: _Address = _DASHBOARD, allow_unauthenticated: _Open = False) -> None:
    """List the runs of a Ray cluster."""
    for job in jobs.list_runs(jobs.client(address, allow_unauthenticated)):
        _console.print(f"{job.id}  {job.status.lower()}  {job.folder}")


@app.command()
def status(name: _Name, address: _Address = _DASHBOARD, allow_unauthenticated: _Open = False) -> None:
    """Say how far a run is."""
    connected = jobs.client(address, allow_unauthenticated)
    _console.print(jobs.status(connected, jobs.find(connected, name)))


@app.command()
def logs(
    name: _Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on printing")] = False,
    address: _Address = _DASHBOARD,
    allow_unauthenticated: _Open = False,
) -> None:
    """Print what a run's driver printed."""
    connected = jobs.client(address, allow_unauthenticated)
    for text in jobs.logs(connected, jobs.find(connected, name), follow):
        _console.print(text, end="")


@app.command()
def stop(name: _Name, address: _Address = _DASHBOARD, allow_unauthenticated: _Open = False) -> None:
    """Stop a run, with a last checkpoint."""
    connected = jobs.client(address, allow_unauthenticated)
    job = jobs.stop(connected, jobs.find(connected, name))
    _console.print(f"{job.name} is {job.status.lower()}; go on with: metatrain submit … --resume")


@app.command()
def inspect(
    optimizer: Annotated[str, typer.Argument(help="a checkpoint: a folder, shipped name or URL")],
    network: Annotated[
        Path | None,
        typer.Option(help="a configuration, or a safetensors file of a PyTorch model, whose layers it sorts by name"),
    ] = None,
    match: Annotated[str, typer.Option(help="how layers of --network find theirs: auto, path or order")] = "auto",
    on_unknown: Annotated[str, typer.Option(help="what a layer gets that is not found: error, mean")] = "error",
    rename: Annotated[list[str] | None, typer.Option(help="NETWORK=CHECKPOINT, paths of a layer; repeatable")] = None,
) -> None:
    """Say what a checkpoint is: how it was made, what it fits; or what it takes the layers of a network for."""
    if network is not None:
        _print_matches(optimizer, network, {"rename": _renames(rename), "by": match, "on_unknown": on_unknown})
        return
    theta, spec, info = l3rs.restore(optimizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    _console.print(
        f"{optimizer}: L3RS with {size:,} meta-parameters, directions {', '.join(d.name for d in spec.directions)}"
    )
    for key, value in info.items():
        if key not in ("config", "results"):
            _console.print(f"  {key}: {value}")
    for setting, optimizers in info.get("results", {}).items():
        _console.print(f"  measured, {setting}: test loss after N steps")
        for name, horizons in optimizers.items():
            _console.print(f"    {name}: " + ", ".join(f"{steps}: {loss}" for steps, (loss, *_) in horizons.items()))
    if spec.embedding == "descriptor":
        _console.print("  fits any network: it reads kind, depth and fans of a layer")
        return
    _console.print("  layers:")
    for layer in spec.layers:
        _console.print(f"    {layer.path}  {list(layer.shape)}")


def _print_matches(optimizer: str, network: Path, how: Mapping[str, Any]) -> None:
    for name, layers in networks.matches(optimizer, network, how):
        _console.print(f"{name} ← {optimizer}")
        width = max(len(layer.name or "") for layer in layers)
        for layer in layers:
            _console.print(f"  {layer.name or '':{width}}  {list(layer.shape)}  ← {layer.source}")


def _renames(pairs: Sequence[str] | None) -> dict[str, str]:
    for pair in pairs or ():
        if "=" not in pair:
            raise UserError(f"--rename is {pair!r}; write NETWORK=CHECKPOINT, e.g. fc/kernel=head/kernel")
    return dict(pair.split("=", 1) for pair in pairs or ())


@app.command("list-tasks")
def list_tasks() -> None:
    """List the tasks and their options."""
    for name, builder in TASKS.items():
        first_line = (builder.__doc__ or "").strip().splitlines()[0]
        _console.print(Text.assemble((name, "bold"), f"  {first_line}"))
        for option in python_inspect.signature(builder).parameters.values():
            _console.print(f"    {str(option).replace(': ', '  ', 1)}")


if __name__ == "__main__":
    main()
