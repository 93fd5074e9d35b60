"""The PyTorch step against `torch.optim.AdamW(foreach=True)` on a ResNet-18-shaped list of parameters.

`AdamW(foreach=True)` is nine passes over memory on a CPU, `AdamW(fused=True)` one. L3RS has to know norms
and inner products before it can update, which takes three passes, each over pieces that stay in cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

import l3rs
from l3rs.torch import L3RS
from tests.benchmarks.timing import in_turn, ratio


def resnet18_params() -> dict[str, torch.nn.Parameter]:
    """11.7 M parameters in 62 tensors."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for channels in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(channels, width, 3, 3), (channels,), (channels,)]
            shapes += [(channels, channels, 3, 3), (channels,), (channels,)]
            if width != channels:
                shapes += [(channels, width, 1, 1), (channels,), (channels,)]
            width = channels
    shapes += [(1000, 512), (1000,)]
    generator = torch.Generator().manual_seed(0)
    return {f"{i:02d}": torch.nn.Parameter(0.05 * torch.randn(s, generator=generator)) for i, s in enumerate(shapes)}


def with_gradients() -> dict[str, torch.nn.Parameter]:
    params = resnet18_params()
    for param in params.values():
        param.grad = 0.01 * param.detach() + 0.001
    return params


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    params = with_gradients()
    n_floats = sum(param.numel() for param in params.values())
    spec = l3rs.Spec.create({name: np.empty(param.shape, np.float32) for name, param in params.items()})
    theta = l3rs.init(jax.random.key(0), spec)
    ours = L3RS(params.items(), (theta, spec), total_steps=10**6)
    others = with_gradients().values()
    adamw = torch.optim.AdamW(others, lr=1e-4, foreach=True)
    fused = torch.optim.AdamW(with_gradients().values(), lr=1e-4, fused=True)
    calls = {"l3rs": lambda: ours.step(loss=1.0), "adamw": adamw.step, "fused adamw": fused.step}
    print(f"{n_floats:,} parameters in {len(params)} tensors")
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        seconds = in_turn(calls, rounds=15)
        times = ", ".join(f"{name} {1e3 * np.median(s):.1f} ms" for name, s in seconds.items())
        print(f"step, {threads} threads: {times}; l3rs / adamw: {ratio(seconds, 'l3rs', 'adamw')}  (wanted: ≤ 2)")
    held = sum(x.numel() for state in ours.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    print(f"state: {held / n_floats:.4f} floats a parameter  (wanted: ≤ 2.01)")
    with tempfile.TemporaryDirectory() as folder:
        path = l3rs.save(f"{folder}/checkpoint", theta, spec)
        build = {
            "l3rs": lambda: L3RS(params.items(), path, total_steps=100),
            "adamw": lambda: torch.optim.AdamW(others, foreach=True),
        }
        l3rs.restore(path)  # Orbax is imported at the first one
        milliseconds = {name: 1e3 * np.median([seconds_of(call) for _ in range(9)]) for name, call in build.items()}
    beyond = milliseconds["l3rs"] - milliseconds["adamw"]
    print(f"construction: {beyond:.1f} ms beyond AdamW's, reading the checkpoint included  (wanted: ≤ 50)")
