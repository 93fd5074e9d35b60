"""The safety net: Adam takes over for a while when the loss runs away. Off unless asked for.

A learned optimizer is used on tasks, and for longer, than it was meta-trained on. The guard watches the fastest loss
EMA of the features; where it fires, the step is Adam's (from the moments that the direction has anyway).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.spec import L3RSError, Spec


@dataclasses.dataclass(frozen=True)
class Guard:
    """When Adam takes over, and for how long.

    It takes over when the loss EMA is above its best value so far by more than `bound` · |first loss|, for `patience`
    steps in a row; or at once when a loss is not finite. After `steps` steps the network decides again.

    With the defaults it does nothing, to the bit, in three of the five settings of `configs/digits.yaml`, at 10 to
    2,500 steps. In the other two, whose networks know the target and begin with a loss of about a tenth, the
    optimizer raises the loss first: there the guard costs up to .04 of test loss to 200 steps, and gains up to .02
    past 500.

    Attributes:
      bound: how far the loss may rise, as a share of the first loss.
      patience: steps in a row that it may be higher.
      steps: of Adam.
      learning_rate: of Adam: the step is -learning_rate · m̂ / (√v̂ + ε), not normalised.

    Raises:
      L3RSError: a value out of range.
    """

    bound: float = 1.0
    patience: int = 10
    steps: int = 50
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("bound", "learning_rate"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise L3RSError(f"guard.{name} is {value!r}; it must be a number > 0")
        for name in ("patience", "steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise L3RSError(f"guard.{name} is {value!r}; it must be a whole number ≥ 1")


class GuardState(NamedTuple):
    """What the guard has seen. In PyTorch the fields are numbers."""

    count: Any  # int32 [], how often Adam took over
    adam_steps: Any  # int32 [], steps it took in all
    left: Any  # int32 [], steps it has left, this one included
    high: Any  # int32 [], steps in a row with a loss past the bound
    best: Any  # float32 [], the lowest loss EMA; infinity before the first loss


def make_guard(guard: bool | Guard, spec: Spec) -> Guard | None:
    """The guard that `guard=` asks for.

    Raises:
      L3RSError: neither a truth value nor a `Guard`; an optimizer without Adam among its directions.
    """
    if guard is False or guard is None:
        return None
    if guard is not True and not isinstance(guard, Guard):
        raise L3RSError(f"guard is {guard!r}; allowed are True, False and a l3rs.Guard")
    if not adam_share(spec).any():
        names = ", ".join(direction.name for direction in spec.directions)
        raise L3RSError(f"guard goes back to Adam, which is not among this optimizer's directions {names}")
    return Guard() if guard is True else guard


def adam_share(spec: Spec) -> np.ndarray:
    """float32 [P]: 1 for the first direction that is Adam, 0 for the others."""
    share = np.zeros(len(spec.directions), np.float32)
    names = [direction.name for direction in spec.directions]
    if "adam" in names:
        share[names.index("adam")] = 1
    return share


def init_guard() -> GuardState:
    zero = jnp.zeros([], jnp.int32)
    return GuardState(zero, zero, zero, zero, jnp.asarray(jnp.inf, jnp.float32))


def advance(guard: Guard, state: GuardState, value: Any, ema: Any, first: Any, xp: Any = jnp) -> GuardState:
    """One step: Adam takes it if `left` is above 0 afterwards.

    Args:
      guard: the rules.
      state: before this step.
      value: [], the loss of this step.
      ema: [], the bias-corrected EMA of the finite losses, this one included; NaN before the first.
      first: [], the first of them.
      xp: `jax.numpy` or `numpy`.
    """
    best = xp.where(ema < state.best, ema, state.best)
    waiting = state.left <= 1  # the last step of Adam is done
    high = xp.where(waiting & (ema > best + guard.bound * abs(first)), state.high + 1, 0)
    fires = waiting & (~xp.isfinite(value) | (high >= guard.patience))
    left = xp.where(fires, guard.steps, xp.where(waiting, 0, state.left - 1))
    return GuardState(
        count=state.count + xp.where(fires, 1, 0),
        adam_steps=state.adam_steps + xp.where(left > 0, 1, 0),
        left=left,
        high=xp.where(fires, 0, high),
        best=best,
    )


def guard_report(state: Any) -> dict[str, Any]:
    """What the guard did: `count`, how often Adam took over; `adam_steps`, in all; `active`, whether it has the next
    step for sure; `best_loss`, the lowest loss EMA.

    Args:
      state: an optimizer state that holds one of `learned_optimizer(…, guard=…)`, chained or wrapped.

    Raises:
      L3RSError: there is none, or more than one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GuardState))
    found = [leaf for leaf in leaves if isinstance(leaf, GuardState)]
    if len(found) != 1:
        raise L3RSError(f"the state holds {len(found)} guards; one is needed: l3rs.load(…, guard=True)")
    return report(found[0])


def report(state: GuardState) -> dict[str, Any]:
    """See `guard_report`."""
    return {
        "count": int(state.count),
        "adam_steps": int(state.adam_steps),
        "active": int(state.left) > 1,
        "best_loss": float(state.best),
    }
