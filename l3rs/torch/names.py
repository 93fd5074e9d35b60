"""Names and layouts of PyTorch parameters, and how they map to the checkpoint's (Flax) layers.

Norms and sums over a tensor do not depend on its layout, so a torch weight [out, in] and the Flax kernel [in, out] in
the checkpoint are the same layer; only finding one from the other takes rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT

from l3rs.descriptors import is_adapter, kind
from l3rs.io.checkpoint import read_spec
from l3rs.layers import Convention, Match, MatchBy, Matching, OnUnknown, match_network
from l3rs.spec import L3RSError, Layer, Spec


def match_layers(
    optimizer: str | os.PathLike[str] | Spec,
    params: ParamsT,
    *,
    rename: Mapping[str, str] | None = None,
    by: MatchBy = "auto",
    on_unknown: OnUnknown = "error",
) -> tuple[Match, ...]:
    """Which layer of the checkpoint each parameter is, in the order given; `L3RS` maps them in the same way.

    A parameter's layer is found by name (with `.` for `/`, and `weight` for `kernel`, `scale` or `embedding`; prefixes
    of DDP and torch.compile are ignored), or by order, see `l3rs.layers.match_network`. Two shapes are equal if they
    have the same dimensions in any order.

    Args:
      optimizer: a checkpoint, or a spec.
      params: `model.named_parameters()`, or parameters.
      rename, by, on_unknown: see `L3RS`.

    Raises:
      L3RSError: as `L3RS`.
    """
    spec = optimizer if isinstance(optimizer, Spec) else read_spec(optimizer)
    network = []
    for param in params:
        if isinstance(param, dict):
            raise L3RSError("match_layers takes parameters, or (name, parameter) pairs, not param groups")
        name, tensor = param if isinstance(param, tuple) else (None, param)
        network.append((name, tuple(tensor.shape)))
    return match_network(spec, network, Matching.of(spec, rename, by, on_unknown), TORCH)


def unwrapped(name: str) -> str:
    """A torch name as a path, without the prefixes of wrappers (DDP, torch.compile, checkpointing)."""
    name = re.sub(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.)", "", name).removeprefix(".")
    return re.sub(r"^(module\.)+", "", name).replace(".", "/")


def _spellings(name: str) -> Iterator[str]:
    """The paths that a torch name may have in JAX."""
    path = unwrapped(name)
    yield path
    if path.endswith("weight"):
        for leaf in ("kernel", "scale", "embedding"):
            yield path.removesuffix("weight") + leaf


def flax_layer(name: str | None, shape: Sequence[int]) -> Layer:
    """The layer of a parameter in Flax's layout: [in, out] and [H, W, in, out]."""
    path = unwrapped(name or "")
    match "matrix" if is_adapter(path, len(shape)) else kind(path, len(shape)):
        case "matrix":
            return Layer(path, tuple(reversed(shape)))
        case "conv":
            return Layer(path, (*shape[2:], shape[1], shape[0]))
    return Layer(path, tuple(shape))


TORCH = Convention(_spellings, lambda shape: tuple(sorted(shape)), alphabetical=False)


def network_layers(params: Iterable[tuple[str, Tensor]]) -> tuple[Layer, ...]:
    """The layers of a network as a spec holds them: Flax's layout and Flax's name for `weight`.

    Args:
      params: (name, parameter) pairs, as of `model.named_parameters()`.
    """
    return tuple(_as_flax(flax_layer(name, tensor.shape)) for name, tensor in params)


def _as_flax(layer: Layer) -> Layer:
    *modules, leaf = layer.path.split("/")
    if leaf != "weight":
        return layer
    leaf = {"matrix": "kernel", "conv": "kernel", "scale": "scale", "embedding": "embedding"}.get(
        kind(layer.path, len(layer.shape)), leaf
    )
    return Layer("/".join([*modules, leaf]), layer.shape)
