"""What an optimizer checks when it is made: parameters, and the keys of their groups."""

from __future__ import annotations

import numbers
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from l3rs.spec import L3RSError

OPTIONS = ("lr", "weight_decay")  # of a param group
_KEYS = {"params", "param_names", *OPTIONS}
_LABELS = {"name", "initial_lr"}  # Lightning's name of a group; the initial rate that a scheduler keeps there
_SMALL_LR = 0.02


def check_group(group: Mapping[str, Any]) -> None:
    """Check the keys of a param group and their values. Warns of an `lr` that seems to be for Adam.

    Raises:
      L3RSError: a key is unknown, or a value is not allowed.
    """
    if unknown := set(group) - _KEYS - _LABELS:
        raise L3RSError(
            f"a param group has {min(unknown)!r}; allowed are params, lr, weight_decay and, in add_param_group, rename"
        )
    for name in OPTIONS:
        value = group.get(name, 0.0)
        try:
            allowed = not isinstance(value, bool | str) and 0 <= float(value) < float("inf")
        except (TypeError, ValueError, RuntimeError):
            allowed = False
        if not allowed:
            raise L3RSError(f"{name} is {value!r}; it must be a number ≥ 0")


def warn_of_small_lr(groups: Sequence[Mapping[str, Any]]) -> None:
    small = [float(group["lr"]) for group in groups if 0 < float(group["lr"]) < _SMALL_LR]
    if small:
        warnings.warn(
            f"lr is {min(small):g}, which looks like a learning rate of Adam; in L3RS lr multiplies the learned step, "
            f"and the optimizer was meta-trained with 1",
            stacklevel=3,
        )


def check_params(names: Sequence[str | None], params: Sequence[Tensor]) -> None:
    """Check that parameters are whole, real and initialised.

    Raises:
      L3RSError: one is not.
    """
    for i, (name, param) in enumerate(zip(names, params, strict=True)):
        if is_lazy(param):
            called = f"parameter {i}" if name is None else f"parameter {name!r}"
            raise L3RSError(
                f"{called} has no shape yet; pass a batch through the model before the optimizer is made, "
                f"so that its lazy layers are initialised"
            )
        called = f"parameter {name or ''}{tuple(param.shape)}"
        if hasattr(param, "device_mesh") or re.search("_fsdp_wrapped_module|_flat_param", name or ""):
            raise L3RSError(f"{called} is sharded; L3RS needs norms of whole layers: use DDP")
        if param.is_complex():
            raise L3RSError(f"{called} is complex; L3RS needs real parameters")


def check_devices(params: Sequence[Tensor]) -> None:
    """Check that all parameters are on one device.

    Raises:
      L3RSError: they are not, or that device is "meta".
    """
    devices = {str(param.device) for param in params}
    if len(devices) > 1:
        raise L3RSError(f"parameters are on {', '.join(sorted(devices))}; they must all be on one device")
    if devices == {"meta"}:
        raise L3RSError(
            "the parameters are on the meta device, where they have no values; load the model's weights, or call "
            "model.to_empty(device=…) and initialise it, before the optimizer is made"
        )


def as_loss(loss: Tensor | float) -> Tensor:
    """A copy of the loss, float32 [], on its device.

    Raises:
      L3RSError: it is not one real number.
    """
    if not isinstance(loss, Tensor):
        if not isinstance(loss, numbers.Real) or isinstance(loss, bool):
            raise L3RSError(f"the loss is {loss!r}; it must be a number or a tensor of one")
        return torch.tensor(float(loss), dtype=torch.float32, device="cpu")
    if loss.numel() != 1 or loss.is_complex() or loss.dtype == torch.bool:
        raise L3RSError(f"the loss is {loss.dtype}{list(loss.shape)}; it must be one real number")
    # A copy, because the caller may change the tensor in place.
    return loss.detach().reshape(()).to(torch.float32, copy=True)
