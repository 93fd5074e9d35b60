"""Whole fine-tuning steps in PyTorch, forward, backward and step, against those with `AdamW(foreach=True)`.

ResNet-18 and ViT-S on 64 × 64 images, and a small BERT on 64 tokens, batch 16, with random weights. Times are the CPU
time of all threads.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
from torch import Tensor, nn

import l3rs
from l3rs.torch import L3RS
from tests.benchmarks.timing import in_turn, medians, ratio

BATCH, CLASSES, ROUNDS = 16, 100, 7


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.residual = nn.Sequential(
            *_convolution(inputs, outputs, 3, stride), nn.ReLU(), *_convolution(outputs, outputs, 3, 1)
        )
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    stem = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


class ViT(nn.Module):
    """ViT-S with patches of 8 × 8, and the mean of the tokens in place of a class token."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 64, width))
        layer = nn.TransformerEncoderLayer(width, 6, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 12, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(images).flatten(2).mT + self.position).mean(1))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=CLASSES
    )
    return BertForSequenceClassification(config)


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 64, 64)
    measure("ResNet-18, 64 × 64", resnet18(), lambda model: model(images))
    measure("ViT-S, 64 × 64", ViT(), lambda model: model(images))
    if importlib.util.find_spec("transformers") is None:
        print("a fine-tuning step of BERT in PyTorch: not measured, transformers is not installed")
        return
    tokens = torch.randint(30_000, (BATCH, 64))
    measure("BERT, 4 layers, 64 tokens", bert(), lambda model: model(input_ids=tokens).logits)


def measure(name: str, model: nn.Module, apply: Callable[[nn.Module], Tensor]) -> None:
    """Time a step of a network with both optimizers."""
    shapes = {key.replace(".", "/"): np.empty(param.shape, np.float32) for key, param in model.named_parameters()}
    spec = l3rs.Spec.create(shapes, ("adam", "sgd", "weight_decay"))
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    ours, theirs = model, copy.deepcopy(model)
    learned = L3RS(ours.named_parameters(), (theta, spec), total_steps=10**6)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-4, foreach=True)
    labels = torch.randint(CLASSES, (BATCH,))

    def backward(model: nn.Module) -> Tensor:
        loss = nn.functional.cross_entropy(apply(model), labels)
        model.zero_grad()
        loss.backward()
        return loss

    def step_adamw() -> None:
        backward(theirs)
        adamw.step()

    calls = {"l3rs": lambda: learned.step(loss=backward(ours)), "adamw": step_adamw}
    seconds = in_turn(calls, ROUNDS, time.process_time)
    times = medians(seconds, decimals=0)
    found = ratio(seconds, "l3rs", "adamw")
    print(f"a fine-tuning step in PyTorch, {name}, batch {BATCH}: {times}; l3rs / adamw: {found}  (wanted: ≤ 1.05)")
