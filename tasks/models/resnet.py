"""Residual networks (He et al., arXiv:1512.03385) over NHWC images.

Numerically the published PyTorch networks: `cifar_resnet` is akamaster/pytorch_resnet_cifar10's,
`imagenet_resnet` is torchvision's (v1.5: the stride is in the 3 × 3 of a bottleneck).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.base import TaskError
from tasks.models.convolution import SlicedConv

Norm = Literal["batch", "group", "frozen", "none"]
Shortcut = Literal["pad", "projection"]
Implementation = Literal["xla", "sliced"]

_IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_EPSILON = 1e-5
_MOMENTUM = 0.1  # the weight of the newest batch in the running statistics


@dataclasses.dataclass(frozen=True)
class Style:
    """The options that all layers of a network share.

    Attributes:
      norm: "batch"; "group"; "frozen", batch normalization with stored statistics that never change (scale and
        bias are trained); or "none", where convolutions have a bias and each block is initialized to its shortcut.
      groups: the number of groups of norm "group".
      shortcut: of blocks that change the shape: "pad", every second pixel and zero channels (option A of the paper),
        or "projection", a 1 × 1 convolution (option B).
      bottleneck: blocks of 1 × 1, 3 × 3 and 1 × 1, four times as wide outside, instead of two 3 × 3.
      convolution: "xla", or "sliced", which is fast inside compiled loops on a CPU, see `SlicedConv`.
    """

    norm: Norm
    groups: int
    shortcut: Shortcut
    bottleneck: bool
    convolution: Implementation = "xla"


def cifar_resnet(
    depth: int,
    image_shape: Sequence[int],
    classes: int,
    *,
    width: int = 16,
    norm: Norm = "batch",
    groups: int = 8,
    shortcut: Shortcut = "pad",
    convolution: Implementation = "xla",
    stem_stride: int = 1,
    rngs: nnx.Rngs,
) -> ResNet:
    """A CIFAR ResNet: a 3 × 3 stem, then three stages of basic blocks with width, 2 · width, 4 · width channels.

    Args:
      depth: 6 n + 2 layers, n blocks a stage.
      image_shape: [H, W, C].
      classes: the number of logits.
      width: channels of the first stage.
      norm, groups, shortcut, convolution: see `Style`; groups divides width.
      stem_stride: 2 halves the image in the stem.
      rngs: random streams.

    Raises:
      TaskError: an option has a value that is not allowed.
    """
    style = _checked(Style(norm, groups, shortcut, bottleneck=False, convolution=convolution), width)
    blocks = [(depth - 2) // 6] * 3
    return ResNet(image_shape[-1], width, blocks, classes, style, stem=(3, stem_stride), rngs=rngs)


def imagenet_resnet(
    depth: int,
    image_shape: Sequence[int],
    classes: int,
    *,
    width: int = 64,
    norm: Norm = "batch",
    groups: int = 32,
    rngs: nnx.Rngs,
) -> ResNet:
    """An ImageNet ResNet, for images of any size: a 7 × 7 stem, max-pooling, four stages, projection shortcuts.

    Args:
      depth: 18 or 34 with basic blocks, 50 with bottlenecks.
      image_shape: [H, W, C].
      classes: the number of logits.
      width: channels of the stem and inside the blocks of the first stage.
      norm, groups: see `Style`; groups divides width.
      rngs: random streams.

    Raises:
      TaskError: an option has a value that is not allowed.
    """
    style = _checked(Style(norm, groups, "projection", bottleneck=depth >= 50), width)
    return ResNet(image_shape[-1], width, _IMAGENET_BLOCKS[depth], classes, style, stem=(7, 2), rngs=rngs)


def _checked(style: Style, width: int) -> Style:
    choices = (
        ("norm", style.norm, Norm),
        ("shortcut", style.shortcut, Shortcut),
        ("convolution", style.convolution, Implementation),
    )
    for name, value, allowed in choices:
        if value not in get_args(allowed):
            raise TaskError(f"{name} is {value!r}; allowed are {', '.join(get_args(allowed))}")
    if style.norm == "group" and width % style.groups:
        raise TaskError(f"groups is {style.groups}; it must divide width, which is {width}")
    return style


class ResNet(nnx.Module):
    """Stem, stages of blocks, mean over the pixels, linear head; [B, H, W, C] -> [B, classes]."""

    def __init__(
        self,
        channels: int,
        width: int,
        blocks: Sequence[int],
        classes: int,
        style: Style,
        *,
        stem: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        self.pools = stem[0] == 7  # ImageNet's stem
        self.stem = Convolution(channels, width, *stem, style, rngs=rngs)
        stages: list[nnx.List[Block]] = []
        before, after = width, width * (4 if style.bottleneck else 1)
        for stage, count in enumerate(blocks):
            stages.append(nnx.List([]))
            for i in range(count):
                stride = 2 if stage and not i else 1
                stages[-1].append(Block(before, after, stride, style, rngs=rngs))
                before = after
            after *= 2
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(images))
        if self.pools:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """A residual block, [B, H, W, before] -> [B, ⌈H / stride⌉, ⌈W / stride⌉, after]."""

    def __init__(self, before: int, after: int, stride: int, style: Style, *, rngs: nnx.Rngs) -> None:
        inner = after // 4
        plan = [(before, inner, 1, 1), (inner, inner, 3, stride), (inner, after, 1, 1)]
        if not style.bottleneck:
            plan = [(before, after, 3, stride), (after, after, 3, 1)]
        self.layers = nnx.List([Convolution(*layer, style, rngs=rngs) for layer in plan])
        if style.norm == "none":  # otherwise activations would grow from block to block
            kernel = self.layers[-1].conv.kernel
            kernel[...] = jnp.zeros_like(kernel[...])
        project = style.shortcut == "projection" and (stride > 1 or before != after)
        self.shortcut = Convolution(before, after, 1, stride, style, rngs=rngs) if project else None
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for layer in self.layers[:-1]:
            y = nnx.relu(layer(y))
        y = self.layers[-1](y)
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else self._padded(x, y.shape[-1])))

    def _padded(self, x: jax.Array, channels: int) -> jax.Array:
        missing = channels - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class Convolution(nnx.Module):
    """A convolution with the same padding on both sides, and its normalization."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, style: Style, *, rngs: nnx.Rngs) -> None:
        make: type[nnx.Conv] | type[SlicedConv] = SlicedConv if style.convolution == "sliced" else nnx.Conv
        self.conv = make(
            before,
            after,
            (kernel, kernel),
            stride,
            padding=kernel // 2,  # "SAME" pads only one side where the stride is 2
            use_bias=style.norm == "none",
            kernel_init=_he_normal,
            rngs=rngs,
        )
        self.norm = _norm(after, style)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return self.norm(x) if self.norm else x


def _he_normal(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels [H, W, in, out] of variance 2 / (H · W · out)."""
    std = math.sqrt(2 / (shape[0] * shape[1] * shape[3]))
    # Drawn flat: a draw of four dimensions takes XLA five times as long to compile.
    return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def _norm(channels: int, style: Style) -> BatchNorm | GroupNorm | None:
    if style.norm == "none":
        return None
    if style.norm == "group":
        return GroupNorm(channels, style.groups)
    return BatchNorm(channels, frozen=style.norm == "frozen")


class BatchNorm(nnx.Module):
    """Batch normalization; its running statistics are updated as in PyTorch, or are frozen."""

    def __init__(self, channels: int, *, frozen: bool) -> None:
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.frozen = frozen
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.frozen or self.use_running_average:
            return _normalized(x, self.mean[...], self.var[...], self.scale[...], self.bias[...])
        mean, square = (moment.mean(0) for moment in _moments(x))
        var = jnp.maximum(square - mean**2, 0)
        n = x.size // x.shape[-1]
        unbiased = var * (n / max(n - 1, 1))
        self.mean[...] += _MOMENTUM * (mean - self.mean[...])
        self.var[...] += _MOMENTUM * (unbiased - self.var[...])
        return _normalized(x, mean, var, self.scale[...], self.bias[...])


class GroupNorm(nnx.Module):
    """Group normalization (Wu and He, arXiv:1803.08494)."""

    def __init__(self, channels: int, groups: int) -> None:
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        # First over pixels, then over groups: splitting x itself into groups takes XLA twice as long on a CPU.
        mean, square = (self._over_group(moment) for moment in _moments(x))
        return _normalized(x, mean, jnp.maximum(square - mean**2, 0), self.scale[...], self.bias[...])

    def _over_group(self, moment: jax.Array) -> jax.Array:  # [B, C] -> [B, 1, 1, C]
        batch, channels = moment.shape
        means = moment.reshape(batch, self.groups, -1).mean(-1)
        return jnp.repeat(means, channels // self.groups, axis=1)[:, None, None]


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and mean square over the pixels, each [B, C]."""
    return x.mean((1, 2)), (x * x).mean((1, 2))


def _normalized(x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    factor = scale * jax.lax.rsqrt(var + _EPSILON)
    return x * factor + (bias - mean * factor)
