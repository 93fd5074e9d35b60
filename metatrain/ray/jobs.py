"""Runs as jobs of a Ray cluster: submit, list, status, logs, stop.

Ray Jobs starts the driver, a process on the cluster, with `metatrain run`. A job contains the run's
configuration and, if the task is the user's own, the module that defines it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from l3rs.io.files import first_line, temporary_folder
from metatrain.config import Config, UserError, dump_config
from metatrain.outer.status import Snapshot, folder_snapshot, logged_snapshot
from metatrain.ray.connection import has_token, is_loopback, probe, require_token, split_address
from metatrain.waiting import noticed

CLIENT = "L3RS_CLIENT"  # environment variable: the versions on the submitting machine, as JSON
_NAME, _FOLDER = "l3rs_run", "l3rs_folder"  # metadata of a job
_START_SECONDS = 180.0
_STOP_SECONDS = 120
_AGENT_SECONDS = 60.0
_MODULE_BYTES = 50 * 2**20
_GENERATION = re.compile(r"generation [1-9]\d*/\d+ ")  # of a driver's log
_OURS = ("l3rs", "tasks", "metatrain")


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted run."""

    id: str
    name: str  # of the run
    folder: str  # of the run, as the driver sees it
    status: str  # Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED
    message: str
    started: float  # seconds since 1970; 0 if it has not started
    begun: float  # likewise, of the run's first job


def client(address: str, allow_unauthenticated: bool = False, log: Callable[[str], None] = lambda _: None) -> Any:
    """A client of the cluster's job server.

    Args:
      address: of the dashboard, http://host:port.
      allow_unauthenticated: accept a cluster without Ray's token that others can reach, too.
      log: called with the cluster's address and whether it uses a token.

    Raises:
      UserError: the server does not answer, the token is missing or wrong, or Ray's versions differ.
    """
    host, port = split_address(address)
    require_token(host, allow_unauthenticated, accept="--allow-unauthenticated")
    probe(host, port)
    url = address if "://" in address else f"http://{address}"
    mode = _authentication_mode(url)
    if mode == "token":
        if not has_token():
            raise UserError(
                f"the cluster at {address} requires Ray's token, and there is none here: set RAY_AUTH_TOKEN, or copy "
                "~/.ray/auth_token from the cluster's head"
            )
        os.environ["RAY_AUTH_MODE"] = "token"  # read when Ray is imported
    elif not is_loopback(host) and not allow_unauthenticated:
        raise UserError(
            f"the cluster at {url} accepts everyone: start it with RAY_AUTH_MODE=token, "
            "or accept the risk with --allow-unauthenticated"
        )
    import ray
    from ray.job_submission import JobSubmissionClient

    try:
        connected = JobSubmissionClient(url)
        theirs = connected._do_request("GET", "/api/version").json()["ray_version"]
    except Exception as error:  # Ray raises RuntimeError, ConnectionError, ValueError, AuthenticationError and others
        raise UserError(f"the job server at {address} rejected the request: {first_line(error)}") from None
    if theirs != ray.__version__:
        raise UserError(
            f"the cluster at {address} has Ray {theirs}, this machine has {ray.__version__}; they must be the same"
        )
    used = "with Ray's token" if mode == "token" else "without a token"
    log(f"Ray cluster at {address}, {used}")
    return connected


def _authentication_mode(url: str) -> str:
    """Ray's `authentication_mode` of a cluster: "token", or "disabled", also if it does not say."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/authentication_mode", timeout=10) as answer:
            return str(json.load(answer).get("authentication_mode", "disabled"))
    except (OSError, ValueError, AttributeError):
        return "disabled"


def submit(
    jobs: Any,
    config: Config,
    folder: str,
    *,
    resume: bool = False,
    allow_other_version: bool = False,
    retries: int = 0,
    log: Callable[[str], None] = print,
) -> Job:
    """Start a run on the cluster and wait until its first generation is done.

    Args:
      jobs: from `client`.
      config: the run; execution.backend and execution.address are replaced by the cluster's.
      folder: the run's folder on the driver's machine, on a file system that outlives the driver.
      resume: resume the run of that name.
      allow_other_version: resume it although other code has begun it.
      retries: how often a driver that dies is started again, on the cluster; see `metatrain.ray.retry`.
      log: called with news for the user.

    Raises:
      UserError: the name is in use, or the driver refuses; then nothing keeps running.
    """
    earlier = [job for job in list_runs(jobs) if job.name == config.name]
    if running := [job for job in earlier if job.status in ("PENDING", "RUNNING")]:
        raise UserError(f"the run {config.name} is {running[0].status.lower()} as job {running[0].id}; stop it first")
    if earlier and not resume:
        raise UserError(f"the run {config.name} was submitted before; resume it with --resume, or choose another name")
    execution = config.execution.model_copy(update={"backend": "ray", "address": "auto"})
    with _package(config.model_copy(update={"execution": execution})) as package:
        environment = {
            CLIENT: json.dumps(_versions()),
            "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS),  # a last checkpoint takes longer than Ray's 3 s
            "PYTHONUNBUFFERED": "1",
        }
        options = " --resume" * resume + " --allow-other-version" * allow_other_version
        # Without the job's working directory on the path: a module of the user's could hide one of Python's.
        retry = f"python -P -m metatrain.ray.retry {retries} " if retries else ""
        job_id = submit_job(
            jobs,
            # Ray makes job ids unique: of two simultaneous submissions of one name, one fails.
            submission_id=f"{config.name}-{len(earlier) + 1}",
            entrypoint=f"{retry}python -m metatrain.cli run config.yaml --out {shlex.quote(folder)}{options}",
            runtime_env={"working_dir": str(package), "env_vars": environment},
            metadata={_NAME: config.name, _FOLDER: folder},
        )
    log(f"job {job_id}, run directory {folder}")
    return _wait_for_start(jobs, job_id, log)


def submit_job(jobs: Any, **job: Any) -> str:
    """Submit a job; returns its id. A cluster that has just started cannot take jobs yet: it is asked again."""
    deadline = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            return str(jobs.submit_job(**job))
        except Exception as error:  # what Ray's REST client raises has no common base
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"the job cannot be submitted: {first_line(error)}") from None
        time.sleep(1.0)


def output(jobs: Any, job_id: str) -> tuple[str, bool]:
    """Wait for a short job; returns what it printed, and whether it succeeded.

    Raises:
      UserError: it takes too long.
    """
    deadline, advice = time.monotonic() + _START_SECONDS, f"at most {_START_SECONDS:.0f} s"
    with noticed(f"the job {job_id}", advice, lambda text: print(text, file=sys.stderr)):
        while time.monotonic() < deadline:
            status = str(jobs.get_job_status(job_id).value)
            if status not in ("PENDING", "RUNNING"):
                lines = jobs.get_job_logs(job_id).splitlines()
                printed = [line for line in lines if not line.startswith("Running entrypoint for job")]
                return "\n".join(printed), status == "SUCCEEDED"
            time.sleep(0.5)
    raise UserError(f"the job {job_id} has not ended after {_START_SECONDS:.0f} s; see: ray job logs {job_id}")


def clock_ahead(jobs: Any) -> float | None:
    """Seconds by which the clock of the cluster's head is ahead of this machine's, to a second; None if unknown."""
    try:
        stated = parsedate_to_datetime(jobs._do_request("GET", "/api/version").headers["Date"])
    except (KeyError, ValueError, TypeError):
        return None
    return stated.timestamp() + 0.5 - time.time()


def list_runs(jobs: Any) -> list[Job]:
    """All runs of the cluster, the oldest first."""
    found = [
        Job(
            id=details.submission_id,
            name=details.metadata[_NAME],
            folder=details.metadata[_FOLDER],
            status=str(details.status.value),
            message=details.message or "",
            started=(details.start_time or 0) / 1e3,
            begun=0.0,
        )
        for details in jobs.list_jobs()
        if details.submission_id and _NAME in (details.metadata or {})
    ]
    found.sort(key=lambda job: job.started)
    first = {(job.name, job.folder): job.started for job in reversed(found) if job.started}
    return [dataclasses.replace(job, begun=first.get((job.name, job.folder), 0.0)) for job in found]


def find(jobs: Any, name: str) -> Job:
    """The newest job of a run.

    Args:
      jobs: from `client`.
      name: of the run, or the job's id.

    Raises:
      UserError: there is no such job.
    """
    known = list_runs(jobs)
    # A run may be called as another's job: ids are NAME-1, NAME-2, ….
    found = [job for job in known if job.name == name] or [job for job in known if job.id == name]
    if not found:
        names = ", ".join(dict.fromkeys(job.name for job in known)) or "none"
        raise UserError(f"the cluster has no run {name}; its runs are {names}")
    return found[-1]


def _by_id(jobs: Any, job_id: str) -> Job:
    if found := [job for job in list_runs(jobs) if job.id == job_id]:
        return found[0]
    raise UserError(f"the cluster has no job {job_id} any more")


def snapshot(jobs: Any, job: Job) -> Snapshot:
    """A run's progress, from its metrics if its folder can be read here, else from its driver's log."""
    state, going = job.status.lower(), job.status == "RUNNING"
    found = folder_snapshot(Path(job.folder), job.name, state, going=going)
    # The cluster's path may be that of an earlier run of this machine.
    own = found.updated is not None and 0 < job.begun <= found.updated
    return found if own else logged_snapshot(jobs.get_job_logs(job.id), job.name, state, going=going)


def logs(jobs: Any, job: Job, follow: bool) -> Iterator[str]:
    """The driver's output so far; if `follow`, also what it prints until it ends."""
    if not follow:
        yield jobs.get_job_logs(job.id)
        return

    loop = asyncio.new_event_loop()
    tail = jobs.tail_job_logs(job.id)
    try:
        while True:
            yield loop.run_until_complete(anext(tail))
    except StopAsyncIteration:
        return
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(tail.aclose())
        loop.close()


def stop(jobs: Any, job: Job, log: Callable[[str], None] = print) -> Job:
    """Stop a run and wait until its driver has saved it and ended.

    Args:
      jobs: from `client`.
      job: from `find`.
      log: called with news for the user.

    Raises:
      UserError: it is not running, or does not end in time.
    """
    if job.status not in ("PENDING", "RUNNING"):
        raise UserError(f"the run {job.name} is not running: job {job.id} is {job.status.lower()}")
    jobs.stop_job(job.id)
    deadline = time.monotonic() + _STOP_SECONDS
    advice = f"at most {_STOP_SECONDS} s; see: metatrain logs {job.name}"
    with noticed(f"the driver of {job.name} to save the run and end", advice, log):
        while time.monotonic() < deadline:
            now = _by_id(jobs, job.id)
            if now.status not in ("PENDING", "RUNNING"):
                return now
            time.sleep(0.5)
    raise UserError(
        f"job {job.id} still runs {_STOP_SECONDS} s after it was told to stop; see: metatrain logs {job.name}"
    )


def check_client() -> None:
    """In a driver: refuse to start if the submitting machine has other versions.

    Raises:
      UserError: some versions differ.
    """
    stated = os.environ.get(CLIENT)
    if not stated:
        return
    theirs, ours = json.loads(stated), _versions()
    found = {name: ours.get(name, "none") for name in theirs}
    if different := [
        f"{name} {found[name]} (yours: {value})" for name, value in theirs.items() if found[name] != value
    ]:
        raise UserError(f"the cluster has {', '.join(different)}; they must be the same")


def _versions() -> dict[str, str]:
    """Versions that must be the same on the submitting machine and the cluster."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "l3rs": version("l3rs"), "ray": version("ray")}


def _wait_for_start(jobs: Any, job_id: str, log: Callable[[str], None]) -> Job:
    deadline = time.monotonic() + _START_SECONDS
    advice = f"at most {_START_SECONDS:.0f} s; Ctrl-C leaves the job running; see: metatrain logs {job_id}"
    with noticed(f"the first generation of {job_id}", advice, log):
        while time.monotonic() < deadline:
            job = _by_id(jobs, job_id)
            if job.status == "FAILED":
                raise UserError(_failure(jobs, job))
            if job.status != "PENDING" and (job.status != "RUNNING" or _GENERATION.search(jobs.get_job_logs(job_id))):
                return job
            time.sleep(0.5)
    log(f"the run has not finished a generation after {_START_SECONDS:.0f} s; see: metatrain logs {job_id}")
    return _by_id(jobs, job_id)


def _failure(jobs: Any, job: Job) -> str:
    """Why a job failed, in the driver's own words if it printed a sentence."""
    with contextlib.suppress(Exception):
        lines = jobs.get_job_logs(job.id).splitlines()
        for line in reversed(lines):
            if line.startswith("metatrain: "):
                return f"the driver refused the run: {line.removeprefix('metatrain: ')}"
        if any("No module named metatrain" in line or "No module named 'metatrain'" in line for line in lines):
            return "the cluster's Python has no l3rs; install l3rs[metatrain] in its image"
    return f"job {job.id} failed: {' '.join(job.message.split())[:500]}"


@contextlib.contextmanager
def _package(config: Config) -> Iterator[Path]:
    """A folder with the files that the driver needs and the cluster lacks."""
    for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # the level of "ray" does not apply to them
    with temporary_folder("l3rs-job-") as folder:
        (folder / "config.yaml").write_text(dump_config(config))
        names = [name for name, _ in config.task.forms() if ":" in name]
        for top in sorted({name.partition(":")[0].partition(".")[0] for name in names} - set(_OURS)):
            _copy_module(top, folder)
        yield folder


def _copy_module(top: str, folder: Path) -> None:
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"task.name: the module {top} is not on this machine, so it cannot be sent to the cluster")
    locations = list(spec.submodule_search_locations or [])
    source = Path(locations[0]) if locations else Path(spec.origin or "")
    if "site-packages" in source.parts:
        return  # an installed package: the cluster must have it installed, too
    files = [source] if source.is_file() else [f for f in source.rglob("*.py") if "__pycache__" not in f.parts]
    if (total := sum(file.stat().st_size for file in files)) > _MODULE_BYTES:
        raise UserError(
            f"the task's module {top} has {total / 2**20:.0f} MiB of Python files; at most 50 MiB can be sent"
        )
    for file in files:
        target = folder / (file.name if source.is_file() else Path(top) / file.relative_to(source))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
