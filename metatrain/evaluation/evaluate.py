"""How good a meta-trained optimizer is, against baselines tuned with care.

All optimizers see the same inits (which meta-training never used) and the same batches. A
baseline's learning rate is tuned for each horizon on inner_valid; test is only read off at the end.
"""

from __future__ import annotations

import collections
import datetime
import functools
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from l3rs import L3RSError
from l3rs.baselines import MADAState, SWATSState, iomt, mada_coefficients
from l3rs.baselines.mada import COEFFICIENTS
from l3rs.trees import layers_of
from metatrain.config import Config, EvaluationConfig, Plan, UserError, check_section, portable
from metatrain.evaluation.baselines import Baseline, Interleaved, Tuned, chosen_baselines, make_baseline
from metatrain.evaluation.interleaved import Trainers, interleaved_rollout, trainers
from metatrain.evaluation.results import (
    L3RS,
    CoefficientPath,
    Cost,
    Curve,
    DecisionPath,
    Record,
    Results,
    Speedup,
    SwitchHistory,
)
from metatrain.evaluation.statistics import area_under_curve, speedup
from metatrain.inner.plan import choose_plan, time_steps
from metatrain.inner.rollout import MakeOptimizer, Score, fused_rollout, inner_steps, learned, stepwise_rollout
from tasks import Task, TaskSample, make_task

_log = logging.getLogger("metatrain")

NO_OPTIMIZER = "-"  # instead of a checkpoint: the baselines alone

_GRID = 12  # learning rates a factor 2 apart, around the baseline's own
_GROW = 4  # added at an edge that holds the best value; also how many run in one compiled call
_GROWTHS = 3  # at most
_COEFFICIENT_POINTS = 100  # steps of a run at which MADA's coefficients are kept
_PATH_STEPS = 100  # the horizon whose path of (μ, λ) is kept is the nearest to it
_TIMED_STEPS = {"fused": 60, "stepwise": 8}  # long enough for a clock, short enough to wait for


def evaluate(
    optimizer: str | Path,
    config: Config,
    settings: Sequence[str] | None = None,
    say: Callable[[str], None] = _log.info,
    **options: Any,
) -> Results:
    """Compare a deployed optimizer with tuned baselines in the configuration's settings.

    Args:
      optimizer: a checkpoint; or "-" for the baselines alone.
      config: its `evaluation` says how; the settings are those of `evaluation.settings`, the task as it is
        when there are none.
      settings: which of the settings; all when not given.
      say: told what has been done.
      **options: replace fields of `evaluation`, e.g. `horizons=(10, 100), seeds=3`.

    Raises:
      UserError, L3RSError, TaskError: bad input; an optimizer that fits the model of no setting; nothing to
        compare.
    """
    began = time.perf_counter()
    how = _options(config.evaluation, options)
    config = config.model_copy(update={"evaluation": how})
    rivals, notes = chosen_baselines(how.baselines, how.schedules)
    ours, info = _restored(optimizer, how.make_guard())
    if ours is None and not rivals:
        raise UserError(f"there is nothing to compare: no optimizer and no baseline{''.join(f'; {n}' for n in notes)}")
    if ours is not None and ours.guard:
        notes.append(f"L3RS has a guard, which takes Adam's steps when the loss rises: {ours.guard}")
    parts: list[_Part] = []
    tuning: dict[str, Any] = {}
    costs: list[Cost] = []
    refused: list[str] = []
    for setting, task_options in _settings(config, settings).items():
        task = make_task(*config.task.form(task_options))
        label = f"{setting}: {task.name}" if setting else task.name
        try:
            if ours is not None:
                l3rs.match_layers(ours.spec, task.params_shape())
        except L3RSError as error:
            refused.append(f"{label} is left out: {error}")
            continue
        spec = l3rs.Spec.create(task.params_shape()) if ours is None else ours.spec
        plan = choose_plan([task], spec) if config.execution.plan == "auto" else config.execution.plan
        comparison = _Comparison(
            setting=label,
            task=task,
            samples=held_out_samples(task, config.seed, how.seeds),
            horizons=sorted(how.horizons),
            tuning_seeds=how.tuning_seeds or how.seeds,
            points=how.curve_points,
            plan=plan,
            trainers=trainers(task, plan),
            say=say,
        )
        jobs = [] if ours is None else [functools.partial(_run_l3rs, ours, comparison)]
        jobs += [functools.partial(_tune, name, baseline, comparison) for name, baseline in rivals.items()]
        found = _on_devices(jobs)
        parts += found
        tuning[label] = {name: grid for part in found for name, grid in part.tuning.items()}
        costs = costs or _costs(ours, rivals, comparison)
    if not parts:
        raise L3RSError(f"{optimizer} fits the model of no setting; {refused[0]}")
    records = [record for part in parts for record in part.records]
    notes += refused + _diverged(records) + _at_edges(tuning)
    notes += [note for part in parts for note in part.notes]
    return Results(
        optimizer=portable(str(optimizer)),
        records=records,
        speedup=_speedups(records),
        tuning=tuning,
        curves=[curve for part in parts for curve in part.curves],
        paths=[path for part in parts for path in part.paths],
        coefficients=[path for part in parts for path in part.coefficients],
        switches=[history for part in parts for history in part.switches],
        costs=costs,
        notes=notes,
        meta_training={k: info[k] for k in ("horizon", "generations", "candidate_steps", "seconds") if k in info},
        environment={**_environment(), "evaluation_seconds": round(time.perf_counter() - began, 1)},
        config=portable(config.model_dump(mode="json")),
    )


class _Learned(NamedTuple):
    """An optimizer of ours."""

    theta: l3rs.spec.Theta
    spec: l3rs.Spec
    guard: bool | l3rs.Guard

    @property
    def make(self) -> MakeOptimizer:
        return learned(self.spec, self.guard)


def _restored(optimizer: str | Path, guard: bool | l3rs.Guard) -> tuple[_Learned | None, dict[str, Any]]:
    """(the optimizer of a checkpoint, what the checkpoint says of it); (None, {}) for "-"."""
    if str(optimizer) == NO_OPTIMIZER:
        return None, {}
    theta, spec, info = l3rs.restore(optimizer)
    return _Learned(theta, spec, guard), info


def _options(section: EvaluationConfig, options: Mapping[str, Any]) -> EvaluationConfig:
    data = {**section.model_dump(), **{key: value for key, value in options.items() if value is not None}}
    return check_section(EvaluationConfig, data, "evaluation")


def _settings(config: Config, chosen: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """{setting: what it replaces of the task's options}; nothing when the configuration has no settings."""
    known = config.evaluation.settings
    if unknown := [name for name in chosen or () if name not in known]:
        raise UserError(
            f"no setting {', '.join(unknown)} in evaluation.settings; allowed are {', '.join(known) or 'none'}"
        )
    return {name: known[name] for name in chosen or known} or {"": {}}


def held_out_samples(task: Task, seed: int, count: int) -> TaskSample:
    """`count` task samples with inits that meta-training never used; leading axis [count]."""
    inits = task.pools["held_out"]
    rows = np.array([inits[i % len(inits)] for i in range(count)], np.int32)
    # 2**31 + i: never a generation's number, so never a batch stream of meta-training
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(2**31)
    )
    return TaskSample(jnp.asarray(rows), jax.random.key_data(keys))


class _Comparison(NamedTuple):
    """What all optimizers share."""

    setting: str
    task: Task
    samples: TaskSample
    horizons: Sequence[int]
    tuning_seeds: int
    points: int
    plan: Plan
    trainers: Trainers
    say: Callable[[str], None]


class _Part(NamedTuple):
    """What one job found."""

    records: list[Record]
    curves: list[Curve]
    paths: list[DecisionPath]
    coefficients: list[CoefficientPath]
    switches: list[SwitchHistory]
    tuning: dict[str, Any]
    notes: list[str]

    @classmethod
    def empty(cls) -> _Part:
        return cls([], [], [], [], [], {}, [])


def _run_l3rs(ours: _Learned, comparison: _Comparison, device: jax.Device) -> _Part:
    run = _Runner(comparison, ours.make, device)
    part = _Part.empty()
    for horizon in comparison.horizons:
        run.judge(part, jax.tree.map(lambda x: jnp.asarray(x)[None], ours.theta), L3RS, horizon, {})
        comparison.say(f"{comparison.setting}: l3rs, {horizon} steps")
    part.paths.append(_decisions(ours, comparison, device))
    return part


def _decisions(ours: _Learned, comparison: _Comparison, device: jax.Device) -> DecisionPath:
    """μ and λ at every step of the first seed's run."""
    horizon = min(comparison.horizons, key=lambda steps: abs(math.log(steps / _PATH_STEPS)))
    task = comparison.task
    theta, data, samples = jax.device_put((ours.theta, task.data, comparison.samples), device)
    first = jax.tree.map(lambda x: x[0], samples)
    steps = [
        (np.asarray(carry.state.mix), np.asarray(carry.state.step_norm))
        for carry in inner_steps(task, ours.make, theta, data, first, horizon)
    ]
    mix, step_norm = (np.stack(values) for values in zip(*steps, strict=True))
    layers = layers_of(task.params_shape())
    return DecisionPath(
        setting=comparison.setting,
        horizon=horizon,
        layers=[layer.path for layer in layers],
        shapes=[list(layer.shape) for layer in layers],
        directions=[direction.name for direction in ours.spec.directions],
        mix=mix.round(4).tolist(),
        step_rms=_significant(step_norm / np.sqrt([max(layer.size, 1) for layer in layers])).tolist(),
    )


def _significant(x: np.ndarray) -> np.ndarray:
    """Four digits: more would only make the file long."""
    return np.array([float(f"{value:.4g}") for value in x.ravel()]).reshape(x.shape)


def _tune(name: str, baseline: Baseline | Interleaved, comparison: _Comparison, device: jax.Device) -> _Part:
    run = _Runner(comparison, _maker(baseline), device)
    part = _Part.empty()
    for schedule in baseline.schedules:
        label = f"{name}/{schedule}"
        part.tuning[label] = {}
        for horizon in comparison.horizons:
            grid = _search(run, baseline, schedule, horizon, comparison.tuning_seeds)
            chosen = grid["chosen"]
            run.judge(part, Tuned.grid([chosen], schedule), label, horizon, {"learning_rate": chosen})
            part.notes.extend(_stage_notes(f"{comparison.setting}: {label}", horizon, run.watched))
            part.tuning[label][str(horizon)] = grid
            tried = len(grid["learning_rate"])
            comparison.say(f"{comparison.setting}: {label}, {horizon} steps, best of {tried} learning rates")
        if run.watched:
            history, losses = run.watched[0]
            stages = [
                {**stage._asdict(), "seconds": round(stage.seconds, 4), "notes": list(stage.notes)} for stage in history
            ]
            part.switches.append(SwitchHistory(comparison.setting, label, stages, _significant(losses).tolist()))
        if isinstance(baseline, Baseline):
            _look_inside(part, label, baseline, chosen, schedule, comparison, device)
    return part


def _stage_notes(where: str, horizon: int, watched: Sequence[tuple[Sequence[iomt.Stage], np.ndarray]]) -> list[str]:
    """What happened to stages that a reader should know: how many of them diverged, and what was said of how many."""
    stages = [stage for history, _ in watched for stage in history]
    said = collections.Counter(note for stage in stages for note in stage.notes if not note.startswith("the loss was"))
    said.update("the loss diverged" for stage in stages if stage.diverged)
    return [f"{where}, {horizon} steps: {note}, in {count} of {len(stages)} stages" for note, count in said.items()]


def _look_inside(
    part: _Part,
    label: str,
    baseline: Baseline,
    rate: float,
    schedule: str,
    comparison: _Comparison,
    device: jax.Device,
) -> None:
    """What the first seed's run over the longest horizon tells: MADA's coefficients, when SWATS switched."""
    tuned = Tuned(jnp.float32(0.1), jnp.int32(0))
    shape = comparison.task.params_shape()
    form = jax.eval_shape(lambda params: make_baseline(baseline, tuned, 10).init(params), shape)
    learns, switches = (len(_parts_of(form, kind)) == 1 for kind in (MADAState, SWATSState))
    if not learns and not switches:
        return
    horizon = comparison.horizons[-1]
    kept = set(np.linspace(1, horizon, min(horizon, _COEFFICIENT_POINTS)).round().astype(int).tolist())
    hyper = jax.tree.map(lambda x: x[0], Tuned.grid([rate], schedule))
    hyper, data, samples = jax.device_put((hyper, comparison.task.data, comparison.samples), device)
    first = jax.tree.map(lambda x: x[0], samples)
    found: dict[int, dict[str, float]] = {}
    for step, carry in enumerate(
        inner_steps(comparison.task, functools.partial(make_baseline, baseline), hyper, data, first, horizon), 1
    ):
        if learns and step in kept:
            found[step] = {name: float(x) for name, x in mada_coefficients(carry.state).items()}
    if learns:
        values = {name: [round(at[name], 4) for at in found.values()] for name in COEFFICIENTS}
        part.coefficients.append(CoefficientPath(comparison.setting, label, list(found), values))
    if switches:
        (state,) = _parts_of(carry.state, SWATSState)
        what = f"switched to SGD after step {int(state.switch_step)}" if state.sgd else "was Adam, it did not switch,"
        part.notes.append(f"{comparison.setting}: {label} {what} in the first seed's run of {horizon} steps")


def _parts_of(state: Any, kind: type) -> list[Any]:
    """The states of one transformation in an optimizer's."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _maker(baseline: Baseline | Interleaved) -> MakeOptimizer | Interleaved:
    return baseline if isinstance(baseline, Interleaved) else functools.partial(make_baseline, baseline)


def _search(
    run: _Runner, baseline: Baseline | Interleaved, schedule: str, horizon: int, tuning_seeds: int
) -> dict[str, Any]:
    """The grid of learning rates, its mean inner_valid losses over the first `tuning_seeds` samples,
    and its best, which is not at the edge. Test is not read. A learning rate that was given is the grid."""
    losses: dict[float, float] = {}
    start = baseline.learning_rate
    exponents = list(range(-(_GRID // 2), _GRID - _GRID // 2)) if baseline.tuned else [0]
    for growth in range(_GROWTHS + 1):
        for first in range(0, len(exponents), _GROW):
            rates = [start * 2.0**k for k in exponents[first : first + _GROW]]
            scores, _ = run(Tuned.grid(rates, schedule), horizon, "inner_valid", tuning_seeds)
            losses |= {rate: _mean_or_inf(loss) for rate, loss in zip(rates, scores.loss, strict=True)}
        ordered = sorted(losses)
        best = min(ordered, key=lambda rate: losses[rate])
        if growth == _GROWTHS or not baseline.tuned or best not in (ordered[0], ordered[-1]):
            break
        edge = round(math.log2(best / start))
        outwards = -1 if best == ordered[0] else 1
        exponents = [edge + outwards * k for k in range(1, _GROW + 1)]
    return {
        "learning_rate": ordered,
        "inner_valid_loss": [losses[rate] for rate in ordered],
        "seeds": tuning_seeds,
        "chosen": best,
        "at_edge": baseline.tuned and best in (ordered[0], ordered[-1]),
    }


class _Runner:
    """Rollouts of hyper-parameters on samples, on one device: all in one compiled call, or stepwise."""

    def __init__(self, comparison: _Comparison, make: MakeOptimizer | Interleaved, device: jax.Device) -> None:
        self._interleaved = make if isinstance(make, Interleaved) else None
        self.watched: list[tuple[list[iomt.Stage], np.ndarray]] = []  # IOMT's stages and losses in the last call's runs
        self._on_host = comparison.plan == "stepwise" or self._interleaved is not None
        self._setting = comparison.setting
        self._points = comparison.points
        self._device = device
        self._data, self._samples = jax.device_put((comparison.task.data, comparison.samples), device)
        if isinstance(make, Interleaved):
            self._call: Any = interleaved_rollout(
                comparison.task, make, comparison.plan, comparison.trainers, lambda *run: self.watched.append(run)
            )
        elif comparison.plan == "stepwise":
            self._call = stepwise_rollout(comparison.task, make, ())
        else:
            rollout = fused_rollout(comparison.task, make, ())

            def grid(
                hyper: Any, data: Any, samples: TaskSample, steps: jax.Array, splits: tuple[str, ...], points: Any
            ) -> Any:
                one = functools.partial(rollout, splits=splits, points=points)
                return jax.vmap(jax.vmap(one, (None, None, 0, None)), (0, None, None, None))(
                    hyper, data, samples, steps
                )

            self._call = jax.jit(grid, static_argnums=4)

    def __call__(
        self, hyper: Any, horizon: int, split: str, seeds: int | None = None, points: Sequence[int] | None = None
    ) -> tuple[Score, float]:
        """Scores [H, S] on `split` of all H rows of `hyper` on the first S samples, and seconds a run.
        With `points`, numbers of steps, they are scores after each of these: [H, S, K]."""
        began = time.perf_counter()
        self.watched.clear()
        samples = jax.tree.map(lambda x: x[:seeds], self._samples)
        at = None if points is None else np.asarray(points, np.int32)
        hyper, steps, at = jax.device_put((hyper, np.int32(horizon), at), self._device)
        if self._on_host:
            runs = [[self._call(h, self._data, s, steps, (split,), at) for s in _rows(samples)] for h in _rows(hyper)]
            scores = _stack([_stack(row) for row in runs])[split]
        else:
            scores = jax.tree.map(np.asarray, self._call(hyper, self._data, samples, steps, (split,), at)[split])
        return scores, (time.perf_counter() - began) / math.prod(scores.loss.shape[:2])

    def judge(self, part: _Part, hyper: Any, label: str, horizon: int, hparams: dict[str, float]) -> None:
        """Run one hyper-parameter on all samples, and put records and curve into `part`."""
        stage = self._interleaved.at(horizon).stage_steps if self._interleaved else 1
        points = _points(horizon, self._points, stage)
        scores, seconds = self(hyper, horizon, "test", points=points)
        steps, kept = np.unique(points, return_index=True)
        loss, accuracy = (np.asarray(score[0], float)[:, kept] for score in scores)  # [S, K]
        for seed, (losses, accuracies) in enumerate(zip(loss.tolist(), accuracy.tolist(), strict=True)):
            area = area_under_curve(steps.tolist(), losses)
            run = Record(self._setting, label, horizon, seed, losses[-1], accuracies[-1], seconds, dict(hparams), area)
            part.records.append(run)
        means = [_significant(values.mean(0)).tolist() for values in (loss, accuracy)]
        part.curves.append(Curve(self._setting, label, horizon, steps.tolist(), *means))


def _points(horizon: int, count: int, stage: int = 1) -> list[int]:
    """Where a run is judged: the start, and `count` numbers of steps, denser where more happens, each the end
    of a stage. Short horizons repeat some, so that one compiled program serves all."""
    steps = [math.ceil(horizon * (k / count) ** 2) for k in range(count + 1)]
    return [min(-(-step // stage) * stage, horizon) for step in steps]


def _rows(tree: Any) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(jax.tree.leaves(tree)[0].shape[0])]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def _on_devices(jobs: Iterable[Callable[[jax.Device], _Part]]) -> list[_Part]:
    """Each job on a device of its own, as far as there are devices; results in the jobs' order."""
    devices = jax.local_devices()
    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(job, devices[i % len(devices)]) for i, job in enumerate(jobs)]
        return [future.result() for future in futures]


def _costs(ours: _Learned | None, rivals: Mapping[str, Baseline | Interleaved], comparison: _Comparison) -> list[Cost]:
    """What a training step costs with each optimizer: one run at a time, nothing beside it."""
    device = jax.local_devices()[0]
    shape = comparison.task.params_shape()
    size = max(sum(leaf.size for leaf in jax.tree.leaves(shape)), 1)
    costs = []

    def measure(labels: Sequence[str], make: MakeOptimizer | Interleaved, hypers: Sequence[Any]) -> None:
        run = _Runner(comparison, make, device)
        for label, hyper in zip(labels, hypers, strict=True):
            one = jax.tree.map(lambda x: x[0], hyper)
            steps = _TIMED_STEPS[comparison.plan]
            if isinstance(make, Interleaved):  # a whole run: what its controller costs grows with the stages
                steps = max(comparison.horizons)
                state = jax.eval_shape(iomt.interleave(make.space(0.1)).init, shape)
            else:
                state = jax.eval_shape(lambda h, params: make(h, jnp.int32(1)).init(params), one, shape)
            alone = functools.partial(run, hyper, split="inner_valid", seeds=1)
            seconds, _ = time_steps(alone, steps, 3)
            floats = sum(leaf.size for leaf in jax.tree.leaves(state)) / size
            costs.append(Cost(comparison.setting, label, seconds, floats))

    if ours is not None:
        measure([L3RS], ours.make, [jax.tree.map(lambda x: jnp.asarray(x)[None], ours.theta)])
    for name, baseline in rivals.items():
        measure(
            [f"{name}/{schedule}" for schedule in baseline.schedules],
            _maker(baseline),
            [Tuned.grid([baseline.learning_rate], schedule) for schedule in baseline.schedules],
        )
    return costs


def _speedups(records: list[Record]) -> list[Speedup]:
    """From the baselines' accuracy at the evaluated horizons, linear in log steps between them."""
    results = Results("", records, [], {})
    horizons = results.horizons()
    speedups: list[Speedup] = []
    if L3RS not in results.optimizers():
        return speedups
    for setting in results.settings():
        ours = results.accuracy_curve(setting, L3RS)
        for baseline in results.baselines():
            theirs = results.accuracy_curve(setting, baseline)
            for at, horizon in enumerate(horizons):
                found = [x if math.isfinite(x) else None for x in speedup(horizons, ours, theirs, at)]
                speedups.append(Speedup(setting, baseline, horizon, *found))
    return speedups


def _diverged(records: Sequence[Record]) -> list[str]:
    """What has no finite test loss."""
    found: dict[tuple[str, str, int], int] = {}
    for r in records:
        if not math.isfinite(r.loss):
            found[r.setting, r.optimizer, r.horizon] = found.get((r.setting, r.optimizer, r.horizon), 0) + 1
    return [
        f"{setting}: {optimizer} has no finite test loss after {horizon} steps in {count} of its runs"
        for (setting, optimizer, horizon), count in found.items()
    ]


def _at_edges(tuning: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Grids that grew as far as they may and have their best value at the edge all the same."""
    return [
        f"{setting}: {label} has its best learning rate for {horizon} steps, {grid['chosen']:.3g}, at the edge of "
        f"a grid of {len(grid['learning_rate'])}"
        for setting, labels in tuning.items()
        for label, horizons in labels.items()
        for horizon, grid in horizons.items()
        if grid["at_edge"]
    ]


def _environment() -> dict[str, Any]:
    devices = jax.local_devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {name: metadata.version(name) for name in ("l3rs", "jax", "optax", "flax", "numpy")},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
    }


def _mean_or_inf(losses: np.ndarray) -> float:
    mean = float(np.mean(losses))
    return mean if math.isfinite(mean) else math.inf
