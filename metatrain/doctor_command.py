"""The command `metatrain doctor`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from metatrain.terminal import console, print_news

if TYPE_CHECKING:
    from metatrain.doctor import Finding

app = typer.Typer()
_CLOCK_SECONDS = 5.0  # an HTTP date has whole seconds, and is a while on its way


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="Cluster to check, too: http://HOST:PORT of its dashboard, host:port of Ray, or auto."),
    ] = None,
    folder: Annotated[str, typer.Option(help="Folder or URL where runs will be written.")] = "runs",
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Connect to a cluster without Ray's token, too.")
    ] = False,
) -> None:
    """Check this machine, or a cluster, before a run: one line each, with what to do. Exit code 1 if one is bad."""
    from metatrain import doctor as checks

    if address is None:
        bad = _print("this machine", checks.machine(folder))
    elif address.startswith("http"):
        bad = _through_jobs(address, folder, allow_unauthenticated)
    else:
        bad = _print(f"the cluster at {address}", checks.cluster(address, folder, allow_unauthenticated, print_news))
    if bad:
        raise typer.Exit(1)


def _print(what: str, findings: Iterable[Finding]) -> bool:
    """Print the lines as they come; returns whether one is bad."""
    console.print(f"{what}:")
    bad = False
    for finding in findings:
        console.print(f"  {finding}")
        bad |= finding.level == "bad"
    return bad


def _through_jobs(address: str, folder: str, allow_unauthenticated: bool) -> bool:
    """Check the way to a cluster's dashboard, and the cluster by a job that runs this command there."""
    from metatrain import doctor as checks
    from metatrain.ray import jobs
    from metatrain.ray.connection import is_loopback, split_address

    connected = jobs.client(address, allow_unauthenticated, print_news)
    host, _ = split_address(address)
    reach = "on loopback: an ssh or kubectl port-forward, or this machine" if is_loopback(host) else "over the network"
    found = [checks.Finding("ok", "dashboard", f"it answers {reach}"), checks.check_token()]
    if (seconds := jobs.clock_ahead(connected)) is not None:
        if abs(seconds) < _CLOCK_SECONDS:
            found.append(checks.Finding("ok", "clock", "the head's is this machine's, within a few seconds"))
        else:
            found.append(checks.check_clocks({"the head": seconds}))
    bad = _print("this machine", found)
    options = f"--address auto --folder {shlex.quote(folder)}" + " --allow-unauthenticated" * allow_unauthenticated
    job = jobs.submit_job(
        connected,
        submission_id=f"l3rs-doctor-{time.time_ns():x}",
        entrypoint=f"python -m metatrain.cli doctor {options}",
    )
    text, succeeded = jobs.output(connected, job)
    console.print(text.strip())
    return bad or not succeeded
