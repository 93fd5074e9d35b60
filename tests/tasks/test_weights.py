"""Published weights: every naming scheme is read, the real ResNet-20 classifies, a wrong file is one sentence."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_bfloat16
from safetensors.numpy import save_file

from tasks.base import TaskError
from tasks.models import make_model
from tasks.weights import load_weights

SHARED = Path(os.environ.get("L3RS_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
RESNET20 = SHARED / "weights" / "resnet20_cifar10.safetensors"
CIFAR10 = SHARED / "tfds" / "cifar10_test_1k" / "1.0.0"

Tensors = dict[str, np.ndarray]


def numbered(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Tensors that all differ."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves}


def torchvision_resnet18(width: int = 8, classes: int = 5) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (width, 3, 7, 7), **norm("bn1", width)}
    before = width
    for stage in range(4):
        after = width * 2**stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            shapes |= {f"{name}.conv1.weight": (after, before, 3, 3), f"{name}.conv2.weight": (after, after, 3, 3)}
            shapes |= norm(f"{name}.bn1", after) | norm(f"{name}.bn2", after)
            if before != after:
                shapes |= {f"{name}.downsample.0.weight": (after, before, 1, 1), **norm(f"{name}.downsample.1", after)}
            before = after
    return numbered(shapes | {"fc.weight": (classes, before), "fc.bias": (classes,)})


def timm_vit(dim: int = 12, depth: int = 2, classes: int = 5) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 17, dim),
        "patch_embed.proj.weight": (dim, 3, 8, 8),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }
    widths = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for block in range(depth):
        for name, shape in widths.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.weight": (dim,), f"blocks.{block}.{name}.bias": (dim,)}
    return numbered(shapes)


def model_of(name: str, classes: int = 5, **options: Any) -> tuple[Any, Any]:
    """Parameters and statistics, all 7."""
    sizes: dict[str, Any] = {"vit_tiny": {"patch_size": 8, "depth": 2, "dim": 12}, "resnet18": {"width": 8}}
    init = make_model(name, (32, 32, 3), classes, **sizes.get(name, {}), **options).init
    return jax.tree.map(lambda x: np.full(x.shape, 7, np.float32), jax.eval_shape(init, jax.random.key(0)))


def load(path: Path, tensors: Tensors, name: str, classes: int = 5, **options: Any) -> tuple[Any, Any]:
    save_file(tensors, path)
    return load_weights(path, name, *model_of(name, classes, **options))


def same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def test_resnet_of_torchvision(file: Path) -> None:
    tensors = torchvision_resnet18()
    counts = {"bn1.num_batches_tracked": np.asarray(3)}
    params, stats = load(file, tensors | counts, "resnet18")
    block = params["stages"][2][0]
    np.testing.assert_array_equal(params["stem"]["conv"]["kernel"], tensors["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(block["layers"][1]["norm"]["scale"], tensors["layer3.0.bn2.weight"])
    np.testing.assert_array_equal(block["shortcut"]["norm"]["bias"], tensors["layer3.0.downsample.1.bias"])
    np.testing.assert_array_equal(
        stats["stages"][3][1]["layers"][0]["norm"]["var"], tensors["layer4.1.bn1.running_var"]
    )
    assert all(not np.any(np.asarray(leaf) == 7) for leaf in jax.tree.leaves((params, stats)))
    same(load(file, {f"module.{name}": tensor for name, tensor in tensors.items()}, "resnet18"), (params, stats))


def test_frozen_norm_takes_the_same_file(file: Path) -> None:
    tensors = torchvision_resnet18()
    same(load(file, tensors, "resnet18", norm="frozen"), load(file, tensors, "resnet18"))


def test_vit_of_timm_and_of_transformers(file: Path) -> None:
    """Both naming schemes give the same parameters; transformers stores query, key and value separately."""
    tensors = timm_vit()
    params, stats = load(file, tensors, "vit_tiny")
    np.testing.assert_array_equal(params["patches"]["kernel"], tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["blocks"][1]["qkv"]["kernel"], tensors["blocks.1.attn.qkv.weight"].T)
    assert all(not np.any(np.asarray(leaf) == 7) for leaf in jax.tree.leaves(params))
    assert stats == {}
    same(load(file, in_transformers_names(tensors), "vit_tiny"), (params, stats))


def in_transformers_names(timm: Tensors) -> Tensors:
    renames = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "blocks": "vit.encoder.layer",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "norm.": "vit.layernorm.",
        "head": "classifier",
    }
    renamed = {}
    for name, tensor in timm.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = np.ascontiguousarray(rows)
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(("name", "tensors"), [("resnet18", torchvision_resnet18), ("vit_tiny", timm_vit)])
def test_a_head_for_other_classes_is_not_read(file: Path, name: str, tensors: Callable[[], Tensors]) -> None:
    params, stats = load(file, tensors(), name, classes=3)
    body, body_stats = load(file, tensors(), name)
    assert all(np.all(np.asarray(leaf) == 7) for leaf in jax.tree.leaves(params.pop("head")))
    body.pop("head")
    same((params, stats), (body, body_stats))


def test_bfloat16_is_read(file: Path) -> None:
    tensors = timm_vit()
    save_bfloat16({name: jnp.asarray(tensor, jnp.bfloat16) for name, tensor in tensors.items()}, file)
    params, _ = load_weights(file, "vit_tiny", *model_of("vit_tiny"))
    assert params["cls_token"].dtype == jnp.float32
    np.testing.assert_allclose(params["cls_token"], tensors["cls_token"], rtol=1e-2)


def missing(tensors: Tensors) -> None:
    del tensors["layer2.0.conv1.weight"]


def unexpected(tensors: Tensors) -> None:
    tensors["layer5.0.conv1.weight"] = np.ones((2, 3, 1, 1), np.float32)


def misshapen(tensors: Tensors) -> None:
    tensors["conv1.weight"] = np.ones((8, 3, 3, 3), np.float32)


def narrow_head(tensors: Tensors) -> None:
    tensors |= {"fc.weight": np.ones((9, 32), np.float32), "fc.bias": np.ones(9, np.float32)}


def quantized(tensors: Tensors) -> None:
    tensors["conv1.weight"] = np.ones((8, 3, 7, 7), np.int8)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (missing, "tensor 'layer2.0.conv1.weight' of shape [16, 8, 3, 3] is missing"),
        (unexpected, "tensor 'layer5.0.conv1.weight' of shape [2, 3, 1, 1] is not one of the model's"),
        (misshapen, "tensor 'conv1.weight' has shape [8, 3, 3, 3], the model's is [8, 3, 7, 7]"),
        (narrow_head, "tensor 'fc.weight' has shape [9, 32], the model's is [5, 64]"),
        (quantized, "tensor 'conv1.weight' is int8; it must be floating point"),
    ],
)
def test_wrong_tensors_are_one_sentence(file: Path, damage: Callable[[Tensors], None], sentence: str) -> None:
    tensors = torchvision_resnet18()
    damage(tensors)
    expect(sentence, file, lambda: load(file, tensors, "resnet18"))


def test_a_file_of_another_network_is_one_sentence(file: Path) -> None:
    tensors = torchvision_resnet18()
    expect("tensor 'bn1.running_mean'", file, lambda: load(file, tensors, "resnet18", norm="group", groups=4))
    expect("is missing", file, lambda: load(file, tensors, "vit_tiny"))
    expect("model 'mlp' has no published weights; allowed are resnet…, vit…", file, lambda: load(file, tensors, "mlp"))


def test_an_unreadable_file_is_one_sentence(file: Path, tmp_path: Path) -> None:
    model = model_of("resnet18")
    expect("there is no such file", file, lambda: load_weights(file, "resnet18", *model))
    expect("not a regular file", tmp_path, lambda: load_weights(tmp_path, "resnet18", *model))
    save_file(torchvision_resnet18(), file)
    file.write_bytes(file.read_bytes()[:-10])
    expect("not a readable safetensors file", file, lambda: load_weights(file, "resnet18", *model))
    for content in (b"", b"\x80\x02}q\x00.", b"PK\x03\x04" * 20):  # nothing, a pickle, a zip
        file.write_bytes(content)
        expect("not a readable safetensors file", file, lambda: load_weights(file, "resnet18", *model))


def expect(sentence: str, source: object, call: Callable[[], Any]) -> None:
    with pytest.raises(TaskError) as error:
        call()
    message = str(error.value)
    assert sentence in message
    assert str(source) in message
    assert "\n" not in message


def test_names_on_the_hub(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(*args: str) -> str:
        asked.append(args)
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    params, stats = load(file, torchvision_resnet18(), "resnet18")
    for source in ("hf://owner/name", "hf://owner/name/a/b.safetensors"):
        same(load_weights(source, "resnet18", *model_of("resnet18")), (params, stats))
    assert asked == [("owner/name", "model.safetensors"), ("owner/name", "a/b.safetensors")]


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(*_: str) -> str:
        raise hub.errors.LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = model_of("resnet18")
    source = "hf://owner/name"
    expect("cannot be downloaded (no connection)", source, lambda: load_weights(source, "resnet18", *model))
    for source in ("hf://name", "hf://", "hf://owner/name/"):
        expect("not a name on the hub", source, functools.partial(load_weights, source, "resnet18", *model))


@pytest.mark.skipif(not (RESNET20.is_file() and CIFAR10.is_dir()), reason="$L3RS_SHARED/data is not there")
def test_the_published_resnet20_classifies_cifar10() -> None:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(CIFAR10)).as_data_source("test")
    records = source.__getitems__(range(len(source)))
    images = np.stack([record["image"] for record in records]) / 255
    images = ((images - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    labels = np.asarray([record["label"] for record in records])

    model = make_model("resnet20", (32, 32, 3), 10)
    params, stats = load_weights(RESNET20, "resnet20", *jax.eval_shape(model.init, jax.random.key(0)))
    logits, _ = jax.jit(model.apply, static_argnums=3)(params, stats, images, False)
    assert np.mean(np.argmax(logits, -1) == labels) == pytest.approx(0.902, abs=0.003)
