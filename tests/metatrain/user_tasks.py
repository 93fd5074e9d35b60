"""What somebody who knows nothing else of this project may pass to `metatrain specialize`, right and wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.torch import TorchTask

Example = Any


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


class Named(nn.Module):
    """Returns a mapping; takes `x`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.name = network(), name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {self.name: self.network(x)}


def tuples(seed: int) -> list[Example]:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    return [(row, int(row[0] > 0)) for row in x]


def mappings(seed: int) -> list[Example]:
    return [{"x": x, "y": y} for x, y in tuples(seed)]


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def _task(model: Callable[[int], nn.Module], data: Callable[[int], list[Example]] = tuples, **more: Any) -> TorchTask:
    return TorchTask("mine", model, *map(data, range(4)), batch_size=8, **more)


def logits() -> TorchTask:
    return _task(lambda _: Named("logits"))


def scores() -> TorchTask:
    return _task(lambda _: Named("scores"))


def with_mappings() -> TorchTask:
    return _task(lambda _: network(), mappings, loss=_loss)


def mappings_alone() -> TorchTask:
    return _task(lambda _: network(), mappings)


def nan_at_once() -> TorchTask:
    return _task(lambda _: network(), loss=lambda model, batch: model(batch[0]).sum() * math.nan)


def nan_later() -> TorchTask:
    """In the third batch."""
    drawn = [0]

    def train(_: torch.Generator) -> Any:
        drawn[0] += 1
        return torch.ones(8, 4) * (math.nan if drawn[0] > 4 else 1), torch.zeros(8, dtype=torch.long)

    return dataclasses.replace(_task(lambda _: network()), train=train)


def tied() -> TorchTask:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x)))

    return _task(lambda _: Tied())


def views() -> TorchTask:
    def model(_: int) -> nn.Module:
        found = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        found[1].weight = nn.Parameter(found[0].weight.detach())
        return found

    return _task(model)


def elsewhere() -> TorchTask:
    return _task(lambda _: network().to("meta"))


def one_network() -> TorchTask:
    found = network()
    return _task(lambda _: found)


def undeclared():  # type: ignore[no-untyped-def]
    return _task(lambda _: network())
