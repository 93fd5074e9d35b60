"""One optimizer, two frameworks: a ResNet-20 has the same loss curve in PyTorch and in Flax."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
pytest.importorskip("flax.nnx", reason="flax is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

import l3rs  # noqa: E402
from examples.specialize_resnet20 import ResNet20  # noqa: E402
from l3rs.torch import L3RS  # noqa: E402
from tasks.models import make_model  # noqa: E402
from tasks.weights import load_weights  # noqa: E402
from tests.integrations.common import SHARED, random_theta  # noqa: E402

PUBLISHED = SHARED / "weights" / "resnet20_cifar10.safetensors"

STEPS, BATCH = 15, 16
Optimizer = tuple[l3rs.spec.Theta, l3rs.Spec]


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Random pixels and labels, NHWC float32 and int64, the same in every step, so that the loss falls."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(BATCH, 32, 32, 3)).astype(np.float32), rng.integers(10, size=BATCH))] * STEPS


def in_flax(weights: Path, make: Callable[[Any], Optimizer], lr: float) -> tuple[list[float], Optimizer]:
    """The losses, and the optimizer that `make` returns for the params."""
    model = make_model("resnet20", (32, 32, 3), 10, norm="frozen")
    params, stats = load_weights(weights, "resnet20", *model.init(jax.random.key(0)))
    optimizer = make(params)
    tx = optax.chain(l3rs.learned_optimizer(*optimizer, STEPS), optax.scale(lr))

    @jax.jit
    def step(params, state, x, y):
        def loss_fn(params):
            logits, _ = model.apply(params, stats, x, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for x, y in batches():
        params, state, loss = step(params, state, jnp.asarray(x), jnp.asarray(y))
        losses.append(float(loss))
    return losses, optimizer


def flax_name(name: str) -> str:
    """The Flax path of a parameter: layer1.0.bn2.weight is stages/0/0/layers/1/norm/scale."""
    *block, module, leaf = name.split(".")
    if module == "linear":
        return "head/kernel" if leaf == "weight" else "head/bias"
    place = f"stages/{int(block[0][-1]) - 1}/{block[1]}/layers/{int(module[-1]) - 1}" if block else "stem"
    if module.startswith("conv"):
        return f"{place}/conv/kernel"
    return f"{place}/norm/{'scale' if leaf == 'weight' else leaf}"


def in_torch(
    weights: Path, optimizer: Optimizer | str, lr: float, *, renamed: bool = False
) -> tuple[list[float], list[str | None]]:
    model = ResNet20()
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name for name in missing)
    model.eval()  # frozen batch norm
    rename = {name: flax_name(name) for name, _ in model.named_parameters()} if renamed else None
    opt = L3RS(model.named_parameters(), optimizer, STEPS, lr=lr, rename=rename)
    losses = []
    for x, y in batches():
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(x).permute(0, 3, 1, 2)), torch.tensor(y))
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    return losses, opt.param_groups[0]["layers"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The published weights if they are available, otherwise random weights of the same shapes."""
    if PUBLISHED.is_file():
        return PUBLISHED
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file({k: v for k, v in ResNet20().state_dict().items() if "num_batches_tracked" not in k}, file)
    return file


pytestmark = pytest.mark.slow  # compiles a ResNet-20 twice


def test_the_shipped_optimizer_takes_the_same_curve(weights):
    """`universal` at a hundredth of its step agrees within 1e-3 over 15 steps. The frameworks' convolutions round
    differently; with longer steps the curve is chaotic, and a comparison would be meaningless. It describes layers by
    their names, which are Flax's in both."""
    expected, _ = in_flax(weights, lambda _: l3rs.restore("universal")[:2], lr=0.01)
    losses, _ = in_torch(weights, "universal", lr=0.01, renamed=True)
    assert expected[-1] < 0.99 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_layers_are_found_by_order(weights):
    """An optimizer with an embedding table for the Flax network, matched to the names of another implementation."""

    def make(params):
        spec = l3rs.Spec.create(params, hidden=(16,), step_scale=1.5e-4)
        return random_theta(spec, scale=0.1), spec

    expected, optimizer = in_flax(weights, make, lr=1.0)
    losses, layers = in_torch(weights, optimizer, lr=1.0)
    assert expected[-1] < 0.95 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert layers[0] == "stem/conv/kernel"
    assert layers[-2:] == ["head/kernel", "head/bias"]
    assert layers[3] == "stages/0/0/layers/0/conv/kernel"
