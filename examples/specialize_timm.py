"""An optimizer for a timm classifier: `metatrain specialize examples.specialize_timm:task --minutes 30`.

With timm installed: model=resnet18.a1_in1k pretrained=true images=PATH (one folder a class). Without, a small
convolutional network on noise runs offline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset, random_split

from tasks.torch import TorchTask

_SPLITS = {"train": 0.55, "inner_valid": 0.15, "outer_valid": 0.15, "test": 0.15}


def task(
    model: str = "", pretrained: bool = False, images: str = "", size: int = 32, batch_size: int = 32
) -> TorchTask:
    """Fine-tune `model` of timm, or a small network, on an image folder, or on noise in three colours."""
    data, classes = _image_folder(images, size) if images else _noise(size)
    parts = random_split(data, list(_SPLITS.values()), torch.Generator().manual_seed(0))
    splits: dict[str, Any] = dict(zip(_SPLITS, parts, strict=True))

    def start(_: int) -> nn.Module:  # a fresh head from each seed: PyTorch's generator is seeded with it
        if model:
            import timm

            return timm.create_model(model, pretrained=pretrained, num_classes=classes)
        body = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(8, classes))

    return TorchTask(model or "small network", start, **splits, batch_size=batch_size, eval_batch_size=64)


def _image_folder(path: str, size: int) -> tuple[Dataset[Any], int]:
    from torchvision import datasets, transforms

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = datasets.ImageFolder(path, transforms.Compose([*steps, normalize]))
    return found, len(found.classes)


def _noise(size: int) -> tuple[Dataset[Any], int]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (240,), generator=generator)
    colours = torch.randn(3, 3, generator=generator)[labels]  # a class is a colour
    return TensorDataset(colours[:, :, None, None] + torch.randn(240, 3, size, size, generator=generator), labels), 3
