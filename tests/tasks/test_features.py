"""The task `features`: its files, its splits, and the optimum of the convex head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks import Task, TaskError, make_task
from tasks.base import SPLITS
from tasks.features import optimum


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "cache"))


def examples(n: int = 100, width: int = 5, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(first)
    return rng.standard_normal((n, width)).astype(np.float32), np.arange(n) % 3


def losses(task: Task, params: object) -> tuple[float, float]:
    return tuple(float(task.loss(params, {}, task.data[split], False)[0]) for split in ("inner_train", "test"))


def test_random_features_have_the_width_and_the_scale_asked_for() -> None:
    for scale in (1.0, 0.3):
        task = make_task("features", {"width": 300, "input_scale": scale})
        x = np.asarray(task.data["inner_train"]["x"])
        assert x.shape == (2000, 300)
        assert x.dtype == np.float32
        assert np.sqrt(np.mean(x**2)) == pytest.approx(scale, rel=1e-4)
        assert x.min() == 0
    assert isinstance(make_task("features", {"width": 300}).data["test"]["x"], np.memmap)


def test_a_zero_head_starts_at_the_loss_of_chance_and_a_default_one_depends_on_its_init() -> None:
    task = make_task("features", {"width": 64})
    params, _ = task.init(task.data, jnp.int32(3))
    assert jax.tree.map(jnp.shape, params) == {"head": {"bias": (10,), "kernel": (64, 10)}}
    assert losses(task, params)[1] == pytest.approx(np.log(10), rel=1e-5)
    default = make_task("features", {"width": 64, "head_init": "default"})
    one, two = (default.init(default.data, jnp.int32(i))[0]["head"]["kernel"] for i in (0, 1))
    assert float(jnp.std(one)) == pytest.approx(1 / 8, rel=0.2)
    assert not np.array_equal(one, two)
    hidden = make_task("features", {"width": 64, "hidden": 7})
    assert jax.tree.map(jnp.shape, hidden.init(hidden.data, jnp.int32(0))[0])["hidden"]["kernel"] == (64, 7)


def test_the_optimum_is_that_of_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    task = make_task("features", {"width": 64})
    l2 = 1e-3
    params = optimum(task, l2)
    train = task.data["inner_train"]
    # The penalty of scikit-learn is on the kernel alone: its bias is compared through the constant feature 1.
    x = np.concatenate([train["x"], np.ones((len(train["x"]), 1), np.float32)], axis=1)
    model = LogisticRegression(C=1 / (l2 * len(x)), fit_intercept=False, max_iter=2000, tol=1e-6)
    model.fit(x, train["label"])
    np.testing.assert_allclose(params["head"]["kernel"], model.coef_[:, :-1].T, atol=2e-2)
    np.testing.assert_allclose(params["head"]["bias"], model.coef_[:, -1], atol=2e-2)
    assert losses(task, params)[0] < 0.5
    with pytest.raises(TaskError, match=r"task\.hidden"):
        optimum(make_task("features", {"width": 64, "hidden": 3}))


def test_there_is_no_optimum_with_a_hidden_layer() -> None:
    with pytest.raises(TaskError, match=r"task\.hidden .* 0"):
        optimum(make_task("features", {"width": 16, "hidden": 4}))


def test_a_file_is_split_or_keeps_its_splits(tmp_path: Path) -> None:
    x, y = examples()
    np.savez(tmp_path / "all.npz", x=x, y=y)
    task = make_task("features", {"file": str(tmp_path / "all.npz"), "batch_size": 8})
    assert [len(task.data[split]["label"]) for split in SPLITS] == [40, 10, 20, 30]
    rows = {row.tobytes(): label for row, label in zip(x, y, strict=True)}
    for split in SPLITS:
        for row, label in zip(task.data[split]["x"], task.data[split]["label"], strict=True):
            assert rows.pop(row.tobytes()) == label  # no example is in two splits
    test_x, test_y = examples(30, first=1)
    save_file({"train/x": x, "train/y": y, "test/x": test_x, "test/y": test_y}, tmp_path / "f.safetensors")
    task = make_task("features", {"file": str(tmp_path / "f.safetensors"), "batch_size": 8, "input_scale": 2.0})
    assert [len(task.data[split]["label"]) for split in SPLITS] == [70, 10, 20, 30]
    np.testing.assert_array_equal(task.data["test"]["x"], 2 * test_x)
    four = {f"{split}/{field}": array for i, split in enumerate(SPLITS)
            for field, array in zip("xy", examples(9 + i, first=i), strict=True)}  # fmt: skip
    np.savez(tmp_path / "four.npz", **four)
    task = make_task("features", {"file": str(tmp_path / "four.npz"), "batch_size": 8})
    for split in SPLITS:
        np.testing.assert_array_equal(task.data[split]["label"], four[f"{split}/y"])


def widths(parts: Sequence[str]) -> dict[str, np.ndarray]:
    """Parts of 3, 4, … features."""
    pairs = {part: examples(12, 3 + i) for i, part in enumerate(parts)}
    return {f"{part}/{field}": array for part, pair in pairs.items() for field, array in zip("xy", pair, strict=True)}


def pickled(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=np.zeros(1, int))


@pytest.mark.parametrize(
    ("write", "fact"),
    [
        (lambda _: None, "does not exist"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.write_bytes(b"PK no archive"), "not a readable"),
        (pickled, "not a readable"),
        (lambda path: np.savez(path, x=examples()[0]), "train/x"),
        (lambda path: np.savez(path, x=examples()[0][0], y=examples()[1]), "[5]"),
        (lambda path: np.savez(path, x=examples()[0], y=examples()[1][:-1]), "[99]"),
        (lambda path: np.savez(path, x=examples()[0], y=examples()[0][:, 0]), "float32"),
        (lambda path: np.savez(path, x=examples()[0] * np.nan, y=examples()[1]), "finite"),
        (lambda path: np.savez(path, x=examples()[0], y=examples()[1] - 1), "from 0"),
        (lambda path: np.savez(path, **widths(["train", "test"])), "widths: 3, 4"),
        (lambda path: np.savez(path, **widths(SPLITS)), "widths: 3, 4, 5, 6"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, write: object, fact: str) -> None:
    write(tmp_path / "f.npz")
    with pytest.raises(TaskError) as error:
        make_task("features", {"file": str(tmp_path / "f.npz")})
    assert str(tmp_path / "f.npz") in str(error.value)
    assert fact in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"width": 0}, ["task.width", "0"]),
        ({"width": 10**9}, ["task.width", "16384"]),
        ({"hidden": -1}, ["task.hidden", "-1"]),
        ({"batch_size": 1.5}, ["task.batch_size", "1.5"]),
        ({"batch_size": 5000}, ["task.batch_size", "5000", "2000"]),
        ({"input_scale": 0}, ["task.input_scale", "0"]),
        ({"input_scale": "x"}, ["features", "input_scale"]),
        ({"source": "svhn"}, ["task.source", "'svhn'", "mnist, uci"]),
        ({"head_init": "ones"}, ["task.head_init", "'ones'", "zero, default"]),
    ],
)
def test_bad_input_is_one_sentence(options: dict, facts: list[str]) -> None:
    with pytest.raises(TaskError) as error:
        make_task("features", {"width": 16, **options})
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "y", "fact"),
    [
        (np.full((60, 2), 1e300), np.arange(60) % 3, "also in float32"),
        (np.ones((60, 0), np.float32), np.arange(60) % 3, "[60, 0]"),
        (np.ones((60, 2), np.float32), np.arange(60) * 2000, "0 to 65535"),
        (np.ones((60, 2), np.float32), np.arange(60) - 1, "0 to 65535"),
        (np.ones((60, 2), np.float32), np.arange(60).astype("datetime64[s]"), "datetime64"),
    ],
    ids=["beyond float32", "no width", "many classes", "negative", "times"],
)
def test_values_that_are_refused(x: np.ndarray, y: np.ndarray, fact: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(TaskError) as error:
        make_task("features", {"file": str(tmp_path / "a.npz")})
    assert fact in str(error.value)


@pytest.mark.parametrize("kind", ["text", "empty", "large", "pipe"])
def test_files_that_are_no_archive_are_not_read(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_text("x = 1" if kind == "text" else "")
        os.truncate(file, 1 << 40 if kind == "large" else file.stat().st_size)
    with pytest.raises(TaskError, match=r"a\.npz (is not a readable \.npz|does not exist or is not a regular)"):
        make_task("features", {"file": str(file)})
