"""An optimizer for one task in a given time.

Check the task, plan, find how far the steps of a checkpoint should go, meta-train from there, evaluate, judge.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from metatrain import report
from metatrain.config import Config, UserError, check_config
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.learned import restore_optimizer
from metatrain.evaluation.multipliers import best_multiplier, meta_losses
from metatrain.evaluation.payback import paybacks
from metatrain.evaluation.records import L3RS
from metatrain.evaluation.runner import Conditions
from metatrain.inner.network import task_layers
from metatrain.inner.plan import choose_plan
from metatrain.outer.estimate import Estimate, estimate
from metatrain.outer.loop import refuse_existing, run
from metatrain.system import check_destination
from tasks import make_task, sample
from tasks.base import AnyTask

BASELINES = ("adamw", "sgdm")

_TRAINING_SHARE = 0.6  # of the time; the rest is the evaluation's
_SHORTEST = 10  # steps of the shortest horizon
_LONGEST = (200, 100, 50, 30, 20)  # steps of the longest horizon, in the order of preference
_POPULATIONS = (16, 8)
_GENERATIONS = (24, 2000)  # fewer teach too little beyond the multiplier of the steps, more are not needed
_SEEDS = (6, 4, 3, 2)
_MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)  # of the checkpoint's steps
_MULTIPLIER_SAMPLES = 2  # inits and batches on which they are compared
_GRID = 12  # learning rates of a baseline's grid
_CURVE_POINTS = 6


@dataclasses.dataclass(frozen=True)
class Plan:
    """What fits into the time.

    Attributes:
      generations, population, longest: of meta-training; horizons go from 10 to `longest`.
      seeds: of the evaluation.
      training_seconds: expected, with the search for the multiplier of the start's steps.
      evaluation_seconds: expected.
    """

    generations: int
    population: int
    longest: int
    seeds: int
    training_seconds: float
    evaluation_seconds: float

    @property
    def tuning_seeds(self) -> int:
        """Of the evaluation: how many of the seeds tune the baselines. Tuning is most of its cost."""
        return max(self.seeds // 2, 1)

    @property
    def horizons(self) -> list[int]:
        """Of the evaluation, and of the search for the multiplier."""
        return sorted({max(self.longest // 3, _SHORTEST), self.longest})


@dataclasses.dataclass(frozen=True)
class Specialized:
    """The result of `specialize`."""

    optimizer: Path  # the checkpoint
    plan: Plan
    analysis: Analysis
    sentence: str  # whether it was worth it


def specialize(
    task: str,
    minutes: float,
    out: Path,
    options: Mapping[str, Any] | None = None,
    start: str = "universal",
    log: Callable[[str], None] = print,
) -> Specialized:
    """Meta-train an optimizer for a task, beginning with a checkpoint, and compare it with tuned AdamW and SGDM.

    Args:
      task: `package.module:function`, or a name of `TASKS`.
      minutes: for everything.
      out: the folder of the run; it holds `optimizer/` and `evaluation/` in the end.
      options: of the task.
      start: the checkpoint.
      log: called with a line about each step.

    Raises:
      UserError, TaskError, L3RSError: the task cannot be trained; the time is too short; the folder exists.
    """
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes is {minutes}; it must be a number > 0")
    refuse_existing(out, str(out))
    check_destination(out / "evaluation", "results.json", "report.html")
    built = make_task(task, options)
    layers = task_layers(built)
    log(f"{built.name}: {len(layers)} layers with {sum(layer.size for layer in layers):,} parameters that train")
    config = _config(task, options, start, _TRIAL)
    measured = estimate(config)
    log(
        f"measured: {1e3 * measured.seconds_per_step:,.3g} ms a step, and {measured.seconds_per_call:,.3g} s for the "
        "meta-loss of a candidate"
    )
    plan = make_plan(measured, 60 * minutes, len(jax.local_devices()))
    log(
        f"plan: {plan.generations} generations of {plan.population} candidates over {_SHORTEST} to {plan.longest} "
        f"steps, {plan.training_seconds / 60:,.1f} min; evaluation with {plan.seeds} seeds, "
        f"{plan.evaluation_seconds / 60:,.1f} min"
    )
    multiplier = _start_multiplier(built, start, plan, log)
    config = _config(task, options, start, plan, multiplier)
    done = run(config, out)
    if done.optimizer is None:
        raise UserError(f"{out} was interrupted; resume it with: metatrain resume {out}")
    optimizer = Path(done.optimizer)
    results = evaluate(optimizer, config, log=log)
    results.save(out / "evaluation")
    analysis = Analysis(results)
    report.write(analysis, out / "evaluation")
    return Specialized(optimizer, plan, analysis, sentence(analysis))


_TRIAL = Plan(generations=1, population=2, longest=_SHORTEST, seeds=2, training_seconds=0, evaluation_seconds=0)


def _start_multiplier(task: AnyTask, start: str, plan: Plan, log: Callable[[str], None]) -> float:
    """The factor of the checkpoint's steps with the lowest meta-loss. Evolution would take long to find it."""
    ours, _ = restore_optimizer(start, guard=False)
    assert ours is not None
    keys = jax.random.split(jax.random.key(0), _MULTIPLIER_SAMPLES)
    conditions = Conditions(
        setting=task.name,
        task=task,
        samples=jax.tree.map(lambda *each: jnp.stack(each), *(sample(task, key) for key in keys)),
        horizons=plan.horizons,
        tuning_seeds=_MULTIPLIER_SAMPLES,
        points=1,
        plan=choose_plan([task], ours.spec),
        trainers=None,
        log=log,
    )
    losses = meta_losses(ours, _MULTIPLIERS, conditions, jax.local_devices()[0])
    best = best_multiplier(losses)
    found = ", ".join(f"{loss:.4g} at {factor:g}" for factor, loss in losses.items())
    log(f"meta-loss of {start} by the factor of its steps: {found}; meta-training begins with {best:g}")
    return best


def _config(task: str, options: Mapping[str, Any] | None, start: str, plan: Plan, multiplier: float = 1.0) -> Config:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", task.rpartition(":")[2]).strip("-.") or "task"
    return check_config(
        {
            "name": name,
            "task": {"name": task, **(options or {})},
            "optimizer": {"start": start, "start_multiplier": multiplier, "embedding": "table"},
            "outer": {
                "steps": plan.generations,
                "population": plan.population,
                "horizon": {"min": _SHORTEST, "max": plan.longest},
            },
            "evaluation": {
                "horizons": plan.horizons,
                "seeds": plan.seeds,
                "tuning_seeds": plan.tuning_seeds,
                "baselines": list(BASELINES),
                "curve_points": _CURVE_POINTS,
            },
        },
        "specialize",
    )


def make_plan(measured: Estimate, seconds: float, workers: int) -> Plan:
    """The longest horizon and the largest population that fit into the time.

    Args:
      measured: seconds of a candidate's step and of its meta-loss.
      seconds: for meta-training and evaluation.
      workers: processes or devices that compute side by side.

    Raises:
      UserError: not even the smallest plan fits.
    """
    step, call = measured.seconds_per_step, measured.seconds_per_call / measured.members_per_call
    budget = _TRAINING_SHARE * seconds
    for longest in _LONGEST:
        search = _search_seconds(longest, step, call)
        mean_horizon = (longest - _SHORTEST) / math.log(longest / _SHORTEST)
        for population in _POPULATIONS:
            generation = math.ceil(population / workers) * (call + mean_horizon * step)
            generations = min(int((budget - search) / generation), _GENERATIONS[1])
            if generations < _GENERATIONS[0]:
                continue
            found = [(n, _evaluation_seconds(longest, n, step, call)) for n in _SEEDS]
            fitting = [each for each in found if each[1] <= seconds - budget]
            if fitting:
                training = search + generations * generation
                return Plan(generations, population, longest, fitting[0][0], training, fitting[0][1])
    least = max(
        (search + _GENERATIONS[0] * generation) / _TRAINING_SHARE,
        _evaluation_seconds(_LONGEST[-1], _SEEDS[-1], step, call) / (1 - _TRAINING_SHARE),
    )
    raise UserError(
        f"--minutes is {seconds / 60:g}; this task needs at least {math.ceil(least / 60):,}: "
        f"{_GENERATIONS[0]} generations of {_POPULATIONS[-1]} candidates, and the evaluation"
    )


def _search_seconds(longest: int, step: float, call: float) -> float:
    """Expected of the search for the multiplier of the start's steps."""
    plan = Plan(0, 0, longest, 0, 0, 0)
    return len(_MULTIPLIERS) * _MULTIPLIER_SAMPLES * sum(step * horizon + call for horizon in plan.horizons)


def _evaluation_seconds(longest: int, seeds: int, step: float, call: float) -> float:
    """Expected of an evaluation without neighbours: grids of both baselines with two schedules, and final runs."""
    plan = Plan(0, 0, longest, seeds, 0, 0)
    kinds = 2 * len(BASELINES)
    tuning = kinds * _GRID * plan.tuning_seeds * sum(step * horizon + call for horizon in plan.horizons)
    judging = (kinds + 1) * seeds * sum(step * horizon + _CURVE_POINTS * call for horizon in plan.horizons)
    return tuning + judging


def sentence(analysis: Analysis) -> str:
    """Whether it was worth it, in one sentence."""
    setting, steps = analysis.results.settings()[0], analysis.results.horizons()[-1]
    rival = analysis.best_baseline(setting, steps)
    assert rival is not None
    ours, theirs = (analysis.mean(setting, label, steps) for label in (L3RS, rival))
    losses = f"after {steps} steps its test loss is {ours:.4g}, that of the best tuned baseline ({rival}) {theirs:.4g}"
    outcome = analysis.outcome(setting, rival, steps)
    if outcome == "worse":
        return f"It was not worth it: {losses}."
    if outcome == "undecided":
        return f"It is undecided whether it was worth it: {losses}, and the difference may be chance."
    found = paybacks(analysis)
    tuned = found[0].fine_tunings_tuned if found else math.inf
    if not math.isfinite(tuned):
        return f"It was worth it: {losses}."
    return f"It was worth it: {losses}, and it pays after {tuned:,.0f} fine-tunings that would each tune that baseline."
