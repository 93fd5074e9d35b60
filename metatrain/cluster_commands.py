"""The commands for runs that are jobs of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metatrain.terminal import AllowOtherVersion, ConfigFile, Overrides, TrustTask, console, load, print_news

app = typer.Typer()

_Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Address of the cluster's dashboard, http://HOST:PORT.")
]
_Open = Annotated[
    bool,
    typer.Option("--allow-unauthenticated", help="Accept a cluster without Ray's token that others can reach, too."),
]
_Name = Annotated[str, typer.Argument(help="Name of the run, or id of its job.")]
_DASHBOARD = "http://127.0.0.1:8265"


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option(help="URL of the run, or its folder as an absolute path on the cluster.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run of that name.")] = False,
    retries: Annotated[
        int, typer.Option(min=0, max=1000, help="How often to restart a driver that dies; it resumes the run.")
    ] = 0,
    allow_other_version: AllowOtherVersion = False,
    address: _Address = _DASHBOARD,
    allow_unauthenticated: _Open = False,
    trust_task: TrustTask = False,
) -> None:
    """Start a run as a job of a Ray cluster."""
    from metatrain.config import UserError
    from metatrain.ray import jobs

    setup = load(config, overrides, trust_task)
    if allow_unauthenticated:
        execution = setup.execution.model_copy(update={"allow_unauthenticated": True})
        setup = setup.model_copy(update={"execution": execution})
    folder = out or str(Path("runs").absolute() / setup.name)
    if "://" not in folder and not Path(folder).is_absolute():
        raise UserError(f"--out is {folder}; a job runs on another machine, so it must be an absolute path or a URL")
    connected = jobs.client(address, allow_unauthenticated, console.print)
    job = jobs.submit(
        connected,
        setup,
        folder,
        resume=resume,
        allow_other_version=allow_other_version,
        retries=retries,
        log=console.print,
    )
    console.print(f"{job.name} is {job.status.lower()}; see: metatrain status {job.name}")


@app.command("list")
def list_(address: _Address = _DASHBOARD, allow_unauthenticated: _Open = False) -> None:
    """List the runs of a Ray cluster."""
    from metatrain.ray import jobs

    for job in jobs.list_runs(jobs.client(address, allow_unauthenticated, print_news)):
        console.print(f"{job.id}  {job.status.lower()}  {job.folder}")


@app.command()
def status(
    name: Annotated[str, typer.Argument(help="Name of a run of the cluster, id of its job, or a run's folder.")],
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Keep showing it until the run ends, or Ctrl-C, which ends the screen."),
    ] = False,
    address: _Address = _DASHBOARD,
    allow_unauthenticated: _Open = False,
) -> None:
    """Show the progress of a run: of a folder on this machine, or of a Ray cluster."""
    from metatrain.watch import watch as watch_run

    if (Path(name) / "config.yaml").is_file() or ("/" in name and Path(name).is_dir()):
        from metatrain.outer.status import Snapshot, local_snapshot

        def read() -> Snapshot:
            return local_snapshot(Path(name), name)
    else:
        from metatrain.ray import jobs

        connected = jobs.client(address, allow_unauthenticated, print_news)

        def read() -> Snapshot:
            return jobs.snapshot(connected, jobs.find(connected, name))

    if watch:
        watch_run(read)
    else:
        console.print(read().line())


@app.command()
def logs(
    name: _Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
    address: _Address = _DASHBOARD,
    allow_unauthenticated: _Open = False,
) -> None:
    """Print the output of a run's driver."""
    from metatrain.ray import jobs

    connected = jobs.client(address, allow_unauthenticated, print_news)
    for text in jobs.logs(connected, jobs.find(connected, name), follow):
        console.print(text, end="")


@app.command()
def stop(name: _Name, address: _Address = _DASHBOARD, allow_unauthenticated: _Open = False) -> None:
    """Stop a run after a last checkpoint."""
    from metatrain.ray import jobs

    connected = jobs.client(address, allow_unauthenticated, print_news)
    job = jobs.stop(connected, jobs.find(connected, name), log=print_news)
    console.print(f"{job.name} is {job.status.lower()}; resume with: metatrain submit … --resume")
