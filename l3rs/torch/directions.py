"""The base directions on lists of tensors; `l3rs.directions` has their names and options.

Each is computed twice in a step, first in `advance` and then in `add`: that is cheaper than storing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l3rs.directions import resolved_options
from l3rs.spec import Direction
from l3rs.torch.passes import Bucket, Tensors

Moments = list[list[Tensor]]  # of one direction: pieces by moment


class Inputs(NamedTuple):
    """What directions are computed from: pieces in float32, with finite gradients."""

    params: list[Tensor]
    grads: list[Tensor]
    moments: list[Moments]  # of each direction
    steps: np.ndarray  # float32 [pieces], gradients seen, including this one


class BaseDirection:
    """A base optimizer's direction d, on lists of float32 pieces.

    A direction that reads the new moments updates them in `advance`; one that reads the old moments, in `after`.
    A moment that is d but for a factor, the `scale`, is read as it is: nothing is computed from it.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    reads_adam: ClassVar[bool] = False  # the moments that it reads are those of the first Adam
    reads_params: ClassVar[bool] = False

    def scale(self, steps: np.ndarray) -> np.ndarray | None:
        """What `advance` and `read` leave out of d, of the shape of `steps`; None if they return d itself."""
        del steps
        return None

    def advance(self, moments: Moments, inputs: Inputs) -> Tensors:
        """Update the moments with the gradients; returns d over its scale."""
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        """d over its scale, from moments that have been updated."""
        raise NotImplementedError

    def add(self, targets: list[Tensor], factors: list[float], moments: Moments, inputs: Inputs) -> None:
        """Add factor · d to each target."""
        scale = self.scale(inputs.steps)
        if scale is not None:
            factors = (np.array(factors) * scale).tolist()
        for target, piece, factor in zip(targets, self.read(moments, inputs), factors, strict=True):
            target.add_(piece, alpha=factor)

    def after(self, moments: Moments, inputs: Inputs) -> None:
        """Update moments that d must not see."""


@dataclasses.dataclass(frozen=True)
class _Adam(BaseDirection):
    """m̂ / (√(v̂ + eps_root) + eps) = √c₂/c₁ · m / (√(v + c₂ eps_root) + √c₂ eps), c: the bias corrections."""

    b1: float
    b2: float
    eps: float
    eps_root: float
    moments = ("exp_avg", "exp_avg_sq")

    def advance(self, moments: Moments, inputs: Inputs) -> Tensors:
        exp_avg, exp_avg_sq = moments
        if self.eps_root == 0 and all(
            x.is_contiguous() and x.device.type == "cpu" for x in (*inputs.grads, *exp_avg, *exp_avg_sq)
        ):
            return self._fused(exp_avg, exp_avg_sq, inputs)
        torch._foreach_lerp_(exp_avg, inputs.grads, 1 - self.b1)
        torch._foreach_mul_(exp_avg_sq, self.b2)
        torch._foreach_addcmul_(exp_avg_sq, inputs.grads, inputs.grads, 1 - self.b2)
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        pieces = torch._foreach_div(moments[0], self._root(moments[1], inputs.steps))
        torch._foreach_mul_(pieces, self._scale(inputs.steps).tolist())
        return pieces

    def add(self, targets: list[Tensor], factors: list[float], moments: Moments, inputs: Inputs) -> None:
        scaled = (np.array(factors) * self._scale(inputs.steps)).tolist()
        torch._foreach_addcdiv_(targets, moments[0], self._root(moments[1], inputs.steps), scaled)

    def _fused(self, exp_avg: list[Tensor], exp_avg_sq: list[Tensor], inputs: Inputs) -> Tensors:
        """One kernel in place of seven: Adam with learning rate -1 turns zeros into d."""
        pieces = [torch.zeros_like(x) for x in exp_avg]
        torch._fused_adam_(
            pieces,
            inputs.grads,
            exp_avg,
            exp_avg_sq,
            [],
            list(torch.from_numpy(inputs.steps).unbind()),
            lr=-1.0,
            beta1=self.b1,
            beta2=self.b2,
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        return pieces

    def _scale(self, steps: np.ndarray) -> np.ndarray:
        return np.sqrt(1 - self.b2 ** steps.astype(float)) / (1 - self.b1 ** steps.astype(float))

    def _root(self, exp_avg_sq: list[Tensor], steps: np.ndarray) -> Tensors:
        correction = 1 - self.b2 ** steps.astype(float)
        if self.eps_root:
            root = torch._foreach_add(exp_avg_sq, (correction * self.eps_root).tolist())
            torch._foreach_sqrt_(root)
        else:
            root = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_add_(root, (np.sqrt(correction) * self.eps).tolist())
        return root


@dataclasses.dataclass(frozen=True)
class _FirstMoment(BaseDirection):
    """m̂, from Adam's moments, which Adam updates before."""

    b1: float
    reads_adam = True

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        del inputs
        return moments[0]

    def scale(self, steps: np.ndarray) -> np.ndarray:
        return 1 / (1 - self.b1 ** steps.astype(float))


@dataclasses.dataclass(frozen=True)
class _Sgd(BaseDirection):
    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        del moments
        return inputs.grads


@dataclasses.dataclass(frozen=True)
class _Momentum(BaseDirection):
    decay: float
    nesterov: bool
    moments = ("trace",)

    def advance(self, moments: Moments, inputs: Inputs) -> Tensors:
        torch._foreach_mul_(moments[0], self.decay)
        torch._foreach_add_(moments[0], inputs.grads)
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        return torch._foreach_add(inputs.grads, moments[0], alpha=self.decay) if self.nesterov else moments[0]


@dataclasses.dataclass(frozen=True)
class _Lion(BaseDirection):
    b1: float
    b2: float
    moments = ("exp_avg",)

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        interpolated = torch._foreach_mul(moments[0], self.b1)
        torch._foreach_add_(interpolated, inputs.grads, alpha=1 - self.b1)
        torch._foreach_sign_(interpolated)
        return interpolated

    def after(self, moments: Moments, inputs: Inputs) -> None:
        torch._foreach_lerp_(moments[0], inputs.grads, 1 - self.b2)


@dataclasses.dataclass(frozen=True)
class _Rmsprop(BaseDirection):
    decay: float
    eps: float
    moments = ("square_avg",)

    def advance(self, moments: Moments, inputs: Inputs) -> Tensors:
        torch._foreach_mul_(moments[0], self.decay)
        torch._foreach_addcmul_(moments[0], inputs.grads, inputs.grads, 1 - self.decay)
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        scale = torch._foreach_add(moments[0], self.eps)
        torch._foreach_rsqrt_(scale)
        torch._foreach_mul_(scale, inputs.grads)
        return scale


@dataclasses.dataclass(frozen=True)
class _WeightDecay(BaseDirection):
    reads_params = True

    def read(self, moments: Moments, inputs: Inputs) -> Tensors:
        del moments
        return inputs.params


DIRECTIONS: dict[str, Callable[..., BaseDirection]] = {
    "adam": _Adam,
    "first_moment": _FirstMoment,
    "sgd": _Sgd,
    "momentum": _Momentum,
    "lion": _Lion,
    "rmsprop": _Rmsprop,
    "weight_decay": _WeightDecay,
}


def make_directions(directions: Sequence[Direction]) -> list[BaseDirection]:
    """The base optimizers of a spec's directions.

    Raises:
      L3RSError: there is no such direction, or it has no such option.
    """
    return [DIRECTIONS[name](**options) for name, options in resolved_options(directions)]


def assign_moments(directions: Sequence[BaseDirection], moments: Sequence[list[Tensor]]) -> list[Moments]:
    """The moments that each direction reads: its own, in order, or those of the first Adam."""
    slots = iter(moments)
    own = [[next(slots) for _ in direction.moments] for direction in directions]
    adam = next((m for m, direction in zip(own, directions, strict=True) if isinstance(direction, _Adam)), [])
    return [adam if direction.reads_adam else m for m, direction in zip(own, directions, strict=True)]


def scales_of(directions: Sequence[BaseDirection], steps: np.ndarray) -> dict[int, np.ndarray]:
    """The scale of each direction that has one."""
    scales = ((p, direction.scale(steps)) for p, direction in enumerate(directions))
    return {p: scale for p, scale in scales if scale is not None}


def make_inputs(bucket: Bucket, directions: Sequence[BaseDirection], finite: np.ndarray, steps: np.ndarray) -> Inputs:
    """The inputs of the directions of a bucket.

    Args:
      bucket: the pieces, with all moments of all directions.
      directions: the base optimizers.
      finite: bool [L], whether each layer's gradient is finite.
      steps: float32 [L], gradients that each layer has seen, including this one.
    """
    params, grads, *moments = bucket.arrays
    usable = finite[bucket.layers].tolist()
    return Inputs(
        params=[param.float() for param in params],
        grads=[
            # A NaN must not enter moments, which would keep it.
            grad.float() if ok else torch.zeros_like(grad, dtype=torch.float32)
            for grad, ok in zip(grads, usable, strict=True)
        ],
        moments=assign_moments(directions, moments),
        steps=steps[bucket.layers],
    )


def add_directions(
    bucket: Bucket,
    directions: Sequence[BaseDirection],
    inputs: Inputs,
    factors: np.ndarray,
    decay: np.ndarray,
    moves: np.ndarray,
) -> None:
    """Add decay · θ + Σ_p factor_p d_p to the parameters θ of a bucket, and update the moments that the directions
    must not see.

    Args:
      bucket, directions: see `make_inputs`, which makes `inputs` of them.
      inputs: after `advance` of all directions.
      factors: float32 [pieces, P].
      decay: float32 [pieces], 0 or less.
      moves: bool [L]; the parameters of a layer that does not move stay, but its moments are updated.
    """
    params, moving = bucket.arrays[0], moves[bucket.layers].tolist()
    aside = any(direction.reads_params for direction in directions)
    updates = [
        _begin(param, factor, in_place=ok and param.dtype == torch.float32 and not aside)
        for param, factor, ok in zip(params, decay.tolist(), moving, strict=True)
    ]
    for direction, moments, factor in zip(directions, inputs.moments, factors.T.tolist(), strict=True):
        direction.add(updates, factor, moments, inputs)
    for direction, moments in zip(directions, inputs.moments, strict=True):
        direction.after(moments, inputs)
    for param, update, ok in zip(params, updates, moving, strict=True):
        if ok and update is not param:
            param.add_(update.to(param.dtype))


def _begin(param: Tensor, decay: float, in_place: bool) -> Tensor:
    """The float32 tensor that directions are added to: the parameter itself, or its update."""
    if in_place:
        return param.mul_(1 + decay) if decay else param
    return param.float() * decay if decay else torch.zeros_like(param, dtype=torch.float32)
