"""Checks of a machine or of a Ray cluster before a run: one line each, with what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from l3rs.extras import pip_install
from metatrain.config import ExecutionConfig, UserError
from metatrain.config_errors import reason
from metatrain.ray.connection import connect, is_loopback, others_can_read, token_file, uses_token
from metatrain.ray.node_report import NodeReport, installed_versions, listening, nodes
from metatrain.system import check_destination, usable_cpus
from tasks.data.cache import cache_dir

_LEAST_FREE, _LITTLE_FREE = 1 << 30, 5 << 30  # bytes
_CLOCK_SECONDS, _MOST_CLOCK_SECONDS = 1.0, 20.0  # a lease on an object store expires after 60 s
_SHOWN = 5  # hosts in one line


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
      level: "ok", "note" (look at it) or "bad" (a run would fail or be exposed).
      subject: what was checked.
      found: what was found.
      advice: what to do.
    """

    level: str
    subject: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.level:4}  {self.subject}: {self.found}{advice}"


def machine(folder: str) -> Iterator[Finding]:
    """The checks of this machine.

    Args:
      folder: where runs will be written; a folder, or a URL.
    """
    yield check_versions(installed_versions())
    yield _check_devices()
    yield check_token()
    try:
        yield check_ports(listening(), "this machine", uses_token())
    except ImportError:
        yield Finding("bad", "ports", "Ray is not installed", pip_install("metatrain"))
    if "://" in folder:
        yield _check_store(folder)
    else:
        yield check_folder(Path(folder))
    yield check_disk("disk of the cache", cache_dir(), "set L3RS_CACHE to a folder elsewhere")
    yield check_disk("disk for temporary files", Path(tempfile.gettempdir()), "Ray and JAX write there: set TMPDIR")


def cluster(address: str, folder: str, allow_unauthenticated: bool, log: Callable[[str], None]) -> Iterator[Finding]:
    """The checks of a cluster, from a machine of it.

    Args:
      address: of Ray, host:port or auto.
      folder: where runs will be written, as the cluster's machines see it.
      allow_unauthenticated: connect to a cluster without a token that others can reach.
      log: called with news of the connection.

    Raises:
      UserError: the cluster cannot be used at all, see `connect`.
    """
    execution = ExecutionConfig(backend="ray", address=address, allow_unauthenticated=allow_unauthenticated)
    owned = connect(execution, log)
    import ray

    try:
        session = ray.get_runtime_context().get_session_name()
        resources = ray.cluster_resources()
        with _probe(folder) as probe:
            answers, silent = nodes(session, probe)
    finally:
        if owned:
            ray.shutdown()
    yield _check_answers(len(answers), silent)
    yield check_equal_versions([node for _, node in answers])
    addresses = {address for _, node in answers for address in node.listening or ()}
    told = all(node.listening is not None for _, node in answers)
    yield check_ports(tuple(sorted(addresses)) if told else None, "the cluster", uses_token())
    yield check_clocks({node.host: node.time - now for now, node in answers})
    if probe:
        yield check_shared(folder, {node.host: node.missing for _, node in answers if node.missing})
    yield check_free({node.host: node.free for _, node in answers})
    named = ("CPU", "GPU", "TPU")
    shown = ", ".join(f"{resources[name]:g} {name}" for name in named if resources.get(name))
    yield Finding("ok" if shown else "bad", "devices", shown or "none", "" if shown else "start a node with --num-cpus")


def check_versions(versions: dict[str, str]) -> Finding:
    """Python and the packages of this machine."""
    shown = ", ".join(f"{name} {value}" for name, value in versions.items())
    if missing := [name for name, value in versions.items() if value == "none"]:
        return Finding(
            "bad",
            "versions",
            shown,
            f"{', '.join(missing)} missing: {pip_install('metatrain')}",
        )
    return Finding("ok", "versions", shown)


def check_equal_versions(found: list[NodeReport]) -> Finding:
    """The packages of the cluster's machines against this one's."""
    ours = installed_versions()
    different = {
        node.host: ", ".join(f"{name} {value} (here {ours[name]})" for name, value in node.versions.items()
                             if value != ours[name])
        for node in found
    }  # fmt: skip
    wrong = {host: what for host, what in different.items() if what}
    if wrong:
        return Finding("bad", "versions", _hosts(wrong), "install the same versions everywhere, e.g. from one image")
    return Finding("ok", "versions", f"equal on all machines: {', '.join(f'{k} {v}' for k, v in ours.items())}")


def check_ports(addresses: tuple[str, ...] | None, where: str, token: bool) -> Finding:
    """Who can reach the processes of Ray.

    Args:
      addresses: on which they listen; None: unknown.
      where: the machines.
      token: whether Ray asks for its token.
    """
    if addresses is None:
        return Finding("note", "ports", f"the system does not tell what listens on {where}", "look with lsof, as root")
    if not addresses:
        return Finding("ok", "ports", f"no Ray is running on {where}")
    open_to = sorted({address for address in addresses if not is_loopback(address)})
    if not open_to:
        return Finding("ok", "ports", f"Ray on {where} listens on loopback only: no other machine can reach it")
    shown = f"Ray on {where} listens on {', '.join(open_to)}: anyone who can reach that"
    if token:
        return Finding("ok", "ports", f"{shown} needs the token; keep it inside your own network")
    return Finding(
        "bad", "ports", f"{shown} can run code here",
        "start Ray with RAY_AUTH_MODE=token, or on loopback only with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
    )  # fmt: skip


def check_token() -> Finding:
    """Ray's token on this machine."""
    path = token_file()
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("ok", "token", f"RAY_AUTH_MODE is {mode}; RAY_AUTH_TOKEN holds a token")
    if path.is_file():
        found = f"RAY_AUTH_MODE is {mode}; {path} holds a token"
        if others_can_read(path):
            return Finding("bad", "token", f"{found} that other users can read", f"chmod 600 {path}")
        return Finding("ok", "token", found)
    if os.environ.get("RAY_AUTH_TOKEN_PATH") or uses_token():
        return Finding("bad", "token", f"RAY_AUTH_MODE is {mode}; there is no token in {path}",
                       "ray get-auth-token --generate")  # fmt: skip
    return Finding("ok", "token", "none; Ray on loopback needs none, a cluster of several machines does")


def check_folder(folder: Path) -> Finding:
    """Whether runs can be written into a folder of this machine, and its free space."""
    try:
        check_destination(folder, "config.yaml")
    except UserError as error:
        return Finding("bad", "folder of runs", str(error), "choose another with --folder")
    return check_disk("folder of runs", folder, "remove old runs, or choose another with --folder")


def check_disk(subject: str, folder: Path, advice: str) -> Finding:
    """The free space of a folder that need not exist."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder} has {_size(free)} free"
    if free < _LITTLE_FREE:
        return Finding("bad" if free < _LEAST_FREE else "note", subject, found, advice)
    return Finding("ok", subject, found)


def check_free(free: dict[str, int]) -> Finding:
    """The free space for Ray's temporary files on the cluster's machines."""
    little = {host: f"{_size(size)} free" for host, size in free.items() if size < _LITTLE_FREE}
    if little:
        level = "bad" if min(free.values()) < _LEAST_FREE else "note"
        return Finding(level, "disk", _hosts(little), "Ray writes to /tmp there: make room, or set --temp-dir")
    return Finding("ok", "disk", f"at least {_size(min(free.values(), default=0))} free for temporary files")


def check_shared(folder: str, missing: dict[str, str]) -> Finding:
    """Whether all machines see the folder of the runs."""
    if missing:
        return Finding("bad", "shared folder", f"{folder}: {_hosts(missing)}",
                       "mount the same file system at the same path everywhere, or use a URL as --out")  # fmt: skip
    return Finding("ok", "shared folder", f"{folder} can be written from all machines")


def check_clocks(ahead: dict[str, float]) -> Finding:
    """The clocks of the cluster's machines.

    Args:
      ahead: seconds by which each machine's is ahead of this one's.
    """
    off = {host: f"{seconds:+.1f} s" for host, seconds in ahead.items() if abs(seconds) > _CLOCK_SECONDS}
    most = max(map(abs, ahead.values()), default=0.0)
    if off:
        level = "bad" if most > _MOST_CLOCK_SECONDS else "note"
        return Finding(level, "clocks", f"{_hosts(off)} against this machine", "let NTP set them, e.g. with chrony")
    return Finding("ok", "clocks", f"within {max(most, 0.001):.3f} s of this machine's")


def _check_answers(answered: int, silent: dict[str, str]) -> Finding:
    if silent:
        return Finding("bad", "machines", f"{answered} answer, {len(silent)} do not: {_hosts(silent)}",
                       "install l3rs[metatrain] there, or look into /tmp/ray/session_latest/logs")  # fmt: skip
    return Finding("ok", "machines", f"{answered} answer")


def _check_devices() -> Finding:
    from metatrain.inner.devices import use_cores

    use_cores()
    import jax

    kinds = [device.device_kind for device in jax.local_devices()]
    found = f"JAX computes on {len(kinds)} × {kinds[0]}; {usable_cpus()} CPUs"
    if jax.default_backend() == "cpu" and sys.platform == "linux" and Path("/proc/driver/nvidia/gpus").is_dir():
        return Finding("note", "devices", f"{found}, though there is an NVIDIA GPU", "pip install 'jax[cuda12]'")
    return Finding("ok", "devices", found)


def _check_store(url: str) -> Finding:
    """Whether an object can be written to a URL and read back."""
    try:
        import fsspec

        files, root = fsspec.core.url_to_fs(url)
        name = f"{root.rstrip('/')}/.doctor-{secrets.token_hex(4)}"
        files.makedirs(root, exist_ok=True)
        files.pipe_file(name, b"l3rs")
        same = files.cat_file(name) == b"l3rs"
        files.rm_file(name)
    except Exception as error:  # the drivers' own exceptions have no common base
        found = f"{url} cannot be written: {reason(error)}"
        return Finding("bad", "store of runs", found, "check its name and your access")
    if not same:
        return Finding("bad", "store of runs", f"{url} returns another content than was written", "use another store")
    return Finding("ok", "store of runs", f"{url} can be written and read")


@contextlib.contextmanager
def _probe(folder: str) -> Iterator[str | None]:
    """A file in the shared folder while the nodes are asked; None for a URL, which every machine reaches by itself.

    Raises:
      UserError: this machine cannot write there.
    """
    if "://" in folder:
        yield None
        return
    check_destination(Path(folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder).absolute() / f".doctor-{secrets.token_hex(4)}"
    file.write_text("")
    try:
        yield str(file)
    finally:
        file.unlink(missing_ok=True)


def _hosts(found: dict[str, str]) -> str:
    shown = [f"{host}: {what}" for host, what in sorted(found.items())[:_SHOWN]]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join(shown + more)


def _size(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
