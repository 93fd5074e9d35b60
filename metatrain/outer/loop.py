"""The outer loop: a run from its configuration to a deployable optimizer.

runs/NAME/config.yaml   the resolved configuration
runs/NAME/optimizer.json the form of the optimizer: its spec
runs/NAME/metrics.jsonl one object per generation
runs/NAME/report.html   a page that is kept up to date
runs/NAME/tensorboard/
runs/NAME/state/        to resume (Orbax)
runs/NAME/optimizer/    to deploy (`l3rs.load`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.io.files import remove_leftovers, write_atomically
from metatrain.config import Config, UserError, differences, dump_config, load_config, require_config
from metatrain.inner.devices import use_cpu_only
from metatrain.inner.population import Evaluator, GenerationSpec
from metatrain.log_lines import print_line
from metatrain.outer.code import checked_code, code_of, with_devices
from metatrain.outer.export import Form, save_optimizer, write_form
from metatrain.outer.lease import LeaseLostError
from metatrain.outer.lock import BusyError, FolderGoneError, FolderWatch, run_lock
from metatrain.outer.metrics import Metrics, describe_draws
from metatrain.outer.progress import Display
from metatrain.outer.setup import Setup
from metatrain.outer.signals import Interrupts
from metatrain.outer.sinks import make_sinks
from metatrain.outer.start import resolve_start
from metatrain.outer.state import Progress, StateStore
from metatrain.outer.store import RunFolder, run_folder
from metatrain.outer.strategy import mean_ranks, state_like
from metatrain.report.live import Live
from metatrain.system import check_destination
from metatrain.trust import refuse_links, require_trust

_log = logging.getLogger("metatrain")

_ALIKE = 3  # generations in a row whose candidates do not differ, after which that is said
_CHANGEABLE = ("execution", "checkpoint", "logging")  # sections that do not change what a run computes


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run."""

    folder: str  # or URL
    generation: int  # generations done
    finished: bool
    optimizer: str | None  # the deployable optimizer, once the run is finished


def run(
    config: Config,
    out: str | Path | None = None,
    *,
    resume_run: bool = False,
    allow_other_version: bool = False,
    log: Callable[[str], None] | None = None,
) -> Run:
    """Start a meta-training run.

    Args:
      config: the run's configuration, from `load_config`.
      out: the run's folder, or a URL of an object store; `runs/NAME` by default.
      resume_run: resume the folder's run if there is one. The sections `execution`, `checkpoint` and
        `logging` may differ then, and `outer.steps` may be larger.
      allow_other_version: resume a run that other code has begun.
      log: of a new run; see `Display`.

    Raises:
      UserError: the folder exists, or holds another run; or the configuration cannot be run here.
      WaitError: a wait for the cluster has reached its bound.
    """
    require_config(config)
    _leave_devices(config)
    with run_folder(out if out is not None else Path("runs") / config.name) as folder:
        if resume_run and (folder.path / "config.yaml").is_file():
            refuse_links(folder.path, folder.name)
            return _resume(folder, resolve_start(config, _run_config(folder).optimizer), allow_other_version)
        refuse_existing(folder.path, folder.name)
        check_destination(folder.path)
        setup = Setup.build(config.model_copy(update={"code": None}), log or print_line)
        refuse_existing(folder.path, folder.name)  # another run may have begun meanwhile
        code = code_of(config)
        setup = dataclasses.replace(setup, config=setup.config.model_copy(update={"code": code}))
        _create(folder, setup.config)
        try:
            return _train(folder, setup, log=log)
        except (BusyError, FolderGoneError):
            raise
        except Exception:
            # Ended before anything was saved: the new folder must not block the next attempt.
            if not any(step.name.isdigit() for step in (folder.path / "state").glob("*")):
                shutil.rmtree(folder.path)
            raise


def refuse_existing(path: Path, name: str) -> None:
    """Raise UserError if the folder of a new run exists; `name` is what its user calls it."""
    if path.exists():
        raise UserError(f"{name} exists; resume it with `metatrain resume {name}` or choose another with --out")


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    trust_task: bool = False,
    allow_other_version: bool = False,
) -> Run:
    """Resume an interrupted run from its newest good checkpoint.

    The result is that of a run that was never interrupted, bit for bit.

    Args:
      folder: the run; a folder or a URL.
      overrides: of `execution`, `checkpoint` or `logging`, e.g. `execution.workers=8`. They do not change
        what the run computes. A larger `outer.steps` does: the learning rate's cosine is that of the new length
        from here on, so the result is not that of a run that was started with it.
      allow_other_version: resume a run that other code has begun.
      trust_task: import a task `package.module:function` though the run is another user's, or at a URL.

    Raises:
      UserError: not a run's folder, no checkpoint can be read, an override would change the run, or its task is not
        trusted.
    """
    with run_folder(folder, must_exist=True) as opened:
        config = _run_config(opened)  # reports a folder that is not a run
        refuse_links(opened.path, opened.name)
        if not trust_task:
            files = None if "://" in str(folder) else [opened.path, opened.path / "config.yaml"]
            require_trust(config, files, opened.name)
        return _resume(opened, load_config(opened.path / "config.yaml", overrides), allow_other_version)


def _create(folder: RunFolder, config: Config) -> None:
    """Make the run's folder and its configuration in one step: a start that is killed leaves no half of it."""
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.path.name}.", dir=folder.path.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        (new / "config.yaml").write_text(dump_config(config))
        new.rename(folder.path)


def _resume(folder: RunFolder, wanted: Config, allow_other_version: bool) -> Run:
    """Resume the saved run with the parts of `wanted` that may change."""
    _leave_devices(wanted)
    saved = _run_config(folder)
    # How candidates are grouped decides the last bits, so it stays as it was.
    kept = {key: getattr(saved.execution, key) for key in ("plan", "members_per_call")}
    asked = {key: getattr(wanted.execution, key) for key in kept}
    if any(value not in ("auto", kept[key]) for key, value in asked.items()):
        raise UserError(f"{folder.name} was started with {kept}; that cannot be changed to {asked}")
    steps = max(saved.outer.steps, wanted.outer.steps)
    changed = {name: getattr(wanted, name) for name in _CHANGEABLE}
    config = saved.model_copy(
        update={
            **changed,
            "outer": saved.outer.model_copy(update={"steps": steps}),
            "execution": wanted.execution.model_copy(update=kept),
        }
    )
    different = [
        f"{key} was {_shown(before)} and would become {_shown(after)}"
        for key, (before, after) in differences(config, wanted).items()
        if not key.startswith(("execution.", "measured", "code"))
    ]
    if different:
        raise UserError(
            f"{folder.name} holds another run: {'; '.join(different)}; on resume only the sections "
            f"{', '.join(_CHANGEABLE)} may change, and outer.steps may grow"
        )
    code = checked_code(folder.name, saved, wanted, allow_other_version)
    rewritten = saved.model_copy(update={"outer": config.outer, "code": code})
    setup = Setup.build(config.model_copy(update={"code": code}), print_line, resolved=True)
    return _train(folder, setup, None if rewritten == saved else rewritten)


def _leave_devices(config: Config) -> None:
    """On Ray, accelerators are the workers'. Called before this process computes anything."""
    if config.execution.backend == "ray":
        use_cpu_only()


def _cosine(share: float) -> float:
    """The learning rate after a share of the run, as a share of its first value; see `make_strategy`."""
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _run_config(folder: RunFolder) -> Config:
    if not (folder.path / "config.yaml").is_file():
        raise UserError(f"{folder.name} is not a run: it has no config.yaml")
    return load_config(folder.path / "config.yaml")


def _train(
    folder: RunFolder, setup: Setup, rewritten: Config | None = None, log: Callable[[str], None] | None = None
) -> Run:
    """Compute the remaining generations and write the optimizer, while holding the run's lock.

    Args:
      folder, setup: the run.
      rewritten: what to save as its configuration, if that may have changed.
      log: see `Display`.

    Raises:
      UserError: another process holds the lock; or too many generations in a row had no finite loss.
    """
    outer = setup.config.outer
    with run_lock(folder.path, folder.name):
        watch = FolderWatch(folder.path, folder.name)
        remove_leftovers(folder.path)
        with contextlib.ExitStack() as resources:
            session = _Session(folder, setup, watch, resources, Display(outer.steps, log))
            if rewritten is not None:
                session.rewrite(rewritten)
            finished = session.compute()
            progress = session.progress
            if progress.failures >= outer.max_failures:
                raise UserError(
                    f"{folder.name}: {progress.failures} generations in a row without a finite loss; stopped, and the "
                    "last good state is saved: try a smaller optimizer.step_scale or outer.sigma"
                )
            if not finished:
                session.display.log(
                    f"stopped after {progress.generation} of {outer.steps} generations and saved; "
                    f"resume with: metatrain resume {folder.name}"
                )
                return Run(folder.name, progress.generation, False, None)
        watch.check()
        theta = setup.strategy.mean(progress.strategy)
        destination = folder.path / "optimizer"
        optimizer = save_optimizer(setup.config, _form(setup), progress, theta, destination, overwrite=True)
        folder.saved(True)
        return Run(folder.name, progress.generation, True, f"{folder.name}/{optimizer.name}")


class _Session:
    """The part of a run that one process computes.

    Args:
      folder, setup: the run.
      watch: notices that the folder is gone.
      resources: closes what is opened here.
      display: the terminal.

    Attributes:
      progress: how far the run is.
      display: the terminal.
    """

    def __init__(
        self, folder: RunFolder, setup: Setup, watch: FolderWatch, resources: contextlib.ExitStack, display: Display
    ) -> None:
        config = setup.config
        self._folder, self._setup, self._watch = folder, setup, watch
        self.display = display
        write_form(folder.path, _form(setup))
        self._evaluator = setup.evaluator(self.display.warn)
        resources.callback(self._evaluator.close)
        resources.callback(self.display.close)
        self._store = StateStore(folder.path / "state", config.checkpoint.keep, config.code)
        resources.callback(self._store.close)
        self.progress = self._store.restore(state_like(setup.strategy, setup.spec)) or setup.fresh()
        generation = self.progress.generation
        self._metrics = Metrics(folder.path, generation, make_sinks(config, folder.path, generation))
        resources.callback(self._metrics.close)
        self._page = Live(folder.path)
        self._code = config.code
        self._compiled: set[int] = set()  # tasks
        self._alike = 0  # generations in a row whose candidates had one and the same meta-loss
        resources.callback(self._page.close)

    def compute(self) -> bool:
        """Compute and save generations until the last one, an interrupt or too many failures.

        Returns whether it was not interrupted.
        """
        start = self.progress.generation
        self.display.begin(start)
        finished = True
        with Interrupts() as interrupts:
            try:
                self._generations(interrupts)
            except KeyboardInterrupt:
                finished = False
            except (FolderGoneError, LeaseLostError):
                raise
            except Exception:
                self._watch.check()  # that the folder is gone is the cause, not the error that it leads to
                if self.progress.generation > start:  # an error must not cost the generations before it
                    self._save()
                raise
            self._watch.check()
            self._store.save(self.progress)
            self._page.close()
            self._folder.saved(True)
        return finished

    def rewrite(self, config: Config) -> None:
        """Save a configuration that has changed, and say what a larger `outer.steps` means."""
        file = self._folder.path / "config.yaml"
        before, done = load_config(file).outer.steps, self.progress.generation
        if before != config.outer.steps:
            old, new = (_cosine(done / steps) for steps in (before, config.outer.steps))
            self.display.log(
                f"outer.steps grows from {before} to {config.outer.steps}: from generation {done} on, the learning "
                f"rate follows the longer cosine, {new:.0%} of its first value instead of {old:.0%}; the result is not "
                f"that of a run that was started with {config.outer.steps}"
            )
        write_atomically(file, dump_config(config))

    def _generations(self, interrupts: Interrupts) -> None:
        outer, every = self._setup.config.outer, self._setup.config.checkpoint.every
        while self.progress.generation < outer.steps:
            spec = self._setup.generation(self.progress.generation)
            if new := {draw.task for draw in spec.draws} - self._compiled:
                self._compiled |= new
                self.display.starting(sorted(new), len(self._compiled), len(self._setup.tasks))
            self.progress, line = _generation(self._setup, self._evaluator, self.progress, spec, interrupts, self._wait)
            line["compiled"] = bool(new)
            self._watch.check()
            self._note_devices(line.get("devices", ()))
            self.display.update(self._metrics.write(line))
            self._note_alike(line, len(spec.draws) * outer.population)
            self._page.tick()
            if self.progress.failures >= outer.max_failures:
                return
            if self.progress.generation % every == 0:
                self._save()

    def _note_alike(self, line: Mapping[str, Any], evaluations: int) -> None:
        """Say it if candidates do not differ, as when a task's loss is NaN soon after the start."""
        all_finite = line["finite"] == evaluations
        alike = all_finite and math.isclose(line["meta_loss_mean"], line["meta_loss_best"], rel_tol=1e-7)
        self._alike = self._alike + 1 if alike else 0
        if self._alike == _ALIKE:
            self.display.log(
                f"in {_ALIKE} generations all candidates had the same meta-loss: nothing that an optimizer does "
                "changes it. Is the task's training loss finite after a few steps, and do its parameters train?"
            )

    def _note_devices(self, kinds: Sequence[str]) -> None:
        """Record the kinds of the workers' devices in the run's configuration; one that was not there is named."""
        if self._code is None or (noted := with_devices(self._code, kinds)) == self._code:
            return
        if self._code.device:
            self.display.log(
                f"the run was computed on different devices, {noted.device}; the last bits of its result may change"
            )
        self._code = noted
        file = self._folder.path / "config.yaml"
        write_atomically(file, dump_config(load_config(file).model_copy(update={"code": noted})))

    def _wait(self, reason: str) -> None:
        """Save before a wait whose end is not known."""
        self._save()
        self.display.warn(f"{reason}; what is done is saved")

    def _save(self) -> None:
        self._watch.check()
        self._store.save(self.progress)
        self._folder.saved(False)


def _generation(
    setup: Setup,
    evaluator: Evaluator,
    progress: Progress,
    spec: GenerationSpec,
    interrupts: Interrupts,
    waiting: Callable[[str], None],
) -> tuple[Progress, dict[str, Any]]:
    """Compute one generation.

    Returns:
      (the progress after it, its line of metrics.jsonl)
    """

    def saved(reason: str) -> None:
        with interrupts.held():
            waiting(reason)

    began = time.perf_counter()
    with interrupts.allowed():
        losses = evaluator.evaluate(progress.strategy, spec, saved)
    failed = not np.isfinite(losses).any()
    strategy = progress.strategy
    if not failed:
        fitness = losses[0] if len(losses) == 1 else mean_ranks(losses)
        strategy = setup.strategy.tell(jax.random.wrap_key_data(spec.key), strategy, jnp.asarray(fitness))
    theta_norm = float(optax.tree.norm(setup.strategy.mean(strategy)))
    seconds = time.perf_counter() - began
    steps = setup.config.outer.population * sum(draw.horizon for draw in spec.draws)
    line = {
        "generation": spec.generation,
        **describe_draws(spec.draws, losses),
        "theta_norm": theta_norm,
        "candidate_steps_per_s": steps / seconds,
        "seconds": seconds,
        **evaluator.report(),
    }
    progress = Progress(
        generation=progress.generation + 1,
        failures=progress.failures + 1 if failed else 0,
        candidate_steps=progress.candidate_steps + steps,
        seconds=progress.seconds + seconds,
        strategy=strategy,
    )
    return progress, line


def _form(setup: Setup) -> Form:
    return Form(setup.spec, ", ".join(dict.fromkeys(task.name for task in setup.tasks)))
