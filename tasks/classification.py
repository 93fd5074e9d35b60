"""The loss and the random inits that all image-classification tasks share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from tasks.base import Aux, Batch, Params, Stats
from tasks.data.images import IMAGENET_MEAN, IMAGENET_STD
from tasks.models import Model
from tasks.pretrained import Loss

_HELD_OUT = 1 << 20  # random inits of this index and above are never used in meta-training
RANDOM_POOLS = {"meta_train": range(_HELD_OUT), "held_out": range(_HELD_OUT, 2 * _HELD_OUT)}


def normalized(images: jax.Array) -> jax.Array:
    """Convert uint8 RGB [..., 3] to float32 with about zero mean and unit variance; float images are returned as is."""
    if images.dtype != jnp.uint8:
        return images
    return (images.astype(jnp.float32) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD


def classification_loss(model: Model) -> Loss:
    """Mean cross-entropy over a batch {"image": uint8 or float32 [B, H, W, C], "label": int32 [B]}."""

    def loss(params: Params, stats: Stats, batch: Batch, train: bool) -> tuple[jax.Array, Aux]:
        logits, stats = model.apply(params, stats, normalized(batch["image"]), train)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return value, Aux(stats, jnp.mean(jnp.argmax(logits, -1) == batch["label"]))

    return loss
