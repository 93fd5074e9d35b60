"""The one validated configuration of a meta-training run.

A file is YAML; `key=value` overrides are merged into it (OmegaConf); pydantic checks the result. Values are not
converted: "8" is not a number, and 1 is not true.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from omegaconf import OmegaConf
from pydantic import Field, PrivateAttr

from l3rs import Direction, Guard, L3RSError, Layer, Spec
from l3rs.descriptors import ROLE_NAMES
from l3rs.directions import direction_options
from l3rs.io.files import read_regular
from l3rs.io.manifest import check_spec_limits
from l3rs.spec import OFF_AT_ZERO
from metatrain import yaml_text
from metatrain.config_errors import one_sentence
from metatrain.config_fields import Count, Few, Flag, Name, Positive, Section, SpecFields, Text

Plan = Literal["fused", "stepwise", "torch"]  # how candidates run, see metatrain/inner/rollout.py, torch_rollout.py


class UserError(ValueError):
    """The user's input is wrong; the message is one sentence: what, where, what is allowed."""


class TaskConfig(pydantic.BaseModel):
    """The training problem. Further keys are the task's own options.

    Attributes:
      name: one that `metatrain list-tasks` prints, or `package.module:function`.
      variants: mappings of options that replace these, `name` too. Every task sample draws one of them.
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


_START_FIELDS = {"start", "start_multiplier", "start_by_role", "start_horizon_power"}


class OptimizerConfig(SpecFields):
    """The form of L3RS: the fields of `l3rs.Spec`, with its defaults and its checks; and where meta-training begins.

    Attributes:
      start: checkpoint whose form and meta-parameters it begins with; null: new meta-parameters.
      start_multiplier: factor of that checkpoint's steps, which its form's limit still bounds.
      start_by_role: further factors by a layer's role, such as {output_kernel: 4}; with a table and a layer_gain.
      start_horizon_power: another horizon_power than that checkpoint's, for form 2; null for its own.
    """

    start: Text | None = None
    start_multiplier: Positive = 1.0
    start_horizon_power: float | None = Field(default=None, ge=0, le=1, strict=True)
    start_by_role: dict[str, Positive] = Field(default_factory=dict)

    def start_fields(self) -> dict[str, Any]:
        """What says where meta-training begins."""
        return self.model_dump(include=_START_FIELDS)

    def spec_fields(self) -> dict[str, Any]:
        """The fields of `l3rs.Spec` without the layers."""
        return self.model_dump(exclude=_START_FIELDS)

    @pydantic.model_validator(mode="after")
    def _checked(self) -> OptimizerConfig:
        fields = self.spec_fields()
        try:
            check_spec_limits({key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}, "")
        except L3RSError as error:
            raise ValueError(str(error).replace(": spec.", "")) from None
        fields["directions"] = tuple(Direction.parse(direction) for direction in self.directions)
        for direction in fields["directions"]:
            try:
                direction_options(direction)
            except (L3RSError, TypeError, OverflowError) as error:
                raise ValueError(f"directions: {error}") from None
        if self.start is not None and any(getattr(self, name) for name in OFF_AT_ZERO):  # it is not read yet
            likely = {"form": 2, "step": "initial", "directions": (*fields["directions"], Direction("weight_decay"))}
            fields |= {name: value for name, value in likely.items() if name not in self.model_fields_set}
        try:
            Spec((Layer("layer", (1,)),), **fields)
        except L3RSError as error:
            raise ValueError(str(error).replace("spec.", "")) from None
        for name in sorted(_START_FIELDS) if self.start is None else ():
            if name in self.model_fields_set and getattr(self, name) not in (1, {}, None):
                raise ValueError(f"{name} is {getattr(self, name)}, but there is no start whose steps it changes")
        if unknown := sorted(set(self.start_by_role) - set(ROLE_NAMES)):
            raise ValueError(f"start_by_role has {unknown[0]!r:.100}; allowed are {', '.join(ROLE_NAMES)}")
        if self.start_by_role and (self.embedding != "table" or not self.layer_gain):
            raise ValueError("start_by_role needs embedding: table and a layer_gain, whose column it sets")
        return self


class HorizonConfig(Section):
    """Inner steps of a task sample, drawn from min … max.

    Attributes:
      min: the shortest horizon, in steps.
      max: the longest horizon, in steps.
      power: a horizon's probability is as this power of it: -1 is log-uniform; with less, long ones are rare.
    """

    min: Count = 10
    max: Count = 200
    power: float = Field(default=-1.0, ge=-3, le=0, strict=True)

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> HorizonConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class OuterConfig(Section):
    """The evolution strategy.

    Attributes:
      steps: generations.
      population: candidates of a generation; even, because they come in mirrored pairs.
      sigma: standard deviation of the noise on the meta-parameters.
      strategy: the estimator of the search gradient.
      learning_rate: of Adam on the search gradient, decayed to 0 along a cosine.
      horizon: inner steps of a task sample.
      samples: task samples (variant, init, batches, horizon) on which a generation evaluates every member. With more
        than one, a member's fitness is the mean of its ranks within each sample; a non-finite loss ranks worst.
      max_failures: generations in a row without a finite fitness before the run stops.
    """

    steps: Count = 400
    population: int = Field(default=32, ge=2, le=10**6, strict=True)
    sigma: Positive = 0.05
    strategy: Literal["open_es", "snes", "pgpe"] = "open_es"
    learning_rate: Positive = 0.03
    horizon: HorizonConfig = HorizonConfig()
    samples: int = Field(default=1, ge=1, le=1000, strict=True)
    max_failures: Count = 5

    @pydantic.model_validator(mode="after")
    def _even(self) -> OuterConfig:
        if self.population % 2:
            raise ValueError(f"population is {self.population}; it must be even: members come in mirrored pairs")
        return self


class ExecutionConfig(Section):
    """Where and how candidates are evaluated.

    Attributes:
      backend: this process, or workers of Ray.
      address: of Ray, host:port or auto; null starts Ray on this machine.
      workers: Ray actors; auto fills the cluster as it grows. Locally, processes of the plan torch; auto: cores,
        or one process where PyTorch computes on an accelerator.
      resources_per_worker: Ray's names: CPU, GPU (whole ones or a part of one), TPU, or a custom resource.
      autoscaling: wait for a node that can hold a worker instead of refusing the run when there is none.
      wait_minutes: how long to wait without any worker of the cluster before the run stops, saved.
      allow_unauthenticated: use a cluster that others can reach, without Ray's token.
      plan: fused, stepwise or torch, see the guide "Meta-train"; auto measures which of the first two is faster.
      members_per_call: candidates in one compiled call.
    """

    backend: Literal["local", "ray"] = "local"
    address: Text | None = None
    workers: Few | Literal["auto"] = "auto"
    resources_per_worker: dict[Text, Positive] = Field(default={"CPU": 1.0})
    autoscaling: Flag = False
    wait_minutes: Positive = 60.0
    allow_unauthenticated: Flag = False
    plan: Plan | Literal["auto"] = "auto"
    members_per_call: Count | Literal["auto"] = "auto"

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


class CheckpointConfig(Section):
    """When a run saves its state.

    Attributes:
      every: generations between two checkpoints.
      keep: how many of the newest checkpoints stay.
    """

    every: Count = 25
    keep: Count = 3


class EvaluationConfig(Section):
    """How an optimizer is evaluated; the options of `metatrain evaluate` take precedence.

    Attributes:
      settings: {setting: options that replace the task's}; empty: the task itself.
      horizons: numbers of steps to compare at.
      seeds: training runs of each optimizer and horizon; a seed is an init and its batches.
      tuning_seeds: how many of them tune the baselines; null: all.
      baselines: names, `package.module:function`, or all; or mappings of a name, its options, a label and schedules.
      schedules: of the learning rate: constant, cosine, warmup_cosine, step.
      curve_points: test evaluations along a training run.
      multipliers: factors of L3RS's steps to compare, e.g. [.1, .3, 1, 3, 10].
      guard: L3RS's: fields of `l3rs.Guard`, or true for its defaults.
      costs: measure what a step costs with each optimizer, in the first setting, when all have run there.
    """

    settings: dict[Name, dict[str, Any]] = Field(default={})
    horizons: tuple[Count, ...] = Field(default=(10, 30, 100), min_length=1, max_length=100)
    seeds: Few = 6
    tuning_seeds: Few | None = None
    baselines: tuple[Text | dict[str, Any], ...] = ("adam", "sgdm")
    schedules: tuple[Text, ...] = ("constant", "cosine")
    curve_points: Few = 16
    multipliers: tuple[Positive, ...] = ()
    guard: Flag | dict[str, Any] = False
    costs: Flag = True

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


class LoggingConfig(Section):
    """What a run writes besides `metrics.jsonl` and its page.

    Attributes:
      tensorboard: event files in the folder `tensorboard`.
      mlflow: a run of MLflow (`l3rs[mlflow]`), in `mlflow.db` unless MLFLOW_TRACKING_URI names a server.
      wandb: a run of Weights & Biases (`l3rs[wandb]`), in the folder `wandb` unless WANDB_MODE or WANDB_API_KEY is set.
    """

    tensorboard: Flag = True
    mlflow: Flag = False
    wandb: Flag = False


class MeasuredConfig(Section):
    """What a run's plan and members per call were chosen by, on one kind of device. The run writes it.

    Attributes:
      device: its kind.
      ms_per_step: {plan: milliseconds per candidate-step}.
      members_that_fit: candidates of one fused call; null without a limit.
    """

    device: str
    ms_per_step: dict[str, float] = Field(default={})
    members_that_fit: int | None = None


class CodeConfig(Section):
    """What a run was started with. The run writes it; it is compared on resume.

    Attributes:
      l3rs: its version.
      jax: its version.
      source: digest of the source of l3rs, tasks and metatrain.
      device: kinds of the devices that compute, on a cluster those of the workers.
    """

    l3rs: str
    jax: str
    source: str
    device: str


class Config(Section):
    """A meta-training run. Its sections are explained by their classes.

    Attributes:
      name: of the run and of its folder: letters, digits, dots, underscores and hyphens.
      seed: of everything random in the run.
    """

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


def require_config(value: object) -> None:
    """Raise UserError unless a value is a configuration."""
    if not isinstance(value, Config):
        raise UserError(f"config is a {type(value).__name__}; it must be a Config, as `load_config` returns")


def check_config(data: dict[Any, Any], where: str = "config") -> Config:
    """Make a `Config` from plain dictionaries.

    Raises:
      UserError: it names the key, the value found and the values allowed.
    """
    return check_section(Config, data, where)


AnySection = TypeVar("AnySection", bound=pydantic.BaseModel)


def check_section(section: type[AnySection], data: dict[Any, Any], where: str) -> AnySection:
    """Make one section of a configuration; as `check_config`."""
    try:
        return section.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {one_sentence(error.errors(), section)}") from None


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
    """{dotted key: (value before, value after)} of what differs in two configurations; None where one lacks it."""
    left, right = (flat(config.model_dump(mode="python")) for config in (before, after))
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested mappings."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
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
