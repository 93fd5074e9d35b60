"""A Ray cluster of several nodes on one machine: each a `ray start` of its own, killed for real."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_RAY = Path(sys.executable).with_name("ray")
_START_SECONDS = 120


@contextmanager
def local_ray(num_cpus: int, **options: Any) -> Iterator[Any]:
    """Ray on this machine only, with `num_cpus` CPUs, however many cores it has; yields the result of `ray.init`.

    Args:
      num_cpus: room for so many workers of one CPU.
      options: further arguments of `ray.init`.
    """
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
    import ray  # the import reads the first variable

    context = ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        **options,
    )  # fmt: skip
    try:
        yield context
    finally:
        ray.shutdown()


class Nodes:
    """A head, and nodes that are added and removed.

    Attributes:
      address: host:port of Ray.
      dashboard: the address of the dashboard; empty without one.
      env: the environment with which to reach it.
      processes: of `ray start`, one a node; each leads a session of its own.
    """

    def __init__(self, token: bool | None, dashboard: bool, loopback: bool = False) -> None:
        self._temp = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self.env = {**os.environ, "RAY_worker_niceness": "0"}
        self.env.pop("RAY_AUTH_MODE", None)
        if token is not None:
            self.env["RAY_AUTH_MODE"] = "token" if token else "disabled"
        self.env["PATH"] = f"{_RAY.parent}:{self.env['PATH']}"  # a job's command finds this Python
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
            self.env.pop(name, None)
        if token:
            self.env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        if loopback:
            self.env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        host = "127.0.0.1" if loopback else socket.gethostbyname(socket.gethostname())
        port, self._port = free_port(), free_port()
        self.address = f"{host}:{port}"
        self.dashboard = f"http://127.0.0.1:{self._port}" if dashboard else ""
        self._dashboard = dashboard
        self.processes: list[subprocess.Popen[bytes]] = []

    def head(self, cpus: int) -> None:
        port = self.address.rpartition(":")[2]
        self._start("--head", f"--port={port}", f"--num-cpus={cpus}", f"--include-dashboard={self._dashboard}",
                    f"--dashboard-port={self._port}", f"--temp-dir={self._temp.name}")  # fmt: skip

    def add(self, cpus: int) -> subprocess.Popen[bytes]:
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        """Kill it, as if its machine had lost power."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        self.processes.remove(node)

    def stop(self) -> None:
        for node in list(reversed(self.processes)):
            self.remove(node)
        self._temp.cleanup()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        log = Path(self._temp.name, f"node-{len(self.processes)}-{time.monotonic_ns()}.log")
        with log.open("w") as out:
            command = [str(_RAY), "start", "--block", "--disable-usage-stats", *options]
            node = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True)
        self.processes.append(node)
        deadline = time.monotonic() + _START_SECONDS
        while "runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start {' '.join(options)} failed: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        return node


@contextmanager
def ray_nodes(
    cpus: int = 2,
    *,
    token: bool | None = True,
    dashboard: bool = False,
    home: Path | None = None,
    loopback: bool = False,
) -> Iterator[Nodes]:
    """A head; at the end, everything is stopped and removed.

    Args:
      cpus: of the head.
      token: Ray's authentication mode; None leaves the choice to Ray.
      dashboard: start it, too.
      home: the home folder, where Ray looks for a token.
      loopback: start it as docs/operate/deploy.md does for one machine, so that nothing listens beyond loopback.
    """
    nodes = Nodes(token, dashboard, loopback)
    if home is not None:
        nodes.env |= {"HOME": str(home)}
        nodes.env.pop("RAY_AUTH_TOKEN", None)
    try:
        nodes.head(cpus)
        yield nodes
    finally:
        nodes.stop()


def cluster_command(nodes: Nodes, cwd: Path, **environment: str) -> Callable[..., tuple[int, str, str]]:
    """`metatrain` with this cluster's dashboard, in a folder whose modules it can import.

    Args:
      nodes: the cluster.
      cwd: the folder.
      environment: changes to the cluster's environment; "" removes a variable.

    Returns:
      words -> (exit code, stdout, stderr)
    """
    env = {**nodes.env, "PYTHONPATH": f"{cwd}", "RAY_API_SERVER_ADDRESS": nodes.dashboard, **environment}
    env = {name: value for name, value in env.items() if value}

    def call(*words: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "metatrain.cli", *map(str, words)],
            capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return call


def listening(nodes: Nodes) -> set[str]:
    """The addresses on which processes of the cluster's nodes listen."""
    found = set()
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in [node.pid for node in nodes.processes]:
                sockets = process.net_connections(kind="inet")
                found |= {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
        except (psutil.Error, ProcessLookupError):
            continue
    return {address.removeprefix("::ffff:") for address in found}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def worker_processes(name: str = r"\w*Worker") -> list[psutil.Process]:
    """The processes on this machine of `metatrain.ray.worker.Worker` and its subclasses, or of other actors.

    Ray names them after their classes.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if re.match(rf"ray::{name}\b", " ".join(process.cmdline())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found
