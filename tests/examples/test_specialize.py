"""The examples are short, and their tasks run offline."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import l3rs
from metatrain.inner.network import make_spec, task_layers
from metatrain.inner.torch_rollout import LearnedTorch, torch_rollout
from tasks import TaskSample, make_task
from tasks.torch_training import Training

ROOT = Path(__file__).parents[2]
_SAMPLE = TaskSample(jax.numpy.int32(3), jax.random.key_data(jax.random.key(4)))


@pytest.mark.parametrize("name", ["specialize_timm", "specialize_bert_lora", "specialize_text"])
def test_a_task_trains_offline(name: str) -> None:
    if name != "specialize_timm":
        pytest.importorskip("transformers", reason="the extra `integrations`")
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60
    options: dict[str, Any] = {"specialize_timm": {"size": 8}, "specialize_bert_lora": {"examples": 64}}.get(name, {})
    task = make_task(f"examples.{name}:task", options)
    spec = make_spec(task_layers(task), {})
    theta = jax.tree.map(np.asarray, l3rs.init_meta_params(jax.random.key(0), spec))
    scores = torch_rollout(Training(task), LearnedTorch(spec), ())(theta, {}, _SAMPLE, 20, ("outer_valid",), [0, 20])
    before, after = scores["outer_valid"].loss
    assert math.isfinite(after)
    assert after < before
    assert (scores["outer_valid"].accuracy >= 0).all()


def _write_images(folder: Path, pixels: Callable[[int, tuple[int, ...]], np.ndarray]) -> str:
    """Twenty images of each of two classes, uint8 [32, 32, 3]."""
    from PIL import Image

    for label in range(2):
        (folder / str(label)).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(pixels(label, (32, 32, 3))).save(folder / str(label) / f"{i}.png")
    return str(folder)


def test_a_resnet20_with_weights_of_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from examples.specialize_resnet20 import ResNet20, task

    rng = np.random.default_rng(0)
    _write_images(tmp_path / "images", lambda _, shape: rng.integers(0, 256, shape, dtype=np.uint8))
    published = {k: v for k, v in ResNet20().state_dict().items() if "num_batches" not in k}
    save_file(published, tmp_path / "weights.safetensors")
    built = task(str(tmp_path / "images"), str(tmp_path / "weights.safetensors"), batch_size=4)
    model = built.model(0)
    assert model.linear.weight.shape == (2, 64)
    np.testing.assert_array_equal(model.layer2[1].conv1.weight.detach(), published["layer2.1.conv1.weight"])
    save_file({"conv.weight": published["conv1.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        task(str(tmp_path / "images"), str(tmp_path / "other.safetensors"), batch_size=4).model(0)


def test_leep_and_logme_of_a_resnet20(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dark and light images, which any network tells apart, and images whose classes mean nothing."""
    pytest.importorskip("sklearn", reason="the extra `iomt`")
    from safetensors.torch import save_file

    from examples.specialize_resnet20 import ResNet20
    from examples.transferability import main

    rng = np.random.default_rng(0)
    save_file(ResNet20().state_dict(), tmp_path / "weights.safetensors")
    light = _write_images(
        tmp_path / "light", lambda label, shape: rng.integers(0, 100, shape, dtype=np.uint8) + 150 * label
    )
    noise = _write_images(tmp_path / "noise", lambda _, shape: rng.integers(0, 256, shape, dtype=np.uint8))
    main(str(tmp_path / "weights.safetensors"), [light, noise])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in rows] == ["pretrained", "random"] * 2
    scores = np.array([[float(x.rstrip("%")) for x in row[2:]] for row in rows])
    assert (scores[:2, 2] == 100).all()
    assert (scores[:2, :2] > scores[2:, :2]).all()  # LEEP and LogME


def test_lora_trains_adapters_and_head_alone() -> None:
    pytest.importorskip("transformers", reason="the extra `integrations`")
    from examples.specialize_bert_lora import task

    model = task(examples=16).model(0)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"up", "down", "classifier"}


def test_paraphrases_in_a_file(tmp_path: Path) -> None:
    """Adapters of six layers of both blocks and the head train; a word's type says whether both sentences have it."""
    pytest.importorskip("transformers", reason="the extra `integrations`")
    rows = [f"{i % 2}\tsome words {i}\t{'some words' if i % 2 else 'others'} {i}" for i in range(40)]
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join(["Quality\t#1 String\t#2 String", *rows]) + "\n")
    built = make_task("examples.specialize_mrpc:task", {"file": str(file)})
    layers = task_layers(built)
    assert len(layers) == 2 * 6 * 2 + 2
    example = next(each for each in built.train if each["labels"] == 1)
    assert example["token_type_ids"][:8].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
    assert example["attention_mask"].sum() == 8
    spec = make_spec(layers, {})
    theta = jax.tree.map(np.asarray, l3rs.init_meta_params(jax.random.key(0), spec))
    scores = torch_rollout(Training(built), LearnedTorch(spec), ())(theta, {}, _SAMPLE, 3, ("outer_valid",), [0, 3])
    assert np.isfinite(scores["outer_valid"].loss).all()
    assert scores["outer_valid"].loss[0] != scores["outer_valid"].loss[1]
