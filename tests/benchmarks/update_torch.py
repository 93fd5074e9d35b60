"""The PyTorch step against `torch.optim.AdamW(foreach=True)` on parameters shaped like real networks.

`AdamW(foreach=True)` is nine passes over memory on a CPU, `AdamW(fused=True)` one. L3RS needs norms
and inner products before it can update, which takes three passes, each over pieces that stay in cache. In networks of
many small layers, operations per layer cost more than passes over memory: L3RS copies them into flat buffers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

import l3rs
from l3rs.torch import L3RS
from tests.benchmarks.shapes import NETWORKS, SMALL_LAYERS, Shapes
from tests.benchmarks.timing import in_turn, medians, ratio

_THREADS = torch.get_num_threads()
FORMS: dict[str, dict[str, Any]] = {
    "form 1": {"directions": ("adam", "sgd", "weight_decay")},
    "form 2": {
        "directions": ("adam", "first_moment", "sgd", "weight_decay"),
        "form": 2,
        "embedding": "descriptor",
        "step": "initial",
    },
}


def with_gradients(shapes: Shapes) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = {}
    for i, shape in enumerate(shapes):  # from [H, W, in, out] and [in, out] to PyTorch's layout
        torch_shape = {4: (shape[-1], *shape[2:3], *shape[:2]), 2: shape[::-1]}.get(len(shape), shape)
        params[f"{i:03d}"] = torch.nn.Parameter(0.05 * torch.randn(torch_shape, generator=generator))
    for param in params.values():
        param.grad = 0.01 * param.detach() + 0.001
    return params


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    for network, shapes in NETWORKS.items():
        measure(network, shapes(), wanted=2.0)
    for network, shapes in SMALL_LAYERS.items():
        for form, fields in FORMS.items():
            measure(f"{network}, {form}", shapes(), wanted=1.5, **fields)


def measure(network: str, shapes: Shapes, wanted: float, **fields: Any) -> None:
    """Time a step beside AdamW's, the state and the construction; `fields` are the spec's."""
    params = with_gradients(shapes)
    n_floats = sum(param.numel() for param in params.values())
    spec = l3rs.Spec.create({name: np.empty(param.shape, np.float32) for name, param in params.items()}, **fields)
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    ours = L3RS(params.items(), (theta, spec), total_steps=10**6)
    adamw = torch.optim.AdamW(with_gradients(shapes).values(), lr=1e-4, foreach=True)
    fused = torch.optim.AdamW(with_gradients(shapes).values(), lr=1e-4, fused=True)
    calls = {"l3rs": lambda: ours.step(loss=1.0), "adamw": adamw.step, "fused adamw": fused.step}
    print(f"{network} in PyTorch: {n_floats:,} parameters in {len(params)} tensors")
    for threads in sorted({1, _THREADS}):
        torch.set_num_threads(threads)
        seconds = in_turn(calls, rounds=15)
        times = medians(seconds)
        print(f"  {threads} threads: {times}; l3rs / adamw: {ratio(seconds, 'l3rs', 'adamw')}  (wanted: ≤ {wanted})")
    held = sum(x.numel() for state in ours.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    with tempfile.TemporaryDirectory() as folder:
        path = l3rs.save(f"{folder}/checkpoint", theta, spec)
        build = {
            "l3rs": lambda: L3RS(params.items(), path, total_steps=100),
            "adamw": lambda: torch.optim.AdamW(params.values(), foreach=True),
        }
        milliseconds = {name: 1e3 * np.median([seconds_of(call) for _ in range(9)]) for name, call in build.items()}
    beyond = milliseconds["l3rs"] - milliseconds["adamw"]
    print(
        f"  state: {held / n_floats:.4f} floats a parameter  (wanted: ≤ 2.01); "
        f"construction: {beyond:.1f} ms beyond AdamW's, reading the checkpoint included "
        "(wanted: ≤ 50)"
    )
