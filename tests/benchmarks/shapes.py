"""Parameter shapes of networks that people fine-tune, in Flax's layout."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """11.7 M parameters in 62 tensors."""
    shapes: Shapes = [(7, 7, 3, 64), (64,), (64,)]
    width = 64
    for channels in (64, 128, 256, 512):
        for _ in range(2):
            shapes += _convolution(3, width, channels) + _convolution(3, channels, channels)
            shapes += _convolution(1, width, channels) if width != channels else []
            width = channels
    return [*shapes, (512, 1000), (1000,)]


def resnet50() -> Shapes:
    """25.6 M parameters in 161 tensors."""
    shapes: Shapes = [(7, 7, 3, 64), (64,), (64,)]
    width = 64
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution(1, width, channels) + _convolution(3, channels, channels)
            shapes += _convolution(1, channels, 4 * channels)
            shapes += _convolution(1, width, 4 * channels) if block == 0 else []
            width = 4 * channels
    return [*shapes, (2048, 1000), (1000,)]


def vit_s() -> Shapes:
    """ViT-S/16: 22.1 M parameters in 152 tensors."""
    width = 384
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    stem: Shapes = [(16, 16, 3, width), (width,), (1, 1, width), (1, 197, width)]
    return [*stem, *12 * [*norm, *attention, *norm, *mlp], *norm, (width, 1000), (1000,)]


def small_resnet(depth: int) -> Shapes:
    """ResNet-20 or -32 for 32 × 32 images: 0.27 M parameters in 65 tensors, 0.47 M in 101."""
    shapes: Shapes = _convolution(3, 3, 16)
    width = 16
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            shapes += _convolution(3, width, channels) + _convolution(3, channels, channels)
            shapes += _convolution(1, width, channels) if width != channels else []
            width = channels
    return [*shapes, (64, 10), (10,)]


def _convolution(size: int, inputs: int, outputs: int) -> Shapes:
    """A kernel, and scale and bias of the norm behind it."""
    return [(size, size, inputs, outputs), (outputs,), (outputs,)]


NETWORKS = {"ResNet-18": resnet18, "ResNet-50": resnet50, "ViT-S": vit_s}
SMALL_LAYERS = {"ResNet-20": lambda: small_resnet(20), "ResNet-32": lambda: small_resnet(32)}
