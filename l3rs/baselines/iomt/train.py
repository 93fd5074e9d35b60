"""Training in stages: compiled steps, and the controller between stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.baselines.iomt.compress import key_parameters as default_key_parameters
from l3rs.baselines.iomt.controller import Controller, Options, Stage
from l3rs.baselines.iomt.space import SPACE, InterleavedState, Space, encode, interleave
from l3rs.spec import L3RSError

Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # (params, stats, batch) -> (loss [], stats after)
Batches = Callable[[Any, jax.Array], Any]  # (data, step int32 []) -> batch
Plan = Literal["fused", "stepwise"]


class NoFiniteStartError(L3RSError):
    """The loss is not finite before the first step."""


class Result(NamedTuple):
    """The result of a training run. `losses` include those of stages that were rolled back."""

    params: Any
    stats: Any  # after the same steps as the params
    state: InterleavedState
    history: list[Stage]
    losses: np.ndarray  # float64 [steps + 1]: before the first step, and after each step on the next batch


class _Carry(NamedTuple):
    """Training between two steps: the gradient is computed, but not used yet."""

    step: jax.Array  # int32 [], steps made
    params: Any
    stats: Any  # after `step` batches
    state: InterleavedState
    value: jax.Array  # float [], the loss of the params on batch number `step`
    grads: Any  # its gradient
    next_stats: Any  # after that batch


def make_train(
    loss: Loss,
    batch: Batches,
    *,
    space: Space = SPACE,
    options: Options | None = None,
    key_parameters: Callable[[Any], Sequence[Any]] = default_key_parameters,
    plan: Plan = "fused",
) -> Callable[..., Result]:
    """Training with interleaved optimizers, as a function that can be called many times.

    Every τ steps the controller reads the losses and the key parameters on the host, and chooses the
    optimizer of the next τ steps. A step uses the gradient that was computed with the loss after the
    last step. So a stage has its l_0 and its l_τ, and no loss is computed twice: a run computes one
    gradient more than it takes steps. With one optimizer in the space, the result is that of plain
    training with it.

    Args:
      loss: (params, stats, batch) -> (loss [], stats after it). Stats are state without a gradient,
        such as batch-norm statistics or frozen parameters; () where there is none.
      batch: (data, step) -> the batch of that step, 0 ≤ step ≤ steps, within jit. The last batch is
        only for the last loss.
      space: the optimizers to choose from.
      options: numbers and ablations.
      key_parameters: params -> a list of arrays for the surrogates.
      plan: "fused": a stage is one compiled loop; "stepwise": a loop on the host calls one compiled
        step. Choose it for convolutional networks on a CPU, which XLA runs 10 times slower in a loop.

    Returns:
      train(params, stats, data, steps, seed=0, controller=None, after_stage=None) -> Result. `params`:
      any pytree of float arrays, all of them trained. `data`: any pytree, for `batch`. `controller`:
      instead of a new one with this space, these options and that seed, one that has the same
      optimizers with other values of their hyper-parameters, or other options, but the same
      stage_steps and moments. `after_stage`: called with params, stats and the steps made, after each
      stage and its rollback. Calls compile once for each form of their arguments, whatever the steps
      and the controller; neither a switch nor a last, shorter stage compiles anything.
      Memory: the params, their gradient, the stats and the states of all optimizers, twice; three
      times with rollback.

    Raises:
      L3RSError: a bad space or option; and in training, steps < 1, or another controller's stages or moments.
      NoFiniteStartError: in training, a loss that is not finite before the first step.

    Example:
      >>> import jax, optax
      >>> from l3rs.baselines import iomt
      >>> def loss(params, stats, batch):
      ...     x, y = batch
      ...     return ((x @ params["w"] - y) ** 2).mean(), stats
      >>> def batch(data, step):
      ...     rows = jax.random.randint(jax.random.fold_in(data["key"], step), (8,), 0, 100)
      ...     return data["x"][rows], data["y"][rows]
      >>> x = jax.random.normal(jax.random.key(0), (100, 3))
      >>> data = {"x": x, "y": x @ jax.numpy.array([1.0, 2.0, 3.0]), "key": jax.random.key(1)}
      >>> train = iomt.make_train(loss, batch, options=iomt.Options(stage_steps=5, initial_stages=4))
      >>> result = train({"w": jax.numpy.zeros(3)}, (), data, 42)
      >>> len(result.losses), len(result.history), result.history[-1].steps
      (43, 9, 2)
    """
    options = Options() if options is None else options
    if plan not in get_args(Plan):
        raise L3RSError(f"plan is {plan!r}; allowed are {', '.join(get_args(Plan))}")
    transformation = interleave(space, options.moments)
    init = jax.jit(transformation.init)
    begin, stage = _compiled(loss, batch, transformation, options.stage_steps, plan)

    def train(
        params: Any,
        stats: Any,
        data: Any,
        steps: int,
        seed: int = 0,
        controller: Controller | None = None,
        after_stage: Callable[[Any, Any, int], None] | None = None,
    ) -> Result:
        if steps < 1:
            raise L3RSError(f"steps is {steps}; it must be ≥ 1")
        controller = Controller(space, options, seed) if controller is None else controller
        own = controller.options
        if (own.stage_steps, own.moments) != (options.stage_steps, options.moments):
            raise L3RSError(
                f"the controller has stages of {own.stage_steps} steps and moments {own.moments!r}, "
                f"not of {options.stage_steps} and {options.moments!r}"
            )
        carry = begin(params, stats, init(params), data, np.int32(0))
        losses = np.full(steps + 1, np.nan)
        losses[0] = float(carry.value)
        if not np.isfinite(losses[0]):
            raise NoFiniteStartError(
                f"the loss is {losses[0]} before the first step; IOMT needs a finite one to begin with"
            )
        for first in range(0, steps, options.stage_steps):
            count = min(options.stage_steps, steps - first)
            choice = controller.choose(key_parameters(carry.params))
            before = carry if controller.options.rollback else None
            level = float(carry.value)
            carry, after = stage(carry, data, encode(space, choice), count)
            losses[first + 1 : first + count + 1] = after
            if controller.observe([level, *after]).diverged and before is not None:
                # A new gradient, too: the one at hand may be what went wrong.
                carry = begin(before.params, before.stats, before.state, data, carry.step)
            if after_stage is not None:
                after_stage(carry.params, carry.stats, first + count)
        return Result(carry.params, carry.stats, carry.state, controller.history, losses)

    return train


def _compiled(
    loss: Loss, batch: Batches, transformation: optax.GradientTransformationExtraArgs, stage_steps: int, plan: Plan
) -> tuple[Callable[..., _Carry], Callable[..., tuple[_Carry, np.ndarray]]]:
    """The pieces of a run: begin(params, stats, state, data, step) and stage(carry, data, choice, steps)."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    @jax.jit
    def begin(params: Any, stats: Any, state: InterleavedState, data: Any, step: jax.Array) -> _Carry:
        (value, next_stats), grads = gradient(params, stats, batch(data, step))
        return _Carry(step, params, stats, state, value, grads, next_stats)

    def advance(carry: _Carry, data: Any, choice: dict[str, Any]) -> _Carry:
        updates, state = transformation.update(carry.grads, carry.state, carry.params, value=carry.value, **choice)
        params, step = optax.apply_updates(carry.params, updates), carry.step + 1
        (value, next_stats), grads = gradient(params, carry.next_stats, batch(data, step))
        return _Carry(step, params, carry.next_stats, state, value, grads, next_stats)

    one_step = jax.jit(advance)

    @jax.jit
    def one_stage(carry: _Carry, data: Any, choice: dict[str, Any], steps: jax.Array) -> tuple[_Carry, jax.Array]:
        def body(loop: tuple[_Carry, jax.Array]) -> tuple[_Carry, jax.Array]:
            before, losses = loop
            after = advance(before, data, choice)
            return after, losses.at[before.step - first].set(after.value)

        first = carry.step
        losses = jnp.full(stage_steps, jnp.nan, carry.value.dtype)
        return jax.lax.while_loop(lambda loop: loop[0].step < first + steps, body, (carry, losses))

    def stage(carry: _Carry, data: Any, choice: dict[str, Any], steps: int) -> tuple[_Carry, np.ndarray]:
        """The carry after it, and the losses [steps] after each of its steps."""
        if plan == "fused":
            carry, losses = one_stage(carry, data, choice, np.int32(steps))
            return carry, np.asarray(losses, np.float64)[:steps]
        values = []
        for _ in range(steps):
            carry = one_step(carry, data, choice)
            values.append(carry.value)
        return carry, np.array([float(value) for value in values])

    return begin, stage
