"""The PyTorch optimizer neither needs JAX nor loads it."""

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
