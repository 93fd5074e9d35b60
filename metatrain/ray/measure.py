"""Measurements on workers of a run: the driver has other devices than they, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import l3rs
from l3rs.io.files import first_line
from metatrain.config import ExecutionConfig, OuterConfig, Plan, UserError
from metatrain.inner.measure import Probe
from metatrain.ray.connection import connect
from metatrain.ray.fleet import Package, live_nodes, refuse_what_never_fits
from metatrain.ray.share import Share, actor_options, room, take_share, worker_share
from metatrain.ray.worker import unpack
from metatrain.waiting import WaitError, noticed
from tasks import TaskError
from tasks.base import AnyTask

_TYPE = "accelerator_type:"  # Ray's resource of nodes with a kind of accelerator, e.g. accelerator_type:A100
_SOME = 0.001  # of it


class Prober:
    """The actor that measures: a process with the share of a worker."""

    def __init__(self, share: Share) -> None:
        take_share(share)

    def setup(self, blob: bytes, sent: Mapping[int, Any]) -> list[int] | str:
        """Build the tasks; as `Worker.setup`."""
        found = unpack(blob, sent)
        if not isinstance(found, tuple):
            return found
        job, tasks = found
        self._probe = Probe(tasks, job.spec, job.outer)
        return []

    def device(self) -> str:
        return self._probe.device()

    def plan_seconds(self) -> dict[Plan, float]:
        return self._probe.plan_seconds()

    def members_that_fit(self) -> int | None:
        return self._probe.members_that_fit()


class WorkerMeasurements:
    """`Measurements` by an actor on a node of each kind that Ray knows, for as long as they take.

    Args:
      tasks, spec, outer: the run, of tasks of JAX.
      execution: address, resources, security.
      log: called with what is waited for.

    Raises:
      UserError: the cluster cannot be used, see `connect`; no node can hold a worker; a worker cannot be set up.
      WaitError: no worker has answered within `execution.wait_minutes`.
    """

    def __init__(
        self,
        tasks: Sequence[AnyTask],
        spec: l3rs.Spec,
        outer: OuterConfig,
        execution: ExecutionConfig,
        log: Callable[[str], None],
    ) -> None:
        self._owned = connect(execution, log)
        import ray

        self._ray, self._log, self._minutes = ray, log, execution.wait_minutes
        self._started: list[Any] = []
        self._actors: dict[str, Any] = {}  # one for each kind of device
        try:
            refuse_what_never_fits(execution)
            package = Package(tasks, spec, outer, "fused")  # versions are those of both plans of JAX
            self._started = [self._start(execution, kind) for kind in self._node_types(execution)]
            for actor in self._started:
                self._set_up(actor, package)
                self._actors.setdefault(self._ask(actor.device), actor)
        except BaseException:
            self.close()
            raise

    def plan_seconds(self) -> dict[str, dict[Plan, float]]:
        return self._ask_all("plan_seconds")

    def members_that_fit(self) -> dict[str, int | None]:
        return self._ask_all("members_that_fit")

    def close(self) -> None:
        for actor in self._started:
            self._ray.kill(actor)
        if self._owned:
            self._ray.shutdown()

    def _node_types(self, execution: ExecutionConfig) -> list[str]:
        """Ray's resource for each kind of accelerator of nodes that can hold a worker; [""] without a kind."""
        fits = [node for node in live_nodes() if room(node, execution.resources_per_worker)]
        share = worker_share(execution.resources_per_worker)
        found = {name for node in fits for name in node if share.accelerator and name.startswith(_TYPE)}
        return sorted(found) or [""]

    def _start(self, execution: ExecutionConfig, node_type: str) -> Any:
        resources = execution.resources_per_worker
        options = actor_options({**resources, node_type: _SOME} if node_type else resources)
        return self._ray.remote(Prober).options(**options).remote(worker_share(resources))

    def _set_up(self, actor: Any, package: Package) -> None:
        while needed := self._ask(actor.setup, package.blob, package.refs):
            if isinstance(needed, str):
                raise UserError(needed)
            package.send(needed)

    def _ask_all(self, method: str) -> dict[str, Any]:
        refs = {kind: getattr(actor, method).remote() for kind, actor in self._actors.items()}
        return {kind: self._answer(ref) for kind, ref in refs.items()}

    def _ask(self, method: Any, *arguments: Any) -> Any:
        return self._answer(method.remote(*arguments))

    def _answer(self, ref: Any) -> Any:
        advice = (
            f"at most {self._minutes:g} min (execution.wait_minutes): it compiles, or another run uses the cluster: "
            "see `metatrain list`"
        )
        with noticed("a worker that measures its device", advice, self._log):
            try:
                return self._ray.get(ref, timeout=60 * self._minutes)
            except self._ray.exceptions.GetTimeoutError:
                raise WaitError(
                    f"no worker of the cluster has measured its device within {self._minutes:g} min; try again when "
                    "the cluster has room, or wait longer with execution.wait_minutes"
                ) from None
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, UserError | TaskError):
                    raise cause from None
                raise UserError(f"a worker failed while its device was measured: {first_line(cause)}") from error
