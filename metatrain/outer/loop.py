"""The outer loop: a run from its configuration to a deployable optimizer.

runs/NAME/config.yaml   the resolved configuration
runs/NAME/metrics.jsonl one object a generation
runs/NAME/report.html   a page, kept up to date
runs/NAME/tensorboard/
runs/NAME/state/        to resume (Orbax)
runs/NAME/optimizer/    to deploy (`l3rs.load`)
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
from metatrain.config import Config, ExecutionConfig, UserError, dump_config, load_config, portable
from metatrain.evaluation.results import write_whole
from metatrain.inner.plan import choose_plan, members_per_call
from metatrain.inner.population import Evaluator, GenerationSpec, LocalEvaluator
from metatrain.outer.progress import Display
from metatrain.outer.state import Progress, StateStore
from metatrain.outer.store import RunFolder, run_folder
from metatrain.outer.strategy import Strategy, make_strategy
from metatrain.ray.evaluator import RayEvaluator
from metatrain.report.live import Live
from tasks import Task, make_task, sample

_log = logging.getLogger("metatrain")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run."""

    folder: str  # or URL
    generation: int  # generations done
    finished: bool
    optimizer: str | None  # the deployable optimizer, once the run is finished


def run(config: Config, out: str | Path | None = None, *, resume_run: bool = False) -> Run:
    """Meta-train from the start.

    Args:
      config: the run's configuration, from `load_config`.
      out: the run's folder, or a URL of an object store; `runs/NAME` when not given.
      resume_run: go on with the folder's run if there is one; where it runs may have changed.

    Raises:
      UserError: the folder exists, or holds another run; or the configuration asks for what cannot be had.
    """
    with run_folder(out if out is not None else Path("runs") / config.name) as folder:
        if resume_run and (folder.path / "config.yaml").is_file():
            return _resume(folder, config)
        setup = Setup.build(config)
        if folder.path.exists():
            raise UserError(
                f"{folder.name} exists; resume it with `metatrain resume {folder.name}` or choose another with --out"
            )
        # There with its configuration, or not at all: a killed start is not in the way of the next.
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.path.name}.", dir=folder.path.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            (new / "config.yaml").write_text(dump_config(setup.config))
            new.rename(folder.path)
        try:
            return _train(folder, setup)
        except _BusyError:
            raise
        except UserError:
            # Refused before anything was saved: what was made here is not in the way of the next try.
            if not any(step.name.isdigit() for step in (folder.path / "state").glob("*")):
                shutil.rmtree(folder.path)
            raise


def resume(folder: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Go on with an interrupted run, from its newest good checkpoint: the result is that of a run
    that was never interrupted.

    Args:
      folder: the run; a folder or a URL.
      overrides: of `execution`, e.g. `execution.workers=8`: where it runs, not what.

    Raises:
      UserError: not a run's folder, none of its checkpoints can be read, or an override would change the run.
    """
    with run_folder(folder) as opened:
        _run_config(opened)  # says what a run is
        return _resume(opened, load_config(opened.path / "config.yaml", overrides))


def _resume(folder: RunFolder, wanted: Config) -> Run:
    """Go on with the run as it was saved, where `wanted` says."""
    saved = _run_config(folder)
    # How candidates are put together decides the last bits, so it stays what it was.
    kept = {key: getattr(saved.execution, key) for key in ("plan", "members_per_call")}
    asked = {key: getattr(wanted.execution, key) for key in kept}
    if any(value not in ("auto", kept[key]) for key, value in asked.items()):
        raise UserError(f"{folder.name} was begun with {kept}; that cannot be changed to {asked}")
    config = saved.model_copy(update={"execution": wanted.execution.model_copy(update=kept)})
    if wanted.model_copy(update={"execution": config.execution}) != config:
        different = [name for name in Config.model_fields if getattr(wanted, name) != getattr(config, name)]
        different = [name for name in different if name != "execution"]
        raise UserError(f"{folder.name} holds a run with another {', '.join(different)}; only execution may change")
    return _train(folder, Setup.build(config))


def export(folder: str | Path, destination: str | Path, results: Mapping[str, Any] | None = None) -> Path:
    """Write the optimizer of a run's newest checkpoint, finished or not.

    Args:
      folder: the run; a folder or a URL.
      destination: the folder to make.
      results: what was measured of the optimizer, to go into its `info`; see `Results.summary`.

    Raises:
      UserError: not a run's folder, or it has no checkpoint yet.
      L3RSError: the destination exists.
    """
    with run_folder(folder) as opened:
        setup = Setup.build(_run_config(opened))
        store = StateStore(opened.path / "state", setup.config.checkpoint.keep)
        try:
            progress = store.restore(setup.fresh().strategy, to_go_on=False)
        finally:
            store.close()
        if progress is None:
            raise UserError(f"{opened.name} has no checkpoint yet")
        return _save_optimizer(setup, progress, Path(destination), results)


def _run_config(folder: RunFolder) -> Config:
    if not (folder.path / "config.yaml").is_file():
        raise UserError(f"{folder.name} is not a run: it has no config.yaml")
    return load_config(folder.path / "config.yaml")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a configuration stands for, with everything that was left to "auto" decided."""

    config: Config
    tasks: tuple[Task, ...]  # every generation is of one of them
    spec: l3rs.Spec
    strategy: Strategy

    @classmethod
    def build(cls, config: Config) -> Setup:
        tasks = tuple(make_task(name, options) for name, options in config.task.forms())
        task = tasks[0]
        spec = l3rs.Spec.create(task.params_shape(), **config.optimizer.model_dump())
        for other in tasks[1:]:
            try:
                l3rs.match_layers(spec, other.params_shape())
            except l3rs.L3RSError as error:
                raise UserError(
                    f"task.variants have different networks ({error}): optimizer.embedding must be descriptor"
                ) from None
        plan, members = config.execution.plan, config.execution.members_per_call
        if plan == "auto":
            plan = choose_plan(tasks, spec)
        strategy = make_strategy(config.outer, l3rs.init_meta_params(jax.random.key(0), spec))
        if members == "auto":
            devices = jax.local_devices()
            calls = len(devices) * _calls_a_device(config.execution)
            members = min(
                members_per_call(each, spec, strategy, config.outer.population, plan, calls, devices) for each in tasks
            )
        execution = config.execution.model_copy(update={"plan": plan, "members_per_call": members})
        config = config.model_copy(update={"execution": execution})
        return cls(config, tasks, spec, strategy)

    def evaluator(self, say: Callable[[str], None]) -> Evaluator:
        execution, outer = self.config.execution, self.config.outer
        plan, members = execution.plan, execution.members_per_call
        assert plan != "auto"
        assert members != "auto"
        if execution.backend == "ray":
            return RayEvaluator(self.tasks, self.spec, outer, members, plan, execution, say)
        return LocalEvaluator(self.tasks, self.spec, self.strategy, outer.population, members, plan)

    def fresh(self) -> Progress:
        theta_key, strategy_key = jax.random.split(jax.random.key(self.config.seed))
        state = self.strategy.init(strategy_key, l3rs.init_meta_params(theta_key, self.spec))
        return Progress(generation=0, failures=0, candidate_steps=0, seconds=0.0, strategy=state)

    def generation(self, number: int) -> GenerationSpec:
        """A function of the seed and the number alone: nothing to save, nothing to replay."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        ask_key, sample_key, horizon_key = jax.random.split(key, 3)
        low, high = math.log(self.config.outer.horizon.min), math.log(self.config.outer.horizon.max)
        horizon = round(math.exp(low + float(jax.random.uniform(horizon_key)) * (high - low)))
        task = int(jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(self.tasks)))
        return GenerationSpec(number, jax.random.key_data(ask_key), sample(self.tasks[task], sample_key), horizon, task)


class _BusyError(UserError):
    """Somebody else's run."""


def _train(folder: RunFolder, setup: Setup) -> Run:
    """The run, by this process alone.

    Raises:
      UserError: another process is at it.
    """
    with (folder.path / "config.yaml").open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _BusyError(f"{folder.name}: another process is at this run") from None
        except OSError as error:  # a file system without locks
            _log.debug("%s cannot be locked: %s", folder.name, error)
        return _go_on(folder, setup)


def _go_on(folder: RunFolder, setup: Setup) -> Run:
    config = setup.config
    display = Display(config.outer.steps)
    evaluator = setup.evaluator(display.say)
    store = StateStore(folder.path / "state", config.checkpoint.keep)
    progress = store.restore(setup.fresh().strategy) or setup.fresh()
    metrics = _Metrics(folder.path, progress.generation, config.logging.tensorboard)
    page = Live(folder.path)
    display.begin(progress.generation)
    began = progress.generation

    def waiting(sentence: str) -> None:
        store.save(progress)
        folder.saved(False)
        display.say(f"{sentence}; what is done is saved")

    interrupted = False
    try:
        with _Interrupts() as interrupts:
            try:
                while progress.generation < config.outer.steps:
                    progress, line = _generation(setup, evaluator, progress, interrupts, waiting)
                    metrics.write(line)
                    display.update(line)
                    page.tick()
                    if progress.failures >= config.outer.max_failures:
                        break
                    if progress.generation % config.checkpoint.every == 0:
                        store.save(progress)
                        folder.saved(False)
            except KeyboardInterrupt:
                interrupted = True
            except Exception:
                if progress.generation > began:  # what is done is not lost with what failed
                    store.save(progress)
                    folder.saved(False)
                raise
            store.save(progress)
            page.close()
            folder.saved(True)
        if progress.failures >= config.outer.max_failures:
            raise UserError(
                f"{folder.name}: {progress.failures} generations in a row without a finite loss; stopped, and the "
                "last good state is saved: try a smaller optimizer.step_scale or outer.sigma"
            )
        if interrupted:
            display.say(
                f"stopped after {progress.generation} of {config.outer.steps} generations and saved; "
                f"go on with: metatrain resume {folder.name}"
            )
            return Run(folder.name, progress.generation, False, None)
    finally:
        evaluator.close()
        display.close()
        metrics.close()
        page.close()
        store.close()
    optimizer = _save_optimizer(setup, progress, folder.path / "optimizer", overwrite=True)
    folder.saved(True)
    return Run(folder.name, progress.generation, True, f"{folder.name}/{optimizer.name}")


def _generation(
    setup: Setup,
    evaluator: Evaluator,
    progress: Progress,
    interrupts: _Interrupts,
    waiting: Callable[[str], None],
) -> tuple[Progress, dict[str, Any]]:
    """One generation: (progress, evaluator) -> (progress, a line of metrics.jsonl)."""
    began = time.perf_counter()
    spec = setup.generation(progress.generation)
    with interrupts.allowed():
        fitness = evaluator.evaluate(progress.strategy, spec, waiting)
    finite = fitness[np.isfinite(fitness)]
    strategy = progress.strategy
    if finite.size:
        strategy = setup.strategy.tell(jax.random.wrap_key_data(spec.key), strategy, jnp.asarray(fitness))
    psi_norm = float(optax.tree.norm(setup.strategy.mean(strategy)))
    seconds = time.perf_counter() - began
    steps = setup.config.outer.population * spec.horizon
    line = {
        "generation": spec.generation,
        "horizon": spec.horizon,
        "task": spec.task,
        "init": int(spec.sample.init),
        "meta_loss_mean": float(finite.mean()) if finite.size else None,
        "meta_loss_best": float(finite.min()) if finite.size else None,
        "finite": int(finite.size),
        "psi_norm": psi_norm,
        "candidate_steps_per_s": steps / seconds,
        "seconds": seconds,
        **evaluator.report(),
    }
    progress = Progress(
        generation=progress.generation + 1,
        failures=0 if finite.size else progress.failures + 1,
        candidate_steps=progress.candidate_steps + steps,
        seconds=progress.seconds + seconds,
        strategy=strategy,
    )
    return progress, line


def _save_optimizer(
    setup: Setup,
    progress: Progress,
    destination: Path,
    results: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    config = setup.config
    info = {
        "name": config.name,
        "task": ", ".join(dict.fromkeys(task.name for task in setup.tasks)),
        "horizon": config.outer.horizon.model_dump(),
        "generations": progress.generation,
        "candidate_steps": progress.candidate_steps,
        "seconds": round(progress.seconds, 1),
        "config": portable(config.model_dump(mode="json")),
    }
    if results is not None:
        info["results"] = dict(results)
    return l3rs.save(destination, setup.strategy.mean(progress.strategy), setup.spec, info, overwrite=overwrite)


def _calls_a_device(execution: ExecutionConfig) -> int:
    """Ray: so many shards that no worker waits long for the last; elsewhere one call a device."""
    if execution.backend == "local":
        return 1
    return 2 * (execution.workers if isinstance(execution.workers, int) else 4)


class _Metrics:
    """`metrics.jsonl` and TensorBoard. A resumed run drops the lines it is going to write again."""

    def __init__(self, folder: Path, generation: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _before(line, generation)]
            write_whole(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=generation or None)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board:
            for name, value in line.items():
                if name != "generation" and value is not None:
                    self._board.add_scalar(name, value, line["generation"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _before(line: str, generation: int) -> bool:
    try:
        return bool(json.loads(line)["generation"] < generation)
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return False


class _Interrupts:
    """Ctrl-C and SIGTERM, which interrupt a generation at once, but nothing that is being written."""

    def __init__(self) -> None:
        self._allowed = self._pending = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours
            self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in here, also for a signal that came before."""
        self._allowed = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._allowed = self._pending = False

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt
        self._pending = True
