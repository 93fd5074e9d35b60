"""An optimizer for a published ResNet-20.

    metatrain specialize examples.specialize_resnet20:task weights=FILE images=PATH --minutes 30

FILE holds the CIFAR-10 weights of akamaster/pytorch_resnet_cifar10 as safetensors; without it the network is random.
PATH is a folder with one folder a class, or of a prepared TFDS set of 32 × 32 images or larger.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from tasks.torch import TorchTask
from tasks.torch_data import image_splits


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.pad = (after - before) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(x + y)


class ResNet20(nn.Module):
    """The network, with the published names."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate(((16, 16), (16, 32), (32, 64))):
            blocks = [Block(after if i else before, after, 2 if stage and not i else 1) for i in range(3)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def task(images: str, weights: str = "", batch_size: int = 32) -> TorchTask:
    """Fine-tune all layers and a new head, batch norm in training mode."""
    splits, classes = image_splits(images, 32)

    def start(_: int) -> nn.Module:  # PyTorch's generator is seeded with it: a new head for each seed
        network = ResNet20(classes).to(memory_format=torch.channels_last)  # a step takes a quarter less on a CPU
        known = load_file(weights) if weights else {}
        body = {name: value for name, value in known.items() if not name.startswith("linear")}
        network.load_state_dict(network.state_dict() | body)
        return network

    return TorchTask("resnet20", start, **splits, batch_size=batch_size)
