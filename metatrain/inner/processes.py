"""Evaluation of a generation in processes of this machine, for PyTorch, whose settings belong to a process.

A process builds the tasks for itself and regenerates its members from (strategy state, key). A process that dies is
replaced, and its members are evaluated again.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
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
from tasks.base import AnyTask

_DEATHS = 5  # of processes in a row without an answer: then the run is at fault


def local_processes(execution: ExecutionConfig, population: int) -> int:
    """How many processes evaluate on this machine."""
    wanted = usable_cpus() if execution.workers == "auto" else execution.workers
    return min(wanted, population)


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
        self._workers: dict[Connection, Any] = {}
        try:
            for _ in range(processes):
                self._start()
        except BaseException:
            self.close()
            raise

    def evaluate(self, state: State, spec: GenerationSpec, waiting: Callable[[str], None] | None = None) -> np.ndarray:
        del waiting  # a process that dies is replaced at once
        shared = [(draw.task, host_arguments(state, spec.key, draw)) for draw in spec.draws]
        losses = np.full((len(spec.draws), self._population), np.nan, np.float32)
        chunks = generation_chunks(spec.draws, self._population, 1)
        pending = deque((index, int(member)) for index, [member] in chunks)
        running: dict[Connection, tuple[int, int]] = {}
        while pending or running:
            for connection in [c for c in self._workers if c not in running]:
                if pending:
                    index, member = running[connection] = pending.popleft()
                    self._send(connection, (shared[index], member))
            ready: list[Any] = wait(list(running))
            for connection in ready:
                index, member = running.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    pending.appendleft((index, member))
                    self._replace(connection)
                    continue
                self._deaths = 0
                if isinstance(answer, BaseException):
                    raise answer
                losses[index, member] = answer
        return losses

    def report(self) -> dict[str, Any]:
        return {"workers": len(self._workers), "lost": self._lost}

    def close(self) -> None:
        for connection, process in self._workers.items():
            process.terminate()
            connection.close()
        for process in self._workers.values():
            process.join()
        self._workers = {}

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._job), daemon=True)
        process.start()
        theirs.close()
        self._workers[ours] = process

    def _send(self, connection: Connection, message: Any) -> None:
        try:
            connection.send(message)
        except OSError:
            return  # it is dead: reading from it says so

    def _replace(self, connection: Connection) -> None:
        process = self._workers.pop(connection)
        process.join()
        connection.close()
        self._deaths += 1
        self._lost += 1
        if self._deaths >= _DEATHS:
            raise UserError(f"{self._deaths} processes died in a row, the last with exit code {process.exitcode}")
        self._log(f"a process died (exit code {process.exitcode}); its candidate is evaluated again")
        self._start()


def _work(connection: Connection, job: bytes) -> None:
    """The loop of a process: (what all members share, member) -> its meta-loss, or the error that it raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent decides
    use_cores(1)  # before the tasks are built: they may compute with JAX
    tasks, spec, outer = pickle.loads(job)
    strategy = make_strategy(outer, l3rs.init_meta_params(jax.random.key(0), spec))
    calls = [candidate_losses(task, spec, strategy, "torch") for task in tasks]
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
        connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """An error that the parent can raise: some cannot be pickled."""
    if isinstance(error, ValueError) and type(error).__reduce__ is ValueError.__reduce__:
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
