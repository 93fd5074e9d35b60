"""PyTorch tasks so small that a whole meta-training run takes seconds."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from tasks import TaskError
from tasks.torch import TorchTask
from tests.metatrain.failing_tasks import counted

TINY = "tests.metatrain.torch_tasks:tiny"


class Examples(Dataset):
    """Examples one by one, with noise from each of the generators that augmentation uses."""

    def __init__(self, data: TensorDataset, noise: float, as_dict: bool = False) -> None:
        self._data, self._noise, self._as_dict = data, noise, as_dict

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Any:
        x, y = self._data[i]
        x = x + self._noise * (torch.randn(()) + random.random() + float(np.random.normal()))
        return {"x": x, "labels": y} if self._as_dict else (x, y)


class Mlp(nn.Module):
    """With dropout and batch norm, which need a seed and a reset."""

    def __init__(self, inputs: int = 6, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def splits(examples: int = 48) -> dict[str, TensorDataset]:
    """Three classes of points."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))
    found = {}
    for name in ("train", "inner_valid", "outer_valid", "test"):
        labels = rng.integers(0, 3, examples)
        points = centres[labels] + rng.normal(size=(examples, 6))
        found[name] = TensorDataset(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))
    return found


def tiny(noise: float = 0.1, freeze: bool = False, unused: bool = False, **options: Any) -> TorchTask:
    """Points in three classes; the layers below the head can be frozen, and one may be unused."""
    data = splits()

    def model(init: int) -> nn.Module:
        del init  # PyTorch's generator is seeded with it
        network = Mlp()
        for param in network.body.parameters() if freeze else ():
            param.requires_grad_(False)
        if unused:
            network.unused = nn.Linear(3, 2)
        return network

    train = Examples(data.pop("train"), noise)
    return TorchTask("tiny", model, train, **data, **{"batch_size": 8, **options})


ONLY_HERE: set[str] = set()  # filled in the process of a test


def only_here() -> TorchTask:
    """A task that can be built only where `ONLY_HERE` is filled."""
    if not ONLY_HERE:
        raise TaskError("there is nothing here")
    return tiny()


def failing(part: str, after: int = 1, flag: str = "") -> TorchTask:
    """The tiny task, of which a function fails when it has been called so often."""
    own = tiny()
    if part == "data":
        draw = counted(
            lambda generator: [own.train[i] for i in torch.randint(48, (8,), generator=generator)],
            after,
            StopIteration(),
        )
        return dataclasses.replace(own, train=lambda generator: default_collate(draw(generator)))
    error = ValueError(f"the {part} is wrong\nhere")
    function = (lambda *_: (0.1, 0.2)) if part == "score" else getattr(own, part)
    return dataclasses.replace(own, **{part: counted(function, after, error, flag)})
