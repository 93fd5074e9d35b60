"""Fine-tuning a network on photographs from TensorFlow Datasets or from folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from tasks.base import Batch, Data, Params, Stats, Task, TaskError, check_keys, uniform_batches
from tasks.classification import RANDOM_POOLS, classification_loss
from tasks.data.crop_flip import random_crop_flip
from tasks.data.images import Classes, choose_classes, load_images
from tasks.data.sources import ImageFolder, Source, Tfds, prepare
from tasks.models import Model, make_model
from tasks.pretrained import Schedule, cached_inits, pretrain_stepwise, pretraining_model, stacked_init
from tasks.trainable import TRAIN_MODES, train_only, with_head_of
from tasks.weights import load_weights


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The configuration of a set of labelled images; exactly one of tfds, directory and folder is given.

    Attributes:
      tfds: a TFDS builder's name.
      directory: the folder of one prepared TFDS version.
      folder: a folder with one sub-folder per class.
      data_dir: where `tfds` is prepared, if not in TFDS's default folder.
      classes: names, or {count, seed} for a random choice; all classes when not given.
      on_corrupt: "error" or "skip", for images that cannot be decoded.
    """

    tfds: str | None = None
    directory: str | None = None
    folder: str | None = None
    data_dir: str | None = None
    classes: Classes = None
    on_corrupt: Literal["error", "skip"] = "error"

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str) -> ImageSet:
        """Check the keys of a configuration."""
        check_keys(options, [field.name for field in dataclasses.fields(cls)], where, "a key of an image set")
        given = [key for key in ("tfds", "directory", "folder") if options.get(key)]
        if len(given) != 1:
            raise TaskError(f"{where} needs exactly one of tfds, directory and folder, found {given or 'none'}")
        return cls(**options)

    def source(self) -> Source:
        if self.folder is not None:
            return ImageFolder(self.folder)
        return Tfds(self.tfds, self.data_dir, self.directory)

    def count(self) -> int:
        """The number of classes."""
        return len(choose_classes(self.source().open().classes, self.classes))

    def load(self, size: int) -> dict[str, dict[str, np.ndarray]]:
        return load_images(self.source(), self.classes, size, on_corrupt=self.on_corrupt)

    def identity(self) -> dict[str, Any]:
        """Everything that the images depend on, as JSON."""
        return {**dataclasses.asdict(self), "source": dict(self.source().open().identity)}


def images(
    target: Mapping[str, Any],
    size: int = 32,
    model: Mapping[str, Any] | None = None,
    init: Mapping[str, Any] | Literal["random"] = "random",
    batch_size: int = 32,
    crop_flip: bool = True,
    train: Literal["all", "head", "lora"] = "all",
    outer_examples: int = 0,
) -> Task:
    """Fine-tune a network on images of any TFDS data set or folder.

    Args:
      target: the images to fine-tune on, see `ImageSet`: {tfds | directory | folder, classes, …}.
      size: height and width in pixels.
      model: {name: one of `tasks.models.MODELS`, and its options}; resnet8 with group norm when not given.
      init: "random"; {weights: a safetensors file or hf://owner/name}; or {source: an image set to pretrain on,
        seeds, held_out_seeds, epochs: [..], batch_size, learning_rate}.
      batch_size: examples a step.
      crop_flip: whether training images are cropped at random and mirrored.
      train: all parameters, the head alone, or low-rank adapters (LoRA) and the head.
      outer_examples: the number of examples of outer_valid that the meta-loss uses; 0 for all.
    """
    if batch_size < 1 or outer_examples < 0:
        raise TaskError(
            f"task.batch_size is {batch_size}, task.outer_examples {outer_examples}; allowed are ≥ 1 and ≥ 0"
        )
    if train not in TRAIN_MODES:
        raise TaskError(f"task.train is {train!r}; allowed are {', '.join(TRAIN_MODES)}")
    options = dict(model or {"name": "resnet8", "norm": "group"})
    if "name" not in options:
        raise TaskError(f"task.model needs a name, found {options}")
    chosen = ImageSet.parse(target, "task.target")
    data: dict[str, Any] = chosen.load(size)
    n_train = len(data["inner_train"]["label"])
    if batch_size > n_train:
        raise TaskError(f"task.batch_size is {batch_size}; the target has {n_train} training images")
    if outer_examples:
        data["outer_valid"] = {field: x[:outer_examples] for field, x in data["outer_valid"].items()}
    network = _network(options, size, chosen.count())
    start, pools, inits, origin = _inits(init, options, network, size)
    if inits is not None:
        data["inits"] = inits
    loss = classification_loss(network)
    if train != "all":
        start, loss = train_only(train, start, loss)
    draw = uniform_batches(batch_size)

    def batch(data: Data, key: jax.Array) -> Batch:
        draw_key, augment_key = jax.random.split(key)
        examples = draw(data, draw_key)
        if not crop_flip:
            return examples
        return {**examples, "image": random_crop_flip(augment_key, examples["image"], padding=size // 8)}

    name = f"{options['name']}({origin} → {_short(chosen)})"
    return Task(name, data, start, batch, loss, pools)


def prepare_images(target: Mapping[str, Any], init: Mapping[str, Any] | str = "random", **_: Any) -> list[str]:
    """Download and prepare the image sets that `images` would read; returns their locations."""
    sets = [ImageSet.parse(target, "task.target")]
    if isinstance(init, Mapping) and "source" in init:
        sets.append(ImageSet.parse(init["source"], "task.init.source"))
    return [prepare(image_set.source()) for image_set in sets]


def _network(options: Mapping[str, Any], size: int, classes: int) -> Model:
    rest = {key: value for key, value in options.items() if key != "name"}
    return make_model(options["name"], (size, size, 3), classes, **rest)


def _short(image_set: ImageSet) -> str:
    if image_set.directory is not None:
        parts = image_set.directory.rstrip("/").split("/")
        return parts[-2] if len(parts) > 1 and parts[-1][:1].isdigit() else parts[-1]
    return image_set.tfds or str(image_set.folder).rstrip("/").split("/")[-1]


def _inits(init: Mapping[str, Any] | str, options: Mapping[str, Any], network: Model, size: int) -> tuple[Any, ...]:
    """(init function, pools, stacked inits for the task's data or None, the init's part of the task's name)."""
    if init == "random":
        return (lambda _, i: network.init(jax.random.key(i))), RANDOM_POOLS, None, "random"
    if not isinstance(init, Mapping) or ("weights" in init) == ("source" in init):
        raise TaskError(f"task.init is {init!r}; allowed are random, {{weights: …}} and {{source: …}}")

    def fresh_head(params: Params, i: jax.Array) -> Params:
        return with_head_of(params, network.init(jax.random.key(i))[0])

    if "weights" in init:
        if set(init) != {"weights"}:
            raise TaskError(f"task.init.weights allows no other keys, found also {', '.join(set(init) - {'weights'})}")
        loaded = load_weights(init["weights"], options["name"], *network.init(jax.random.key(0)))
        # All inits have the same body; the index seeds the new head.
        return (
            (lambda data, i: (fresh_head(data["inits"][0], i), data["inits"][1])),
            RANDOM_POOLS,
            jax.tree.map(np.asarray, loaded),
            str(init["weights"]),
        )

    source = ImageSet.parse(init["source"], "task.init.source")
    schedule = Schedule.parse({key: value for key, value in init.items() if key != "source"}, "task.init")
    options = pretraining_model(options)
    donor = _network(options, size, source.count())
    key = {"source": source.identity(), "size": size, "model": options, **dataclasses.asdict(schedule)}
    shape = jax.eval_shape(donor.init, jax.random.key(0))
    stacked = cached_inits(
        key,
        shape,
        lambda: pretrain_stepwise(donor, classification_loss(donor), source.load(size), schedule, size // 8),
    )

    def pretrained(data: Data, i: jax.Array) -> tuple[Params, Stats]:
        params, stats = stacked_init(data, i)
        return fresh_head(params, i), stats

    snapshots = len(schedule.epochs)
    first_held_out = snapshots * schedule.seeds
    count = first_held_out + snapshots * schedule.held_out_seeds
    pools = {"meta_train": range(first_held_out), "held_out": range(first_held_out, count)}
    return pretrained, pools, stacked, _short(source)
