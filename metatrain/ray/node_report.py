"""What one node of a Ray cluster reports about itself, for `metatrain doctor`."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Whose versions must be equal on all machines of a run, for equal results.
PACKAGES = ("l3rs", "ray", "jax", "jaxlib", "evosax", "optax", "flax", "numpy")
_SERVERS = ("gcs_server", "raylet")
_ANSWER_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class NodeReport:
    """One node.

    Attributes:
      host: its name.
      versions: of Python and of the packages that must be equal everywhere; "none" where one is missing.
      time: of its clock, seconds since 1970.
      listening: addresses on which the cluster's processes on it listen; None where the system does not tell.
      free: free bytes of its temporary folder, where Ray writes.
      missing: which of the probes in the shared folder it does not see, or why it cannot write there.
    """

    host: str
    versions: dict[str, str]
    time: float
    listening: tuple[str, ...] | None
    free: int
    missing: str | None


def installed_versions() -> dict[str, str]:
    """Versions that must be the same on every machine of a run."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def report(session: str, probe: str | None) -> NodeReport:
    """This node.

    Args:
      session: name of Ray's session, which its processes have in their command lines.
      probe: a file that the driver has written into the shared folder; this node writes one beside it.
    """
    return NodeReport(
        host=socket.gethostname(),
        versions=installed_versions(),
        time=time.time(),
        listening=listening(session),
        free=shutil.disk_usage(tempfile.gettempdir()).free,
        missing=None if probe is None else _missing(Path(probe)),
    )


def listening(session: str = "") -> tuple[str, ...] | None:
    """Addresses on which Ray's processes on this machine listen; None where the system does not tell.

    Args:
      session: only those of this session of Ray.
    """
    import ray  # brings psutil

    del ray
    import psutil

    servers, found = [], set()
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            own = bool(words) and (
                Path(words[0]).name in _SERVERS or any("ray/dashboard/" in word for word in words[:4])
            )
            if own and session in " ".join(words):
                servers += [process, *process.children()]  # agents are children of the raylet, with other titles
        except psutil.Error:
            continue
    for process in servers:
        try:
            found |= {each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN}
        except psutil.AccessDenied:
            return None
        except psutil.Error:
            continue
    return tuple(sorted({address.removeprefix("::ffff:") for address in found}))


def nodes(session: str, probe: str | None) -> tuple[list[tuple[float, NodeReport]], dict[str, str]]:
    """Ask every node of the connected cluster.

    Args:
      session, probe: see `report`.

    Returns:
      ((this machine's time halfway through the question, the answer) of each node, {host: why it did not answer}).
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(report)
    alive: Sequence[Mapping[str, str]] = [node for node in ray.nodes() if node["Alive"]]

    def question(node: Mapping[str, str]) -> ray.ObjectRef:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ask.options(scheduling_strategy=where).remote(session, probe)

    # The first question starts a process; the second is answered at once, which makes the time exact.
    first = {node["NodeID"]: question(node) for node in alive}
    ray.wait(list(first.values()), num_returns=len(first), timeout=_ANSWER_SECONDS)
    answers, silent = [], {}
    for node in alive:
        host = node["NodeManagerHostname"]
        try:
            ray.get(first[node["NodeID"]], timeout=0.1)
            asked = time.time()
            answer = ray.get(question(node), timeout=_ANSWER_SECONDS)
            answers.append(((asked + time.time()) / 2, answer))
        except ray.exceptions.GetTimeoutError:
            silent[host] = f"no answer in {_ANSWER_SECONDS:.0f} s"
        except ray.exceptions.RayError as error:
            silent[host] = str(getattr(error, "cause", None) or error).strip().splitlines()[-1][:300]
    return answers, silent


def _missing(probe: Path) -> str | None:
    """Why the driver and this node do not share a folder; None if they do."""
    if not probe.is_file():
        return f"does not see the file {probe.name} that the driver has written there"
    try:
        answer = probe.with_name(f"{probe.name}.{socket.gethostname()}.{os.getpid()}")
        answer.write_text("")
        answer.unlink()
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return None
