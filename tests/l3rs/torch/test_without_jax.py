"""The PyTorch optimizer neither needs JAX nor loads it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="the extra `torch` is not installed")

TRAINING = """
import sys, torch
from l3rs.torch import L3RS, match_layers

torch.manual_seed(0)
linear, relu = torch.nn.Linear, torch.nn.ReLU
model = torch.nn.Sequential(linear(196, 64), relu(), linear(64, 64), relu(), linear(64, 10))
opt = L3RS(model.named_parameters(), "digits-mlp", total_steps=40, guard=True)
x, y = torch.randn(32, 196), torch.randint(10, (32,))
losses = []
for _ in range(40):
    loss = torch.nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step(loss=loss)
    losses.append(loss.item())
opt.load_state_dict(opt.state_dict())
assert losses[-1] < 0.5 * losses[0], losses
assert len(match_layers("digits-mlp", model.parameters())) == 6
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
print(*sorted(loaded & {"jax", "jaxlib", "optax", "orbax", "flax", "tensorstore"}))
"""
BLOCKED = "import sys; sys.modules |= dict.fromkeys(('jax', 'jaxlib', 'optax', 'orbax', 'flax'))"


@pytest.mark.parametrize("before", ["", BLOCKED], ids=["installed", "not installed"])
def test_training_loads_no_jax(before, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{TRAINING}"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []
    assert not done.stderr


LOADING = """
import jax, torch
from jax._src.xla_bridge import backends_are_initialized
from torch.utils.data import DataLoader
from l3rs.torch import L3RS

weight = torch.nn.Parameter(torch.ones(3, 3))
opt = L3RS([("dense.weight", weight)], "universal", total_steps=10)
loss = (weight ** 2).sum()
loss.backward()
opt.step(loss=loss)
assert len(list(DataLoader(torch.arange(4), num_workers=1, multiprocessing_context="fork"))) == 4
assert not backends_are_initialized()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_data_loader_is_silent(tmp_path):
    """Even after an import of JAX: its runtime has not been started, so that it does not warn of a deadlock."""
    pytest.importorskip("jax")
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
