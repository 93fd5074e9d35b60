"""What defines an L3RS optimizer besides its meta-parameters: types and their checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_type_hints

Theta = dict[str, Any]  # the meta-parameters: nested dicts of float32 arrays, see `init_meta_params`

FEATURE_VERSION = 2  # a change of any feature's formula, in core.py, scale_free.py or descriptors.py, is a new version

# λ stays within a factor e^±10 of its base; in form 2 e^step_limit at most. A layer's own factor stays in e^±10.
STEP_LOG_LIMIT = 10.0


_LAYER_GAIN_LIMIT = 100.0
_MOST_DECREASE_LIMIT = 100.0  # with as many matrices, all of the loss
_MOST_LEVERAGE_FLOOR = 100.0


class L3RSError(ValueError):
    """The caller's input is wrong. The message is one sentence: what is wrong, where, and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One parameter tensor of the target network."""

    path: str  # e.g. "dense_0/kernel"
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Direction:
    """A base optimizer's name (see `directions.py`) and its options, e.g. `b2=0.99`."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | Direction) -> Direction:
        """`"adam"`, `{"name": "adam", "b2": 0.99}` or a `Direction`."""
        if isinstance(value, Direction):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise L3RSError(f"a direction is {value!r:.100}; it must be a name, or a mapping with a name and options")
        options = dict(value)
        if type(options.get("name")) is not str:
            raise L3RSError(f"a direction needs a name, found {options}")
        return cls(options.pop("name"), tuple(sorted(options.items())))

    def to_json(self) -> str | dict[str, Any]:
        """The name, or a mapping of the name and the options: what `parse` reads."""
        return {"name": self.name, **dict(self.options)} if self.options else self.name


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything needed, besides the meta-parameters, to rebuild an L3RS optimizer.

    Attributes:
      layers: the parameter tensors of the network that it was meta-trained on.
      directions: the base optimizers to mix, at least one. New meta-parameters favour the first.
      hidden: widths of the MLP's hidden layers (tanh).
      embedding: where a layer's embedding comes from: "table", a learned row for each of `layers`; "descriptor", a
        learned linear map of descriptors that any network's layers have, see `layers.descriptors`.
      embedding_dim: length of a layer's embedding.
      step: what λ, the norm of a layer's update, is relative to: "rms", √n of the layer; "relative", the norm of its
        parameters; "initial", in form 2, their norm when training began.
      step_scale: λ of new meta-parameters, over √n or over the norm of the parameters; > 0.
      step_gain: λ = step_scale · √n · exp(step_gain · out), or with the norm in place of √n.
      mix_bias: logit of the first direction, and minus that of the others, with new meta-parameters.
      loss_decays: decays of the loss EMAs, fast to slow; two or more, in [0, 1).
      norm_decays: (fast, slow) decays of the EMAs of the log norms, in [0, 1).
      absolute_time: give the network the step itself as well as the fraction of the horizon; form 1 only.
      form: 1, or 2: features without a scale, see `scale_free`. What follows is of form 2 only.
      step_limit: the largest value of step_gain · out: no step is over e^step_limit times its base, whatever the
        network sees; > 0.
      natural_size: the RMS of a layer that begins at zero, over `descriptors.natural_rms`; > 0.
      depth_scaling: divide λ by the root of the number of matrices that train.
      horizon_power: multiply λ by (100 / T)^horizon_power with T the horizon, in [0, 1]. 0.5 is what theory has for a
        constant learning rate on a convex problem; a published ResNet-20 wanted 0.14.
      decrease_limit: shorten the steps of all layers alike, so that by the gradients they lower the loss by at most
        decrease_limit / M times the first or the present loss, whichever is larger in magnitude; M is the number of
        matrices that train. 0 for no limit. Needs sgd among the directions.
      leverage_floor: where a matrix trains alone or with its bias, make what λ is relative to larger, at most 10
        times, if moving both by their own size promises, by the gradients of their first step, to lower the loss by
        less than leverage_floor times the loss. 0 for never. Needs step initial.
      decay_share: there, too, give weight decay less weight where by the gradients its terms of the mixtures undo more
        than this share of the decrease that the terms of the other directions promise; in [0, 1], 0 for no limit.
        Needs sgd and weight_decay among the directions.
      signal: shorten a step as its gradient loses signal; without it only a gradient of zero stops it.
      adaptation: how far a layer's log λ may move in a step for good; 0 for not at all.
      layer_gain: multiply a layer's λ by exp(layer_gain · c), with c learned for each row of the embedding, as a column
        of its own: what suits a kind of layer, or each layer of one network, whatever the MLP says; 0 for none.

    Raises:
      L3RSError: a field has a value that is not allowed.
    """

    layers: tuple[Layer, ...]
    directions: tuple[Direction, ...] = (Direction("adam"), Direction("sgd"))
    hidden: tuple[int, ...] = (32, 32)
    embedding: Literal["table", "descriptor"] = "table"
    embedding_dim: int = 8
    step: Literal["rms", "relative", "initial"] = "rms"
    step_scale: float = 3e-3
    step_gain: float = 2.0
    mix_bias: float = 2.0
    loss_decays: tuple[float, ...] = (0.8, 0.97)
    norm_decays: tuple[float, float] = (0.8, 0.97)
    absolute_time: bool = False
    form: Literal[1, 2] = 1  # form 1 stores neither this nor any field below
    step_limit: float = 2.0
    natural_size: float = 0.5
    depth_scaling: bool = True
    horizon_power: float = 0.5
    signal: bool = True
    adaptation: float = 0.0
    layer_gain: float = 0.0
    decrease_limit: float = 0.0
    leverage_floor: float = 0.0
    decay_share: float = 0.0

    def __post_init__(self) -> None:
        _check_sequences(self)
        _check_types(self)
        _check_values(self)
        _check_form(self)

    @classmethod
    def create(
        cls, params: Any, directions: Sequence[str | Mapping[str, Any] | Direction] = ("adam", "sgd"), **fields: Any
    ) -> Spec:
        """The spec for a network. Needs JAX.

        Args:
          params: the network's parameters, a pytree of arrays or shapes; only paths and shapes are read.
          directions: names, or mappings with a name and options.
          **fields: any other field of `Spec`.
        """
        from l3rs.trees import layers_of  # here: the spec itself needs no JAX

        if not isinstance(directions, list | tuple):
            raise L3RSError(f"directions is {directions!r:.100}; it must be a list of base optimizers")
        return cls(layers_of(params), tuple(Direction.parse(d) for d in directions), **fields)

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON's types, as a checkpoint's l3rs.json stores them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["layers"] = [[layer.path, list(layer.shape)] for layer in self.layers]
        fields["directions"] = [d.to_json() for d in self.directions]
        for name in OFF_AT_ZERO:
            if not fields[name]:
                del fields[name]
        if self.form == 1:  # as it was written before there were others
            fields = {key: value for key, value in fields.items() if key not in _FORM_2}
            if self.embedding == "table":
                del fields["embedding"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        """The spec that `to_json` described.

        Raises:
          L3RSError: the fields are not those of a spec, or one has a value that is not allowed.
        """
        data, known = _with_present_names(data), {f.name for f in dataclasses.fields(cls)}
        if set(data) | {"embedding", "step_limit", *OFF_AT_ZERO, *(() if "form" in data else _FORM_2)} != known:
            raise L3RSError(f"spec has fields {sorted(data)}; expected are {sorted(known)}")
        # Before there was a limit, it was that of form 1.
        stored = {"step_limit": STEP_LOG_LIMIT, **data} if "form" in data else data
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        fields["layers"] = tuple(Layer(path, tuple(shape)) for path, shape in data["layers"])
        fields["directions"] = tuple(Direction.parse(d) for d in data["directions"])
        return cls(**fields)


def _fields_of_type(wanted: type) -> tuple[str, ...]:
    return tuple(name for name, hint in get_type_hints(Spec).items() if hint is wanted)


_NAMES = [field.name for field in dataclasses.fields(Spec)]
_FORM_2 = tuple(_NAMES[_NAMES.index("form") :])  # fields that form 1 does not store
# Of form 2; not stored where they are off, as before there were any.
OFF_AT_ZERO = ("layer_gain", "decrease_limit", "leverage_floor", "decay_share")
_NUMBERS, _SWITCHES = _fields_of_type(float), _fields_of_type(bool)


def _with_present_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a spec that an earlier version may have written, under the names that they have now."""
    known = dict(fields)
    if "horizon_scaling" in known:
        root = known.pop("horizon_scaling")
        if type(root) is not bool or "horizon_power" in known:
            raise L3RSError(f"spec.horizon_scaling is {root!r:.100}; it must be true or false, without a horizon_power")
        known["horizon_power"] = 0.5 if root else 0.0
    return known


def require_spec(value: object) -> None:
    """Raise L3RSError unless a value is a spec."""
    if not isinstance(value, Spec):
        raise L3RSError(f"spec is a {type(value).__name__}; it must be an l3rs.Spec")


def _check_sequences(spec: Spec) -> None:
    for name in ("hidden", "loss_decays", "norm_decays", "layers", "directions"):
        if not isinstance(getattr(spec, name), tuple | list):
            raise L3RSError(f"spec.{name} is {getattr(spec, name)!r:.100}; it must be a tuple")


def _check_types(spec: Spec) -> None:
    for name, values in (("hidden", spec.hidden), ("embedding_dim", (spec.embedding_dim,))):
        if any(type(value) is not int or value < 1 for value in values):
            raise L3RSError(f"spec.{name} is {getattr(spec, name)!r}; it must hold whole numbers ≥ 1")
    for name in _NUMBERS:
        if type(getattr(spec, name)) not in (int, float) or not math.isfinite(getattr(spec, name)):
            raise L3RSError(f"spec.{name} is {getattr(spec, name)!r}; it must be a finite number")
    for name in _SWITCHES:
        if type(getattr(spec, name)) is not bool:
            raise L3RSError(f"spec.{name} is {getattr(spec, name)!r}; it must be true or false")
    for layer in spec.layers:
        if type(layer.path) is not str or any(type(n) is not int or n < 0 for n in layer.shape):
            raise L3RSError(f"spec.layers holds {layer}; a layer is a path and a shape of whole numbers")


def _check_values(spec: Spec) -> None:
    if not spec.layers:
        raise L3RSError("spec.layers is empty: an optimizer needs at least one parameter tensor")
    if not spec.directions:
        raise L3RSError("spec.directions is empty: at least one base optimizer is needed")
    if len({layer.path for layer in spec.layers}) < len(spec.layers):
        raise L3RSError("spec.layers: two layers have the same path")
    if len(spec.loss_decays) < 2 or len(spec.norm_decays) != 2:
        raise L3RSError("spec.loss_decays needs two or more decays, spec.norm_decays exactly two")
    if not all(0 <= d < 1 for d in (*spec.loss_decays, *spec.norm_decays)):
        raise L3RSError("spec.loss_decays and spec.norm_decays must lie in [0, 1)")
    names = [direction.name for direction in spec.directions]
    if "first_moment" in names and "adam" not in names[: names.index("first_moment")]:
        raise L3RSError("spec.directions: first_moment reads Adam's average; put adam before it")


def _check_form(spec: Spec) -> None:
    if spec.embedding not in ("table", "descriptor"):
        raise L3RSError(f"spec.embedding is {spec.embedding!r}; allowed are 'table' and 'descriptor'")
    if type(spec.form) is not int or spec.form not in (1, 2):
        raise L3RSError(f"spec.form is {spec.form!r}; allowed are 1 and 2")
    _check_ranges(spec)
    for name in OFF_AT_ZERO:
        if spec.form == 1 and getattr(spec, name):
            raise L3RSError(f"spec.{name} is {getattr(spec, name)}; it is of form 2, and form 1 has none")
    steps = ("rms", "relative", "initial") if spec.form == 2 else ("rms", "relative")
    if spec.step not in steps:
        raise L3RSError(f"spec.step is {spec.step!r}; allowed in form {spec.form} are {', '.join(map(repr, steps))}")
    if spec.form == 2 and spec.absolute_time:
        raise L3RSError("spec.absolute_time is true; form 2 always reads log T and log t instead")
    _check_needs(spec)


def _check_ranges(spec: Spec) -> None:
    for name in ("step_scale", "step_limit", "natural_size"):
        if not getattr(spec, name) > 0:
            raise L3RSError(f"spec.{name} is {getattr(spec, name)}; it must be > 0")
    for name, most in (
        ("adaptation", 1),
        ("horizon_power", 1),
        ("layer_gain", _LAYER_GAIN_LIMIT),
        ("decrease_limit", _MOST_DECREASE_LIMIT),
        ("leverage_floor", _MOST_LEVERAGE_FLOOR),
        ("decay_share", 1),
    ):
        if not 0 <= getattr(spec, name) <= most:
            raise L3RSError(f"spec.{name} is {getattr(spec, name)}; it must lie in [0, {most:g}]")


def _check_needs(spec: Spec) -> None:
    """What a field needs of others."""
    names = [direction.name for direction in spec.directions]
    for name, needed in (("decrease_limit", ["sgd"]), ("decay_share", ["sgd", "weight_decay"])):
        if getattr(spec, name) and not set(needed) <= set(names):
            value = getattr(spec, name)
            raise L3RSError(f"spec.{name} is {value}; it needs {' and '.join(needed)} among spec.directions")
    if spec.leverage_floor and spec.step != "initial":
        raise L3RSError(
            f"spec.leverage_floor is {spec.leverage_floor}; it needs spec.step 'initial', not {spec.step!r}"
        )
