"""The task `images` on a small folder of made-up pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tasks import TaskError, make_task, prepare_task
from tasks.base import Task

MODEL = {"name": "resnet8", "norm": "group", "groups": 2, "width": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of one colour each, with noise."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(("red", "green", "blue")):
        (root / colour).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 120, (20, 16, 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(root / colour / f"{i}.png")
    return root


def images(folder: Path, **options: object) -> Task:
    small = {"target": {"folder": str(folder)}, "size": 16, "model": MODEL, "batch_size": 8}
    return make_task("images", {**small, **options})


def pretrained(folder: Path, **options: object) -> dict:
    source = {"folder": str(folder), "classes": ["red", "green"]}
    return {"source": source, "seeds": 2, "held_out_seeds": 1, "epochs": [1, 3], "batch_size": 8, **options}


def test_batches_are_augmented_and_evaluation_is_not(folder: Path) -> None:
    task, plain = images(folder), images(folder, crop_flip=False)
    key = jax.random.key(0)
    one, two = jax.jit(task.batch)(task.data, key), jax.jit(plain.batch)(plain.data, key)
    assert one["image"].shape == (8, 16, 16, 3)
    assert one["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(one["label"], two["label"])
    assert not np.array_equal(one["image"], two["image"])
    np.testing.assert_array_equal(task.data["test"]["image"], plain.data["test"]["image"])


def test_outer_examples_shortens_the_meta_loss_alone(folder: Path) -> None:
    task, whole = images(folder, outer_examples=5), images(folder)
    assert len(task.data["outer_valid"]["label"]) == 5
    for split in ("inner_train", "inner_valid", "test"):
        assert len(task.data[split]["label"]) == len(whole.data[split]["label"])


def test_an_init_distribution_is_pretrained_once_with_heads_for_the_target(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = images(folder, init=pretrained(folder))
    assert [list(task.pools[pool]) for pool in ("meta_train", "held_out")] == [[0, 1, 2, 3], [4, 5]]
    init = jax.jit(task.init)
    params = [init(task.data, jnp.int32(i))[0] for i in range(6)]
    assert params[0]["head"]["kernel"].shape == (32, 3)  # two classes in the source, three in the target
    stems = {np.asarray(p["stem"]["kernel"]).tobytes() for p in params if "kernel" in p["stem"]}
    stems |= {np.asarray(jax.tree.leaves(p["stem"])[-1]).tobytes() for p in params}
    assert len(stems) == 6
    monkeypatch.setattr("tasks.images.pretrain_stepwise", lambda *_: pytest.fail("pretrained a second time"))
    again = images(folder, init=pretrained(folder))
    jax.tree.map(np.testing.assert_array_equal, again.data["inits"], task.data["inits"])


@pytest.mark.slow  # pretrains
def test_a_network_whose_head_is_its_last_layer_is_pretrained_too(folder: Path) -> None:
    task = images(folder, model={"name": "mlp", "hidden": [4]}, init=pretrained(folder))
    params, _ = jax.jit(task.init)(task.data, jnp.int32(0))
    other, _ = jax.jit(task.init)(task.data, jnp.int32(1))
    assert params["layers"][1]["kernel"].shape == (4, 3)  # of the target's three classes; the source has two
    assert not np.array_equal(params["layers"][0]["kernel"], other["layers"][0]["kernel"])


@pytest.mark.slow  # pretrains
def test_frozen_batch_norm_keeps_the_statistics_of_a_pretraining_in_train_mode(folder: Path) -> None:
    model = {"name": "resnet8", "width": 2}
    init = pretrained(folder, seeds=1, epochs=[1])
    frozen, moving = (images(folder, model={**model, "norm": norm}, init=init) for norm in ("frozen", "batch"))
    (params, stats), other = (jax.jit(task.init)(task.data, jnp.int32(0)) for task in (frozen, moving))
    jax.tree.map(np.testing.assert_array_equal, (params, stats), other)
    assert any(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(stats))
    batch = jax.jit(frozen.batch)(frozen.data, jax.random.key(0))
    losses = [jax.jit(task.loss, static_argnums=3) for task in (frozen, moving)]
    kept, moved = (loss(params, stats, batch, True)[1].stats for loss in losses)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(stats), strict=True))


@pytest.mark.slow
def test_pretraining_learns_the_source(folder: Path) -> None:
    from tasks.classification import classification_loss
    from tasks.images import ImageSet
    from tasks.models import make_model
    from tasks.pretrained import Schedule, pretrain_stepwise

    data = ImageSet(folder=str(folder)).load(16)
    model = make_model("resnet8", (16, 16, 3), 3, norm="group", groups=2, width=8)
    loss = classification_loss(model)
    schedule = Schedule(seeds=1, held_out_seeds=1, epochs=(12,), batch_size=8, learning_rate=1e-2)
    params, stats = pretrain_stepwise(model, loss, data, schedule, padding=2)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], (params, stats))
        _, aux = loss(*one, jax.tree.map(jnp.asarray, data["test"]), False)
        assert aux.accuracy > 0.8  # colours are easy; chance is a third


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_training_a_part_starts_at_the_whole_and_leaves_the_rest(folder: Path, mode: str) -> None:
    model = {"name": "vit_tiny", "patch_size": 8, "depth": 1, "dim": 16, "heads": 2}
    whole, part = images(folder, model=model), images(folder, model=model, train=mode)
    batch = jax.jit(whole.batch)(whole.data, jax.random.key(0))
    params, stats = jax.jit(whole.init)(whole.data, jnp.int32(3))
    trained, held = jax.jit(part.init)(part.data, jnp.int32(3))
    expected, _ = jax.jit(whole.loss, static_argnums=3)(params, stats, batch, True)
    gradient = jax.jit(jax.value_and_grad(part.loss, has_aux=True), static_argnums=3)
    (found, aux), grads = gradient(trained, held, batch, True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # LoRA's change starts at zero
    assert set(trained) == ({"head"} if mode == "head" else {"head", "lora"})
    jax.tree.map(np.testing.assert_array_equal, aux.stats["frozen"], held["frozen"])
    assert float(jnp.abs(grads["head"]["kernel"]).max()) > 0
    if mode == "lora":
        sizes = [leaf.size for leaf in jax.tree.leaves(trained["lora"])]
        assert 0 < sum(sizes) < 0.6 * sum(leaf.size for leaf in jax.tree.leaves(held["frozen"]))
        assert all(float(jnp.abs(a["b"]).max()) > 0 for a in grads["lora"].values())
        # Changing an adapter changes its matrix, by α / r · a b, and nothing else.
        path = next(iter(trained["lora"]))
        moved = jax.tree.map(lambda x: x, trained)
        moved["lora"][path] = {**moved["lora"][path], "b": jnp.ones_like(moved["lora"][path]["b"])}
        assert float(gradient(moved, held, batch, True)[0][0]) != pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": {}}, "task.target needs exactly one of tfds, directory and folder"),
        ({"target": {"folder": "a", "tfds": "b"}}, "exactly one of"),
        ({"target": {"colour": 1}}, "task.target.colour is not a key of an image set; allowed are tfds"),
        ({"model": {"width": 4}}, "task.model needs a name"),
        ({"model": {"name": "resnet9"}}, "unknown model 'resnet9'"),
        ({"init": "imagenet"}, "task.init is 'imagenet'"),
        ({"init": {"weights": "x", "seeds": 1}}, "found also seeds"),
        ({"init": {"weights": "/no/such/file.safetensors"}}, "/no/such/file.safetensors"),
        ({"train": "body"}, "task.train is 'body'; allowed are all, head, lora"),
        ({"batch_size": 0}, "task.batch_size is 0"),
        ({"batch_size": 1000}, "training images"),
        ({"target": {"directory": "/no/such/folder"}}, "/no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, options: dict, words: str) -> None:
    with pytest.raises(TaskError) as error:
        images(folder, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": 0}, "must all be ≥ 1"),
        ({"epochs": [3, 1]}, "task.init.epochs is [3, 1]; it must increase"),
        ({"epoch": [1]}, "task.init.epoch is not"),
    ],
)
def test_bad_pretraining_is_one_sentence(folder: Path, change: dict, words: str) -> None:
    with pytest.raises(TaskError) as error:
        images(folder, init=pretrained(folder, **change))
    assert words in str(error.value)


def test_prepare_says_where_folders_are_and_what_a_name_needs(folder: Path, tmp_path: Path) -> None:
    assert prepare_task("images", {"target": {"folder": str(folder)}, "init": pretrained(folder)}) == [str(folder)] * 2
    assert prepare_task("digits", {}) == []
    missing = {"tfds": "cifar100", "data_dir": str(tmp_path)}
    with pytest.raises(TaskError, match=r"metatrain prepare CONFIG"):
        images(folder, target=missing)
    if importlib.util.find_spec("tensorflow") is None:
        with pytest.raises(TaskError, match=r"needs TensorFlow: pip install 'l3rs\[prepare\]'"):
            prepare_task("images", {"target": missing})
