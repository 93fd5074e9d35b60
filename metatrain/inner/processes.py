"""Work in processes of this machine, for PyTorch, whose settings and generators belong to a process.

A process that dies or hangs is replaced, and what it computed is computed again. While a process lives, a thread of it
sends heartbeats.
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
from typing import Any, Literal

import jax
import numpy as np

import l3rs
from metatrain.config import OuterConfig, UserError
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


def local_processes(tasks: Sequence[AnyTask], workers: int | Literal["auto"], most: int) -> int:
    """How many processes compute on this machine, for at most `most` calls at a time.

    If not given, one for every core; but one alone where PyTorch computes on an accelerator, whose memory they share.
    """
    if workers == "auto":
        workers = usable_cpus() if all(getattr(task, "device", "cpu") == "cpu" for task in tasks) else 1
    return min(workers, most)


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


class Processes:
    """Processes of one thread each that call a function.

    Args:
      build: makes the function in each process; of a module, so that it can be sent.
      arguments: of `build`.
      count: how many processes.
      log: called with news of the processes.

    Attributes:
      lost: how many processes had to be replaced.
    """

    def __init__(
        self,
        build: Callable[..., Callable[[Any], Any]],
        arguments: tuple[Any, ...],
        count: int,
        log: Callable[[str], None],
    ) -> None:
        self._job, self._log = pickle.dumps((build, arguments)), log
        self._context = multiprocessing.get_context("spawn")
        self.lost = self._deaths = 0
        self._workers: dict[Connection, _Process] = {}
        self._looked = time.monotonic()
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._workers)

    def map(self, messages: Sequence[Any]) -> list[Any]:
        """The function's answer to each message; the first ones are handed out first.

        Raises:
          ValueError, RuntimeError: what the function raised.
          UserError: process after process died.
        """
        answers: list[Any] = [None] * len(messages)
        pending = deque(range(len(messages)))
        running: dict[Connection, int] = {}
        while pending or running:
            for connection in [c for c in self._workers if c not in running]:
                if pending:
                    running[connection] = pending.popleft()
                    self._send(connection, messages[running[connection]])
            ready: list[Any] = wait(list(self._workers), _LOOK_SECONDS)
            for connection in ready:
                try:
                    sign = self._receive(connection)
                except (EOFError, OSError):
                    self._requeue(connection, running, pending)
                    continue
                if sign is None:
                    continue
                self._deaths = 0
                [answer] = sign
                if isinstance(answer, BaseException):
                    raise answer
                answers[running.pop(connection)] = answer
            for connection in self._hung():
                self._workers[connection].process.kill()
                self._requeue(connection, running, pending)
        return answers

    def close(self) -> None:
        for connection, worker in self._workers.items():
            worker.process.kill()  # also one that is stopped; it holds nothing that has to be saved
            connection.close()
        for worker in self._workers.values():
            worker.process.join()
        self._workers = {}

    def _receive(self, connection: Connection) -> Any:
        """A list of an answer or of the error in its place; None for a heartbeat."""
        sign = connection.recv()
        self._workers[connection].hear(time.monotonic())
        return sign

    def _requeue(self, connection: Connection, running: dict[Connection, int], pending: deque[int]) -> None:
        """Replace a process that is gone, and give its work to another."""
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
        self.lost += 1
        if self._deaths >= _DEATHS:
            raise UserError(f"{self._deaths} processes died in a row, the last with exit code {process.exitcode}")
        self._log(f"a process was lost (exit code {process.exitcode}); what it computed is computed again")
        self._start()


class ProcessEvaluator:
    """Evaluates in processes; see `metatrain.inner.population.Evaluator`.

    A process builds the tasks for itself and regenerates its members from (strategy state, key).

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
        self._population = outer.population
        self._processes = Processes(_candidates, (list(tasks), spec, outer), processes, log)

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        del waiting  # a process that dies is replaced at once
        shared = host_arguments(state, spec)
        losses = np.full((len(spec.draws), self._population), np.nan, np.float32)
        work = [(index, int(member)) for index, [member] in generation_chunks(spec.draws, self._population, 1)]
        found = self._processes.map([(shared[index], member) for index, member in work])
        for place, loss in zip(work, found, strict=True):
            losses[place] = loss
        return losses

    def report(self) -> dict[str, Any]:
        return {"workers": len(self._processes), "lost": self._processes.lost}

    def close(self) -> None:
        self._processes.close()


def _candidates(tasks: Sequence[AnyTask], spec: l3rs.Spec, outer: OuterConfig) -> Callable[[Any], np.float32]:
    """(what all members of a draw share, member) -> its meta-loss."""
    strategy = make_strategy(outer, l3rs.init_meta_params(jax.random.key(0), spec))
    calls = [candidate_losses(task, spec, strategy, "torch") for task in tasks]

    def loss(message: Any) -> np.float32:
        (task, arguments), member = message
        found: np.ndarray = calls[task](*jax.device_put(arguments), tasks[task].data, np.array([member], np.int32))
        return found[0]

    return loss


def _work(connection: Connection, job: bytes) -> None:
    """The loop of a process: it answers every message by a list of an answer, or of the error in its place.

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
        build, arguments = pickle.loads(job)
        call = build(*arguments)
    except Exception as error:
        send([_sendable(error)])
        return
    while True:
        try:
            message = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = call(message)
        except Exception as error:
            answer = _sendable(error)
        send([answer])


def _sendable(error: Exception) -> Exception:
    """An error that the parent can raise: some cannot be pickled."""
    if isinstance(error, ValueError) and type(error).__reduce__ is ValueError.__reduce__:
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
