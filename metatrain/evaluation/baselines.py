"""The optimizers that L3RS is compared with, as functions of a learning rate."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from l3rs.baselines import BASELINES as OWN
from l3rs.baselines import iomt
from l3rs.io.files import first_line
from l3rs.modes import usual_promotion
from metatrain.config import UserError
from metatrain.config_errors import one_line

SCHEDULES = ("constant", "cosine", "warmup_cosine", "step")
WARMUP = 0.1  # of the horizon


class Baseline(NamedTuple):
    """A family of optimizers with one learning rate to tune."""

    make: Callable[..., optax.GradientTransformation]  # of a learning rate or schedule
    learning_rate: float  # where the search begins
    schedules: Sequence[str] = SCHEDULES  # the schedules that suit it
    knows_horizon: bool = False  # `make` also takes `total_steps`
    knows_peak: bool = False  # `make` also takes `peak`, the learning rate without its schedule
    tuned: bool = True  # False: the learning rate was given and is used as it is


def _learning(own: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """MADA and HyperAdam start to learn at step 50, so that in fewer steps they would be plain Adam. Here they start
    at a tenth of the horizon if that is earlier, but not before the second step. `start_step` overrides this."""

    @functools.wraps(own)
    def make(
        learning_rate: optax.ScalarOrSchedule, *, total_steps: int | jax.Array = 500, **options: Any
    ) -> optax.GradientTransformation:
        return own(learning_rate, **{"start_step": jnp.clip(jnp.asarray(total_steps) // 10, 2, 50), **options})

    return make


def _bounded(own: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """AdaBound's bounds are a share of the learning rate's peak: a schedule with a warm-up starts far below it."""

    @functools.wraps(own)
    def make(
        learning_rate: optax.ScalarOrSchedule, *, peak: jax.typing.ArrayLike | None = None, **options: Any
    ) -> optax.GradientTransformation:
        return own(learning_rate, **{"base_learning_rate": peak, **options})

    return make


def _schedule_free(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Schedule-free Adam (arXiv 2405.15682). It is judged at its average, see `metatrain.inner.params`."""
    return optax.contrib.schedule_free(optax.adam(learning_rate, b1=0.0), learning_rate, b1=0.9)


BASELINES = {
    "sgd": Baseline(optax.sgd, 2.0**-3),
    "sgdm": Baseline(functools.partial(optax.sgd, momentum=0.9), 2.0**-5),
    "adam": Baseline(optax.adam, 2.0**-9),
    "adamw": Baseline(functools.partial(optax.adamw, weight_decay=1e-2), 2.0**-9),
    "amsgrad": Baseline(optax.amsgrad, 2.0**-9),
    "nadam": Baseline(optax.nadam, 2.0**-9),
    "adamax": Baseline(optax.adamax, 2.0**-9),
    "adagrad": Baseline(optax.adagrad, 2.0**-6),
    "rmsprop": Baseline(optax.rmsprop, 2.0**-10),
    "lion": Baseline(optax.lion, 2.0**-12),
    "adan": Baseline(optax.adan, 2.0**-8),
    "yogi": Baseline(optax.yogi, 2.0**-7),
    "schedule_free": Baseline(_schedule_free, 2.0**-8, ("constant",)),
    "prodigy": Baseline(optax.contrib.prodigy, 1.0),
    # The systems of l3rs.baselines. Those with a schedule of their own, or that rely on a constant rate, have no other.
    "mada": Baseline(_learning(OWN["mada"]), 2.0**-9, knows_horizon=True),
    "hyper_adam": Baseline(_learning(OWN["hyper_adam"]), 2.0**-9, knows_horizon=True),
    "avgrad": Baseline(OWN["avgrad"], 2.0**-9),
    "padam": Baseline(OWN["padam"], 2.0**-4),
    "adabound": Baseline(_bounded(OWN["adabound"]), 2.0**-9, knows_peak=True),
    "amsbound": Baseline(_bounded(OWN["amsbound"]), 2.0**-9, knows_peak=True),
    "swats": Baseline(OWN["swats"], 2.0**-9, ("constant",)),
}


SPACES: Mapping[str, iomt.Space] = {"usual": iomt.SPACE, "larger": iomt.LARGER_SPACE}


class Interleaved(NamedTuple):
    """IOMT: every τ steps, a controller on the host chooses which of five optimizers trains the next stage.

    The tuned learning rate is the middle one of the three in its space, which are a factor 10 apart. The search
    starts at the paper's .1, .01 and .001.
    """

    options: Mapping[str, Any]  # fields of `iomt.Options`
    optimizers: str = "usual"  # a name in `SPACES`
    learning_rate: float = 1e-2
    schedules: Sequence[str] = ("constant",)
    tuned: bool = True

    def at(self, horizon: int) -> iomt.Options:
        """The options for a horizon. Those not given equal the paper's from 1,250 steps on.

        τ is 25, or a fiftieth of the horizon if that is less; the initial phase n_ini is 20 stages, or two fifths of
        the stages if that is less.
        """
        options = iomt.Options(**{"stage_steps": min(25, max(1, horizon // 50)), **self.options})
        initial = min(20, max(1, round(0.4 * math.ceil(horizon / options.stage_steps))))
        return dataclasses.replace(options, **{"initial_stages": initial, **self.options})

    def space(self, rate: float) -> iomt.Space:
        """The optimizers that the controller chooses from, with learning rates around `rate`."""
        rates = (10 * rate, rate, rate / 10)
        return {
            name: optimizer._replace(hyperparameters={**optimizer.hyperparameters, "learning_rate": rates})
            for name, optimizer in SPACES[self.optimizers].items()
        }


# IOMT, and the ablations of the paper's Tables 7 to 9 and Figure 11. `transferability` is measured unless it is given.
INTERLEAVED = {
    "iomt": Interleaved({}),
    "doit": Interleaved({"variant": "doit"}),
    "iomt_random": Interleaved({"switch": "random"}),
    "iomt_cyclical": Interleaved({"switch": "cyclical"}),
    "iomt_no_transferability": Interleaved({"transferability": 0.0}),
    "iomt_no_halving": Interleaved({"halving": None}),
    "iomt_unweighted": Interleaved({"start": "uniform"}),
    "iomt_larger_space": Interleaved({}, "larger"),
}

ALL = (*BASELINES, "iomt", "doit")  # what "all" stands for; the ablations have to be named


class Tuned(NamedTuple):
    """Hyper-parameters of a baseline, arrays so that a grid of them runs in one call."""

    learning_rate: jax.Array  # float32 []
    schedule: jax.Array  # int32 [], index into SCHEDULES

    @classmethod
    def grid(cls, rates: Sequence[float], schedule: str) -> Tuned:
        """Learning rates under one schedule; leading axis [len(rates)]."""
        return cls(jnp.asarray(rates, jnp.float32), jnp.full(len(rates), SCHEDULES.index(schedule), jnp.int32))


@usual_promotion()
def make_baseline(
    baseline: str | Baseline, hyper: Tuned, horizon: int | jax.Array
) -> optax.GradientTransformationExtraArgs:
    """A baseline, given itself or by name, with one learning rate and schedule; `horizon` may be traced.

    constant: the learning rate itself. cosine: decays to zero over the horizon. warmup_cosine: rises linearly over the
    first tenth of the horizon, at least one step, then decays to zero along a cosine. step: a tenth of it from half of
    the horizon on, and a hundredth from three quarters on.
    """
    warmup = jnp.maximum(jnp.round(WARMUP * horizon), 1.0)

    def schedule(step: jax.Array) -> jax.Array:
        def cosine(fraction: jax.Array) -> jax.Array:
            return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(fraction, 0.0, 1.0)))

        rising = (step + 1) / (warmup + 1)
        falling = cosine((step - warmup) / jnp.maximum(horizon - warmup, 1.0))
        stepped = jnp.where(step < 0.5 * horizon, 1.0, jnp.where(step < 0.75 * horizon, 0.1, 0.01))
        warm = jnp.where(step < warmup, rising, falling)
        factors = jnp.stack([jnp.float32(1), cosine(step / horizon), warm, stepped])
        return hyper.learning_rate * factors[hyper.schedule]

    if isinstance(baseline, str):
        baseline = _named(baseline)
    more = {"total_steps": horizon} if baseline.knows_horizon else {}
    more |= {"peak": hyper.learning_rate} if baseline.knows_peak else {}
    rate = hyper.learning_rate if tuple(baseline.schedules) == ("constant",) else schedule
    made = optax.with_extra_args_support(baseline.make(rate, **more))
    return optax.GradientTransformationExtraArgs(usual_promotion()(made.init), usual_promotion()(made.update))


class MissingBaselineError(UserError):
    """The package of a user's own baseline is not installed."""


def find_baseline(name: str, options: Mapping[str, Any] | None = None) -> Baseline | Interleaved:
    """Find a baseline by name, or by `package.module:function` for a user's own function.

    The function takes a learning rate or an optax schedule, and `total_steps` if it has such a parameter; it returns
    an optax transformation. The search for the learning rate starts at its attribute `learning_rate`.

    Args:
      name: a key of `BASELINES` or `INTERLEAVED`, or a function.
      options: for the optimizer's constructor; for IOMT, fields of `l3rs.baselines.iomt.Options`. A `learning_rate`
        is used as it is, and not tuned.

    Raises:
      MissingBaselineError: its module cannot be imported.
      UserError: no such name or function, or an option that it does not have or does not accept.
    """
    found = INTERLEAVED[name] if name in INTERLEAVED else _named(name)
    options = dict(options or {})
    if "learning_rate" in options:
        found = found._replace(learning_rate=given_rate(name, options.pop("learning_rate")), tuned=False)
    known = _option_names(found)
    if known is not None and (unknown := [option for option in options if option not in known]):
        allowed = ", ".join(["learning_rate", *known])
        raise UserError(f"baseline {name} has no option {', '.join(unknown)}; allowed are {allowed}")
    if isinstance(found, Baseline):
        found = found._replace(make=functools.partial(found.make, **options))
        if name not in BASELINES:
            _try(name, found)
    if not options:
        return found
    try:
        if isinstance(found, Interleaved):
            found = found._replace(options={**found.options, **options})
            found.at(1)
            return found
        bound = found
        if "learning_rate" in options.get("learned", ()):  # an option of MADA, which starts from one number
            bound = bound._replace(schedules=("constant",))
        params = {"w": jnp.zeros((2, 2))}
        jax.eval_shape(lambda: make_baseline(bound, Tuned(jnp.float32(0.1), jnp.int32(0)), 10).init(params))
    except (TypeError, ValueError) as error:  # L3RSError and optax's own
        raise UserError(f"baseline {name}: {one_line(error)}") from None
    return bound


def given_rate(name: str, rate: Any) -> float:
    """A learning rate that a baseline's options give.

    Raises:
      UserError: it is not one number > 0.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise UserError(f"baseline {name}: learning_rate is {rate!r}; it must be one number > 0")
    return float(rate)


def _option_names(baseline: Baseline | Interleaved) -> list[str] | None:
    """Options of the constructor; None where it takes `**options` and checks them itself."""
    if isinstance(baseline, Interleaved):
        return [field.name for field in dataclasses.fields(iomt.Options)]
    parameters = list(inspect.signature(baseline.make).parameters.values())[1:]  # the first is the learning rate
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.name != "total_steps"]


def _named(name: str) -> Baseline:
    """The baseline of `BASELINES`, or of a user's own function, with that name."""
    if name in BASELINES:
        return BASELINES[name]
    module_name, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join((*BASELINES, *INTERLEAVED))
        raise UserError(f"no baseline {name}; allowed are {known} and package.module:function")
    return _own(name, import_baseline(name, module_name, attribute, "function"))


def import_baseline(name: str, module_name: str, attribute: str, kind: str) -> Any:
    """Import a baseline of the user's.

    Args:
      name: of the baseline, for messages.
      module_name, attribute: where it is.
      kind: what it is, for messages: "function" or "class".

    Raises:
      MissingBaselineError: its module, or one that it needs, is not installed.
      UserError: the module raises another error or has no such attribute.
    """
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise MissingBaselineError(f"baseline {name} is left out: {error}") from None
    except AttributeError:
        raise UserError(f"baseline {name}: {module_name} has no {kind} {attribute!r}") from None
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise UserError(f"baseline {name}: {module_name} cannot be imported: {first_line(error)}") from None


def first_rate(name: str, make: Any, kind: str) -> float:
    """Where the search for the learning rate of a user's own baseline begins: its attribute, or 2⁻⁹.

    Args:
      name: of the baseline, for messages.
      make: what was imported.
      kind: what it has to be, for messages: "function" or "class".

    Raises:
      UserError: it cannot be called, or its attribute is not one number > 0.
    """
    rate = getattr(make, "learning_rate", 2.0**-9)
    if not callable(make):
        raise UserError(f"baseline {name} is {type(make).__name__}, not a {kind}")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise UserError(f"baseline {name}: its attribute learning_rate is {rate!r}; it must be one number > 0")
    return float(rate)


def _own(name: str, make: Any) -> Baseline:
    """A user's own function as a baseline."""
    rate = first_rate(name, make, "function")
    try:
        return Baseline(make, rate, knows_horizon="total_steps" in inspect.signature(make).parameters)
    except ValueError as error:  # of some built-in functions
        raise UserError(f"baseline {name} failed: {first_line(error)}") from None


def _try(name: str, own: Baseline) -> None:
    """Call a user's own function with its options once, to see whether it returns an optimizer."""
    try:
        made = own.make(own.learning_rate, **({"total_steps": 10} if own.knows_horizon else {}))
    except (Exception, SystemExit) as error:
        raise UserError(f"baseline {name} failed: {first_line(error)}") from None
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(f"baseline {name} returned {type(made).__name__}, not an optax.GradientTransformation")


def chosen_baselines(
    entries: Sequence[str | Mapping[str, Any]],
    schedules: Sequence[str],
    find: Callable[[str, Mapping[str, Any]], Baseline | Interleaved] = find_baseline,
    every: Sequence[str] = ALL,
) -> tuple[dict[str, Baseline | Interleaved], list[str]]:
    """The baselines of a configuration: {label: baseline, with the schedules that suit it}, and why some are left out.

    Args:
      entries: names, or mappings of a name, options, a label and schedules, {name: mada, b1: 0.5, label: "mada, poor
        β1", schedules: [cosine]}. Without a label it is the name with the options: mada(b1=0.5). "all" stands for
        `every`. They keep their order, and repeated entries count once.
      schedules: of the learning rate, for entries without their own.
      find: finds a baseline by name and options.
      every: names.

    Raises:
      UserError: a name, option or schedule that does not exist, or two baselines with one label.
    """
    _check_schedules(schedules)
    parsed: dict[str, Entry] = {}
    for given in (one for entry in entries for one in (every if entry == "all" else [entry])):
        written = parse_entry(given)
        if parsed.setdefault(written.label, written) != written:
            raise UserError(f"two baselines have the label {written.label!r}; give one of them another label")
    chosen: dict[str, Baseline | Interleaved] = {}
    missing = []
    for label, entry in parsed.items():
        try:
            found = find(entry.name, entry.options)
        except MissingBaselineError as error:
            missing.append(str(error))
            continue
        wanted = schedules if entry.schedules is None else entry.schedules
        chosen[label] = found._replace(schedules=[s for s in wanted if s in found.schedules])
        if not chosen[label].schedules:
            missing.append(
                f"baseline {label} is left out: it only works with the schedules {', '.join(found.schedules)}"
            )
            del chosen[label]
    return chosen, missing


class Entry(NamedTuple):
    """A baseline of a configuration."""

    label: str
    name: str
    options: Mapping[str, Any]
    schedules: Sequence[str] | None  # None: those of the evaluation


def parse_entry(entry: str | Mapping[str, Any]) -> Entry:
    """A baseline as it is written in a configuration.

    Raises:
      UserError: an entry without a name, or a label or schedule that is not allowed.
    """
    if isinstance(entry, str):
        return Entry(entry, entry, {}, None)
    options = {key: value for key, value in entry.items() if key not in ("name", "label", "schedules")}
    name = entry.get("name")
    if not isinstance(name, str):
        raise UserError(f"a baseline needs a name, found {dict(entry)}")
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    label = entry.get("label", f"{name}({shown})" if shown else name)
    if not isinstance(label, str) or not label or "/" in label or label == "l3rs":
        raise UserError(f"baseline {name}: label is {label!r}; it must be text without a slash, and not l3rs")
    schedules = entry.get("schedules")
    if schedules is not None and (not isinstance(schedules, Sequence) or isinstance(schedules, str) or not schedules):
        raise UserError(f"baseline {name}: schedules is {schedules!r}; it must be a list of {', '.join(SCHEDULES)}")
    _check_schedules(schedules or (), f"baseline {name}: ")
    return Entry(label, name, options, schedules)


def _check_schedules(schedules: Sequence[Any], where: str = "") -> None:
    if unknown := [str(schedule) for schedule in schedules if schedule not in SCHEDULES]:
        raise UserError(f"{where}no schedule {', '.join(unknown)}; allowed are {', '.join(SCHEDULES)}")
