"""The comparison of a meta-trained optimizer with tuned baselines.

All optimizers see the same inits, which meta-training never used, and the same batches. A baseline's learning rate
is tuned for each horizon on inner_valid; the test split is only read to judge the final runs.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

import l3rs
from l3rs import L3RSError
from l3rs.layers import Matching
from metatrain.config import Config, EvaluationConfig, UserError, as_written, check_section, portable, require_config
from metatrain.evaluation.analysis import speedups
from metatrain.evaluation.baselines import Baseline, Interleaved, Tuned, chosen_baselines
from metatrain.evaluation.costs import measure_costs
from metatrain.evaluation.environment import environment
from metatrain.evaluation.interleaved import trainers
from metatrain.evaluation.learned import LearnedOptimizer, restore_optimizer
from metatrain.evaluation.multipliers import multiplier_grids
from metatrain.evaluation.parts import Job, Part, Parts
from metatrain.evaluation.paths import baseline_path, decision_path, stage_notes, switch_history
from metatrain.evaluation.records import (
    L3RS,
    Cost,
    Record,
    RecordTable,
    Results,
)
from metatrain.evaluation.results_file import meta_training_facts
from metatrain.evaluation.runner import Conditions, Runner, held_out_samples, learned_maker, maker, torch_runs_of
from metatrain.evaluation.tuning import edge_notes, search
from metatrain.inner.network import is_torch, task_layers, task_matches
from metatrain.inner.plan import check_plan, choose_plan
from tasks import Task, make_task
from tasks.base import AnyTask
from tasks.registry import is_torch_task

_log = logging.getLogger("metatrain")


def evaluate(
    optimizer: str | Path,
    config: Config,
    settings: Sequence[str] | None = None,
    log: Callable[[str], None] = _log.info,
    out: Path | None = None,
    **options: Any,
) -> Results:
    """Compare a meta-trained optimizer with tuned baselines in the configuration's settings.

    Args:
      optimizer: a checkpoint; or "-" for the baselines only.
      config: its `evaluation` section says how; the settings are those of `evaluation.settings`, or the task
        itself when there are none.
      settings: names of the settings to evaluate; all when not given.
      log: called with a line for each step of the evaluation.
      out: a folder in which `results.json` is saved, and until then, in `parts/`, what each optimizer has finished in
        each setting, with which the same evaluation continues if it is interrupted; None saves nothing.
      **options: replace fields of `evaluation`, e.g. `horizons=(10, 100), seeds=3`.

    Raises:
      UserError, L3RSError, TaskError: bad input; an optimizer that fits the model of no setting; nothing to
        compare.
    """
    require_config(config)
    began = time.perf_counter()
    how = _options(config.evaluation, options)
    config = config.model_copy(update={"evaluation": how})
    chosen = _settings(config, settings)
    forms = {setting: config.task.form(task_options) for setting, task_options in chosen.items()}
    kinds = {setting: is_torch_task(name) for setting, (name, _) in forms.items()}
    all_rivals = {torch: _rivals(how, torch) for torch in sorted(set(kinds.values()))}
    notes = list(dict.fromkeys(note for _, found in all_rivals.values() for note in found))
    all_rivals, left_out = in_common(all_rivals)
    notes += left_out
    ours, info = restore_optimizer(optimizer, how.make_guard())
    if ours is None and not any(rivals for rivals, _ in all_rivals.values()):
        raise UserError(f"there is nothing to compare: no optimizer and no baseline{''.join(f'; {n}' for n in notes)}")
    if ours is not None and ours.guard:
        notes.append(f"L3RS runs with its guard, which takes Adam steps while the loss rises: {ours.guard}")
    parts = Parts(out, ours, config, list(forms), log)
    all_parts = Part()
    costs: list[Cost] = []
    refused: list[str] = []
    for setting, form in forms.items():
        task, rivals = make_task(*form), all_rivals[kinds[setting]][0]
        label = f"{setting}: {task.name}" if setting else task.name
        try:
            if ours is not None:
                task_matches(ours.spec, task, Matching(by="auto") if is_torch(task) else None)
        except L3RSError as error:
            refused.append(f"{label} is left out: {error}")
            continue
        with torch_runs_of(task, config.execution, log) as torch_runs:
            conditions = _conditions(label, task, ours, config, log)._replace(torch_runs=torch_runs)
            jobs = _jobs(ours, rivals, how.multipliers, conditions)
            kept_jobs = [parts.kept(f"{label}: {name}", job) for name, job in jobs.items()]
            for part in _on_devices(kept_jobs, conditions):
                all_parts.add(part)
        costs = costs or (measure_costs(ours, rivals, conditions) if how.costs else [])
    if not all_parts.records:
        raise L3RSError(f"{optimizer} fits the model of no setting; {refused[0]}")
    if parts.found:
        notes.append(f"{len(parts.found)} of its parts were done by an earlier start of this evaluation")
    seconds = round(time.perf_counter() - began, 1)
    notes += refused + _divergence_notes(all_parts.records) + edge_notes(all_parts.tuning) + all_parts.notes
    results = Results(
        optimizer=portable(str(optimizer)),
        records=all_parts.records,
        speedup=speedups(RecordTable(all_parts.records)),
        tuning=all_parts.tuning,
        curves=all_parts.curves,
        paths=all_parts.paths,
        coefficients=all_parts.coefficients,
        switches=all_parts.switches,
        costs=costs,
        multipliers=all_parts.multipliers,
        notes=notes,
        meta_training=meta_training_facts(info),
        environment={**environment(), **({} if parts.found else {"evaluation_seconds": seconds})},
        config=portable(as_written(config)),
    )
    if out is not None:
        results.save(out)
        parts.remove()
    return results


def _rivals(how: EvaluationConfig, torch: bool) -> tuple[dict[str, Baseline | Interleaved], list[str]]:
    """The baselines for tasks of JAX or of PyTorch, and why some are left out."""
    if not torch:
        return chosen_baselines(how.baselines, how.schedules)
    from metatrain.evaluation.torch_baselines import ALL_TORCH, find_torch_baseline

    return chosen_baselines(how.baselines, how.schedules, find_torch_baseline, ALL_TORCH)


AllRivals = dict[bool, tuple[dict[str, Baseline | Interleaved], list[str]]]


def in_common(rivals: AllRivals) -> tuple[AllRivals, list[str]]:
    """The baselines that all kinds of tasks have, JAX's and PyTorch's, and a note about the others."""
    names = [list(found) for found, _ in rivals.values()]
    common = [name for name in names[0] if all(name in each for each in names)]
    if not (others := sorted({name for each in names for name in each} - set(common))):
        return rivals, []
    note = f"left out, because tasks of JAX and of PyTorch do not both have them: {', '.join(others)}"
    return {kind: ({name: found[name] for name in common}, own) for kind, (found, own) in rivals.items()}, [note]


def _options(section: EvaluationConfig, options: Mapping[str, Any]) -> EvaluationConfig:
    data = {**section.model_dump(), **{key: value for key, value in options.items() if value is not None}}
    return check_section(EvaluationConfig, data, "evaluation")


def _settings(config: Config, chosen: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """{setting: options that replace the task's}; {"": {}} when the configuration has no settings."""
    known = config.evaluation.settings
    if unknown := [name for name in chosen or () if name not in known]:
        raise UserError(f"evaluation.settings has no {', '.join(unknown)}; allowed are {', '.join(known) or 'none'}")
    return {name: known[name] for name in chosen or known} or {"": {}}


def _conditions(
    setting: str, task: AnyTask, ours: LearnedOptimizer | None, config: Config, log: Callable[[str], None]
) -> Conditions:
    how, plan = config.evaluation, config.execution.plan
    check_plan([task], plan)
    if plan == "auto":
        plan = choose_plan([task], l3rs.Spec(task_layers(task)) if ours is None else ours.spec)
    return Conditions(
        setting=setting,
        task=task,
        samples=held_out_samples(task, config.seed, how.seeds),
        horizons=sorted(how.horizons),
        tuning_seeds=how.tuning_seeds or how.seeds,
        points=how.curve_points,
        plan=plan,
        trainers=trainers(task, plan) if isinstance(task, Task) else None,
        log=log,
    )


def _jobs(
    ours: LearnedOptimizer | None,
    rivals: Mapping[str, Baseline | Interleaved],
    multipliers: Sequence[float],
    conditions: Conditions,
) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    if ours is not None:
        jobs[L3RS] = functools.partial(_run_learned, ours, conditions)
    if ours is not None and multipliers:
        jobs[f"{L3RS}/step multipliers"] = lambda device: Part(
            multipliers=multiplier_grids(ours, multipliers, conditions, device)
        )
    return jobs | {
        name: functools.partial(_run_baseline, name, baseline, conditions) for name, baseline in rivals.items()
    }


def _on_devices(jobs: Iterable[Job], conditions: Conditions) -> list[Part]:
    """Run jobs side by side, one per device at a time, those of PyTorch one by one; results in the jobs' order."""
    devices = jax.local_devices()
    if conditions.plan == "torch":  # in this thread, which an interrupt ends, as its processes are
        return [job(devices[0]) for job in jobs]
    pool = ThreadPoolExecutor(len(devices))
    try:
        futures = [pool.submit(job, devices[i % len(devices)]) for i, job in enumerate(jobs)]
        return [future.result() for future in futures]
    finally:  # after an error or an interrupt, what has not begun does not begin
        pool.shutdown(wait=False, cancel_futures=True)


def _run_learned(ours: LearnedOptimizer, conditions: Conditions, device: jax.Device) -> Part:
    run = Runner(conditions, learned_maker(ours, conditions), device)
    part = Part(tuning={conditions.setting: {}})
    for horizon in conditions.horizons:
        records, curve = run.judge(ours.rows, L3RS, horizon, {})
        part.records += records
        part.curves.append(curve)
        conditions.log(f"{conditions.setting}: l3rs, {horizon} steps")
    path = decision_path(ours, conditions, device)
    if np.isfinite(path.step_rms).all():
        part.paths.append(path)
    else:
        part.notes.append(f"{conditions.setting}: the decisions of L3RS are not shown, because some are not finite")
    return part


def _run_baseline(name: str, baseline: Baseline | Interleaved, conditions: Conditions, device: jax.Device) -> Part:
    """Tune a baseline for every schedule and horizon, and judge it with the learning rate that was best."""
    run = Runner(conditions, maker(baseline, conditions), device)
    part = Part(tuning={conditions.setting: {}})
    for schedule in baseline.schedules:
        label = f"{name}/{schedule}"
        where = f"{conditions.setting}: {label}"
        grids = part.tuning[conditions.setting][label] = {}
        for horizon in conditions.horizons:
            grid = grids[str(horizon)] = search(run, baseline, schedule, horizon, conditions.tuning_seeds)
            rate = grid["chosen"]
            records, curve = run.judge(Tuned.grid([rate], schedule), label, horizon, {"learning_rate": rate})
            part.records += records
            part.curves.append(curve)
            part.notes += stage_notes(f"{where}, {horizon} steps", run.stages)
            chosen = (
                f"best of {len(grid['learning_rate'])} learning rates" if grid["seeds"] else "learning rate as given"
            )
            conditions.log(f"{where}, {horizon} steps, {chosen}")
        if run.stages:
            part.switches.append(switch_history(conditions.setting, label, run.stages))
        if isinstance(baseline, Baseline) and conditions.plan != "torch":
            path, note = baseline_path(label, baseline, rate, schedule, conditions, device)
            part.coefficients += [] if path is None else [path]
            part.notes += [] if note is None else [note]
    return part


def _divergence_notes(records: Sequence[Record]) -> list[str]:
    """A sentence for each optimizer and horizon with runs whose test loss is NaN or infinite."""
    found: dict[tuple[str, str, int], int] = {}
    for r in records:
        if not math.isfinite(r.loss):
            found[r.setting, r.optimizer, r.horizon] = found.get((r.setting, r.optimizer, r.horizon), 0) + 1
    return [
        f"{setting}: {optimizer} has no finite test loss after {horizon} steps in {count} of its runs"
        for (setting, optimizer, horizon), count in found.items()
    ]
