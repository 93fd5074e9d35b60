"""One optimizer of an evaluation against each of the others, on the same seeds; and the cost of IOMT's controller."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from metatrain.config import UserError
from metatrain.evaluation.records import Record, RecordTable, Results, family, nan_as_inf, setting_name
from metatrain.evaluation.statistics import Interval, mean_interval

Field = Literal["loss", "accuracy"]
Outcome = Literal["better", "worse", "undecided"]


class Pair(NamedTuple):
    """An optimizer beside the one that all are compared with."""

    optimizer: str
    difference: Interval  # of the compared one minus this one, paired over seeds
    outcome: Outcome  # of the compared one: better or worse only where the interval excludes 0


class Overhead(NamedTuple):
    """What IOMT's controller took in the first seed's run over the longest horizon."""

    optimizer: str
    stages: int
    seconds: float  # of the controller, in all stages
    share: float  # of the seconds of training without it; NaN where the cost of a step was not measured


def pairs(results: RecordTable, optimizer: str, setting: str, horizon: int, field: Field) -> list[Pair]:
    """An optimizer against each of the others, the best of them first.

    Args:
      results: runs of all optimizers on the same seeds.
      optimizer: a label of `results`, see `find_label`.
      setting, horizon: where they are compared.
      field: what is compared, on test: a lower loss, or a higher accuracy, is better.
    """
    sign = 1 if field == "accuracy" else -1
    ours = results.values(setting, optimizer, horizon, field)
    found = []
    for label in results.optimizers():
        theirs = results.values(setting, label, horizon, field)
        if label == optimizer or not len(theirs):
            continue
        difference = mean_interval(ours - theirs)
        ahead = sign * difference.value > 0
        outcome: Outcome = ("better" if ahead else "worse") if difference.excludes(0.0) else "undecided"
        found.append(Pair(label, difference, outcome))

    def rank(pair: Pair) -> float:
        return nan_as_inf(-sign * results.mean(setting, pair.optimizer, horizon, field))

    return sorted(found, key=rank)


def find_label(results: RecordTable, name: str) -> str:
    """The label of an optimizer that is given with or without its schedule: iomt stands for iomt/constant.

    Raises:
      UserError: there is no such optimizer, or several.
    """
    labels = results.optimizers()
    found = [name] if name in labels else [label for label in labels if family(label) == name]
    if len(found) != 1:
        problem = f"{len(found)} optimizers are" if found else "no optimizer is"
        raise UserError(f"{problem} called {name}; choose one of {', '.join(labels)}")
    return found[0]


def joined(results: Results, other: Results, name: str) -> Results:
    """The runs of two evaluations that share a setting, a horizon and a seed; of `other` as "LABEL of NAME".

    Such runs had the same init and the same batches, if the data in their files are the same, which is not known here:
    differences between them are paired.

    Raises:
      UserError: one does not say what its task is, the tasks or the seeds differ, they share no run, or an optimizer
        has none or several for a seed.
    """
    for each, where in ((results, "the first evaluation"), (other, name)):
        if not each.config:
            raise UserError(f"{where} is of an earlier version and does not say what its task is; evaluate again")
    common = set(map(_sample, results.records)) & set(map(_sample, other.records))
    settings = sorted({setting for setting, _, _ in common})
    for keys in (("task",), ("seed",), *(("evaluation", "settings", setting_name(setting)) for setting in settings)):
        if difference := _difference(_at(results.config, keys), _at(other.config, keys), ".".join(keys)):
            raise UserError(f"{name} is not of the same task: {difference}")
    if not common:
        raise UserError(f"{name} has no setting, horizon and seed in common with the evaluation it is compared with")
    renamed = [dataclasses.replace(record, optimizer=f"{record.optimizer} of {name}") for record in other.records]
    shared = sorted((record for record in [*results.records, *renamed] if _sample(record) in common), key=_sample)
    seeds: dict[tuple[str, str, int], list[int]] = {}
    for record in shared:
        seeds.setdefault((record.optimizer, record.setting, record.horizon), []).append(record.seed)
    for (optimizer, setting, horizon), own in seeds.items():
        if own != sorted(seed for *where, seed in common if where == [setting, horizon]):
            raise UserError(f"{optimizer} has not one run of {horizon} steps for each seed that both evaluations have")
    return dataclasses.replace(results, records=shared)


def _sample(record: Record) -> tuple[str, int, int]:
    return record.setting, record.horizon, record.seed


def _at(config: Any, keys: Sequence[str]) -> Any:
    """A value inside nested mappings, nothing where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _difference(ours: Any, theirs: Any, name: str) -> str | None:
    """The first value of a configuration that another one has otherwise, in words."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        given = ["not given" if value is None else f"{value!r:.100}" for value in (theirs, ours)]
        return None if ours == theirs else f"{name} is {given[0]} there and {given[1]} here"
    found = (_difference(ours.get(key), theirs.get(key), f"{name}.{key}") for key in {**ours, **theirs})
    return next(filter(None, found), None)


def overheads(results: Results, setting: str) -> list[Overhead]:
    """The overhead of each variant of IOMT in a setting."""
    costs = {cost.optimizer: cost.seconds_a_step for cost in results.costs if cost.setting == setting}
    found = []
    for history in results.switches:
        if history.setting != setting:
            continue
        seconds = sum(stage["seconds"] for stage in history.stages)
        steps = sum(stage["steps"] for stage in history.stages)
        training = costs.get(history.optimizer, math.nan) * steps - seconds  # the cost is that of a whole run
        share = seconds / training if training > 0 else math.nan
        found.append(Overhead(history.optimizer, len(history.stages), seconds, share))
    return found
