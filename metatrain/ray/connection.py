"""Connecting to a Ray cluster: no unrequested open ports, and no reachable cluster without its token.

Ray finds its token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. `ray start` turns token
authentication on if it finds one; Ray's clients use it only if RAY_AUTH_MODE is "token". Here, clients ask the
cluster for its mode instead, and the Ray that a run starts for itself leaves no token behind in a file.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import os
import secrets
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from metatrain.config import ExecutionConfig, UserError
from metatrain.config_errors import one_line
from metatrain.waiting import WaitError, noticed

_log = logging.getLogger("metatrain")

_PROBE_SECONDS = 10.0


def connect(execution: ExecutionConfig, log: Callable[[str], None]) -> bool:
    """Connect this process to Ray at `execution.address`, or start Ray on this machine, on loopback only.

    Args:
      execution: address, workers, resources, security.
      log: called with a sentence if it takes long.

    Returns:
      Whether this call opened the connection, so that the caller has to close it.

    Raises:
      UserError: the cluster does not answer, its token is wrong or missing, or versions differ.
      WaitError: Ray does not start on this machine in time.
    """
    address = execution.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return _own_ray(execution, log)
    if address != "auto":
        host, port = split_address(address)
        require_token(host, execution.allow_unauthenticated)
        probe(host, port)
        if is_loopback(host) and has_token():
            # A local `ray start` has turned authentication on if it found this token; without it, the token is ignored.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        return False
    advice = "Ray gives up by itself; check that the cluster's head runs and that its port is right"
    with _captured_stderr() as captured, noticed(f"the Ray cluster at {address}", advice, log):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            problem = None
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            problem = one_line(error)[:400]
        printed = captured()
    if problem and "InvalidAuthToken" in printed + problem:
        raise UserError(f"the cluster at {address} rejected the Ray token, or requires one")
    if problem:
        raise UserError(f"cannot use the Ray cluster at {address}: {problem}")
    try:
        require_token(split_address(ray.get_runtime_context().gcs_address)[0], execution.allow_unauthenticated)
    except UserError:
        ray.shutdown()
        raise
    _log.info("connected to the Ray cluster at %s, %s", address, _mode())
    return True


def _mode() -> str:
    return "with Ray's token" if uses_token() else "without a token"


def _own_ray(execution: ExecutionConfig, log: Callable[[str], None]) -> bool:
    # Ray reads this when it is imported: it then listens on loopback only.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray would write a token to ~/.ray/auth_token, readable by others, and every later `ray start` would ask for it.
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_worker_niceness", "0")  # the run has this machine to itself
    import ray

    if ray.is_initialized():
        return False
    needs = execution.resources_per_worker
    workers = execution.workers if isinstance(execution.workers, int) else 0
    cpus = max(os.cpu_count() or 1, math.ceil(workers * needs.get("CPU", 0)))
    # Ray calls exec right after fork, so JAX's threads are no problem.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
    with noticed("Ray to start on this machine", "if it does not, look into /tmp/ray/session_latest/logs", log):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises bare exceptions when one of its processes does not come up in time
            raise WaitError(
                f"Ray did not start on this machine: {one_line(error)[:400]}; try again when it is less busy, or look "
                "into /tmp/ray/session_latest/logs"
            ) from error
    _log.info("started Ray on this machine for this run, on loopback only, %s", _mode())
    return True


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture file descriptor 2, where Ray's C++ code reports every second why it cannot connect."""
    with tempfile.TemporaryFile() as scratch:
        kept = os.dup(2)
        os.dup2(scratch.fileno(), 2)

        def captured() -> str:
            scratch.seek(0)
            return scratch.read().decode(errors="replace")

        try:
            yield captured
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port", with or without "http://" in front.

    Raises:
      UserError: another format.
    """
    host, _, port = address.removeprefix("http://").removeprefix("https://").rstrip("/").rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host  # an IPv6 address has brackets
    if not bare or not port.isdigit() or "[" in bare or "]" in bare:
        raise UserError(f"{address!r} is not an address; write host:port, e.g. 10.0.0.5:6379")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_token(host: str, allow_unauthenticated: bool, accept: str = "execution.allow_unauthenticated=true") -> None:
    """Use Ray's token; refuse a cluster that others can reach if there is none.

    Args:
      host: of the cluster.
      allow_unauthenticated: accept such a cluster.
      accept: what the user can write to accept it, for the message.

    Raises:
      UserError: there is no token, and `allow_unauthenticated` is false.
    """
    if is_loopback(host) or uses_token():
        return
    if has_token() and os.environ.get("RAY_AUTH_MODE") is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        return
    if allow_unauthenticated:
        return
    raise UserError(
        f"{host} can be reached from other machines, and Ray's token authentication is off: run "
        "`ray get-auth-token --generate`, start the cluster with RAY_AUTH_MODE=token and set the same variable here, "
        f"or accept the risk with {accept}"
    )


def uses_token() -> bool:
    """Whether this process uses Ray's token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token_file() -> Path:
    """Where Ray looks for its token in a file."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given) if given else Path.home() / ".ray" / "auth_token"


def others_can_read(file: Path) -> bool:
    """Whether other users of this machine can read a file that is there; False where the system does not tell."""
    return os.name == "posix" and bool(file.stat().st_mode & 0o077)


def has_token() -> bool:
    """Whether Ray finds a token in this process. A token file that other users can read is named in a warning."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = token_file()
    if path.is_file() and others_can_read(path):
        _log.warning("%s holds Ray's token, and other users can read it; make it yours with: chmod 600 %s", path, path)
    return bool(os.environ.get("RAY_AUTH_TOKEN_PATH")) or path.is_file()


def probe(host: str, port: int) -> None:
    """Raise UserError unless something listens at the address: Ray itself would wait for a minute."""
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            pass
    except OSError as error:
        raise UserError(f"no answer from {host}:{port} ({error.strerror or error}); is the cluster running?") from None
