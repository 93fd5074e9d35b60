"""How a checkpoint maps the layers of a network, for a network given as a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import l3rs
from l3rs.descriptors import depth_order
from l3rs.extras import pip_install
from l3rs.layers import Match
from metatrain.config import UserError, load_config
from tasks import make_task

_TRAINED = ("F64", "F32", "F16", "BF16")  # data types of parameters; others are buffers, such as position ids
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # buffers of BatchNorm


def network_matches(optimizer: str, network: Path, how: Mapping[str, Any]) -> list[tuple[str, tuple[Match, ...]]]:
    """(name, how each of its layers is mapped) for every network that `network` stands for.

    Args:
      optimizer: a checkpoint, as for `l3rs.load`.
      network: a configuration, which stands for the networks of its tasks; or a safetensors file with the weights of
        a PyTorch model. Such a file does not keep the order of the layers: they are sorted by name, numbers as numbers.
      how: rename, by and on_unknown of `l3rs.match_layers`.

    Raises:
      UserError: the file is missing or cannot be read, or PyTorch is not installed.
      L3RSError: the optimizer does not fit the network in that way.
    """
    if network.suffix == ".safetensors":
        return [(network.name, _of_weights(optimizer, network, how))]
    tasks = [make_task(name, options) for name, options in load_config(network).task.forms()]
    return [(task.name, l3rs.match_layers(optimizer, task.params_shape(), **how)) for task in tasks]


def _of_weights(optimizer: str, file: Path, how: Mapping[str, Any]) -> tuple[Match, ...]:
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{file} holds the weights of a PyTorch model, and reading it needs PyTorch: {pip_install('torch')}"
        )
    import torch

    from l3rs.torch import match_layers

    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            shapes = {name: x.get_shape() for name, x in slices.items() if x.get_dtype() in _TRAINED}
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from None
    names = [name for name in shapes if not name.endswith(_STATISTICS)]
    ordered = [names[i] for i in depth_order(names)]
    return match_layers(optimizer, [(name, torch.empty(shapes[name], device="meta")) for name in ordered], **how)
