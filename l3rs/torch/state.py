"""The small state of a parameter and of the optimizer, and the form of a saved one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3rs import core, scale_free
from l3rs.decide import n_norms
from l3rs.guard import GuardState
from l3rs.spec import L3RSError, Spec
from l3rs.torch.passes import host


def small_state(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the small tensors in a parameter's state."""
    n = len(spec.directions)
    shapes: dict[str, tuple[int, ...]] = {"log_norms": (2, n_norms(spec)), "mix": (n,), "step_norm": ()}
    return {**shapes, "memory": (5 + 3 * n,)} if spec.form == 2 else shapes


def read_memory(
    spec: Spec, shared: Mapping[str, Any], states: Sequence[Mapping[str, Any]], guard: GuardState | None
) -> core.Memory:
    """The memory before a step, of the layers with these states."""
    average = np.array(shared["loss_ema"], np.float32)
    layers = None
    if spec.form == 2:
        layers = scale_free.unpack(_stacked(states, "memory"), len(spec.directions))
    return core.Memory(
        step=np.asarray(shared["step"]),
        loss=core.LossState(np.asarray(shared["losses"]), np.float32(shared["first_loss"]), average),
        log_norms=_stacked(states, "log_norms").swapaxes(0, 1),
        guard=guard,
        layers=layers,
    )


def write_memory(memory: core.Memory, decision: core.Decision, states: Sequence[MutableMapping[str, Any]]) -> None:
    """Store in each layer's state what was decided and what to remember."""
    decided = {"log_norms": memory.log_norms.swapaxes(0, 1), "mix": decision.mix, "step_norm": decision.step_norm}
    if memory.layers is not None:
        decided["memory"] = scale_free.pack(memory.layers)
    for i, state in enumerate(states):
        state.update({name: torch.from_numpy(np.array(values[i])) for name, values in decided.items()})


def _stacked(states: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.stack([host(state[name].float()) for state in states])


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
