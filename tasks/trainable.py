"""Training a part of a network: the head alone, or low-rank adapters (LoRA, arXiv 2106.09685) and the head.

Tensors that are not trained are kept in the model state, so that an optimizer sees only the trained ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Aux, Batch, Data, Params, Stats
from tasks.pretrained import Loss

TRAIN_MODES = ("all", "head", "lora")
_RANK = 4
_SCALE = 2.0  # α / rank

Init = Callable[[Data, jax.Array], tuple[Params, Stats]]


def train_only(mode: str, init: Init, loss: Loss) -> tuple[Init, Loss]:
    """An init and a loss over the trained part of the parameters.

    Args:
      mode: "head", or "lora": the head, and a rank-4 change of every other matrix. Convolutions stay fixed.
      init, loss: over all parameters. The head is "head", or the last of "layers".

    Returns:
      The same two functions, where params are {"head"} or {"head", "lora"}, and stats {"frozen", "model"}.
    """

    def partial_init(data: Data, i: jax.Array) -> tuple[Params, Stats]:
        params, stats = init(data, i)
        frozen, head = _split(params)
        trained = {"head": head}
        if mode == "lora":
            trained["lora"] = _adapters(frozen, i)
        return trained, {"frozen": frozen, "model": stats}

    def partial_loss(params: Params, stats: Stats, batch: Batch, train: bool) -> tuple[jax.Array, Aux]:
        frozen = jax.lax.stop_gradient(stats["frozen"])
        body = _adapted(frozen, params["lora"]) if mode == "lora" else frozen
        value, aux = loss(_joined(body, params["head"]), stats["model"], batch, train)
        return value, Aux({"frozen": stats["frozen"], "model": aux.stats}, aux.accuracy)

    return partial_init, partial_loss


def with_head_of(params: Params, other: Params) -> Params:
    """The parameters with the head of `other`, those of the same network."""
    return _joined(_split(params)[0], _split(other)[1])


def _split(params: Params) -> tuple[Params, Params]:
    """(all parameters but the head, the head)."""
    if "head" in params:
        return {k: v for k, v in params.items() if k != "head"}, params["head"]
    layers = params["layers"]
    last = max(layers)
    return {**params, "layers": {k: v for k, v in layers.items() if k != last}}, layers[last]


def _joined(body: Params, head: Params) -> Params:
    """The inverse of `_split`."""
    if "layers" not in body:
        return {**body, "head": head}
    return {**body, "layers": {**body["layers"], len(body["layers"]): head}}


def _matrices(frozen: Params) -> list[str]:
    """The paths of the tensors that get an adapter."""
    leaves = jax.tree_util.tree_leaves_with_path(frozen)
    return [jax.tree_util.keystr(path) for path, x in leaves if x.ndim == 2 and min(x.shape) > _RANK]


def _adapters(frozen: Params, i: jax.Array) -> dict[str, Any]:
    """For each matrix [in, out], "a" [in, r], random, and "b" [r, out], zero, so that the change starts at zero."""
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(frozen)}
    adapters = {}
    for n, path in enumerate(_matrices(frozen)):
        fan_in, fan_out = shapes[path]
        key = jax.random.fold_in(jax.random.key(i), n)
        a = jax.random.normal(key, (fan_in, _RANK)) / np.sqrt(fan_in)
        adapters[path] = {"a": a, "b": jnp.zeros((_RANK, fan_out))}
    return adapters


def _adapted(frozen: Params, adapters: dict[str, Any]) -> Params:
    def change(path: Any, x: jax.Array) -> jax.Array:
        adapter = adapters.get(jax.tree_util.keystr(path))
        return x if adapter is None else x + _SCALE * adapter["a"] @ adapter["b"]

    return jax.tree_util.tree_map_with_path(change, frozen)
