"""Task augmentation: the same function with other parameters, pure, and held-out inits unchanged."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks import Task, TaskError, make_task, sample
from tasks.augment import Augmentation, augmented
from tasks.base import SPLITS

SMALL = {"model": {"name": "mlp", "hidden": [8]}, "init": "random", "batch_size": 16}


@pytest.fixture(scope="module")
def plain() -> Task:
    return make_task("digits", SMALL)


def augment(**options: object) -> Task:
    return make_task("digits", {**SMALL, "augment": options})


def assert_equal(one: object, other: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_reparametrisation_keeps_the_function_and_scales_the_gradient(plain: Task) -> None:
    task = augment(reparametrise=1.5)
    i = int(task.pools["meta_train"][5])
    assert i not in plain.pools["meta_train"]
    phi, stats = task.init(task.data, jnp.int32(i))
    theta, plain_stats = plain.init(plain.data, jnp.int32(plain.pools["meta_train"][5]))
    scale = stats["augment"]["scale"]
    batch = task.batch(task.data, jax.random.key(3))
    assert_equal(batch, plain.batch(plain.data, jax.random.key(3)))
    (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(phi, stats, batch, True)
    (expected, _), expected_grads = jax.value_and_grad(plain.loss, has_aux=True)(theta, plain_stats, batch, True)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # phi is theta / c, rounded
    for found, wanted, c, p, t in zip(
        *(jax.tree.leaves(tree) for tree in (grads, expected_grads, scale, phi, theta)), strict=True
    ):
        np.testing.assert_allclose(p * c, t, rtol=1e-6)
        np.testing.assert_allclose(found, c * wanted, rtol=1e-4, atol=1e-7)


def test_scales_differ_by_tensor_and_by_init_as_configured() -> None:
    task = augment(reparametrise=1.5)
    scales = jax.vmap(lambda i: task.init(task.data, i)[1]["augment"]["scale"])
    rows = jnp.array([task.pools["meta_train"][n] for n in range(3000)], jnp.int32)
    logs = np.log(np.stack(jax.tree.leaves(jax.jit(scales)(rows)), axis=1))  # [inits, tensors]
    assert logs.std() == pytest.approx(np.hypot(1.5, 0.75), rel=0.05)
    within = logs - logs.mean(1, keepdims=True)
    assert np.sqrt(within.var(1, ddof=1).mean()) == pytest.approx(0.75, rel=0.05)
    assert abs(logs.mean()) < 0.1


def test_held_out_inits_and_data_are_those_of_the_plain_task(plain: Task) -> None:
    task = augment(reparametrise=1.5, label_noise=0.5, input_scale=2.0)
    assert list(task.pools["held_out"][:9]) == list(plain.pools["held_out"][:9])
    assert not set(task.pools["meta_train"][:50]) & set(plain.pools["held_out"])
    for split in SPLITS:
        assert_equal(task.data[split], plain.data[split])
    i = jnp.int32(plain.pools["held_out"][4])
    (phi, stats), (theta, plain_stats) = task.init(task.data, i), plain.init(plain.data, i)
    assert_equal(phi, theta)
    batch, plain_batch = (t.batch(t.data, jax.random.key(1)) for t in (task, plain))
    found = jax.value_and_grad(task.loss, has_aux=True)(phi, stats, batch, True)
    wanted = jax.value_and_grad(plain.loss, has_aux=True)(theta, plain_stats, plain_batch, True)
    assert_equal((found[0][0], found[1]), (wanted[0][0], wanted[1]))
    asked = augment(reparametrise=1.5, held_out=True)
    assert asked.pools["held_out"][4] not in plain.pools["held_out"]


def test_everything_is_a_pure_function_of_init_and_key() -> None:
    options = {"reparametrise": 1.0, "label_noise": 0.3, "input_scale": 1.0}
    first, second = augment(**options), augment(**options)
    i = jnp.int32(first.pools["meta_train"][777])
    assert_equal(first.init(first.data, i), second.init(second.data, i))
    assert_equal(*(jax.jit(t.batch)(t.data, jax.random.key(5)) for t in (first, second)))
    other = jnp.int32(first.pools["meta_train"][778])
    one, two = (first.init(first.data, n)[1]["augment"]["scale"] for n in (i, other))
    assert all(float(a) != float(b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def test_label_noise_replaces_a_share_of_the_training_labels_alone() -> None:
    task = make_task("digits", {**SMALL, "batch_size": 1000, "augment": {"label_noise": 0.4}})
    phi, stats = task.init(task.data, jnp.int32(task.pools["meta_train"][0]))
    batch = task.batch(task.data, jax.random.key(0))
    changed = float(np.mean(batch["noisy_label"] != batch["label"]))
    assert changed == pytest.approx(0.4 * 0.9, abs=0.06)  # a tenth of the drawn classes is right by chance
    assert set(np.unique(batch["noisy_label"])) <= set(range(10))
    seen = {**batch, "label": batch["noisy_label"]}
    clean = {key: batch[key] for key in ("image", "label")}
    loss = float(task.loss(phi, stats, batch, True)[0])
    assert loss == float(task.loss(phi, stats, {k: seen[k] for k in clean}, True)[0])
    assert loss != float(task.loss(phi, stats, clean, True)[0])
    other = task.batch(task.data, jax.random.key(1))
    assert not np.array_equal(other["noisy_label"] != other["label"], batch["noisy_label"] != batch["label"])


def test_an_input_scale_multiplies_the_inputs_of_an_init(plain: Task) -> None:
    task = augment(input_scale=2.0)
    i = task.pools["meta_train"][3]
    params, stats = task.init(task.data, jnp.int32(i))
    factor = stats["augment"]["input"]
    batch = {**task.data["test"], "image": task.data["test"]["image"]}
    expected = plain.loss(params, {}, {**batch, "image": batch["image"] * factor}, False)[0]
    assert float(factor) != 1
    np.testing.assert_allclose(task.loss(params, stats, batch, False)[0], expected, rtol=1e-6)


def test_a_batch_size_is_drawn_for_each_variant() -> None:
    bounds = {"batch_size": [4, 64]}
    sizes = [
        len(task.batch(task.data, jax.random.key(0))["label"])
        for task in (make_task("digits", {**SMALL, "model": {"name": "mlp", "hidden": [n]}, "augment": bounds})
                     for n in (2, 3, 4, 5, 6, 2))
    ]  # fmt: skip
    assert sizes[0] == sizes[5]
    assert len(set(sizes)) > 2
    assert all(4 <= size <= 64 for size in sizes)
    parsed = Augmentation.parse({"batch_size": [1, 2]}, "a")
    assert {parsed.with_batch_size("digits", {"n": n})["batch_size"] for n in range(50)} == {1, 2}


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_statistics_of_batch_norm_pass_through(norm: str) -> None:
    model = {"name": "resnet8", "width": 4, "norm": norm}
    options = {"init": "random", "model": model, "batch_size": 8}
    task = make_task("digits", {**options, "augment": {"reparametrise": 1.0}})
    base = make_task("digits", options)
    phi, stats = task.init(task.data, jnp.int32(task.pools["meta_train"][2]))
    theta, base_stats = base.init(base.data, jnp.int32(base.pools["meta_train"][2]))
    batch = task.batch(task.data, jax.random.key(0))
    loss, aux = task.loss(phi, stats, batch, True)
    wanted, base_aux = base.loss(theta, base_stats, batch, True)
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    assert jax.tree.structure(aux.stats) == jax.tree.structure(stats)
    assert_equal(aux.stats["augment"], stats["augment"])
    for found, expected in zip(*map(jax.tree.leaves, (aux.stats["model"], base_aux.stats)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_samples_come_from_the_copies_of_a_pool_of_pretrained_inits() -> None:
    base = make_task("digits", {"model": {"name": "mlp", "hidden": [4]}, "pretrain_steps": [1, 2]})
    task = augmented(base, Augmentation(reparametrise=1.0))
    pool = task.pools["meta_train"]
    assert len(pool) > 1000 > len(base.pools["meta_train"])
    assert pool[len(pool) - 1] < 2**31
    assert pool[-1] == pool[len(pool) - 1]
    drawn = {int(sample(task, jax.random.key(n)).init) for n in range(30)}
    assert len(drawn) > 25
    assert {n % 16 for n in drawn} <= set(base.pools["meta_train"])


def test_no_augmentation_is_the_plain_task(plain: Task) -> None:
    for none in (None, {}):
        task = make_task("digits", {**SMALL, "augment": none})
        assert task.name == plain.name
        assert task.pools == plain.pools
        assert_equal(*(t.init(t.data, jnp.int32(0)) for t in (task, plain)))


@pytest.mark.parametrize(
    ("augmentation", "facts"),
    [
        ({"scale": 1}, ["task.augment.scale", "reparametrise", "label_noise", "batch_size"]),
        (True, ["task.augment", "True", "mapping"]),
        ({"reparametrise": -1}, ["task.augment.reparametrise", "-1", "0 to 10"]),
        ({"reparametrise": "x"}, ["task.augment.reparametrise", "'x'"]),
        ({"reparametrise": None}, ["task.augment.reparametrise", "None"]),
        ({"input_scale": float("nan")}, ["task.augment.input_scale", "nan"]),
        ({"label_noise": 1}, ["task.augment.label_noise", "1", "0.99"]),
        ({"label_noise": True}, ["task.augment.label_noise", "True"]),
        ({"held_out": 1}, ["task.augment.held_out", "1"]),
        ({"batch_size": 16}, ["task.augment.batch_size", "16"]),
        ({"batch_size": [64, 16]}, ["task.augment.batch_size", "[64, 16]"]),
        ({"batch_size": [4, 1.5]}, ["task.augment.batch_size", "1.5"]),
    ],
)
def test_bad_input_is_one_sentence(augmentation: object, facts: list[str]) -> None:
    with pytest.raises(TaskError) as error:
        make_task("digits", {**SMALL, "augment": augmentation})
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)


def test_tasks_that_cannot_be_augmented_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.txt").write_text("abcdefgh" * 100)
    text = {"source": {"file": str(tmp_path / "t.txt")}, "context": 4, "batch_size": 2,
            "model": {"n_layer": 1, "n_head": 1, "width": 4}}  # fmt: skip
    for augmentation, fact in (({"label_noise": 0.1}, "'label'"), ({"input_scale": 1.0}, "'image'")):
        with pytest.raises(TaskError, match=fact):
            make_task("text", {**text, "augment": augmentation})
    task = make_task("text", {**text, "augment": {"reparametrise": 1.0}})
    params, stats = jax.jit(task.init)(task.data, jnp.int32(task.pools["meta_train"][0]))
    batch = jax.jit(task.batch)(task.data, jax.random.key(0))
    loss, _ = jax.jit(task.loss, static_argnums=3)(params, stats, batch, True)
    assert float(loss) == pytest.approx(np.log(8), abs=0.1)
    with pytest.raises(TaskError, match=r"batch_size.*quadratic"):
        make_task("tests.metatrain.quadratic:regression", {"augment": {"batch_size": [1, 2]}})
