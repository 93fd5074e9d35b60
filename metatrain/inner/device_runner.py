"""Chunks of members on the devices of one process."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from tasks.base import AnyTask
from tasks.user_code import callbacks


class DeviceRunner:
    """Computes chunks of members on several devices; each takes the next chunk when it is free.

    A chunk is the same compiled call on every device, so neither their number nor the order of completion changes a
    bit, on devices of one kind.

    Args:
      tasks: what candidates train.
      calls: for each task, its `candidate_losses`.
      devices: of this process.
    """

    def __init__(self, tasks: Sequence[AnyTask], calls: Sequence[Any], devices: Sequence[jax.Device]) -> None:
        self.devices = tuple(devices)
        self._calls, self._names = calls, [task.name for task in tasks]
        self._data = [jax.device_put([task.data for task in tasks], device) for device in self.devices]
        self._draws: Sequence[tuple[int, Any]] = ()
        self._placed: list[Any] = []
        self._pool = ThreadPoolExecutor(len(self.devices))

    def begin(self, draws: Sequence[tuple[int, Any]]) -> None:
        """Give the values that all members of a generation share.

        Args:
          draws: for each draw, (index of its task, arguments of `candidate_losses` before the data).
        """
        self._draws, self._placed = draws, [None] * len(self.devices)

    def run(self, chunks: Sequence[tuple[int, np.ndarray]], chunk: int) -> tuple[list[np.ndarray], int]:
        """Compute chunks.

        Args:
          chunks: (index of the draw, member numbers int32 [m]) each.
          chunk: members in one compiled call.

        Returns:
          (meta-losses float32 [m] of each chunk, the members per call that fitted into memory)
        """
        pending = deque(enumerate(chunks))
        losses: list[Any] = [None] * len(chunks)
        fitted = [chunk] * len(self.devices)

        def work(number: int) -> None:
            while (one := _next(pending)) is not None:
                i, (draw, members) = one
                try:
                    losses[i], fitted[number] = fitness_by_halves(self._call(number, draw), members, min(fitted))
                except BaseException:
                    pending.clear()  # the other devices need not continue
                    raise

        try:
            used = min(len(self.devices), len(chunks))
            for done in [self._pool.submit(work, number) for number in range(used)]:
                done.result()
        finally:
            pending.clear()  # after an interrupt
        return losses, min(fitted)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _call(self, number: int, draw: int) -> Callable[[np.ndarray], np.ndarray]:
        device = self.devices[number]
        if self._placed[number] is None:
            self._placed[number] = jax.device_put([arguments for _, arguments in self._draws], device)
        task = self._draws[draw][0]
        call = functools.partial(self._calls[task], *self._placed[number][draw], self._data[number][task])

        def losses(members: np.ndarray) -> np.ndarray:
            with callbacks(self._names[task]):
                return np.asarray(call(jax.device_put(members, device)))

        return losses


def _next(pending: deque[Any]) -> Any:
    """The next item; None without one. Of several threads each gets another."""
    try:
        return pending.popleft()
    except IndexError:
        return None


def fitness_by_halves(
    call: Callable[[np.ndarray], np.ndarray], members: np.ndarray, chunk: int
) -> tuple[np.ndarray, int]:
    """Evaluate `members` in chunks; halve the chunks while they do not fit into memory.

    Args:
      call: member numbers int32 [chunk] -> fitness [chunk].
      members: int32 [m].
      chunk: members per call, at first.

    Returns:
      (fitness float32 [m], the chunk that fitted)
    """
    while True:
        try:
            parts = [call(np.resize(part, chunk))[: len(part)] for part in split(members, chunk)]
            return np.concatenate(parts).astype(np.float32), chunk
        except jax.errors.JaxRuntimeError as error:
            if chunk == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        chunk = (chunk + 1) // 2


def split(members: np.ndarray, chunk: int) -> list[np.ndarray]:
    """Cut member numbers into parts of at most `chunk`."""
    return [members[first : first + chunk] for first in range(0, len(members), chunk)]
