"""Evaluation of a generation in processes of this machine, for PyTorch, whose settings belong to a process.

A process builds the tasks for itself and regenerates its members from (strategy state, key). A process that dies or
hangs is replaced, and its members are evaluated again. While a process lives, a thread of it sends heartbeats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import jax
import numpy as np

import l3rs
from metatrain.config import ExecutionConfig, OuterConfig, UserError
from metatrain.inner.devices import use_cores
from metatrain.inner.population import GenerationSpec, candidate_losses, generation_chunks, host_arguments
from metatrain.outer.strategy import State, make_strategy
from metatrain.system import usable_cpus
from metatrain.waiting import Wait, notice
from tasks.base import AnyTask

_DEATHS = 5  # of processes in a row without an answer: then the run is at fault
_BEAT_SECONDS = 2.0  # between two heartbeats of a process
_HANG_SECONDS = 60.0  # without a heartbeat until a process is replaced
_START_SECONDS = 300.0  # until its first one: it imports JAX and PyTorch
_LOOK_SECONDS = 1.0  # between two looks for processes that hang


def local_processes(execution: ExecutionConfig, population: int) -> int:
    """How many processes evaluate on this machine."""
    wanted = usable_cpus() if execution.workers == "auto" else execution.workers
    return min(wanted, population)


_Work = tuple[int, int]  # number of a draw, and of a member


@dataclasses.dataclass
class _Process:
    """A process as its parent sees it."""

    process: Any
    silence: Wait  # for the next sign of life
    started: bool = False

    def hear(self, now: float) -> None:
        """It has given a sign of life."""
        self.silence.over(now)
        self.started = True


class ProcessEvaluator:
    """Evaluates in processes of one thread each; see `metatrain.inner.population.Evaluator`.

    Args:
      tasks, spec, outer: the candidates and what they train. Tasks are built again in every process.
      processes: how many.
      log: called with news of the processes.
    """

    def __init__(
        self,
        tasks: Sequence[AnyTask],
        spec: l3rs.Spec,
        outer: OuterConfig,
        processes: int,
        log: Callable[[str], None],
    ) -> None:
        self._job = pickle.dumps((list(tasks), spec, outer))
        self._population, self._log = outer.population, log
        self._context = multiprocessing.get_context("spawn")
        self._deaths = self._lost = 0
        self._workers: dict[Connection, _Process] = {}
        self._looked = time.monotonic()
        try:
            for _ in range(processes):
                self._start()
        except BaseException:
            self.close()
            raise

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        del waiting  # a process that dies is replaced at once
        shared = host_arguments(state, spec)
        losses = np.full((len(spec.draws), self._population), np.nan, np.float32)
        chunks = generation_chunks(spec.draws, self._population, 1)
        pending = deque((index, int(member)) for index, [member] in chunks)
        running: dict[Connection, _Work] = {}
        while pending or running:
            for connection in [c for c in self._workers if c not in running]:
                if pending:
                    index, member = running[connection] = pending.popleft()
                    self._send(connection, (shared[index], member))
            ready: list[Any] = wait(list(self._workers), _LOOK_SECONDS)
            for connection in ready:
                try:
                    answer = self._receive(connection)
                except (EOFError, OSError):
                    self._requeue(connection, running, pending)
                    continue
                if answer is None:
                    continue
                self._deaths = 0
                if isinstance(answer, BaseException):
                    raise answer
                losses[running.pop(connection)] = answer
            for connection in self._hung():
                self._workers[connection].process.kill()
                self._requeue(connection, running, pending)
        return losses

    def report(self) -> dict[str, Any]:
        return {"workers": len(self._workers), "lost": self._lost}

    def close(self) -> None:
        for connection, worker in self._workers.items():
            worker.process.kill()  # also one that is stopped; it holds nothing that has to be saved
            connection.close()
        for worker in self._workers.values():
            worker.process.join()
        self._workers = {}

    def _receive(self, connection: Connection) -> Any:
        """A member's meta-loss, or the error that it raised; None for a heartbeat."""
        answer = connection.recv()
        self._workers[connection].hear(time.monotonic())
        return answer

    def _requeue(self, connection: Connection, running: dict[Connection, _Work], pending: deque[_Work]) -> None:
        """Replace a process that is gone, and evaluate its member again."""
        if connection in running:
            pending.appendleft(running.pop(connection))
        self._replace(connection)

    def _hung(self) -> list[Connection]:
        """The processes that have given no sign of life for too long. Each is named in a sentence before."""
        now = time.monotonic()
        paused = now - self._looked > _HANG_SECONDS / 2  # this process was stopped itself, perhaps with the others
        self._looked = now
        found = []
        for connection, worker in self._workers.items():
            if paused:
                worker.silence.over(now)
            seconds, limit = worker.silence.seconds(now), _HANG_SECONDS if worker.started else _START_SECONDS
            if worker.silence.is_notice_due(now):
                what = f"a sign of life of process {worker.process.pid}"
                self._log(notice(what, seconds, f"it is replaced after {limit:.0f} s; nothing is lost"))
            if seconds > limit:
                found.append(connection)
        return found

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._job), daemon=True)
        process.start()
        theirs.close()
        self._workers[ours] = _Process(process, Wait(time.monotonic()))

    def _send(self, connection: Connection, message: Any) -> None:
        try:
            connection.send(message)
        except OSError:
            return  # it is dead: reading from it says so

    def _replace(self, connection: Connection) -> None:
        process = self._workers.pop(connection).process
        process.join()
        connection.close()
        self._deaths += 1
        self._lost += 1
        if self._deaths >= _DEATHS:
            raise UserError(f"{self._deaths} processes died in a row, the last with exit code {process.exitcode}")
        self._log(f"a process was lost (exit code {process.exitcode}); its candidate is evaluated again")
        self._start()


def _work(connection: Connection, job: bytes) -> None:
    """The loop of a process: (what all members share, member) -> its meta-loss, or the error that it raised.

    In between it sends None: it is alive.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    sending = threading.Lock()

    def send(message: Any) -> None:
        with sending:
            connection.send(message)

    def beat() -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            while True:
                send(None)
                time.sleep(_BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()
    use_cores(1)  # before the tasks are built: they may compute with JAX
    try:
        tasks, spec, outer = pickle.loads(job)
        strategy = make_strategy(outer, l3rs.init_meta_params(jax.random.key(0), spec))
        calls = [candidate_losses(task, spec, strategy, "torch") for task in tasks]
    except Exception as error:
        send(_sendable(error))
        return
    while True:
        try:
            (task, arguments), member = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            members = np.array([member], np.int32)
            answer: Any = calls[task](*jax.device_put(arguments), tasks[task].data, members)[0]
        except Exception as error:
            answer = _sendable(error)
        send(answer)


def _sendable(error: Exception) -> Exception:
    """An error that the parent can raise: some cannot be pickled."""
    if isinstance(error, ValueError) and type(error).__reduce__ is ValueError.__reduce__:
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
