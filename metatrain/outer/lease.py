"""One driver per run in an object store: a lease with a heartbeat.

The store holds `lease.json` with its owner and the time of its last heartbeat. A driver that dies leaves a lease
that expires. Object stores have no locks, so two drivers that start at the same moment may both believe that they
hold it; each checks it before it writes a state, and the one whose lease was replaced stops there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from metatrain.config import UserError
from metatrain.outer.lock import BusyError

_log = logging.getLogger("metatrain")

HEARTBEAT_SECONDS = 10.0
EXPIRE_SECONDS = 60.0  # without a heartbeat
_LOOK_SECONDS = 1.0  # between two looks at the lease of another driver


class LeaseLostError(UserError):
    """Another driver has taken over the run."""


class LeaseStore(Protocol):
    """The store that holds the lease."""

    def read_lease(self) -> bytes | None:
        """Its content; None if there is no such object."""

    def write_lease(self, content: bytes) -> None:
        """Create or replace it."""

    def remove_lease(self) -> None:
        """Remove it."""


@contextlib.contextmanager
def lease(store: LeaseStore, name: str) -> Iterator[Callable[[], None]]:
    """Hold the lease of a run; its heartbeat is written by a thread.

    Args:
      store: where the lease is.
      name: what to call the run in messages.

    Yields:
      A check to call before a state is written. It raises LeaseLostError if another driver has the lease.

    Raises:
      BusyError: another driver holds the lease and is alive.
      UserError: the store cannot be written.
    """
    owner, over = secrets.token_hex(8), threading.Event()
    _wait_until_free(store, name)
    try:
        _renew(store, owner)
    except Exception as error:  # the drivers' own exceptions have no common base
        raise UserError(f"{name} cannot be written: {error}") from None

    def check() -> None:
        found = _read(store)
        if found is not None and found["owner"] != owner:
            raise LeaseLostError(
                f"{_who(found)} has taken over the run {name}; this driver stops and writes nothing more"
            )

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            # A store that fails for a while, or a lease of another owner, is reported when the next state is written.
            with contextlib.suppress(Exception):
                check()
                _renew(store, owner)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield check
    finally:
        over.set()
        heart.join(HEARTBEAT_SECONDS)
        with contextlib.suppress(Exception):  # it expires by itself
            check()
            store.remove_lease()


def _wait_until_free(store: LeaseStore, name: str) -> None:
    """Wait until there is no lease, or it has expired; it has a heartbeat if its driver is alive."""
    first = _read(store)
    if first is None or _has_expired(first):
        return
    _log.warning(
        "%s has the lease of the run %s; waiting at most %.0f s for a sign that it is alive",
        _who(first), name, EXPIRE_SECONDS,
    )  # fmt: skip
    began = time.monotonic()
    while time.monotonic() - began < EXPIRE_SECONDS:
        time.sleep(_LOOK_SECONDS)
        found = _read(store)
        if found is None or _has_expired(found):
            return
        if found != first:
            raise BusyError(f"{_who(found)} is using the run {name}; wait until it ends, or stop it")
    _log.warning("%s has given no sign for %.0f s; its lease is taken over", _who(first), EXPIRE_SECONDS)


def _renew(store: LeaseStore, owner: str) -> None:
    lease = {"owner": owner, "machine": _machine(), "pid": os.getpid(), "time": time.time()}
    store.write_lease(json.dumps(lease).encode())


def _read(store: LeaseStore) -> dict[str, Any] | None:
    """The lease; None if there is none or it is damaged."""
    content = store.read_lease()
    try:
        found = json.loads(content or b"null")
    except (ValueError, RecursionError):
        return None
    kinds = {"owner": str, "machine": str, "pid": int, "time": float}
    whole = isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in kinds.items())
    return found if whole else None


def _has_expired(found: dict[str, Any]) -> bool:
    """Whether the driver has ended, as far as its age and this machine can tell."""
    if time.time() - found["time"] > EXPIRE_SECONDS:
        return True
    if found["machine"] != _machine() or os.name != "posix":
        return False
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _machine() -> str:
    """This machine's name, and on Linux its space of process ids: containers may share the name."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _who(found: dict[str, Any]) -> str:
    return f"another driver (process {found['pid']} on {found['machine'].partition(' ')[0][:80]})"
