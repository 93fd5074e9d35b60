"""From a configuration to the objects of a run: tasks, the optimizer's form, the strategy, the evaluator."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping

import jax

import l3rs
from l3rs.spec import Theta
from metatrain.config import Config, ExecutionConfig, HorizonConfig, MeasuredConfig, Plan, UserError
from metatrain.inner.measure import LocalMeasurements, Measurements, Probe
from metatrain.inner.network import make_spec, task_layers, task_matches
from metatrain.inner.plan import check_plan, fastest, known_plan, members_per_call
from metatrain.inner.population import Draw, Evaluator, GenerationSpec, LocalEvaluator
from metatrain.inner.processes import ProcessEvaluator, local_processes
from metatrain.outer.start import resolve_start, start_theta
from metatrain.outer.state import Progress
from metatrain.outer.strategy import Strategy, make_strategy
from metatrain.ray.share import has_accelerator
from metatrain.system import search_current_folder
from tasks import make_task, sample
from tasks.base import AnyTask

_FURTHER_DRAWS = 1 << 20  # keys of draws after the first one begin here, away from those that `split` gives


@dataclasses.dataclass(frozen=True)
class Setup:
    """The objects that a configuration describes.

    Attributes:
      config: the configuration; `plan` and `members_per_call` are decided, no longer "auto".
      tasks: the variants of the task; each draw of a generation uses one of them.
      spec: the form of the optimizer.
      strategy: the evolution strategy.
    """

    config: Config
    tasks: tuple[AnyTask, ...]
    spec: l3rs.Spec
    strategy: Strategy

    @classmethod
    def build(cls, config: Config, log: Callable[[str], None] = lambda _: None, *, resolved: bool = False) -> Setup:
        """Build the tasks, and decide what the configuration leaves to "auto".

        Args:
          config: of the run.
          log: called before each step that may take a while.
          resolved: it is from `resolve_start`, as a saved run's is: the checkpoint `optimizer.start` is not read.

        Raises:
          UserError, TaskError, L3RSError: the configuration cannot be run.
        """
        config = config if resolved else resolve_start(config)
        if config.own_code():
            search_current_folder()
        forms = config.task.forms()
        built: list[AnyTask] = []
        for number, (name, options) in enumerate(forms, 1):
            log(f"task {number} of {len(forms)}, {name}: data and inits")
            built.append(make_task(name, options))
        tasks = tuple(built)
        check_plan(tasks, config.execution.plan)
        spec = make_spec(task_layers(tasks[0]), config.optimizer.spec_fields())
        _check_variants(tasks, spec)
        strategy = make_strategy(config.outer, l3rs.init_meta_params(jax.random.key(0), spec))
        config = _decide(config, tasks, spec, log)
        return cls(config, tasks, spec, strategy)

    @functools.cached_property
    def start(self) -> Theta | None:
        """The meta-parameters of `optimizer.start`, which are read when a run begins; None for new ones."""
        begin = self.config.optimizer
        return None if begin.start is None else start_theta(begin, self.spec, self.tasks[0])

    def evaluator(self, log: Callable[[str], None]) -> Evaluator:
        """The evaluator of the chosen backend; `log` is called with what an operator should look at."""
        execution, outer = self.config.execution, self.config.outer
        plan, members = execution.plan, execution.members_per_call
        assert plan != "auto"
        assert members != "auto"
        if execution.backend == "ray":
            from metatrain.ray.evaluator import RayEvaluator  # Ray's dependencies take a while to import

            return RayEvaluator(self.tasks, self.spec, outer, members, plan, execution, log)
        if plan == "torch" and (processes := local_processes(self.tasks, execution.workers, outer.population)) > 1:
            return ProcessEvaluator(self.tasks, self.spec, outer, processes, log)
        return LocalEvaluator(self.tasks, self.spec, self.strategy, outer.population, members, plan)

    def fresh(self) -> Progress:
        """The state before the first generation, a function of the seed."""
        theta_key, strategy_key = jax.random.split(jax.random.key(self.config.seed))
        theta = l3rs.init_meta_params(theta_key, self.spec) if self.start is None else self.start
        state = self.strategy.init(strategy_key, theta)
        return Progress(generation=0, failures=0, candidate_steps=0, seconds=0.0, strategy=state)

    def generation(self, number: int) -> GenerationSpec:
        """A generation's random choices. They depend on the seed and the number alone, so nothing has to be saved."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        others = [jax.random.fold_in(key, _FURTHER_DRAWS + index) for index in range(1, self.config.outer.samples)]
        ask_key = jax.random.split(key, 3)[0]
        return GenerationSpec(number, jax.random.key_data(ask_key), tuple(map(self._draw, [key, *others])))

    def _draw(self, key: jax.Array) -> Draw:
        _, sample_key, horizon_key = jax.random.split(key, 3)
        horizon = horizon_at(float(jax.random.uniform(horizon_key)), self.config.outer.horizon)
        task = int(jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(self.tasks)))
        return Draw(sample(self.tasks[task], sample_key), horizon, task)


def horizon_at(quantile: float, config: HorizonConfig) -> int:
    """The horizon below which a share `quantile` in [0, 1) of all draws lies."""
    power = config.power + 1  # of the integral
    if power == 0:
        low, high = math.log(config.min), math.log(config.max)
        return round(math.exp(low + quantile * (high - low)))
    low, high = config.min**power, config.max**power
    return round((low + quantile * (high - low)) ** (1 / power))


def _check_variants(tasks: tuple[AnyTask, ...], spec: l3rs.Spec) -> None:
    """Raise UserError unless the optimizer fits the network of every variant."""
    for other in tasks[1:]:
        try:
            task_matches(spec, other)
        except l3rs.L3RSError as error:
            raise UserError(
                f"task.variants have different networks ({error}): optimizer.embedding must be descriptor"
            ) from None


def _decide(config: Config, tasks: tuple[AnyTask, ...], spec: l3rs.Spec, log: Callable[[str], None]) -> Config:
    """The configuration without "auto" in `plan` and `members_per_call`, and with what they were chosen by.

    On Ray that is measured on workers, whose devices are not those of the driver.
    """
    execution = config.execution
    plan = known_plan(tasks) if execution.plan == "auto" else execution.plan  # None: the faster one
    members = execution.members_per_call
    seconds: Mapping[str, Mapping[Plan, float]] = {}
    fits: Mapping[str, int | None] = {}
    count_members = members == "auto" and plan in (None, "fused") and memory_is_limited(execution)
    if plan is None or count_members:
        with contextlib.closing(_measurements(config, tasks, spec, log)) as measurements:
            if plan is None:
                seconds = measurements.plan_seconds()
                plan = fastest(list(seconds.values()))
            if count_members and plan == "fused":
                fits = measurements.members_that_fit()
    if members == "auto":
        members = members_per_call(config.outer.population, plan, _on_accelerator(execution), list(fits.values()))
    log(f"plan: {plan}, {members} candidate{'s' * (members > 1)} in a call")
    measured = tuple(
        MeasuredConfig(
            device=device,
            ms_per_step={plan: round(1e3 * s, 4) for plan, s in seconds.get(device, {}).items()},
            members_that_fit=fits.get(device),
        )
        for device in seconds or fits
        if seconds or fits[device] is not None
    )
    chosen = execution.model_copy(update={"plan": plan, "members_per_call": members})
    return config.model_copy(update={"execution": chosen, "measured": measured or config.measured})


def _measurements(
    config: Config, tasks: tuple[AnyTask, ...], spec: l3rs.Spec, log: Callable[[str], None]
) -> Measurements:
    if is_elsewhere(config.execution):
        from metatrain.ray.measure import WorkerMeasurements

        return WorkerMeasurements(tasks, spec, config.outer, config.execution, log)
    return LocalMeasurements(Probe(tasks, spec, config.outer, log))


def is_elsewhere(execution: ExecutionConfig) -> bool:
    """Whether workers have other devices than this process: on Ray the driver stays on its machine's CPU."""
    cluster = execution.address or os.environ.get("RAY_ADDRESS")
    return execution.backend == "ray" and bool(cluster or has_accelerator(execution.resources_per_worker))


def memory_is_limited(execution: ExecutionConfig) -> bool:
    """Whether candidates may fill a device's memory; CPUs share that of their machine."""
    return execution.backend == "local" or has_accelerator(execution.resources_per_worker)


def _on_accelerator(execution: ExecutionConfig) -> bool:
    """Whether candidates run on accelerators rather than CPU cores."""
    if execution.backend == "ray":
        return has_accelerator(execution.resources_per_worker)
    return jax.default_backend() != "cpu"
