"""One builder for each entry of the cache: a lock, and a heartbeat by which others see that its holder is alive.

The system releases the lock of a process that dies. A process that is stopped, or that hangs on another machine, keeps
it: then its file `.builder-ENTRY` gets no new time, and nobody waits for it for ever.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.base import TaskError

BEAT_SECONDS = 10.0  # between two heartbeats
SILENCE_SECONDS = 300.0  # without one until a wait ends with an error
NOTICE_SECONDS = 30.0  # of waiting before the warning
_LOOK_SECONDS = 1.0  # between two looks at the heartbeat
_MAX_WHO = 200  # characters that are shown of the holder's name
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # a file system without locks says so

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def builder_lock(entry: Path) -> Iterator[None]:
    """Hold an entry's lock, which excludes other processes and threads; wait for it if need be.

    On a file system without locks two processes may build the same entry; the first to finish publishes it.

    Args:
      entry: the entry's folder; the folder that it is in exists.

    Raises:
      TaskError: the lock's holder gives no sign of life.
      OSError: the folder cannot be written.
    """
    lock = _lock(entry.parent, entry.name)
    try:
        _acquire(lock, entry)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _log.warning("the file system of %s has no locks (%s); building without one", entry.parent, error)
    try:
        with _heartbeat(_builder_file(entry)):
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def unless_locked(folder: Path, entry: str) -> Iterator[bool]:
    """Whether nobody holds an entry's lock; this process holds it meanwhile."""
    lock = _lock(folder, entry)
    try:
        lock.acquire(blocking=False)
    except (Timeout, NotImplementedError, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _acquire(lock: FileLock, entry: Path) -> None:
    waited = silent = 0.0  # seconds; looks that came late, as after a pause of this machine, count as 5
    noticed, seen, looked = False, _sign(entry), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_LOOK_SECONDS if waited else 0)
        except Timeout:
            pass
        else:
            return
        if not waited:
            _log.info("another process is building the cache entry %s; waiting for it", entry)
        now, sign = time.monotonic(), _sign(entry)
        passed = max(min(now - looked, 5.0), 1e-3)
        waited, silent, looked = waited + passed, 0.0 if sign != seen else silent + passed, now
        seen = sign
        who = f"the process {sign[1]}" if sign else "another process"
        if silent > SILENCE_SECONDS:
            raise TaskError(
                f"{who} is building the cache entry {entry} and has given no sign of life for {silent:.0f} s; end it, "
                "or set $L3RS_CACHE to another folder"
            )
        if not noticed and waited > NOTICE_SECONDS:
            noticed = True
            _log.warning(
                "waiting for %s, which is building the cache entry %s, for %.0f s; it is given up after %.0f s without "
                "a sign of life; to build the entry here, set $L3RS_CACHE to another folder",
                who, entry, waited, SILENCE_SECONDS,
            )  # fmt: skip


@contextlib.contextmanager
def _heartbeat(file: Path) -> Iterator[None]:
    """Write who holds the lock, and renew the file's time. A file that cannot be written is done without."""
    over = threading.Event()
    with contextlib.suppress(OSError):
        file.write_text(f"{os.getpid()} on {socket.gethostname()}")

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            file.unlink()


def _sign(entry: Path) -> tuple[int, str] | None:
    """(time of the last heartbeat, who holds the lock); None without a heartbeat."""
    file = _builder_file(entry)
    try:
        return file.stat().st_mtime_ns, file.read_text(errors="replace")[:_MAX_WHO]
    except OSError:
        return None


def _lock(folder: Path, entry: str) -> FileLock:
    return FileLock(folder / f".lock-{entry}", thread_local=False)


def _builder_file(entry: Path) -> Path:
    return entry.with_name(f".builder-{entry.name}")
