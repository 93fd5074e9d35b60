"""Fine-tune an image classifier with L3RS, in an ordinary PyTorch loop.

    python examples/finetune_timm.py resnet18.a1_in1k    # a timm model with its published weights and a new head
    python examples/finetune_timm.py                     # offline: a small network

The images are noise in three colours; put your own DataLoader of (images [B, 3, H, W], labels [B]) in their place.
"""

import itertools
import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from l3rs.torch import L3RS


def make_model(name: str, classes: int) -> nn.Module:
    if name:
        import timm

        return timm.create_model(name, pretrained=True, num_classes=classes)
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, classes))


def make_images(count: int = 240, classes: int = 3, size: int = 32) -> TensorDataset:
    labels = torch.randint(classes, (count,))
    colours = torch.randn(classes, 3)[labels]
    return TensorDataset(colours[:, :, None, None] + torch.randn(count, 3, size, size), labels)


def fine_tune(model: nn.Module, loader: DataLoader, steps: int) -> list[float]:
    """Train for `steps` steps; returns their losses."""
    opt = L3RS(model.named_parameters(), total_steps=steps)  # no learning rate: the optimizer chooses the step
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    model.train()
    losses = []
    for images, labels in itertools.islice(batches, steps):
        loss = cross_entropy(model(images), labels)
        opt.zero_grad()
        loss.backward()
        opt.step(loss=loss)  # the optimizer uses the loss
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    model = make_model("".join(sys.argv[1:]), classes=3)
    losses = fine_tune(model, DataLoader(make_images(), batch_size=32, shuffle=True), steps=50)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
