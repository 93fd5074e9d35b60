"""Training a head on fixed features: a convex problem (without a hidden layer) whose optimum is known."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tasks.base import SPLITS, Aux, Batch, Params, Stats, Task, TaskError, uniform_batches
from tasks.classification import RANDOM_POOLS
from tasks.data import digits as digits_data
from tasks.data.cache import cached
from tasks.data.splits import TRAIN_FRACTIONS, cut, stratified
from tasks.models.functional import functional

_VERSION = 2  # a change of the features or of the splits is a new version
_MOST_WIDTH = 1 << 14
_MOST_CLASSES = 1 << 16
_MOST_BYTES = 16 << 30  # of a feature file, unpacked
_LAYOUTS = "x and y; train/x, train/y, test/x and test/y; or x and y of each of " + ", ".join(SPLITS)

Source = Literal["mnist", "uci", "mixture"]
HeadInit = Literal["zero", "default"]


def features(
    file: str | None = None,
    source: Source = "mnist",
    width: int = 512,
    classes: int = 10,
    input_scale: float = 1.0,
    hidden: int = 0,
    head_init: HeadInit = "zero",
    batch_size: int = 64,
) -> Task:
    """Train a linear head, or one with a hidden layer, on fixed features.

    Args:
      file: a .npz or .safetensors file of features, float [n, width], and labels, integers [n]: arrays x and y, or
        train/x, train/y, test/x and test/y, or x and y of each split (inner_train/x, …). Random features of digits
        when not given.
      source: what random features are computed from: digits; or "mixture", points around random centres.
      classes: of "mixture"; digits have 10.
      width: the number of random features: ReLU of a fixed Gaussian projection, with root mean square 1.
      input_scale: multiplies all features.
      hidden: units of a hidden ReLU layer; 0 for a linear head.
      head_init: "zero", or "default": random kernels of variance 1 / fan-in.
      batch_size: examples a step.
    """
    sizes = (("width", width, 1), ("classes", classes, 2), ("hidden", hidden, 0), ("batch_size", batch_size, 1))
    for name, value, least in sizes:
        if type(value) is not int or not least <= value <= _MOST_WIDTH:
            raise TaskError(f"task.{name} is {value!r}; it must be an integer from {least} to {_MOST_WIDTH}")
    if isinstance(input_scale, bool) or not 0 < input_scale < float("inf"):
        raise TaskError(f"task.input_scale is {input_scale!r}; it must be a number > 0")
    for name, choice, allowed in (("source", source, get_args(Source)), ("head_init", head_init, get_args(HeadInit))):
        if choice not in allowed:
            raise TaskError(f"task.{name} is {choice!r}; allowed are {', '.join(allowed)}")
    splits = _random_features(source, width, classes) if file is None else _read(Path(file).expanduser())
    count = len(splits["inner_train"]["label"])
    if batch_size > count:
        raise TaskError(f"task.batch_size is {batch_size}; there are {count} training examples")
    if input_scale != 1:
        splits = {k: {**split, "x": (split["x"] * input_scale).astype(np.float32)} for k, split in splits.items()}
    count = 1 + max(int(split["label"].max()) for split in splits.values())
    inputs = splits["inner_train"]["x"].shape[1]
    network = functional(lambda rngs: Head(inputs, hidden, count, zero=head_init == "zero", rngs=rngs))

    def loss(params: Params, stats: Stats, batch: Batch, train: bool) -> tuple[jax.Array, Aux]:
        logits, stats = network.apply(params, stats, batch["x"], train)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return value, Aux(stats, jnp.mean(jnp.argmax(logits, -1) == batch["label"]))

    name = f"features({source if file is None else Path(file).stem}, {inputs})"
    init = lambda _, i: network.init(jax.random.key(i))  # noqa: E731
    return Task(name, splits, init, uniform_batches(batch_size), loss, RANDOM_POOLS)


class Head(nnx.Module):
    """A linear layer, behind a hidden ReLU layer where `hidden` > 0; [B, inputs] -> [B, classes]."""

    def __init__(self, inputs: int, hidden: int, classes: int, *, zero: bool, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(inputs, hidden, rngs=rngs) if hidden else None
        kernel = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
        self.head = nnx.Linear(hidden or inputs, classes, kernel_init=kernel, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(x)) if self.hidden else x)


def optimum(task: Task, l2: float = 0.0) -> Params:
    """The parameters of a linear head that minimise the mean loss on inner_train plus l2 / 2 · ‖params‖².

    Computed with L-BFGS. Without l2 the loss of separable data has no minimum, only the infimum 0.

    Args:
      task: of `features`, without a hidden layer.
      l2: the penalty, ≥ 0.
    """
    from scipy.optimize import minimize

    params, stats = task.init(task.data, jnp.int32(0))
    if set(params) != {"head"}:
        raise TaskError("the optimum is known only for a linear head; task.hidden must be 0")
    flat, unravel = ravel_pytree(params)
    train = jax.tree.map(jnp.asarray, task.data["inner_train"])

    @jax.jit
    def objective(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda x: task.loss(unravel(x), stats, train, True)[0] + l2 / 2 * jnp.sum(x**2))(x)

    def in_double(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = objective(jnp.asarray(x, flat.dtype))
        return float(value), np.asarray(grad, np.float64)

    found = minimize(in_double, np.asarray(flat, np.float64), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return unravel(jnp.asarray(found.x, flat.dtype))


def _random_features(source: str, width: int, classes: int) -> dict[str, dict[str, np.ndarray]]:
    def build() -> dict[str, np.ndarray]:
        points, labels = _mixture(classes) if source == "mixture" else digits_data.SOURCES[source]()
        flat = points.reshape(len(points), -1)
        projection = np.random.default_rng(0).standard_normal((flat.shape[1], width), np.float32)
        x = np.maximum(flat @ projection, 0)
        parts = {k: {"x": part["image"], "label": part["label"]} for k, part in cut(x, labels).items()}
        scale = np.sqrt(np.mean(parts["inner_train"]["x"] ** 2))
        return _flat({k: {**part, "x": (part["x"] / scale).astype(np.float32)} for k, part in parts.items()})

    key = {"features": _VERSION, "source": source, "width": width}
    return _nested(cached(key if source != "mixture" else {**key, "classes": classes}, build))


def _mixture(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [4000, 32] around a centre of each class, so noisy that classes overlap, and labels."""
    rng = np.random.default_rng(classes)
    centres = rng.standard_normal((classes, 32), np.float32)
    labels = rng.permutation(np.arange(4000) % classes)
    return centres[labels] + 1.8 * rng.standard_normal((4000, 32), np.float32), labels


def _read(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """The four splits of a feature file, through the cache."""
    try:
        if not file.is_file():
            raise TaskError(f"the feature file {file} does not exist or is not a regular file")
        if file.suffix != ".safetensors" and not zipfile.is_zipfile(file):
            raise TaskError(f"the feature file {file} is not a readable .npz or .safetensors file")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except TaskError:
        raise
    except (OSError, ValueError) as error:
        raise TaskError(f"the feature file {file} cannot be read ({error})") from error
    return _nested(cached({"features": _VERSION, "sha256": digest}, lambda: _flat(_split(file, _arrays(file)))))


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise TaskError(f"the feature file {file} unpacks to {size} bytes; {_MOST_BYTES} is the most allowed")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, SafetensorError) as error:
        raise TaskError(f"the feature file {file} is not a readable .npz or .safetensors file ({error})") from error


def _split(file: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    names = set(arrays)
    if names == {"x", "y"}:
        parts = cut(*_checked(file, arrays, ""))
        return {split: {"x": part["image"], "label": part["label"]} for split, part in parts.items()}
    if names == {f"{part}/{field}" for part in ("train", "test") for field in "xy"}:
        (x, y), (test_x, test_y) = _same_width(file, [_checked(file, arrays, f"{part}/") for part in ("train", "test")])
        rows = stratified(y, TRAIN_FRACTIONS)
        return {**{k: {"x": x[r], "label": y[r]} for k, r in rows.items()}, "test": {"x": test_x, "label": test_y}}
    if names == {f"{split}/{field}" for split in SPLITS for field in "xy"}:
        pairs = _same_width(file, [_checked(file, arrays, f"{split}/") for split in SPLITS])
        return {split: {"x": x, "label": y} for split, (x, y) in zip(SPLITS, pairs, strict=True)}
    raise TaskError(f"the feature file {file} has the arrays {', '.join(sorted(names)[:12])}; allowed are {_LAYOUTS}")


def _same_width(file: Path, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    widths = [x.shape[1] for x, _ in pairs]
    if len(set(widths)) > 1:
        raise TaskError(f"the feature file {file} has splits of different widths: {', '.join(map(str, widths))}")
    return pairs


def _checked(file: Path, arrays: Mapping[str, np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = arrays[f"{prefix}x"], arrays[f"{prefix}y"]
    if x.ndim != 2 or not x.shape[1] or not np.issubdtype(x.dtype, np.floating) or not _is_finite(x):
        raise TaskError(
            f"the feature file {file}: {prefix}x is {x.dtype} {list(x.shape)}; it must be finite "
            "floats [n, width], also in float32"
        )
    if (
        y.shape != x.shape[:1]
        or not np.issubdtype(y.dtype, np.integer)
        or (y.size and not 0 <= y.min() <= y.max() < _MOST_CLASSES)
    ):
        raise TaskError(
            f"the feature file {file}: {prefix}y is {y.dtype} {list(y.shape)}; it must be "
            f"classes from 0 to {_MOST_CLASSES - 1}, [n]"
        )
    return x.astype(np.float32), y.astype(np.int32)


def _is_finite(x: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(x.astype(np.float32)).all())


def _flat(splits: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{split}/{field}": array for split, arrays in splits.items() for field, array in arrays.items()}


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    return {split: {field: arrays[f"{split}/{field}"] for field in ("x", "label")} for split in SPLITS}
