"""The examples are short, and their tasks run offline."""

from __future__ import annotations

import math
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


def test_a_resnet20_with_weights_of_a_file(tmp_path: Path) -> None:
    from PIL import Image
    from safetensors.torch import save_file

    from examples.specialize_resnet20 import ResNet20, task

    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 32, 32, 3), dtype=np.uint8)
    for label, images in enumerate(pixels):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "images" / str(label) / f"{i}.png")
    published = {k: v for k, v in ResNet20().state_dict().items() if "num_batches" not in k}
    save_file(published, tmp_path / "weights.safetensors")
    built = task(str(tmp_path / "images"), str(tmp_path / "weights.safetensors"), batch_size=4)
    model = built.model(0)
    assert model.linear.weight.shape == (2, 64)
    np.testing.assert_array_equal(model.layer2[1].conv1.weight.detach(), published["layer2.1.conv1.weight"])
    save_file({"conv.weight": published["conv1.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        task(str(tmp_path / "images"), str(tmp_path / "other.safetensors"), batch_size=4).model(0)


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
