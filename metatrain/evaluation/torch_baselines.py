"""The optimizers that L3RS is compared with on tasks of PyTorch, as functions of a learning rate.

They are those of `torch.optim`, and some of the package pytorch-optimizer where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l3rs.io.files import first_line
from metatrain.config import UserError
from metatrain.config_errors import one_line
from metatrain.evaluation.baselines import (
    SCHEDULES,
    WARMUP,
    Baseline,
    MissingBaselineError,
    Tuned,
    first_rate,
    given_rate,
    import_baseline,
)

# Where the search for the learning rate begins: as for optax's optimizers of the same name.
TORCH_BASELINES = {
    "sgd": Baseline(torch.optim.SGD, 2.0**-3),
    "sgdm": Baseline(functools.partial(torch.optim.SGD, momentum=0.9), 2.0**-5),
    "adam": Baseline(torch.optim.Adam, 2.0**-9),
    "adamw": Baseline(torch.optim.AdamW, 2.0**-9),  # its weight decay is 0.01, PyTorch's default
    "adagrad": Baseline(torch.optim.Adagrad, 2.0**-6),
    "rmsprop": Baseline(torch.optim.RMSprop, 2.0**-10),
    "nadam": Baseline(torch.optim.NAdam, 2.0**-9),
    "adamax": Baseline(torch.optim.Adamax, 2.0**-9),
}

# Classes of pytorch-optimizer, and where the search begins. Names that `BASELINES` has mean the same algorithm.
_PACKAGE = {
    "lion": ("Lion", 2.0**-12),
    "adan": ("Adan", 2.0**-8),
    "yogi": ("Yogi", 2.0**-7),
    "prodigy": ("Prodigy", 1.0),
    "schedule_free": ("ScheduleFreeAdamW", 2.0**-8),  # judged at its average
    "muon": ("Muon", 2.0**-6),
    "adabelief": ("AdaBelief", 2.0**-9),
    "lamb": ("Lamb", 2.0**-8),
    "ademamix": ("AdEMAMix", 2.0**-9),
    "soap": ("SOAP", 2.0**-8),
}
ALL_TORCH = (*TORCH_BASELINES, *_PACKAGE)  # what "all" stands for
_MUON_ADAMW = 0.015  # AdamW's learning rate over Muon's, as in Muon's own defaults


def find_torch_baseline(name: str, options: Mapping[str, Any] | None = None) -> Baseline:
    """Find a baseline by name, or by `package.module:Class` for another optimizer of `torch.optim`'s kind.

    Such a class takes the parameters and `lr`. The search for the learning rate starts at its attribute
    `learning_rate`, or 2⁻⁹.

    Args:
      name: one of `ALL_TORCH`, or a class.
      options: of its constructor. A `learning_rate` is used as it is, and not tuned.

    Raises:
      MissingBaselineError: its module cannot be imported.
      UserError: no such name or class, or an option that it does not accept.
    """
    found, options = _named(name), dict(options or {})
    if "learning_rate" in options:
        found = found._replace(learning_rate=given_rate(name, options.pop("learning_rate")), tuned=False)
    if options:
        found = _bound(name, found, options)
    if ":" in name:
        _try(name, found)
    elif options:
        try:
            found.make([nn.Parameter(torch.zeros(1))], lr=0.1)
        except (TypeError, ValueError) as error:
            raise UserError(f"baseline {name}: {one_line(error)}") from None
    return found


def _bound(name: str, found: Baseline, options: Mapping[str, Any]) -> Baseline:
    """A baseline with options of its constructor."""
    try:
        known = [key for key in inspect.signature(found.make).parameters if key not in ("params", "lr")]
    except ValueError as error:  # of some built-in functions
        raise UserError(f"baseline {name} failed: {first_line(error)}") from None
    if unknown := [key for key in options if key not in known]:
        raise UserError(
            f"baseline {name} has no option {', '.join(unknown)}; allowed are {', '.join(['learning_rate', *known])}"
        )
    return found._replace(make=functools.partial(found.make, **options))


def _try(name: str, own: Baseline) -> None:
    """Construct a user's own class, to see whether it can be used. A step might need the task's device."""
    try:
        made = own.make([nn.Parameter(torch.ones(2, 2))], lr=own.learning_rate)
        needs = [p.name for p in inspect.signature(made.step).parameters.values() if p.default is p.empty]
    except (Exception, SystemExit) as error:  # whatever the user's class raises
        raise UserError(f"baseline {name} failed: {first_line(error)}") from None
    if not hasattr(made, "param_groups"):
        raise UserError(f"baseline {name} made {type(made).__name__}, which has no param_groups as torch.optim's have")
    if needs:
        raise UserError(f"baseline {name} cannot be used: its step needs {', '.join(needs)}")


def _named(name: str) -> Baseline:
    if name in TORCH_BASELINES:
        return TORCH_BASELINES[name]
    if name in _PACKAGE:
        return _of_package(name)
    module_name, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join(ALL_TORCH)
        raise UserError(f"no baseline {name} for tasks of PyTorch; allowed are {known} and package.module:Class")
    make = import_baseline(name, module_name, attribute, "class")
    return Baseline(make, first_rate(name, make, "class"))


def _of_package(name: str) -> Baseline:
    class_name, rate = _PACKAGE[name]
    try:
        own = getattr(importlib.import_module("pytorch_optimizer"), class_name)
    except ImportError:
        raise MissingBaselineError(f"baseline {name} is left out: it needs pip install pytorch-optimizer") from None
    except AttributeError:
        raise MissingBaselineError(
            f"baseline {name} is left out: the installed pytorch-optimizer has no {class_name}; upgrade it"
        ) from None
    schedules = ("constant",) if name == "schedule_free" else SCHEDULES
    return Baseline(_Muon(own) if name == "muon" else own, rate, schedules)


@dataclasses.dataclass(frozen=True)
class _Muon:
    """Muon for tensors of two or more axes, and its own AdamW, whose learning rate follows, for the others."""

    own: Any

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, params: Iterable[nn.Parameter], lr: float, **options: Any) -> torch.optim.Optimizer:
        every = list(params)
        groups = [
            {"params": [p for p in every if p.ndim >= 2], "lr": lr, "use_muon": True},
            {
                "params": [p for p in every if p.ndim < 2],
                "lr": options.pop("adamw_lr", _MUON_ADAMW * lr),
                "use_muon": False,
            },
        ]
        return self.own([group for group in groups if group["params"]], **options)


class Scheduled:
    """An optimizer of `torch.optim`'s kind under a schedule of the learning rate; see `make_baseline` for its formulas.

    Args:
      optimizer: made with the learning rate's peak.
      schedule: one of `SCHEDULES`.
      horizon: steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: str, horizon: int) -> None:
        self.optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._schedule, self._horizon, self._step = schedule, horizon, 0

    def step(self, *, loss: Tensor) -> None:
        del loss  # torch.optim's optimizers do not read it
        factor = schedule_factor(self._schedule, self._step, self._horizon)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self._step += 1


def schedule_factor(schedule: str, step: int, horizon: int) -> float:
    """The learning rate over its peak at a step, from 0."""

    def cosine(fraction: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))

    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return cosine(step / horizon)
    if schedule == "step":
        return 1.0 if step < 0.5 * horizon else 0.1 if step < 0.75 * horizon else 0.01
    warmup = max(float(np.round(WARMUP * horizon)), 1.0)
    return (step + 1) / (warmup + 1) if step < warmup else cosine((step - warmup) / max(horizon - warmup, 1.0))


def make_torch_baseline(
    baseline: Baseline, hyper: Tuned, params: list[tuple[str, nn.Parameter]], horizon: int
) -> Scheduled:
    """A baseline with one learning rate and schedule."""
    optimizer = baseline.make([param for _, param in params], lr=float(hyper.learning_rate))
    return Scheduled(optimizer, SCHEDULES[int(hyper.schedule)], horizon)
