"""A character language model: a small GPT on a text file or a text of TensorFlow Datasets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Aux, Batch, Data, Params, Stats, Task, TaskError, check_keys
from tasks.classification import RANDOM_POOLS
from tasks.data.text import TextSource, alphabet_of, blocks, digest, load_text, tile
from tasks.models.gpt import gpt
from tasks.pretrained import cached_inits, pretrain, stacked_init

_PRETRAINING = 1  # a change of how networks are pretrained is a new version
_PRETRAIN_BATCH = 32
_MODEL = {name: p.default for name, p in inspect.signature(gpt).parameters.items() if p.kind is p.KEYWORD_ONLY}


def text(
    source: Mapping[str, Any],
    init: Mapping[str, Any] | Literal["random"] = "random",
    model: Mapping[str, Any] | None = None,
    context: int = 64,
    batch_size: int = 32,
    evaluation_windows: int = 256,
    inits: int = 4,
    held_out_inits: int = 3,
    pretrain_steps: int = 2000,
) -> Task:
    """Train a small GPT to predict the next character of a text, from scratch or pretrained on another text.

    The loss is the mean cross-entropy per character in nats, and the accuracy the share of characters predicted right.

    Args:
      source: the text: {file: PATH} or {tfds: tiny_shakespeare}, see `TextSource`.
      init: the text on whose inner_train the networks are pretrained, likewise, or "random" for random initialization.
      model: n_layer, n_head and width of the GPT.
      context: the number of characters that the model reads at once.
      batch_size: windows per step, from anywhere in inner_train.
      evaluation_windows: the number of windows of each other split that is used, evenly spread; 0 for all.
      inits: the number of pretrained networks for meta-training; they differ in seed.
      held_out_inits: the number of further networks, never used in meta-training.
      pretrain_steps: the steps of their pretraining.
    """
    for name, value, least in (
        ("context", context, 1),
        ("batch_size", batch_size, 1),
        ("evaluation_windows", evaluation_windows, 0),
        ("inits", inits, 1),
        ("held_out_inits", held_out_inits, 1),
        ("pretrain_steps", pretrain_steps, 1),
    ):
        if type(value) is not int or value < least:
            raise TaskError(f"task.{name} is {value!r}; it must be an integer ≥ {least}")
    options = dict(model or {})
    check_keys(options, _MODEL, "task.model", "an option of the GPT")
    chosen, donor = TextSource.parse(source, "task.source"), _donor(init)
    content, donor_text = chosen.read(), donor.read() if donor else ""
    alphabet = alphabet_of(content, donor_text) if donor else None
    splits, vocabulary = load_text(chosen.name, content, context, alphabet)
    for name, split in splits.items():
        if name != "inner_train":
            split["text"] = _spread(split["text"], evaluation_windows)
    network = gpt(vocabulary, context, **options)

    def batch(data: Data, key: jax.Array) -> Batch:
        windows = data["inner_train"]["text"]  # they tile the text, so a position is a row and a column
        first = jax.random.randint(key, (batch_size, 1), 0, (len(windows) - 1) * context + 1)
        positions = first + jnp.arange(context + 1)
        # No window begins with the last character of the text, which is the end of the last window.
        row = jnp.minimum(positions // context, len(windows) - 1)
        return {"text": windows[row, positions - row * context]}

    def loss(params: Params, stats: Stats, batch: Batch, train: bool) -> tuple[jax.Array, Aux]:
        characters = batch["text"].astype(jnp.int32)
        target = characters[:, 1:]
        logits, stats = network.apply(params, stats, characters[:, :-1], train)
        # One-hot labels: the gradient of picking a logit is a scatter, which is slow on a CPU.
        value = optax.softmax_cross_entropy(logits, jax.nn.one_hot(target, vocabulary)).mean()
        return value, Aux(stats, jnp.mean(jnp.argmax(logits, -1) == target))

    if donor is None or alphabet is None:
        name = f"gpt({chosen.name})"
        return Task(name, splits, lambda _, i: network.init(jax.random.key(i)), batch, loss, RANDOM_POOLS)

    pretraining_text = blocks(donor_text)["inner_train"]
    if len(pretraining_text) <= context:
        raise TaskError(
            f"task.init: {donor.name} has {len(donor_text)} characters, too few for a window of {context + 1} in "
            "inner_train; use a longer text or a smaller task.context"
        )
    count = inits + held_out_inits
    key = {
        "gpt": _PRETRAINING,
        "text": digest(donor_text),
        "alphabet": alphabet,
        "context": context,
        "model": {**_MODEL, **options},
        "steps": pretrain_steps,
        "inits": count,
        "batch_size": _PRETRAIN_BATCH,
    }

    def build() -> tuple[Params, Stats]:
        data = {"inner_train": {"text": tile(pretraining_text, context, alphabet)}}
        return pretrain(network, loss, data, range(count), [pretrain_steps] * count, _PRETRAIN_BATCH)

    stacked = cached_inits(key, jax.eval_shape(network.init, jax.random.key(0)), build)
    pools = {"meta_train": range(inits), "held_out": range(inits, count)}
    name = f"gpt({donor.name} → {chosen.name})"
    return Task(name, {**splits, "inits": stacked}, stacked_init, batch, loss, pools)


def prepare_text(
    source: Mapping[str, Any], init: Mapping[str, Any] | Literal["random"] = "random", **_: Any
) -> list[str]:
    """Download and prepare the texts that `text` would read; returns their locations."""
    texts = [TextSource.parse(source, "task.source"), _donor(init)]
    return [each.prepare() for each in texts if each]


def _donor(init: Mapping[str, Any] | str) -> TextSource | None:
    """The text that networks are pretrained on, if they are."""
    if init == "random":
        return None
    if not isinstance(init, Mapping):
        raise TaskError(f"task.init is {init!r}; it must be random, {{file: PATH}} or {{tfds: NAME}}")
    return TextSource.parse(init, "task.init")


def _spread(windows: np.ndarray, count: int) -> np.ndarray:
    """`count` evenly spread rows; all of them when count is 0 or too large."""
    if not count or count >= len(windows):
        return windows
    return np.asarray(windows[np.linspace(0, len(windows) - 1, count).round().astype(int)])
