"""How good a meta-trained optimizer is, against baselines tuned with care.

All optimizers see the same inits (which meta-training never used) and the same batches. A
baseline's learning rate is tuned for each horizon on inner_valid; test is only read off at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from metatrain.baselines import BASELINES, DEFAULT, DEFAULT_SCHEDULES, Tuned, chosen_baselines, make_baseline
from metatrain.config import Config, UserError
from metatrain.plan import choose_plan
from metatrain.rollout import MakeOptimizer, Plan, Score, fused_rollout, learned, stepwise_rollout
from tasks import Task, TaskSample, make_task

_log = logging.getLogger("metatrain")

L3RS = "l3rs"
_GRID = 11  # learning rates a factor 2 apart, around the baseline's own
_GROW = 4  # added at an edge that holds the best value
_GROWTHS = 3  # at most


@dataclasses.dataclass(frozen=True)
class Record:
    """One training run."""

    setting: str
    optimizer: str  # "l3rs", "adam/cosine", …
    horizon: int  # inner steps
    seed: int
    loss: float  # on test
    accuracy: float  # on test
    seconds: float  # wall time of the compiled call that held it, over the runs in that call
    hparams: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Steps that a baseline needs for the accuracy that L3RS has at `horizon`, over `horizon`."""

    setting: str
    baseline: str
    horizon: int
    steps_ratio: float | None  # None: not reached at the longest horizon


@dataclasses.dataclass(frozen=True)
class Results:
    """What `evaluate` found; `results.json` holds its fields."""

    optimizer: str
    records: list[Record]
    speedup: list[Speedup]
    tuning: dict[str, Any]  # {setting: {baseline: {horizon: grid, inner_valid_loss, chosen}}}

    def mean(self, setting: str, optimizer: str, horizon: int, field: str = "loss") -> float:
        """Mean over seeds of `loss` or `accuracy`."""
        return float(np.mean([getattr(r, field) for r in self.select(setting, optimizer, horizon)]))

    def select(self, setting: str, optimizer: str, horizon: int) -> list[Record]:
        return [r for r in self.records if (r.setting, r.optimizer, r.horizon) == (setting, optimizer, horizon)]

    def optimizers(self) -> list[str]:
        return list(dict.fromkeys(r.optimizer for r in self.records))

    def horizons(self) -> list[int]:
        return sorted({r.horizon for r in self.records})

    def settings(self) -> list[str]:
        return list(dict.fromkeys(r.setting for r in self.records))

    def summary(self) -> dict[str, Any]:
        """{setting: {optimizer: {horizon: [mean test loss, mean test accuracy, seeds]}}}."""
        return _finite(
            {
                setting: {
                    optimizer: {
                        str(horizon): [
                            *(
                                round(self.mean(setting, optimizer, horizon, field), 4)
                                for field in ("loss", "accuracy")
                            ),
                            len(self.select(setting, optimizer, horizon)),
                        ]
                        for horizon in self.horizons()
                    }
                    for optimizer in self.optimizers()
                }
                for setting in self.settings()
            }
        )

    @classmethod
    def load(cls, file: str | Path) -> Results:
        """Read a `results.json`.

        Raises:
          UserError: not one.
        """
        try:
            data = json.loads(Path(file).read_text())
            records = [Record(**_numbers(record)) for record in data["records"]]
            return cls(data["optimizer"], records, [Speedup(**s) for s in data["speedup"]], data["tuning"])
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a results.json: {error!r}") from None

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False) + "\n")
        os.replace(scratch, file)
        return file


def evaluate(
    optimizer: str | Path,
    config: Config,
    horizons: Sequence[int] = (10, 30, 100),
    seeds: int = 6,
    tuning_seeds: int | None = None,
    settings: Sequence[str] | None = None,
    baselines: Sequence[str] = DEFAULT,
    schedules: Sequence[str] = DEFAULT_SCHEDULES,
    say: Callable[[str], None] = _log.info,
) -> Results:
    """Compare a deployed optimizer with tuned baselines in the configuration's settings.

    Args:
      optimizer: a checkpoint folder.
      config: whose `evaluation.settings` are used; its task when it has none.
      horizons: inner steps.
      seeds: training runs of each optimizer and horizon; a seed is an init and its batches.
      tuning_seeds: how many of them a baseline's learning rate is tuned on; all when not given.
      settings: which of the settings; all when not given.
      baselines: names of `metatrain.baselines`, or "all".
      schedules: of the learning rate, those that make sense with a baseline: constant, cosine, warmup_cosine.
      say: told what has been done.

    Raises:
      UserError, L3RSError, TaskError: bad input.
    """
    tuning_seeds = seeds if tuning_seeds is None else tuning_seeds
    if not horizons or min(horizons) < 1 or seeds < 1 or not 1 <= tuning_seeds <= seeds:
        raise UserError(
            f"horizons {list(horizons)}, seeds {seeds}, tuning seeds {tuning_seeds}: all ≥ 1, tuning ≤ seeds"
        )
    rivals = chosen_baselines(baselines, schedules)
    theta, spec, _ = l3rs.restore(optimizer)
    records: list[Record] = []
    tuning: dict[str, Any] = {}
    for setting, options in _settings(config, settings).items():
        task = make_task(config.task.name, options)
        l3rs.l3rs(theta, spec, 1).init(task.params_shape())  # a mismatch is said before anything is computed
        plan = config.execution.plan
        comparison = _Comparison(
            setting=f"{setting}: {task.name}" if setting else task.name,
            task=task,
            samples=held_out_samples(task, config.seed, seeds),
            horizons=horizons,
            tuning_seeds=tuning_seeds,
            plan=choose_plan(task, spec) if plan == "auto" else plan,
            say=say,
        )
        jobs = [functools.partial(_run_l3rs, spec, theta, comparison)]
        jobs += [functools.partial(_tune, name, theirs, comparison) for name, theirs in rivals.items()]
        parts = _on_devices(jobs)
        records += [record for part in parts for record in part.records]
        tuning[comparison.setting] = {name: grid for part in parts for name, grid in part.tuning.items()}
    return Results(str(optimizer), records, _speedups(records), tuning)


def _settings(config: Config, chosen: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """{setting: the task's options in it}; the task as it is when the configuration has no settings."""
    known = config.evaluation.settings
    if unknown := [name for name in chosen or () if name not in known]:
        raise UserError(
            f"no setting {', '.join(unknown)} in evaluation.settings; allowed are {', '.join(known) or 'none'}"
        )
    if not known:
        return {"": config.task.options}
    return {name: {**config.task.options, **known[name]} for name in chosen or known}


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
    plan: Plan
    say: Callable[[str], None]


class _Part(NamedTuple):
    records: list[Record]
    tuning: dict[str, Any]


def _run_l3rs(spec: l3rs.Spec, theta: l3rs.spec.Theta, comparison: _Comparison, device: jax.Device) -> _Part:
    run = _Runner(comparison, learned(spec), device)
    records = []
    for horizon in comparison.horizons:
        scores, seconds = run(jax.tree.map(lambda x: jnp.asarray(x)[None], theta), horizon, "test")
        records += _records(scores, seconds, comparison.setting, L3RS, horizon, {})
        comparison.say(f"{comparison.setting}: l3rs, {horizon} steps")
    return _Part(records, {})


def _tune(name: str, schedules: Sequence[str], comparison: _Comparison, device: jax.Device) -> _Part:
    run = _Runner(comparison, lambda hyper, horizon: make_baseline(name, hyper, horizon), device)
    records: list[Record] = []
    tuning: dict[str, Any] = {}
    for schedule in schedules:
        label = f"{name}/{schedule}"
        tuning[label] = {}
        for horizon in comparison.horizons:
            grid = _search(run, BASELINES[name].learning_rate, schedule, horizon, comparison.tuning_seeds)
            chosen = grid["chosen"]
            scores, seconds = run(Tuned.grid([chosen], schedule), horizon, "test")
            records += _records(scores, seconds, comparison.setting, label, horizon, {"learning_rate": chosen})
            tuning[label][str(horizon)] = grid
            tried = len(grid["learning_rate"])
            comparison.say(f"{comparison.setting}: {label}, {horizon} steps, best of {tried} learning rates")
    return _Part(records, tuning)


def _search(run: _Runner, start: float, schedule: str, horizon: int, tuning_seeds: int) -> dict[str, Any]:
    """The grid of learning rates, its mean inner_valid losses over the first `tuning_seeds` samples,
    and its best, which is not at the edge. Test is not read."""
    losses: dict[float, float] = {}
    exponents = list(range(-(_GRID // 2), _GRID - _GRID // 2))
    for growth in range(_GROWTHS + 1):
        rates = [start * 2.0**k for k in exponents]
        scores, _ = run(Tuned.grid(rates, schedule), horizon, "inner_valid", tuning_seeds)
        losses |= {rate: _mean_or_inf(loss) for rate, loss in zip(rates, scores.loss, strict=True)}
        ordered = sorted(losses)
        best = min(ordered, key=lambda rate: losses[rate])
        if growth == _GROWTHS or best not in (ordered[0], ordered[-1]):
            break
        edge = round(math.log2(best / start))
        outwards = -1 if best == ordered[0] else 1
        exponents = [edge + outwards * k for k in range(1, _GROW + 1)]
    return {
        "learning_rate": ordered,
        "inner_valid_loss": [losses[rate] for rate in ordered],
        "seeds": tuning_seeds,
        "chosen": best,
        "at_edge": best in (ordered[0], ordered[-1]),
    }


def _records(
    scores: Score, seconds: float, setting: str, optimizer: str, horizon: int, hparams: dict[str, float]
) -> list[Record]:
    """Of scores [1, S]: one hyper-parameter on S samples."""
    pairs = zip(scores.loss[0].tolist(), scores.accuracy[0].tolist(), strict=True)
    return [
        Record(setting, optimizer, horizon, seed, loss, accuracy, seconds, hparams)
        for seed, (loss, accuracy) in enumerate(pairs)
    ]


class _Runner:
    """Rollouts of hyper-parameters on samples, on one device: all in one compiled call, or stepwise."""

    def __init__(self, comparison: _Comparison, make: MakeOptimizer, device: jax.Device) -> None:
        self._plan = comparison.plan
        self._device = device
        self._data, self._samples = jax.device_put((comparison.task.data, comparison.samples), device)
        if self._plan == "stepwise":
            self._call: Any = stepwise_rollout(comparison.task, make, ())
        else:
            rollout = fused_rollout(comparison.task, make, ())

            def grid(hyper: Any, data: Any, samples: TaskSample, steps: jax.Array, splits: tuple[str, ...]) -> Any:
                one = functools.partial(rollout, splits=splits)
                return jax.vmap(jax.vmap(one, (None, None, 0, None)), (0, None, None, None))(
                    hyper, data, samples, steps
                )

            self._call = jax.jit(grid, static_argnums=4)

    def __call__(self, hyper: Any, horizon: int, split: str, seeds: int | None = None) -> tuple[Score, float]:
        """Scores [H, S] on `split` of all H rows of `hyper` on the first S samples, and seconds a run."""
        began = time.perf_counter()
        samples = jax.tree.map(lambda x: x[:seeds], self._samples)
        hyper, steps = jax.device_put((hyper, np.int32(horizon)), self._device)
        if self._plan == "stepwise":
            runs = [[self._call(h, self._data, s, steps, (split,)) for s in _rows(samples)] for h in _rows(hyper)]
            scores = _stack([_stack(row) for row in runs])[split]
        else:
            scores = jax.tree.map(np.asarray, self._call(hyper, self._data, samples, steps, (split,))[split])
        return scores, (time.perf_counter() - began) / scores.loss.size


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


def _speedups(records: list[Record]) -> list[Speedup]:
    """From the baselines' accuracy at the evaluated horizons, linear in log steps between them."""
    results = Results("", records, [], {})
    horizons = results.horizons()
    speedups = []
    for setting in results.settings():
        for baseline in results.optimizers():
            if baseline == L3RS:
                continue
            curve = [results.mean(setting, baseline, horizon, "accuracy") for horizon in horizons]
            for horizon in horizons:
                target = results.mean(setting, L3RS, horizon, "accuracy")
                steps = steps_to_reach(horizons, curve, target)
                speedups.append(Speedup(setting, baseline, horizon, None if steps is None else steps / horizon))
    return speedups


def steps_to_reach(horizons: Sequence[int], curve: Sequence[float], target: float) -> float | None:
    """The first number of steps at which `curve`, linear in log steps, reaches `target`.

    Args:
      horizons: increasing numbers of steps.
      curve: the accuracy at each.
      target: the accuracy to reach.

    Returns:
      Steps; the first horizon if that is enough already; None if none is.
    """
    for i, (steps, value) in enumerate(zip(horizons, curve, strict=True)):
        if value >= target:
            if i == 0 or value == target:
                return float(steps)
            share = (target - curve[i - 1]) / (value - curve[i - 1])
            return math.exp(math.log(horizons[i - 1]) + share * math.log(steps / horizons[i - 1]))
    return None


def _mean_or_inf(losses: np.ndarray) -> float:
    mean = float(np.mean(losses))
    return mean if math.isfinite(mean) else math.inf


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Null, which stood for a loss that is no number, is NaN again."""
    return {**record, **{key: math.nan for key in ("loss", "accuracy") if record.get(key) is None}}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
