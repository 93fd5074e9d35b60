"""The small state of a parameter and of the optimizer, and the form of a saved one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3rs import core, scale_free
from l3rs.decide import n_norms
from l3rs.guard import GuardState
from l3rs.spec import L3RSError, Spec, Theta
from l3rs.torch.names import unwrapped


def small_state(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the small tensors in a parameter's state."""
    n = len(spec.directions)
    shapes: dict[str, tuple[int, ...]] = {"log_norms": (2, n_norms(spec)), "mix": (n,), "step_norm": ()}
    return {**shapes, "memory": (5 + 3 * n,)} if spec.form == 2 else shapes


class SmallState:
    """The small tensors of all layers, stacked: those in the layers' states are views."""

    def __init__(self, spec: Spec, states: Sequence[MutableMapping[str, Any]]) -> None:
        stacks = {name: torch.stack([state[name].float().cpu() for state in states]) for name in small_state(spec)}
        values = {name: stack.numpy() for name, stack in stacks.items()}
        self._log_norms = values["log_norms"].swapaxes(0, 1)
        self._mix, self._step_norm = values["mix"], values["step_norm"]
        self._layers = scale_free.unpack(values["memory"], len(spec.directions)) if spec.form == 2 else None
        for name, stack in stacks.items():
            for state, view in zip(states, stack.unbind(), strict=True):
                state[name] = view

    def read(self, shared: Mapping[str, Any], guard: GuardState | None) -> core.Memory:
        """The memory before a step; `shared` is what all layers share."""
        average = np.array(shared["loss_ema"], np.float32)
        return core.Memory(
            step=np.asarray(shared["step"]),
            loss=core.LossState(np.asarray(shared["losses"]), np.float32(shared["first_loss"]), average),
            log_norms=self._log_norms,
            guard=guard,
            layers=self._layers,
        )

    def write(self, memory: core.Memory, decision: core.Decision) -> None:
        """Store what was decided and what to remember."""
        self._log_norms[:] = memory.log_norms
        self._mix[:] = decision.mix
        self._step_norm[:] = decision.step_norm
        for own, new in zip(self._layers or (), memory.layers or (), strict=True):
            own[:] = new


def numpy_theta(theta: Mapping[str, Any]) -> Theta:
    """Meta-parameters as NumPy arrays."""
    return {name: numpy_theta(each) if isinstance(each, Mapping) else np.asarray(each) for name, each in theta.items()}


def check_state(
    state_dict: Mapping[str, Any],
    spec: Spec,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    own_groups: Sequence[Mapping[str, Any]],
) -> None:
    """Check a state before it replaces the old one: torch would only notice in the next step, if at all.

    Args:
      state_dict: the state to check.
      spec: the spec of the optimizer that is to load it.
      shapes: of each parameter, the tensors that its state must have.
      own_groups: the optimizer's param groups.

    Raises:
      L3RSError: the state does not fit.
    """
    groups = state_dict["param_groups"]
    paths = [path for group in groups for path in group.get("layers", ())]
    known = "shared" in groups[0] and all("layers" in group for group in groups)
    rows = {layer.path for layer in spec.layers}
    if not known:
        raise L3RSError("the state dict is that of another optimizer than L3RS")
    if not (spec.embedding == "descriptor" or set(paths) - {None} <= rows):
        raise L3RSError("the state dict is of an L3RS optimizer with other layers")
    n_averages = len(groups[0]["shared"]["loss_ema"])
    if n_averages != len(spec.loss_decays):
        raise L3RSError(
            f"the state dict has {n_averages} averages of the loss; this optimizer has {len(spec.loss_decays)}"
        )
    _check_order(groups, own_groups)
    indices = [index for group in groups for index in group["params"]]
    for index, expected in zip(indices, shapes, strict=False):  # torch checks the number of parameters
        state = state_dict["state"].get(index)
        if not state:
            continue
        found = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
        found = {key: shape for key, shape in found.items() if "/" in key or key in (*expected, "memory")}
        if found != expected:
            raise L3RSError(
                f"the state dict has {_difference(found, expected)} for parameter {index}; "
                f"this optimizer has {_difference(expected, found)}"
            )


def _check_order(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Check that the layers of a state come in the order of the optimizer's: torch matches them by position.

    Args:
      saved: param groups of the state.
      own: param groups of the optimizer.

    Raises:
      L3RSError: a layer has another name. Prefixes of wrappers (DDP, torch.compile) do not count.
    """
    for i, (theirs, ours) in enumerate(zip(layer_names(saved), layer_names(own), strict=False)):
        if theirs != ours and None not in (theirs, ours):
            raise L3RSError(
                f"the state dict has layer {theirs!r} as parameter {i}; this optimizer has {ours!r} there: create it "
                f"with the same parameters, in the groups and the order in which the state was saved"
            )


def warn_of_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Warn if a state was saved with other meta-parameters or another horizon than the optimizer's `own`."""
    for name, value in own.items():
        found = saved.get(name, value)
        if found != value:
            what = "other meta-parameters" if name == "theta" else f"{name}={found}, not {value}"
            warnings.warn(f"the state was saved with {what}; this optimizer keeps its own", stacklevel=3)


def keep_precision(
    state_dict: Mapping[str, Any], states: Sequence[MutableMapping[str, Any]], moments: Sequence[str]
) -> None:
    """Undo what torch does when it loads a state: it casts every tensor to the parameter's dtype and device.

    Args:
      state_dict: what was loaded.
      states: the state of each parameter, as loaded; it is changed.
      moments: keys of the moments, which stay on the parameter's device.
    """
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, state in zip(indices, states, strict=True):
        for key, saved in state_dict["state"].get(index, {}).items():
            if key in moments and state[key].dtype != torch.float32:
                state[key] = saved.to(state[key].device, torch.float32)
            elif isinstance(saved, Tensor) and key not in moments:
                state[key] = saved.to("cpu", torch.float32)


def layer_names(groups: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The layers of all groups; a layer without one by its parameter's name."""
    names = []
    for group in groups:
        for path, name in zip(group["layers"], group.get("param_names") or group["layers"], strict=True):
            found = name if path is None else path
            names.append(None if found is None else unwrapped(found))
    return names


def _difference(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> str:
    """What `a` has and `b` has not."""
    return ", ".join(f"{key} {shape}" for key, shape in a.items() if b.get(key) != shape) or "fewer tensors"
