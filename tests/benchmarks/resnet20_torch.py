"""A candidate-step of a ResNet-20 in PyTorch, plan torch, against one in JAX, plan stepwise.

Batch norm in training mode, 32 × 32, batch 32, one core; both draw, crop and mirror their batches and ask L3RS.
"""

from __future__ import annotations

import jax
import numpy as np
import torch

import l3rs
from examples.specialize_resnet20 import ResNet20
from metatrain.inner.network import make_spec, task_layers
from metatrain.inner.rollout import learned, stepwise_rollout
from metatrain.inner.torch_rollout import LearnedTorch, torch_rollout
from tasks import sample
from tasks.base import AnyTask
from tasks.torch import TorchTask
from tasks.torch_data import Images
from tasks.torch_training import Training
from tests.benchmarks.stepwise import resnet
from tests.benchmarks.timing import in_turn, medians, ratio, use_one_core

STEPS = 10  # a timing


def in_torch() -> TorchTask:
    rng = np.random.default_rng(0)
    sizes = {"train": 512, "inner_valid": 8, "outer_valid": 8, "test": 8}
    splits = {
        name: Images(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n), name == "train")
        for name, n in sizes.items()
    }
    return TorchTask("resnet20", lambda _: ResNet20(), **splits)


def main() -> None:
    use_one_core()
    torch.set_num_threads(1)

    def of(task: AnyTask) -> tuple[l3rs.Spec, dict]:
        spec = make_spec(task_layers(task), {})
        return spec, l3rs.init_meta_params(jax.random.key(0), spec)

    jax_task, torch_task = resnet("resnet20", "batch"), in_torch()
    (jax_spec, jax_theta), (torch_spec, torch_theta) = of(jax_task), of(torch_task)
    stepwise = stepwise_rollout(jax_task, learned(jax_spec), ("test",))
    own = torch_rollout(Training(torch_task), LearnedTorch(torch_spec), ("test",))
    data, chosen = jax.device_put((jax_task.data, sample(jax_task, jax.random.key(0))))
    calls = {
        "JAX": lambda: stepwise(jax_theta, data, chosen, np.int32(STEPS)),
        "PyTorch": lambda: own(torch_theta, {}, sample(torch_task, jax.random.key(0)), STEPS),
    }
    seconds = in_turn(calls, rounds=7)
    times = medians(seconds, STEPS)
    print(f"a candidate-step of a ResNet-20: {times}; PyTorch / JAX: {ratio(seconds, 'PyTorch', 'JAX')}")
