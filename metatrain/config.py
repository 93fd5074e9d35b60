"""The one validated configuration of a meta-training run.

A file is YAML; `key=value` overrides are merged into it (OmegaConf); pydantic checks the result.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, PositiveFloat, PositiveInt

from l3rs import Direction, Guard, L3RSError, Layer, Spec
from l3rs.directions import direction_options

Plan = Literal["fused", "stepwise"]  # how candidates run, see metatrain/inner/rollout.py


class UserError(ValueError):
    """The user's input is wrong; the message is one sentence: what, where, what is allowed."""


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)


class TaskConfig(pydantic.BaseModel):
    """The task: `name` is listed by `metatrain list-tasks` or is `package.module:function`; the rest are its options.

    `variants` are mappings of options that replace these, `name` too. Every generation draws one of them.
    """

    model_config = pydantic.ConfigDict(extra="allow", frozen=True)
    name: str
    variants: tuple[dict[str, Any], ...] = ()

    @property
    def is_imported(self) -> bool:
        """Whether a variant names code of the user's own, `package.module:function`."""
        return any(":" in str(name) for name, _ in self.forms())

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
    found = {field.name: (types[field.name], field.default) for field in fields if field.name != "layers"}
    directions = tuple(direction.to_json() for direction in Spec.directions)
    return {**found, "directions": (tuple[str | dict[str, Any], ...], directions)}


_SpecFields: Any = pydantic.create_model("_SpecFields", __base__=_Section, **_spec_fields())


class OptimizerConfig(_SpecFields):
    """The form of L3RS: the fields of `l3rs.Spec`, with its defaults and its checks."""

    @pydantic.model_validator(mode="after")
    def _checked(self) -> OptimizerConfig:
        fields = self.model_dump()
        directions = tuple(Direction.parse(direction) for direction in fields.pop("directions"))
        for direction in directions:
            try:
                direction_options(direction)
            except L3RSError as error:
                raise ValueError(f"directions: {error}") from None
        try:
            Spec((Layer("layer", (1,)),), directions, **fields)
        except L3RSError as error:
            raise ValueError(str(error).replace("spec.", "")) from None
        return self


class HorizonConfig(_Section):
    """Inner steps of a generation, drawn log-uniformly from min … max."""

    min: PositiveInt = 10
    max: PositiveInt = 200

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> HorizonConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class OuterConfig(_Section):
    """The evolution strategy."""

    steps: PositiveInt = 400  # generations
    population: int = Field(default=32, ge=2)
    sigma: PositiveFloat = 0.05
    strategy: Literal["open_es", "snes", "pgpe"] = "open_es"
    learning_rate: PositiveFloat = 0.03  # of Adam on the search gradient, decayed to 0 along a cosine
    horizon: HorizonConfig = HorizonConfig()
    max_failures: PositiveInt = 5  # generations in a row without a finite fitness before the run stops

    @pydantic.model_validator(mode="after")
    def _even(self) -> OuterConfig:
        if self.population % 2:
            raise ValueError(f"population is {self.population}; it must be even: members come in mirrored pairs")
        return self


class ExecutionConfig(_Section):
    """Where candidates are evaluated."""

    backend: Literal["local", "ray"] = "local"
    address: str | None = None  # of Ray: host:port or auto; null starts Ray on this machine
    workers: PositiveInt | Literal["auto"] = "auto"  # Ray actors; auto fills the cluster, and follows it as it grows
    resources_per_worker: dict[str, PositiveFloat] = {"CPU": 1.0}  # Ray's names: CPU, GPU, or a custom resource
    autoscaling: bool = False  # wait for a node that can hold a worker instead of refusing the run when there is none
    allow_unauthenticated: bool = False  # use a cluster that others can reach, without Ray's token
    plan: Plan | Literal["auto"] = "auto"  # auto measures both
    members_per_call: PositiveInt | Literal["auto"] = "auto"  # candidates in one compiled call

    @pydantic.model_validator(mode="after")
    def _somewhere(self) -> ExecutionConfig:
        if self.address is not None and self.backend == "local":
            raise ValueError(f"address is {self.address}, a Ray cluster's; it needs execution.backend=ray")
        return self


class CheckpointConfig(_Section):
    every: PositiveInt = 25  # generations
    keep: PositiveInt = 3


class EvaluationConfig(_Section):
    """How an optimizer is evaluated; the options of `metatrain evaluate` take precedence."""

    settings: dict[str, dict[str, Any]] = {}  # {setting: options that replace the task's}; empty: the task itself
    horizons: tuple[PositiveInt, ...] = Field(default=(10, 30, 100), min_length=1)
    seeds: PositiveInt = 6  # training runs of each optimizer and horizon; a seed is an init and its batches
    tuning_seeds: PositiveInt | None = None  # how many of them tune the baselines; null: all
    # Names of evaluation/baselines.py, package.module:function, or all; or mappings of a name, its options and a label.
    baselines: tuple[str | dict[str, Any], ...] = ("adam", "sgdm")
    schedules: tuple[str, ...] = ("constant", "cosine")  # of the learning rate; there is also warmup_cosine
    curve_points: PositiveInt = 16  # test evaluations along a training run
    multipliers: tuple[PositiveFloat, ...] = ()  # factors of L3RS's steps to compare, e.g. [.1, .3, 1, 3, 10]
    guard: bool | dict[str, Any] = False  # L3RS's: fields of `l3rs.Guard`, or true for its defaults

    def make_guard(self) -> bool | Guard:
        """The argument `guard` of `l3rs.learned_optimizer`."""
        if isinstance(self.guard, bool):
            return self.guard
        allowed = [field.name for field in dataclasses.fields(Guard)]
        if unknown := sorted(set(self.guard) - set(allowed)):
            raise ValueError(f"guard has no {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        return Guard(**self.guard)

    @pydantic.model_validator(mode="after")
    def _within(self) -> EvaluationConfig:
        if self.tuning_seeds is not None and self.tuning_seeds > self.seeds:
            raise ValueError(f"tuning_seeds {self.tuning_seeds} is larger than seeds {self.seeds}")
        self.make_guard()
        return self


class LoggingConfig(_Section):
    tensorboard: bool = True


class Config(_Section):
    """A meta-training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**31)
    task: TaskConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    outer: OuterConfig = OuterConfig()
    execution: ExecutionConfig = ExecutionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration.

    Args:
      path: a YAML file.
      overrides: `key=value`, e.g. `outer.sigma=0.1`.

    Raises:
      UserError: unreadable, or a key or value that is not allowed.
    """
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise UserError(f"{path} must hold a mapping of sections, found a list or a bare value")
        data = OmegaConf.to_container(OmegaConf.merge(loaded, _parse(overrides)), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a YAML file is needed") from None
    except UserError:
        raise
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # PyYAML's errors have no common base that is not Exception
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from None
    assert isinstance(data, dict)
    return check_config(data, str(path))


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
        raise UserError(f"{where}: " + "; ".join(_sentence(e, section) for e in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    data = config.model_dump(mode="python")  # JSON would lose infinities
    # Interpolations were resolved when the configuration was read; what still looks like one is text.
    return OmegaConf.to_yaml(OmegaConf.create(_each_text(data, lambda text: text.replace("${", "\\${"))))


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
    """Shorten absolute paths to their last two parts: a checkpoint is published, this machine's folders are not."""
    return _each_text(value, lambda text: "…/" + "/".join(Path(text).parts[-2:]) if text.startswith("/") else text)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to each text in mappings, lists and tuples; tuples become lists."""
    if isinstance(value, dict):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _parse(overrides: Sequence[str]) -> Any:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is not an override; write key=value, e.g. outer.sigma=0.1")
    return OmegaConf.from_dotlist(list(overrides))


def _sentence(error: Any, section: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("function-", "tuple[", "literal[")))
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {key}; allowed here are {', '.join(section.model_fields)}"
    message = re.sub(r"^Value error, ", "", error["msg"])
    found = error["input"]
    shown = "" if error["type"] in ("value_error", "missing") else f", found {found!r}"
    return f"{key or 'config'}: {message[0].lower() + message[1:]}{shown}"


def one_line(error: BaseException) -> str:
    """An error's whole message, without line breaks."""
    return " ".join(str(error).split())
