"""The one validated configuration of a meta-training run.

A file is YAML; `key=value` overrides are merged into it (OmegaConf); pydantic checks the result. Values are not
converted: "8" is not a number, and 1 is not true.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from omegaconf import OmegaConf
from pydantic import Field, PrivateAttr

from l3rs import Direction, Guard, L3RSError, Layer, Spec
from l3rs.directions import direction_options
from l3rs.io.files import read_regular
from l3rs.io.manifest import check_spec_limits
from metatrain import yaml_text

Plan = Literal["fused", "stepwise", "torch"]  # how candidates run, see metatrain/inner/rollout.py, torch_rollout.py


class UserError(ValueError):
    """The user's input is wrong; the message is one sentence: what, where, what is allowed."""


# Upper bounds are far above what anybody can compute: a number beyond them is not meant.
Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
Few = Annotated[int, Field(strict=True, ge=1, le=10**5)]
Positive = Annotated[float, Field(strict=True, gt=0, le=1e9)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(max_length=1000)]
_Name = Annotated[str, Field(max_length=100)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(pydantic.BaseModel):
    """The task: `name` is listed by `metatrain list-tasks` or is `package.module:function`; the rest are its options.

    `variants` are mappings of options that replace these, `name` too. Every task sample draws one of them.
    """

    model_config = pydantic.ConfigDict(extra="allow", frozen=True)
    name: Text
    variants: Annotated[tuple[dict[str, Any], ...], Field(max_length=1000)] = ()

    def forms(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, options) of each variant, or of the task itself if it has none."""
        return [self.form(variant) for variant in self.variants or ({},)]

    def form(self, replaced: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """The arguments of `tasks.make_task`: name and options of the task, some of them replaced."""
        options = {"name": self.name, **(self.model_extra or {}), **(replaced or {})}
        return options.pop("name"), options


def _spec_fields() -> dict[str, Any]:
    """{field: (type, default)} of `l3rs.Spec`, apart from the layers, which follow from the task."""
    types, fields = typing.get_type_hints(Spec), dataclasses.fields(Spec)
    found = {field.name: (_strict(types[field.name]), field.default) for field in fields if field.name != "layers"}
    directions = tuple(direction.to_json() for direction in Spec.directions)
    return {**found, "directions": (tuple[Text | dict[str, Any], ...], directions)}


def _strict(kind: Any) -> Any:
    """The type of a field, without conversions: True is no whole number."""
    if kind in (int, float, bool):
        return Annotated[kind, Field(strict=True)]
    if typing.get_origin(kind) is tuple:
        return tuple[tuple(item if item is ... else _strict(item) for item in typing.get_args(kind))]  # type: ignore[misc]
    return kind


_SpecFields: Any = pydantic.create_model("_SpecFields", __base__=_Section, **_spec_fields())


class OptimizerConfig(_SpecFields):
    """The form of L3RS: the fields of `l3rs.Spec`, with its defaults and its checks; and where meta-training begins."""

    start: Text | None = None  # checkpoint whose form and meta-parameters it begins with; null: new meta-parameters

    def spec_fields(self) -> dict[str, Any]:
        """The fields of `l3rs.Spec` without the layers."""
        return self.model_dump(exclude={"start"})

    @pydantic.model_validator(mode="after")
    def _checked(self) -> OptimizerConfig:
        fields = self.spec_fields()
        try:
            check_spec_limits({key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}, "")
        except L3RSError as error:
            raise ValueError(str(error).replace(": spec.", "")) from None
        directions = tuple(Direction.parse(direction) for direction in fields.pop("directions"))
        for direction in directions:
            try:
                direction_options(direction)
            except (L3RSError, TypeError, OverflowError) as error:
                raise ValueError(f"directions: {error}") from None
        try:
            Spec((Layer("layer", (1,)),), directions, **fields)
        except L3RSError as error:
            raise ValueError(str(error).replace("spec.", "")) from None
        return self


class HorizonConfig(_Section):
    """Inner steps of a task sample, drawn log-uniformly from min … max."""

    min: Count = 10
    max: Count = 200

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> HorizonConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class OuterConfig(_Section):
    """The evolution strategy."""

    steps: Count = 400  # generations
    population: int = Field(default=32, ge=2, le=10**6, strict=True)
    sigma: Positive = 0.05
    strategy: Literal["open_es", "snes", "pgpe"] = "open_es"
    learning_rate: Positive = 0.03  # of Adam on the search gradient, decayed to 0 along a cosine
    horizon: HorizonConfig = HorizonConfig()
    # Task samples (variant, init, batches, horizon) on which a generation evaluates every member. With more than one, a
    # member's fitness is the mean of its ranks within each sample; a non-finite loss ranks worst.
    samples: int = Field(default=1, ge=1, le=1000, strict=True)
    max_failures: Count = 5  # generations in a row without a finite fitness before the run stops

    @pydantic.model_validator(mode="after")
    def _even(self) -> OuterConfig:
        if self.population % 2:
            raise ValueError(f"population is {self.population}; it must be even: members come in mirrored pairs")
        return self


class ExecutionConfig(_Section):
    """Where candidates are evaluated."""

    backend: Literal["local", "ray"] = "local"
    address: Text | None = None  # of Ray: host:port or auto; null starts Ray on this machine
    # Ray actors; auto fills the cluster, and follows it as it grows. Locally, processes of the plan torch; auto: cores.
    workers: Few | Literal["auto"] = "auto"
    # Ray's names: CPU, GPU (a part of one, or whole ones), TPU, or a custom resource. A worker uses what it reserves.
    resources_per_worker: dict[Text, Positive] = {"CPU": 1.0}
    autoscaling: Flag = False  # wait for a node that can hold a worker instead of refusing the run when there is none
    allow_unauthenticated: Flag = False  # use a cluster that others can reach, without Ray's token
    plan: Plan | Literal["auto"] = "auto"  # torch is for tasks of PyTorch; auto measures the others
    members_per_call: Count | Literal["auto"] = "auto"  # candidates in one compiled call

    @pydantic.model_validator(mode="after")
    def _somewhere(self) -> ExecutionConfig:
        if self.address is not None and self.backend == "local":
            raise ValueError(f"address is {self.address}, a Ray cluster's; it needs execution.backend=ray")
        gpus = self.resources_per_worker.get("GPU", 0.0)
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"resources_per_worker.GPU is {gpus:g}; allowed are a part of one, such as 0.25, or whole ones"
            )
        return self


class CheckpointConfig(_Section):
    every: Count = 25  # generations
    keep: Count = 3


class EvaluationConfig(_Section):
    """How an optimizer is evaluated; the options of `metatrain evaluate` take precedence."""

    settings: dict[_Name, dict[str, Any]] = {}  # {setting: options that replace the task's}; empty: the task itself
    horizons: tuple[Count, ...] = Field(default=(10, 30, 100), min_length=1, max_length=100)
    seeds: Few = 6  # training runs of each optimizer and horizon; a seed is an init and its batches
    tuning_seeds: Few | None = None  # how many of them tune the baselines; null: all
    # Names of evaluation/baselines.py, package.module:function, or all; or mappings of a name, its options and a label.
    baselines: tuple[Text | dict[str, Any], ...] = ("adam", "sgdm")
    schedules: tuple[Text, ...] = ("constant", "cosine")  # of the learning rate; there is also warmup_cosine
    curve_points: Few = 16  # test evaluations along a training run
    multipliers: tuple[Positive, ...] = ()  # factors of L3RS's steps to compare, e.g. [.1, .3, 1, 3, 10]
    guard: Flag | dict[str, Any] = False  # L3RS's: fields of `l3rs.Guard`, or true for its defaults

    def make_guard(self) -> bool | Guard:
        """The argument `guard` of `l3rs.learned_optimizer`."""
        if isinstance(self.guard, bool):
            return self.guard
        allowed = [field.name for field in dataclasses.fields(Guard)]
        if unknown := sorted(set(self.guard) - set(allowed)):
            raise ValueError(f"guard has no {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        try:
            return Guard(**self.guard)
        except TypeError as error:
            raise ValueError(f"guard: {error}") from None

    @pydantic.model_validator(mode="after")
    def _within(self) -> EvaluationConfig:
        if self.tuning_seeds is not None and self.tuning_seeds > self.seeds:
            raise ValueError(f"tuning_seeds {self.tuning_seeds} is larger than seeds {self.seeds}")
        self.make_guard()
        return self


class LoggingConfig(_Section):
    tensorboard: Flag = True


class MeasuredConfig(_Section):
    """What a run's plan and members per call were chosen by, on one kind of device. The run writes it."""

    device: str  # its kind
    ms_per_step: dict[str, float] = {}  # {plan: milliseconds per candidate-step}
    members_that_fit: int | None = None  # candidates of one fused call; null without a limit


class CodeConfig(_Section):
    """What a run was started with. The run writes it; it is compared on resume."""

    l3rs: str  # version
    jax: str  # version
    source: str  # digest of the source of l3rs, tasks and metatrain
    device: str  # kind of the device that computes; of the driver's on a cluster


class Config(_Section):
    """A meta-training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=0, ge=0, lt=2**31, strict=True)
    task: TaskConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    outer: OuterConfig = OuterConfig()
    execution: ExecutionConfig = ExecutionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    measured: tuple[MeasuredConfig, ...] = ()
    code: CodeConfig | None = None
    # {path of a value: (the interpolation that it was written as, the value)}
    _interpolations: dict[yaml_text.Path, tuple[str, Any]] = PrivateAttr(default_factory=dict)

    def own_code(self) -> list[str]:
        """Names `package.module:function` of tasks and baselines: code that is imported when they are built."""
        settings = [self.task.form(options)[0] for options in self.evaluation.settings.values()]
        baselines = [b.get("name") if isinstance(b, dict) else b for b in self.evaluation.baselines]
        names = [*(name for name, _ in self.task.forms()), *settings, *baselines]
        return sorted({name for name in names if isinstance(name, str) and ":" in name})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
      path: a YAML file.
      overrides: `key=value`, e.g. `outer.sigma=0.1`.

    Raises:
      UserError: unreadable, or a key or value that is not allowed.
    """
    try:
        text = read_regular(path, yaml_text.MAX_BYTES, follow_links=True).decode()
        merged = yaml_text.read_yaml(text, overrides)
        config = check_config(yaml_text.resolve(merged), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a YAML file is needed") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise UserError(f"{path} cannot be read as YAML: it is not UTF-8") from None
    except yaml_text.YamlError as error:
        raise UserError(f"{path}: {error}") from None
    written = yaml_text.leaves(OmegaConf.to_container(merged, resolve=False))
    values = config.model_dump(mode="python")
    found = {path: (text, _value_at(values, path)) for path, text in written if "${" in str(text)}
    config._interpolations.update(found)
    return config


def check_config(data: dict[Any, Any], where: str = "config") -> Config:
    """Make a `Config` from plain dictionaries.

    Raises:
      UserError: it names the key, the value found and the values allowed.
    """
    return check_section(Config, data, where)


Section = TypeVar("Section", bound=pydantic.BaseModel)


def check_section(section: type[Section], data: dict[Any, Any], where: str) -> Section:
    """Make one section of a configuration; as `check_config`."""
    try:
        return section.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_sentences(error.errors(), section)}") from None


def dump_config(config: Config) -> str:
    """The complete configuration as YAML that `load_config` reads back, with interpolations as they were written."""
    return OmegaConf.to_yaml(OmegaConf.create(as_written(config)))


def as_written(config: Config) -> dict[str, Any]:
    """The configuration as plain values, with interpolations as they were written.

    What an interpolation stands for may be a secret (`${oc.env:TOKEN}`); it belongs in no file. A value that has been
    changed since is given as it is.
    """

    def written(value: Any, path: yaml_text.Path) -> Any:
        if path in config._interpolations:
            text, before = config._interpolations[path]
            if value == before:
                return text
        if isinstance(value, dict):
            return {key: written(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [written(item, (*path, index)) for index, item in enumerate(value)]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    data = written(config.model_dump(mode="python"), ())  # JSON would lose infinities
    assert isinstance(data, dict)
    return data


def _value_at(value: Any, path: yaml_text.Path) -> Any:
    for part in path:
        value = value[part]
    return value


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value before, value after)} of the values in which two configurations differ.

    A value that one of them lacks is None there.
    """
    left, right = (_flat(config.model_dump(mode="python")) for config in (before, after))
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def portable(value: Any) -> Any:
    """Plain values that can be published as JSON: absolute paths shortened to their last two parts, no infinities."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str) and value.startswith("/"):  # this machine's folders mean nothing elsewhere
        return "…/" + "/".join(Path(value).parts[-2:])
    return None if isinstance(value, float) and not math.isfinite(value) else value


_MAX_ERRORS = 5  # in one sentence

# What pydantic puts into the location of an error beside keys: the members of a union.
_MEMBERS = re.compile(r"(function-|tuple\[|literal\[|dict\[|constrained-|(bool|int|float|str)$)")


def _sentences(errors: Sequence[Any], section: Any) -> str:
    """Errors of pydantic as one sentence; what each member of a union wants is joined by "or"."""
    found: dict[str, tuple[list[str], str]] = {}
    wrong = {error["loc"] for error in errors}
    for error in errors:
        if error["type"] == "too_short" and any(
            loc[: len(error["loc"])] == error["loc"] for loc in wrong - {error["loc"]}
        ):
            continue  # it counts the valid items only
        key = ".".join(str(part) for part in error["loc"] if not _MEMBERS.match(str(part)))
        wanted, _ = found.setdefault(key, ([], _found(error)))
        wanted.append(_wanted(error, section))
    shown = [f"{key[:300] or 'config'}: {_either(wanted)}{value}" for key, (wanted, value) in found.items()]
    more = [f"and {len(shown) - _MAX_ERRORS} more"] if len(shown) > _MAX_ERRORS else []
    return "; ".join(shown[:_MAX_ERRORS] + more)


def _either(wanted: list[str]) -> str:
    first, *others = wanted
    return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])


def _wanted(error: Any, section: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            for part in error["loc"][:-1]:
                section = section.model_fields[part].annotation
            return f"unknown key; allowed here are {', '.join(section.model_fields)}"
        case "tuple_type":
            return "input should be a list in brackets, e.g. [16, 16]"
        case "dict_type" | "model_type":
            return "input should be a mapping, e.g. {key: value}"
        case "int_type":
            return "input should be a valid integer, without quotes and leading zeros"
    message = re.sub(r"^Value error, ", "", error["msg"])
    return message[0].lower() + message[1:]


def _found(error: Any) -> str:
    if error["type"] in ("value_error", "missing", "extra_forbidden"):
        return ""
    found = repr(error["input"])
    return f", found {found if len(found) <= 100 else found[:100] + '…'}"


def one_line(error: BaseException) -> str:
    """An error's whole message, without line breaks."""
    return " ".join(str(error).split())
