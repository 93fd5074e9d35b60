"""The form of a saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from l3rs.spec import L3RSError, Spec


def check_state(state_dict: Mapping[str, Any], spec: Spec, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Check a state before it replaces the old one: torch would only notice in the next step, if at all.

    Args:
      state_dict: the state to check.
      spec: the spec of the optimizer that is to load it.
      shapes: of each parameter, the tensors that its state must have.

    Raises:
      L3RSError: the state does not fit.
    """
    groups = state_dict["param_groups"]
    paths = [path for group in groups for path in group.get("layers", ())]
    known = "shared" in groups[0] and all("layers" in group for group in groups)
    rows = {layer.path for layer in spec.layers}
    if not known or not (spec.embedding == "descriptor" or set(paths) - {None} <= rows):
        raise L3RSError("the state dict is not one of an L3RS optimizer with these layers")
    n_averages = len(groups[0]["shared"]["loss_ema"])
    if n_averages != len(spec.loss_decays):
        raise L3RSError(
            f"the state dict has {n_averages} averages of the loss; this optimizer has {len(spec.loss_decays)}"
        )
    indices = [index for group in groups for index in group["params"]]
    for index, expected in zip(indices, shapes, strict=False):  # torch checks the number of parameters
        state = state_dict["state"].get(index)
        if not state:
            continue
        found = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
        found = {key: shape for key, shape in found.items() if "/" in key or key in expected}
        if found != expected:
            raise L3RSError(
                f"the state dict has {_difference(found, expected)} for parameter {index}; "
                f"this optimizer has {_difference(expected, found)}"
            )


def _difference(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> str:
    """What `a` has and `b` has not."""
    return ", ".join(f"{key} {shape}" for key, shape in a.items() if b.get(key) != shape) or "fewer tensors"
