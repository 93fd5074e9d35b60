"""Fine-tuning a small network on handwritten digits, or on drawn patterns, without a download."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from tasks.base import Data, Params, Stats, Task, TaskError, uniform_batches
from tasks.classification import RANDOM_POOLS, classification_loss
from tasks.data import digits as digits_data
from tasks.data.cache import cached
from tasks.data.splits import cut
from tasks.models import MODELS, Model, make_model
from tasks.pretrained import cached_inits, pretrain, pretraining_model, stacked_init
from tasks.trainable import TRAIN_MODES, Init, train_only, with_head_of

Images = Literal["mnist", "uci", "patterns", "other_patterns"]
Start = Literal["pretrained", "new_head", "warm", "random"]


def digits(
    target: Images = "mnist",
    init: Images | Literal["random"] = "uci",
    model: str | Mapping[str, Any] = "mlp",
    batch_size: int = 64,
    inits: int = 10,
    held_out_inits: int = 6,
    pretrain_steps: tuple[int, int] = (150, 600),
    starts: Sequence[Start] = ("pretrained",),
    train: Literal["all", "head", "lora"] = "all",
) -> Task:
    """Fine-tune a small network on 14 × 14 images: handwritten digits, or patterns of 25 classes.

    Args:
      target: the images to fine-tune on: digits of MNIST or UCI, or one of two sets of drawn patterns.
      init: the images that the networks are pretrained on, or "random" for random initialization.
      model: a name of `tasks.models.MODELS`, or a mapping with options, e.g. {name: mlp, hidden: [64, 64]}.
      batch_size: examples a step.
      inits: the number of pretrained networks for meta-training; they differ in seed and in pretraining steps.
      held_out_inits: the number of further networks, never used in meta-training.
      pretrain_steps: the smallest and the largest number of pretraining steps.
      starts: the kinds of inits in meta-training, `inits` of each: "pretrained"; "new_head",
        pretrained networks with a new random head, as is usual for other classes; "warm", pretrained networks after 10
        to 1,000 steps of fine-tuning, with little left to learn; "random". Held-out inits are always pretrained.
      train: all parameters, the head alone, or low-rank adapters (LoRA) and the head.
    """
    _check(target, init, starts, train, {"batch_size": batch_size, "inits": inits, "held_out_inits": held_out_inits})
    splits = _digits_splits(target)
    if batch_size > len(splits["inner_train"]["label"]):
        raise TaskError(f"task.batch_size is {batch_size}; {target} has {len(splits['inner_train']['label'])} examples")

    form = {"name": model} if isinstance(model, str) else dict(model)
    if "name" not in form:
        raise TaskError(f"task.model is {form}; it must have a name, one of {', '.join(MODELS)}")
    network = make_model(image_shape=_shape(splits), classes=_count_classes(splits), **form)
    loss = classification_loss(network)
    name = f"digits({init} → {target})"

    def task(data: Data, start: Init, pools: Mapping[str, Sequence[int]]) -> Task:
        parts = (start, loss) if train == "all" else train_only(train, start, loss)
        return Task(name, data, parts[0], uniform_batches(batch_size), parts[1], pools)

    if init == "random":
        return task(splits, lambda _, i: network.init(jax.random.key(i)), RANDOM_POOLS)

    stacked, pools = _inits(target, splits, init, form, network, (inits, held_out_inits), pretrain_steps, starts)

    return task({**splits, "inits": stacked}, stacked_init, pools)


def _inits(
    target: str,
    splits: Data,
    init: str,
    form: Mapping[str, Any],
    network: Model,
    counts: tuple[int, int],
    pretrain_steps: tuple[int, int],
    starts: Sequence[str],
) -> tuple[tuple[Params, Stats], dict[str, list[int]]]:
    """The stacked inits of `digits`, every array with a leading axis, and the pools of their indices."""
    # Frozen batch norm needs statistics: these networks are pretrained with batch norm in training mode.
    form = pretraining_model(form)
    donor = make_model(image_shape=_shape(splits), classes=_count_classes(splits), **form)
    donor_loss = classification_loss(donor)
    inits, count = counts[0], sum(counts)
    # Interleaved, so that both pools contain short and long pretrainings.
    low, high = pretrain_steps
    stride = _stride(count)
    steps = [low + (high - low) * (i * stride % count) // max(count - 1, 1) for i in range(count)]
    key = {"digits": init, "model": form, "steps": steps, "batch_size": 64}
    shape = jax.eval_shape(donor.init, jax.random.key(0))

    def pretrain_on(data: Data, lengths: Sequence[int], start: Any = None) -> tuple[Params, Stats]:
        return pretrain(donor, donor_loss, data, range(len(lengths)), lengths, 64, start)

    stacked = cached_inits(key, shape, lambda: pretrain_on(_digits_splits(init), steps))
    cold = jax.tree.map(lambda x: x[:inits], stacked)

    @functools.cache
    def random() -> tuple[Params, Stats]:
        return jax.tree.map(np.asarray, jax.vmap(network.init)(jax.random.split(jax.random.key(0), inits)))

    def new_head() -> tuple[Params, Stats]:
        return with_head_of(cold[0], random()[0]), cold[1]

    def warm() -> tuple[Params, Stats]:
        lengths = np.geomspace(10, 1000, inits).round().astype(int).tolist()
        return cached_inits({**key, "warm": [target, lengths]}, shape, lambda: pretrain_on(splits, lengths, cold))

    pools: dict[str, list[int]] = {"meta_train": [], "held_out": list(range(inits, count))}
    if "pretrained" in starts:
        pools["meta_train"] += range(inits)
    for build in (new_head, warm, random):
        if build.__name__ in starts:
            stacked = _append(stacked, build(), pools["meta_train"])
    return stacked, pools


def _check(target: str, init: str, starts: Sequence[str], train: str, numbers: Mapping[str, int]) -> None:
    choices = (
        ("target", target, get_args(Images)),
        ("init", init, (*get_args(Images), "random")),
        ("train", train, TRAIN_MODES),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise TaskError(f"task.{name} is {value!r}; allowed are {', '.join(allowed)}")
    for name, number in numbers.items():
        if number < 1:
            raise TaskError(f"task.{name} is {number}; it must be ≥ 1")
    kinds = get_args(Start)
    needs_pretrained = init == "random" and not {"new_head", "warm"}.isdisjoint(starts)
    if not starts or isinstance(starts, str) or set(starts) - set(kinds) or needs_pretrained:
        raise TaskError(
            f"task.starts is {starts!r}; it must be a list of {', '.join(kinds)}; "
            "new_head and warm need pretrained inits"
        )
    if init != "random" and ("patterns" in target) != ("patterns" in init):
        raise TaskError(f"task.init is {init!r}; for the target {target} it must have as many classes, or be random")


def _append(stacked: Any, more: Any, pool: list[int]) -> Any:
    """Append inits to the stacked ones, and their indices to the pool."""
    first, count = (jax.tree.leaves(tree)[0].shape[0] for tree in (stacked, more))
    pool += range(first, first + count)
    return jax.tree.map(lambda *x: np.concatenate(x), stacked, more)


def _shape(splits: Data) -> tuple[int, ...]:
    return splits["test"]["image"].shape[1:]


def _count_classes(splits: Data) -> int:
    return 1 + int(splits["inner_train"]["label"].max())


def _digits_splits(name: str) -> dict[str, dict[str, np.ndarray]]:
    def build() -> dict[str, np.ndarray]:
        splits = cut(*digits_data.SOURCES[name]())
        return {f"{split}/{field}": array for split, arrays in splits.items() for field, array in arrays.items()}

    splits: dict[str, dict[str, np.ndarray]] = {}
    for path, array in cached({"digits": name}, build).items():
        split, field = path.split("/")
        splits.setdefault(split, {})[field] = array
    return splits


def _stride(count: int) -> int:
    """A number whose multiples modulo `count` are all numbers below it, if possible not in their order."""
    coprime = [number for number in (7, *range(9, 9 + count)) if math.gcd(number, count) == 1]
    return next((number for number in coprime if number % count not in (1, count - 1)), coprime[0])
