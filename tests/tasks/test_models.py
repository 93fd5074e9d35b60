"""Networks: they compute the same as the published PyTorch ones, train under every name, and report wrong options."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tasks.base import TaskError
from tasks.models import MODELS, make_model
from tasks.models.functional import Model, functional
from tasks.models.resnet import BatchNorm, GroupNorm
from tasks.weights import load_weights

BLOCKS = {18: ("basic", [2, 2, 2, 2]), 34: ("basic", [3, 4, 6, 3]), 50: ("bottleneck", [3, 4, 6, 3])}
CLASSES = 7


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.2, shape).astype(np.float32)


def to_torch(x: np.ndarray) -> Any:
    torch = pytest.importorskip("torch", reason="the reference networks are PyTorch's")
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def randomized(network: Any) -> Any:
    """Every tensor differs from its init, also the running statistics of batch norm; activations stay of order 1."""
    import torch

    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(0, tensor[0].numel() ** -0.5)
    return network.eval()


def resnet_pair(depth: int, width: int, folder: Path) -> tuple[Any, Model, Any, Any]:
    transformers = pytest.importorskip("transformers", reason="the reference networks are transformers'")
    kind, blocks = BLOCKS[depth]
    widths = [width * 2**stage * (4 if kind == "bottleneck" else 1) for stage in range(4)]
    config = transformers.ResNetConfig(
        embedding_size=width, hidden_sizes=widths, depths=blocks, layer_type=kind, num_labels=CLASSES
    )
    network = randomized(transformers.ResNetForImageClassification(config))
    network.save_pretrained(folder)
    model = make_model(f"resnet{depth}", (64, 64, 3), CLASSES, width=width)
    params, stats = load_weights(folder / "model.safetensors", f"resnet{depth}", *zeros(model))
    return network, model, params, stats


def zeros(model: Model) -> tuple[Any, Any]:
    """Parameters and statistics of the right shapes; quicker than an init."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def logits(model: Model, params: Any, stats: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.apply, static_argnums=3)(params, stats, x, False)[0])


def relative_error(ours: np.ndarray, reference: Any) -> float:
    reference = reference.detach().numpy()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("depth", [18, pytest.param(34, marks=pytest.mark.slow), 50])
def test_imagenet_resnet_equals_torchs(depth: int, tmp_path: Path) -> None:
    network, model, params, stats = resnet_pair(depth, 16, tmp_path)
    x = images(2, 64, 64, 3)
    assert relative_error(logits(model, params, stats, x), network(to_torch(x)).logits) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_imagenet_resnet_of_full_width_equals_torchs(depth: int, tmp_path: Path) -> None:
    network, model, params, stats = resnet_pair(depth, 64, tmp_path)
    x = images(2, 75, 64, 3)  # an odd side, so that rounding must agree, too
    assert relative_error(logits(model, params, stats, x), network(to_torch(x)).logits) < 1e-4


@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
def test_vit_equals_torchs(epsilon: float, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference networks are transformers'")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        layer_norm_eps=epsilon,
    )
    network = randomized(transformers.ViTForImageClassification(config))
    network.save_pretrained(tmp_path)
    model = make_model("vit_tiny", (32, 32, 3), CLASSES, patch_size=8, depth=3, dim=48, heads=3, epsilon=epsilon)
    params, stats = load_weights(tmp_path / "model.safetensors", "vit_tiny", *zeros(model))
    x = images(2, 32, 32, 3)
    assert relative_error(logits(model, params, stats, x), network(to_torch(x)).logits) < 1e-4


@pytest.mark.slow
def test_training_follows_torchs(tmp_path: Path) -> None:
    """Parameters and batch-norm statistics of a whole network after three steps of SGD."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's training")
    network, model, params, stats = resnet_pair(18, 8, tmp_path)
    labels = np.arange(8) % CLASSES
    step = jax.jit(functools.partial(sgd_step, model))
    optimizer = torch.optim.SGD(network.train().parameters(), 0.01)
    for seed in range(3):
        x = images(8, 64, 64, 3, seed=seed)
        params, stats, _ = step(params, stats, x, labels)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(to_torch(x)).logits, torch.from_numpy(labels)).backward()
        optimizer.step()
    network.save_pretrained(tmp_path)
    reference = load_weights(tmp_path / "model.safetensors", "resnet18", *zeros(model))
    # Float32 sums in another order, through 18 layers and 3 steps.
    for ours, theirs in zip(jax.tree.leaves((params, stats)), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


def sgd_step(model: Model, params: Any, stats: Any, x: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, new = model.apply(params, stats, x, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), stats, value


def test_batch_norm_follows_torchs_inside_a_loop() -> None:
    """Three steps in one compiled loop: jit, grad and while_loop carry the statistics, and only training moves them."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's batch norm")
    xs = np.asarray([images(4, 5, 5, 3, seed=i) for i in range(3)])
    reference = torch.nn.BatchNorm2d(3)
    optimizer = torch.optim.SGD(reference.parameters(), 0.5)
    for x in xs:
        optimizer.zero_grad()
        ((reference(to_torch(x)) - 1) ** 3).mean().backward()
        optimizer.step()

    model = functional(lambda _: BatchNorm(3, frozen=False))
    batches = jnp.asarray(xs)

    def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, new = model.apply(params, carry[1], batches[i], True)
            return jnp.mean((y - 1) ** 3), new

        grads, stats = jax.grad(loss, has_aux=True)(carry[0])
        return jax.tree.map(lambda p, g: p - 0.5 * g, carry[0], grads), stats

    start = model.init(jax.random.key(0))
    params, stats = jax.jit(lambda n: jax.lax.fori_loop(0, n, step, start))(3)
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    np.testing.assert_allclose(stats["mean"], state["running_mean"], rtol=1e-5)
    np.testing.assert_allclose(stats["var"], state["running_var"], rtol=1e-5)
    np.testing.assert_allclose(params["scale"], state["weight"], rtol=1e-4)
    np.testing.assert_allclose(params["bias"], state["bias"], rtol=1e-4)
    y, unchanged = model.apply(params, stats, batches[0], False)
    assert relative_error(np.moveaxis(np.asarray(y), -1, 1), reference.eval()(to_torch(xs[0]))) < 1e-4
    jax.tree.map(np.testing.assert_array_equal, unchanged, stats)


def test_frozen_batch_norm_never_changes() -> None:
    model = functional(lambda _: BatchNorm(3, frozen=True))
    params, _ = model.init(jax.random.key(0))
    stats = {"mean": jnp.asarray([1.0, 2, 3]), "var": jnp.asarray([4.0, 1, 9])}
    x = jnp.asarray(images(4, 5, 5, 3))
    for train in (True, False):
        y, new = model.apply(params, stats, x, train)
        np.testing.assert_allclose(y, (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5), rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, new, stats)


def test_group_norm_equals_flax() -> None:
    ours, flax = GroupNorm(12, groups=4), nnx.GroupNorm(12, num_groups=4, epsilon=1e-5, rngs=nnx.Rngs(0))
    norms: list[Any] = [ours, flax]
    for norm in norms:
        norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2, 12), jnp.linspace(-1, 1, 12)
    x = jnp.asarray(images(3, 5, 6, 12))
    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-4, atol=1e-5)


STEPS: list[Any] = [
    ("mlp", {}),
    ("resnet8", {}),
    ("resnet8", {"norm": "group"}),
    pytest.param("resnet8", {"norm": "none", "shortcut": "projection"}, marks=pytest.mark.slow),
    pytest.param("resnet8", {"norm": "frozen"}, marks=pytest.mark.slow),
    ("vit_tiny", {"patch_size": 8, "depth": 1, "dim": 96}),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in MODELS if name not in ("mlp", "resnet8")),
]


@pytest.mark.parametrize(("name", "options"), STEPS)
def test_every_model_learns_a_batch(name: str, options: dict[str, Any]) -> None:
    """Three steps on one batch under jit lower its loss; shapes do not change."""
    model = make_model(name, (32, 32, 1), CLASSES, **options)
    params, stats = model.init(jax.random.key(0))
    x, labels = images(4, 32, 32, 1), np.arange(4)
    step = jax.jit(functools.partial(sgd_step, model))
    losses, before = [], (params, stats)
    for _ in range(3):
        params, stats, loss = step(params, stats, x, labels)
        losses.append(float(loss))
    assert losses[-1] < losses[0] < 20
    assert jax.tree.map(jnp.shape, (params, stats)) == jax.tree.map(jnp.shape, before)
    moved = any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (stats, before[1])), strict=True))
    assert moved == (name.startswith("resnet") and options.get("norm", "batch") == "batch")


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {}), ("resnet8", {}), ("resnet18", {}), ("vit_tiny", {"depth": 1})]
)
def test_output_shapes(name: str, options: dict[str, Any]) -> None:
    model = make_model(name, (64, 32, 3), CLASSES, **options)
    x = jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
    init = jax.eval_shape(model.init, jax.random.key(0))
    out, stats = jax.eval_shape(lambda init, x: model.apply(init[0], init[1], x, True), init, x)
    assert out.shape == (2, CLASSES)
    assert stats == init[1]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),  # akamaster's table, torchvision's and timm's documentation
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("vit_tiny", 5_717_416),
    ],
)
def test_parameters_are_as_many_as_published(name: str, parameters: int) -> None:
    shape, classes = ((32, 32, 3), 10) if name == "resnet20" else ((224, 224, 3), 1000)
    params, _ = jax.eval_shape(make_model(name, shape, classes).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet9", {}, "unknown model 'resnet9'; allowed are mlp, cnn, resnet8"),
        ("resnet8", {"dept": 3}, "dept is not an option of model 'resnet8'; allowed are width, norm, groups, shortcut"),
        ("resnet18", {"shortcut": "pad"}, "shortcut is not an option of model 'resnet18'; allowed are width"),
        ("resnet8", {"rngs": 0}, "rngs is not an option"),
        ("resnet8", {"norm": "layer"}, "model 'resnet8': norm is 'layer'; allowed are batch, group, frozen, none"),
        ("resnet8", {"shortcut": "conv"}, "shortcut is 'conv'; allowed are pad, projection"),
        ("resnet8", {"norm": "group", "width": 12}, "groups is 8; it must divide width, which is 12"),
        ("resnet8", {"width": 0}, "model 'resnet8': width is 0; it must be an integer > 0"),
        ("mlp", {"hidden": [8, "x"]}, "model 'mlp': each of hidden is 'x'; it must be an integer > 0"),
        ("vit_tiny", {}, "patch_size is 16; it must divide the image's sides, which are 24 and 32"),
        ("vit_tiny", {"patch_size": 8, "heads": 5}, "heads is 5; it must divide dim, which is 192"),
        ("vit_tiny", {"patch_size": 8, "epsilon": -1e-6}, "epsilon is -1e-06; it must be a number > 0"),
    ],
)
def test_wrong_options_are_one_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskError) as error:
        make_model(name, (24, 32, 3), CLASSES, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_image_shape_is_one_sentence() -> None:
    with pytest.raises(
        TaskError, match=r"model 'mlp': image_shape is \(32, 32\); it must be \(height, width, channels"
    ):
        make_model("mlp", (32, 32), CLASSES)
