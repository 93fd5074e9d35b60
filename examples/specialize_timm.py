"""An optimizer for a timm classifier: `metatrain specialize examples.specialize_timm:task --minutes 30`.

With timm installed: model=resnet18.a1_in1k pretrained=true images=PATH, a folder with one folder a class, or of a
prepared TFDS set. Without, a small convolutional network on noise runs offline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

from tasks.torch import TorchTask
from tasks.torch_data import image_splits

_SPLITS = {"train": 0.55, "inner_valid": 0.15, "outer_valid": 0.15, "test": 0.15}


def task(
    model: str = "", pretrained: bool = False, images: str = "", size: int = 32, batch_size: int = 32
) -> TorchTask:
    """Fine-tune `model` of timm, or a small network, on images, or on noise in three colours."""
    splits, classes = image_splits(images, size) if images else _noise(size)

    def start(_: int) -> nn.Module:  # a fresh head from each seed: PyTorch's generator is seeded with it
        if model:
            import timm

            return timm.create_model(model, pretrained=pretrained, num_classes=classes)
        body = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(8, classes))

    return TorchTask(model or "small network", start, **splits, batch_size=batch_size, eval_batch_size=64)


def _noise(size: int) -> tuple[dict[str, Any], int]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (240,), generator=generator)
    colours = torch.randn(3, 3, generator=generator)[labels]  # a class is a colour
    data = TensorDataset(colours[:, :, None, None] + torch.randn(240, 3, size, size, generator=generator), labels)
    parts = random_split(data, list(_SPLITS.values()), torch.Generator().manual_seed(0))
    return dict(zip(_SPLITS, parts, strict=True)), 3
