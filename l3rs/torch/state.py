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


def small_state(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the small tensors in a parameter's state."""
    n = len(spec.directions)
    shapes: dict[str, tuple[int, ...]] = {"log_norms": (2, n_norms(spec)), "mix": (n,), "step_norm": ()}
    return {**shapes, "memory": (5 + 3 * n,)} if spec.form == 2 else shapes


class SmallState:
    """The small tensors of all layers, stacked: those in the layers' states are views."""

    def __init__(self, spec: Spec, states: Sequence[MutableMapping[str, Any]]) -> None:
        stacks = {name: torch.stack([state[name].float().cpu() for state in states]) for name in small_state(spec)}
        self.values = {name: stack.numpy() for name, stack in stacks.items()}  # float32 [L, …] of each name
        self._views = {name: stack.unbind() for name, stack in stacks.items()}
        for name, views in self._views.items():
            for state, view in zip(states, views, strict=True):
                state[name] = view

    def holds(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are the states that it was made of, with its views in them."""
        return all(
            len(states) == len(views) and all(state[name] is view for state, view in zip(states, views, strict=True))
            for name, views in self._views.items()
        )


def read_memory(
    spec: Spec, shared: Mapping[str, Any], values: Mapping[str, np.ndarray], guard: GuardState | None
) -> core.Memory:
    """The memory before a step, of the layers with these values; see `SmallState`."""
    average = np.array(shared["loss_ema"], np.float32)
    return core.Memory(
        step=np.asarray(shared["step"]),
        loss=core.LossState(np.asarray(shared["losses"]), np.float32(shared["first_loss"]), average),
        log_norms=values["log_norms"].swapaxes(0, 1),
        guard=guard,
        layers=scale_free.unpack(values["memory"], len(spec.directions)) if spec.form == 2 else None,
    )


def write_memory(memory: core.Memory, decision: core.Decision, values: Mapping[str, np.ndarray]) -> None:
    """Store in the layers' values what was decided and what to remember."""
    values["log_norms"][:] = memory.log_norms.swapaxes(0, 1)
    values["mix"][:] = decision.mix
    values["step_norm"][:] = decision.step_norm
    if memory.layers is not None:
        values["memory"][:] = scale_free.pack(memory.layers)


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
