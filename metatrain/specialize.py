"""An optimizer for one task in a given time.

Check the task, plan, find by which factors the steps of a checkpoint suit it, meta-train from there, evaluate, judge.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from l3rs.io.checkpoint import read_spec
from l3rs.spec import Spec
from metatrain import report
from metatrain.config import Config, UserError, check_config
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.payback import paybacks
from metatrain.evaluation.records import L3RS
from metatrain.inner.network import is_torch, make_spec, task_layers
from metatrain.inner.processes import local_processes
from metatrain.outer.estimate import Estimate, estimate
from metatrain.outer.loop import refuse_existing, run
from metatrain.outer.setup import Setup
from metatrain.outer.start import resolve_start
from metatrain.start_search import (
    MULTIPLIERS,
    ROLE_FACTORS,
    SAMPLES,
    StartFactors,
    find_factors,
    searched_powers,
    searched_roles,
)
from metatrain.system import check_destination, usable_cpus
from tasks import make_task
from tasks.base import AnyTask

BASELINES = ("adamw", "sgdm")

_TRAINING_SHARE = 0.6  # of the time; the rest is the evaluation's
_SHORTEST = 10  # steps of the shortest horizon
_LONGEST = (200, 100, 50, 30, 20)  # steps of the longest horizon, in the order of preference
_POPULATIONS = (16, 8)
_CANDIDATES = 384  # of all generations: fewer teach too little beyond the factors of the steps
_MOST_GENERATIONS = 2000
_SLOWER = 1.25  # times the planned time of meta-training, from which on it is said
_LAYER_GAIN = 10.0  # evolution moves a layer's log λ by as much as the noise of the MLP does
_NO_FACTORS = StartFactors()
_SEEDS = (6, 4, 3, 2)
_GRID = 12  # learning rates of a baseline's grid
_CURVE_POINTS = 6


@dataclasses.dataclass(frozen=True)
class Plan:
    """What fits into the time.

    Attributes:
      generations, population, longest: of meta-training; horizons go from 10 to `longest`.
      seeds: of the evaluation.
      training_seconds: expected, with the search for the factors of the start's steps.
      evaluation_seconds: expected.
    """

    generations: int
    population: int
    longest: int
    seeds: int
    training_seconds: float
    evaluation_seconds: float


def horizons_of(longest: int) -> list[int]:
    """Of the evaluation, and of the search for the factors of the start's steps."""
    return sorted({max(longest // 3, _SHORTEST), longest})


def tuning_seeds_of(seeds: int) -> int:
    """Of the evaluation: how many of the seeds tune the baselines. Tuning is most of its cost."""
    return max(seeds // 2, 1)


@dataclasses.dataclass(frozen=True)
class Specialized:
    """The result of `specialize`."""

    optimizer: Path  # the checkpoint
    plan: Plan
    analysis: Analysis
    sentence: str  # whether it was worth it


class StoppedError(UserError):
    """Meta-training was stopped on request, after a last checkpoint."""


def specialize(
    task: str,
    minutes: float,
    out: Path,
    options: Mapping[str, Any] | None = None,
    start: str = "universal",
    log: Callable[[str], None] = print,
    steps: int | None = None,
) -> Specialized:
    """Meta-train an optimizer for a task, beginning with a checkpoint, and compare it with tuned AdamW and SGDM.

    Args:
      task: `package.module:function`, or a name of `TASKS`.
      minutes: for everything.
      out: the folder of the run; it holds `optimizer/` and `evaluation/` in the end.
      options: of the task.
      start: the checkpoint.
      log: called with a line about each step.
      steps: of the fine-tunings that the optimizer is for, the longest horizon; by default the longest that fits into
        the time, at most 200.

    Raises:
      UserError, TaskError, L3RSError: the task cannot be trained; the time is too short; the folder exists.
      StoppedError: meta-training was stopped on request; it says how to go on.
    """
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes is {minutes}; it must be a number > 0")
    if steps is not None and steps < _SHORTEST:
        raise UserError(f"--steps is {steps}; it must be a whole number ≥ {_SHORTEST}")
    refuse_existing(out, str(out))
    check_destination(out / "evaluation", "results.json", "report.html")
    built = make_task(task, options)
    layers = task_layers(built)
    log(f"{built.name}: {len(layers)} layers with {sum(layer.size for layer in layers):,} parameters that train")
    trial = _config(task, options, start, _TRIAL)
    measured = estimate(trial)
    log(
        f"measured: {1e3 * measured.seconds_per_step:,.3g} ms a step, and {measured.seconds_per_call:,.3g} s for the "
        "meta-loss of a candidate"
    )
    spec = make_spec(layers, resolve_start(trial).optimizer.spec_fields())
    plan = make_plan(Work.of(measured, built, spec), 60 * minutes, steps)
    log(
        f"plan: {plan.generations} generations of {plan.population} candidates over {_SHORTEST} to {plan.longest} "
        f"steps, {plan.training_seconds / 60:,.1f} min; evaluation with {plan.seeds} seeds, "
        f"{plan.evaluation_seconds / 60:,.1f} min"
    )
    began = time.monotonic()
    factors = find_factors(Setup.build(_config(task, options, start, plan)), horizons_of(plan.longest), log)
    config = _config(task, options, start, plan, factors)
    done = run(config, out, log=log)
    if done.optimizer is None:
        raise StoppedError(
            f"{out} was interrupted; once it is resumed and finished, compare it with: metatrain evaluate "
            f"{out / 'optimizer'} {out / 'config.yaml'} --out {out / 'evaluation'}"
        )
    if (took := time.monotonic() - began) > _SLOWER * plan.training_seconds:
        log(
            f"it took {took / 60:,.1f} min so far instead of {plan.training_seconds / 60:,.1f}: the machine is slower "
            "than when a step was measured, so the evaluation will take longer, too"
        )
    optimizer = Path(done.optimizer)
    results = evaluate(optimizer, config, log=log, out=out / "evaluation")
    analysis = Analysis(results)
    report.write(analysis, out / "evaluation")
    return Specialized(optimizer, plan, analysis, sentence(analysis))


_TRIAL = Plan(generations=1, population=2, longest=_SHORTEST, seeds=2, training_seconds=0, evaluation_seconds=0)


def _config(
    task: str, options: Mapping[str, Any] | None, start: str, plan: Plan, factors: StartFactors = _NO_FACTORS
) -> Config:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", task.rpartition(":")[2]).strip("-.") or "task"
    return check_config(
        {
            "name": name,
            "task": {"name": task, **(options or {})},
            "optimizer": {
                "start": start,
                "start_multiplier": factors.multiplier,
                "start_by_role": dict(factors.by_role),
                "start_horizon_power": factors.horizon_power,
                "embedding": "table",
                **_layer_gain(start),
            },
            "outer": {
                "steps": plan.generations,
                "population": plan.population,
                "horizon": {"min": _SHORTEST, "max": plan.longest},
            },
            "evaluation": {
                "horizons": horizons_of(plan.longest),
                "seeds": plan.seeds,
                "tuning_seeds": tuning_seeds_of(plan.seeds),
                "baselines": list(BASELINES),
                "curve_points": _CURVE_POINTS,
            },
        },
        "specialize",
    )


def _layer_gain(start: str) -> dict[str, float]:
    """A factor of each layer's steps, for a checkpoint of a form that may have one."""
    spec = read_spec(start)
    return {"layer_gain": spec.layer_gain or _LAYER_GAIN} if spec.form == 2 else {}


def make_plan(work: Work, seconds: float, steps: int | None = None) -> Plan:
    """The longest horizon and the largest population that fit into the time.

    Args:
      work: what the parts take.
      seconds: for meta-training and evaluation.
      steps: the longest horizon, if it is given.

    Raises:
      UserError: not even the smallest plan fits.
    """
    budget = _TRAINING_SHARE * seconds
    for longest in _LONGEST if steps is None else (steps,):
        search = work.search(longest)
        for population in _POPULATIONS:
            generation = work.generation(longest, population)
            generations = min(int((budget - search) / generation), _MOST_GENERATIONS)
            if generations * population < _CANDIDATES:
                continue
            for seeds in _SEEDS:
                if (evaluation := work.evaluation(longest, seeds)) <= seconds - budget:
                    training = search + generations * generation
                    return Plan(generations, population, longest, seeds, training, evaluation)
    least = max(
        (search + _CANDIDATES / population * generation) / _TRAINING_SHARE,
        work.evaluation(longest, _SEEDS[-1]) / (1 - _TRAINING_SHARE),
    )
    raise UserError(
        f"--minutes is {seconds / 60:g}; this task needs at least {math.ceil(least / 60):,}: "
        f"{_CANDIDATES} candidates over up to {longest} steps, and the evaluation"
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """Seconds that the parts of a specialisation take.

    Attributes:
      step, call: of a candidate's step, and of its meta-loss.
      candidates: how many train side by side in a generation.
      runs: how many train side by side in the search and in the evaluation.
      roles: how many have a factor that is searched.
      powers: how many powers of the horizon are searched where there are several horizons.
    """

    step: float
    call: float
    candidates: int = 1
    runs: int = 1
    roles: int = 0
    powers: int = 0

    @classmethod
    def of(cls, measured: Estimate, task: AnyTask, spec: Spec) -> Work:
        """What was measured of a task, on the cores of this machine."""
        processes = local_processes([task], "auto", usable_cpus()) if is_torch(task) else len(jax.local_devices())
        return cls(
            step=measured.seconds_per_step,
            call=measured.seconds_per_call / measured.members_per_call,
            candidates=processes,
            runs=processes if is_torch(task) else 1,
            roles=len(searched_roles(spec)),
            powers=len(searched_powers(spec, horizons_of(_LONGEST[0]))),
        )

    def generation(self, longest: int, population: int) -> float:
        ratio = longest / _SHORTEST
        mean_horizon = longest if ratio == 1 else (longest - _SHORTEST) / math.log(ratio)
        return math.ceil(population / self.candidates) * (self.call + mean_horizon * self.step)

    def search(self, longest: int) -> float:
        """For the factors of the start's steps."""
        powers = self.powers if len(horizons_of(longest)) > 1 else 0
        choices = len(MULTIPLIERS) + powers + len(ROLE_FACTORS) * self.roles
        return choices * SAMPLES * self._run(longest, 1) / self.runs

    def evaluation(self, longest: int, seeds: int) -> float:
        """Grids of both baselines with two schedules, and final runs; no grid grows."""
        kinds, tuning_seeds = 2 * len(BASELINES), tuning_seeds_of(seeds)
        tuning = kinds * _GRID * tuning_seeds * self._run(longest, 1)
        return (tuning + (kinds + 1) * seeds * self._run(longest, _CURVE_POINTS)) / self.runs

    def _run(self, longest: int, scores: int) -> float:
        """A training run for each horizon of the evaluation."""
        return sum(self.step * horizon + scores * self.call for horizon in horizons_of(longest))


def sentence(analysis: Analysis) -> str:
    """Whether it was worth it, in one sentence."""
    setting, steps = analysis.results.settings()[0], analysis.results.horizons()[-1]
    rival = analysis.best_baseline(setting, steps)
    assert rival is not None
    ours, theirs = (analysis.mean(setting, label, steps) for label in (L3RS, rival))
    losses = f"after {steps} steps its test loss is {ours:.4g}, that of the best tuned baseline ({rival}) {theirs:.4g}"
    outcome = analysis.outcome(setting, rival, steps)
    rate = analysis.results.tuning[setting][rival][str(steps)]["chosen"]
    if outcome == "worse":
        return f"It was not worth it: {losses}. Use that one, with a learning rate of {rate:.3g}."
    if outcome == "undecided":
        return (
            f"It is undecided whether it was worth it: {losses}, with a learning rate of {rate:.3g}, and the "
            "difference may be chance."
        )
    found = paybacks(analysis)
    if not found or not math.isfinite(found[0].fine_tunings_tuned):
        return f"It was worth it: {losses}."
    paid = found[0]
    most, why = "", "is the quickest to its accuracy"
    if not paid.reached:
        most, why = "at most ", f"does not reach its accuracy in {steps} steps, as no baseline does"
    return (
        f"It was worth it: {losses}, and its generations have paid after {most}{paid.fine_tunings_tuned:,.0f} "
        f"fine-tunings that would each tune {paid.baseline}, which {why}."
    )
