"""The task `text`: the content of its windows, and that the GPT reads only the past."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tasks import TaskError, make_task, prepare_task
from tasks.base import SPLITS, Task
from tasks.data.text import FRACTIONS, TextSource
from tasks.models.gpt import gpt

SHARED = Path(os.environ.get("L3RS_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data" / "text"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no real text: $L3RS_SHARED/data/text is not there")
CONTEXT = 8
SMALL = {"model": {"n_layer": 1, "n_head": 2, "width": 16}, "context": CONTEXT, "batch_size": 4}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "cache"))


def story(length: int = 2000) -> str:
    """Characters whose order is their number; the é takes two bytes."""
    return "".join("abcdefghijklmnopqrsé"[i % 20] for i in range(length))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(story())
    return path


def text(file: Path, **options: object) -> Task:
    return make_task("text", {"source": {"file": str(file)}, **SMALL, **options})


def test_windows_tile_blocks_and_no_character_is_in_two_splits(file: Path) -> None:
    numbers = np.unique(list(story()), return_inverse=True)[1]
    start = 0
    for split, windows in ((name, text(file, evaluation_windows=0).data[name]["text"]) for name in SPLITS):
        end = start + round(FRACTIONS[split] * len(numbers))
        count = (end - start - 1) // CONTEXT
        assert windows.shape == (count, CONTEXT + 1)
        assert windows.dtype == np.uint8
        flat = np.concatenate([windows[:, :-1].ravel(), windows[-1, -1:]])
        np.testing.assert_array_equal(flat, numbers[start : start + count * CONTEXT + 1])
        np.testing.assert_array_equal(windows[:-1, -1], windows[1:, 0])
        start = end
    assert start == len(numbers)


def test_batches_come_from_anywhere_in_inner_train(tmp_path: Path) -> None:
    # Every pair of neighbours occurs once, so the beginning of a window shows its position in the text.
    letters = [chr(0x4E00 + i) for i in range(200)]
    path = tmp_path / "pairs.txt"
    path.write_text("".join(letters))
    task = text(path, context=3, batch_size=64)
    windows = np.asarray(task.data["inner_train"]["text"])
    block = np.concatenate([windows[:, :-1].ravel(), windows[-1, -1:]])
    draw, firsts = jax.jit(task.batch), set()
    for i in range(40):
        batch = np.asarray(draw(task.data, jax.random.key(i))["text"])
        assert batch.shape == (64, 4)
        for row in batch:
            first = int(np.flatnonzero(block == row[0])[0])
            np.testing.assert_array_equal(row, block[first : first + 4])
            firsts.add(first)
    assert firsts == set(range(len(block) - 3))  # all possible ones, also the first and the last


def test_evaluation_windows_are_evenly_spread(file: Path) -> None:
    task, whole = text(file, evaluation_windows=4), text(file, evaluation_windows=0)
    for split in ("inner_valid", "outer_valid", "test"):
        every = whole.data[split]["text"]
        rows = np.linspace(0, len(every) - 1, 4).round().astype(int)
        np.testing.assert_array_equal(task.data[split]["text"], every[rows])
    assert len(task.data["inner_train"]["text"]) == len(whole.data["inner_train"]["text"])


def test_the_gpt_reads_only_the_past() -> None:
    model = gpt(20, CONTEXT, n_layer=2, n_head=2, width=16)
    params, stats = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, CONTEXT), 0, 20)
    logits, _ = model.apply(params, stats, tokens, True)
    assert logits.shape == (3, CONTEXT, 20)
    for position in range(CONTEXT):
        changed, _ = model.apply(params, stats, tokens.at[:, position].add(1) % 20, True)
        np.testing.assert_array_equal(changed[:, :position], logits[:, :position])
        assert not np.allclose(changed[:, position], logits[:, position])
    short, _ = model.apply(params, stats, tokens[:, :3], True)
    np.testing.assert_allclose(short, logits[:, :3], rtol=1e-5, atol=1e-6)


def test_a_step_has_no_scatter_and_no_convolution(file: Path) -> None:
    """There are only matrix products, which are fast in compiled loops on a CPU."""
    task = text(file)
    params, stats = task.init(task.data, jnp.int32(0))
    batch = jax.tree.map(lambda x: x[:4], task.data["test"])
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: task.loss(p, stats, batch, True)[0]))(params))
    assert "scatter" not in jaxpr
    assert "conv_general_dilated" not in jaxpr


def test_loss_and_accuracy(file: Path) -> None:
    task = text(file)
    params, stats = task.init(task.data, jnp.int32(0))
    batch = {"text": task.data["test"]["text"][:5]}
    loss, aux = task.loss(params, stats, batch, False)
    assert float(loss) == pytest.approx(math.log(20), abs=0.1)  # untrained: any of 20 characters
    tx = optax.adam(0.01)
    data = jax.tree.map(jnp.asarray, task.data)

    @jax.jit
    def step(params: dict, state: tuple, i: jax.Array) -> tuple:
        batch = task.batch(data, jax.random.fold_in(jax.random.key(0), i))
        updates, state = tx.update(jax.grad(lambda p: task.loss(p, stats, batch, True)[0])(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(150):
        params, state = step(params, state, i)
    loss, aux = task.loss(params, stats, batch, False)
    assert float(loss) < 0.5  # what follows a character is certain
    assert float(aux.accuracy) > 0.9


def test_inits_differ_and_pools_do_not_meet(file: Path) -> None:
    task = text(file)
    one, two = (task.init(task.data, jnp.int32(i))[0]["head"]["kernel"] for i in (0, 1))
    assert not np.array_equal(one, two)
    assert not set(task.pools["meta_train"]) & set(task.pools["held_out"])


OTHER = "xyzab"  # of these characters the story has two


def test_a_network_pretrained_on_another_text_knows_it(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(OTHER * 400)
    task = text(file, init={"file": str(other)}, pretrain_steps=150, inits=1, held_out_inits=1)
    assert task.params_shape()["head"]["kernel"].shape == (16, 23)  # the characters of both
    characters = sorted(set(story()) | set(OTHER))
    window = np.array([[characters.index(c) for c in (OTHER * 2)[: CONTEXT + 1]]] * 2, np.uint8)
    losses = []
    for i in task.pools["meta_train"], task.pools["held_out"]:
        loss, aux = task.loss(*task.init(task.data, jnp.int32(i[0])), {"text": window}, False)
        assert float(aux.accuracy) > 0.9
        losses.append(float(loss))
    assert max(losses) < 0.5
    assert losses[0] != losses[1]


def test_pretrained_networks_are_kept(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(OTHER * 100)
    options = {"init": {"file": str(other)}, "pretrain_steps": 2, "inits": 2, "held_out_inits": 1}

    def kept(**changes: object) -> object:
        return jax.tree.leaves(text(file, **(options | changes)).data["inits"])[0].filename

    task = text(file, **options)
    assert task.name == "gpt(other → story)"
    assert task.pools == {"meta_train": range(2), "held_out": range(2, 3)}
    file.write_text(story(1900))  # of the text to come, only the characters count
    assert kept() == jax.tree.leaves(task.data["inits"])[0].filename == kept(model=SMALL["model"])
    before = kept()
    assert kept(pretrain_steps=3) != before
    other.write_text(OTHER[::-1] * 100)
    assert kept() != before


def test_pretraining_reads_inner_train_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def pretrain(*given: Any) -> object:
        _, _, data, seeds, *_ = given
        seen.append(data["inner_train"]["text"])
        return jax.vmap(lambda i: gpt(20, CONTEXT, **SMALL["model"]).init(jax.random.key(i)))(jnp.asarray(seeds))

    monkeypatch.setattr("tasks.text.pretrain", pretrain)
    task = text(file, init={"file": str(file)}, inits=1, held_out_inits=1)  # the text itself
    (windows,) = seen
    np.testing.assert_array_equal(windows, task.data["inner_train"]["text"])


def test_the_characters_of_both_texts_have_numbers(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(OTHER * 10)
    task = text(file, init={"file": str(other)}, pretrain_steps=1, inits=1, held_out_inits=1)
    numbers = {c: i for i, c in enumerate(sorted(set(story()) | set(OTHER)))}
    own = dict(enumerate(sorted(set(story()))))
    for split in SPLITS:
        expected = np.vectorize(lambda i: numbers[own[i]])(text(file).data[split]["text"])
        np.testing.assert_array_equal(task.data[split]["text"], expected)
    assert prepare_task("text", {"source": {"file": str(file)}, "init": {"file": str(other)}}) == [
        str(file),
        str(other),
    ]


def write_tfds(folder: Path, splits: dict[str, str], feature: str = "text") -> None:
    """A prepared TFDS text without TensorFlow: one record a split, as tiny_shakespeare has them."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({feature: tfds.features.Text()})
    name, infos = folder.parent.name, []
    for split, content in splits.items():
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        writer.write(features.serialize_example({feature: content}))
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"name": split, "filepathTemplate": template, "shardLengths": ["1"], "numBytes": "1"})
    features.save_config(folder)
    info = {"name": name, "version": folder.name, "fileFormat": "array_record", "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_a_tfds_text_is_joined_again(tmp_path: Path, file: Path) -> None:
    whole = story()
    write_tfds(
        tmp_path / "tfds" / "tiny_shakespeare" / "1.0.0",
        {"test": whole[1500:], "train": whole[:1000], "validation": whole[1000:1500]},
    )
    source = {"tfds": "tiny_shakespeare", "data_dir": str(tmp_path / "tfds")}
    task, same = make_task("text", {"source": source, **SMALL}), text(file)
    for split in SPLITS:
        np.testing.assert_array_equal(task.data[split]["text"], same.data[split]["text"])
    assert prepare_task("text", {"source": source}) == [str(tmp_path / "tfds" / "tiny_shakespeare" / "1.0.0")]
    write_tfds(tmp_path / "tfds" / "images" / "1.0.0", {"train": "x"}, "caption")
    with pytest.raises(TaskError, match="is not a text: its records have no feature 'text'"):
        make_task("text", {"source": {**source, "tfds": "images"}})


def test_a_text_is_split_once(file: Path) -> None:
    first = text(file).data["inner_train"]["text"]
    again = text(file).data["inner_train"]["text"]
    assert isinstance(first, np.memmap)
    assert first.filename == again.filename
    file.write_text(story(1900))
    assert text(file).data["inner_train"]["text"].filename != first.filename


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"source": {"file": "/none.txt"}}, "the text /none.txt cannot be read"),
        ({"source": {}}, "task.source needs exactly one of file and tfds, found none"),
        ({"source": {"file": "a", "tfds": "b"}}, "task.source needs exactly one of file and tfds"),
        ({"source": {"path": "a"}}, "task.source.path is not a key of a text; allowed are file, tfds, data_dir"),
        ({"source": "a.txt"}, "task.source is 'a.txt'; it must be"),
        ({"source": {"tfds": "tiny_shakespeare", "data_dir": "/none"}}, "is not prepared in /none"),
        ({"context": 0}, "task.context is 0; .*≥ 1"),
        ({"context": 300}, "story has 2000 characters.* 301 .*inner_valid"),
        ({"batch_size": 1.5}, "task.batch_size is 1.5"),
        ({"evaluation_windows": -1}, "task.evaluation_windows is -1"),
        ({"init": "mnist"}, "task.init is 'mnist'; it must be random, {file: PATH}"),
        ({"init": {"file": "/none.txt"}}, "the text /none.txt cannot be read"),
        ({"inits": 0}, "task.inits is 0; .*≥ 1"),
        ({"held_out_inits": 0}, "task.held_out_inits is 0; .*≥ 1"),
        ({"pretrain_steps": 0}, "task.pretrain_steps is 0; .*≥ 1"),
        ({"model": {"depth": 3}}, "task.model.depth is not an option of the GPT; allowed are n_layer, n_head, width"),
        ({"model": {"width": 15}}, "n_head is 4; it must divide width, which is 15"),
        ({"model": {"n_layer": 0}}, "n_layer is 0; .*≥ 1"),
    ],
)
def test_bad_input(file: Path, options: dict, sentence: str) -> None:
    with pytest.raises(TaskError, match=sentence):
        text(file, **options)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    with pytest.raises(TaskError, match=r"bytes\.txt is not UTF-8 \(invalid start byte at byte 3\)"):
        TextSource(file=str(tmp_path / "bytes.txt")).read()
    (tmp_path / "many.txt").write_text("".join(chr(0x4E00 + i) for i in range(300)))
    with pytest.raises(TaskError, match=r"many has 300 distinct characters.*256"):
        text(tmp_path / "many.txt")
    (tmp_path / "few.txt").write_text(story())
    with pytest.raises(TaskError, match=r"few and the text of task.init together have 320 distinct .*256"):
        text(tmp_path / "few.txt", init={"file": str(tmp_path / "many.txt")})
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(TaskError, match=r"task.init: short has 3 characters, too few for a window of 9"):
        text(tmp_path / "few.txt", init={"file": str(tmp_path / "short.txt")})


@needs_shared
def test_shakespeare() -> None:
    task = make_task("text", {"source": {"file": str(SHARED / "tinyshakespeare.txt")}, "context": 64})
    assert task.name == "gpt(tinyshakespeare)"
    assert task.params_shape()["head"]["kernel"].shape == (64, 65)
    assert task.data["inner_train"]["text"].shape == (13942, 65)
    # Its plays are not repeated: no window of test stands in inner_train.
    text = (SHARED / "tinyshakespeare.txt").read_text()
    characters = sorted(set(text))
    train = text[: round(0.8 * len(text))]
    found = ["".join(characters[i] for i in window) in train for window in task.data["test"]["text"]]
    assert not any(found)
