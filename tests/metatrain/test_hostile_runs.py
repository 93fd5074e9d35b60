"""Run folders made by another user: no code is imported unless asked for, no link is followed, no stated size is
trusted."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import l3rs
from metatrain.config import UserError, load_config
from metatrain.describe import describe
from metatrain.outer import loop
from metatrain.outer.export import export
from metatrain.outer.status import local_snapshot
from metatrain.report import live
from metatrain.trust import require_trust
from tests.metatrain.common import REGRESSION, small_config

Damage = Callable[[Path], None]
CASES: dict[str, Damage] = {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    loop.run(small_config(outer={"steps": 2}), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def case(damage: Damage) -> Damage:
    CASES[damage.__name__] = damage
    return damage


def replaced_by_a_link(name: str) -> None:
    def damage(run: Path) -> None:
        shutil.move(run / name, run.parent / "moved")
        (run / name).symlink_to(run.parent / "moved")

    CASES[f"a_link_for_{name}"] = damage


for file in ("metrics.jsonl", "config.yaml", "state", "optimizer.json", "state/2", "state/2/strategy/manifest.ocdbt"):
    replaced_by_a_link(file)


@case
def a_dangling_link(run: Path) -> None:
    (run / "tensorboard").symlink_to(run.parent / "outside")


@case
def a_pipe_for_the_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


@case
def a_pipe_for_the_form(run: Path) -> None:
    (run / "optimizer.json").unlink()
    os.mkfifo(run / "optimizer.json")


@case
def a_form_that_is_a_device(run: Path) -> None:
    (run / "optimizer.json").unlink()
    (run / "optimizer.json").symlink_to("/dev/zero")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("work", ["export", "resume", "report", "status"])
def test_links_and_pipes_are_refused(run: Path, tmp_path: Path, name: str, work: str) -> None:
    CASES[name](run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is a link or not a regular file"):
        {
            "export": lambda: export(run, tmp_path / "exported"),
            "resume": lambda: loop.resume(run),
            "report": lambda: live.write(run),
            "status": lambda: local_snapshot(run, str(run)).line(),
        }[work]()
    assert sorted(tmp_path.rglob("*")) == before


def change_form(run: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((run / "optimizer.json").read_text())
    change(data)
    (run / "optimizer.json").write_text(json.dumps(data))


FORMS: dict[str, Damage] = {
    "enormous_width": lambda run: change_form(run, lambda form: form["spec"].update(hidden=[10**9])),
    "enormous_layers": lambda run: change_form(run, lambda form: form["spec"].update(hidden=[60_000, 60_000])),
    "a_million_layers": lambda run: change_form(run, lambda form: form["spec"].update(hidden=[1] * 1_000_000)),
    "another_width": lambda run: change_form(run, lambda form: form["spec"].update(hidden=[5])),
    "no_spec": lambda run: change_form(run, lambda form: form.pop("spec")),
    "a_task_that_is_a_list": lambda run: change_form(run, lambda form: form.update(task=[])),
    "deep": lambda run: void((run / "optimizer.json").write_text("[" * 100_000)),
    "a_list": lambda run: void((run / "optimizer.json").write_text("[]")),
    "ten_gigabytes": lambda run: os.truncate(run / "optimizer.json", 10 << 30),
    "missing": lambda run: (run / "optimizer.json").unlink(),
    "a_config_of_ten_gigabytes": lambda run: os.truncate(run / "config.yaml", 10 << 30),
    "a_large_file_in_the_state": lambda run: large_state(run),
    "many_files_in_the_state": lambda run: many_files(run),
}


def void(_: object) -> None:
    pass


def many_files(run: Path) -> None:
    for step in (run / "state").iterdir():
        for i in range(300):
            (step / str(i)).touch()


def large_state(run: Path) -> None:
    for step in (run / "state").iterdir():
        (step / "large").touch()
        os.truncate(step / "large", 10 << 30)


@pytest.mark.parametrize("name", FORMS)
def test_an_export_trusts_no_stated_size(run: Path, tmp_path: Path, name: str) -> None:
    FORMS[name](run)
    start = time.monotonic()
    with pytest.raises((UserError, l3rs.L3RSError)) as error:
        export(run, tmp_path / "exported")
    assert "\n" not in str(error.value)
    assert str(run) in str(error.value)
    assert len(str(error.value)) < 1000
    assert time.monotonic() - start < 30  # most of it is JAX's compilation
    assert not (tmp_path / "exported").exists()


def test_a_state_that_states_enormous_arrays(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    import tensorstore

    for step in (run / "state").iterdir():
        folder = step / "strategy"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
        for key in store.list().result():
            if key.endswith(b".zarray"):
                array = {**json.loads(store.read(key).result().value), "shape": [2**20, 2**20]}
                store.write(key, json.dumps(array).encode()).result()
    with pytest.raises(UserError, match="none of the 2 checkpoints can be read"):
        export(run, run.parent / "exported")
    assert "[1048576, 1048576]" in caplog.text


@pytest.fixture
def evil(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run names code that leaves a mark when it is imported."""
    (tmp_path / "evil_task.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.delitem(sys.modules, "evil_task", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (run / "config.yaml").read_text()
    assert REGRESSION in text
    (run / "config.yaml").write_text(text.replace(REGRESSION, "evil_task:make"))
    return run


def test_export_report_status_and_inspect_import_no_task(evil: Path, tmp_path: Path) -> None:
    export(evil, tmp_path / "exported")
    assert l3rs.info(tmp_path / "exported")["info"]["task"] == "regression"
    live.write(evil, going=False)
    assert "finished" in local_snapshot(evil, "it").line()
    assert list(describe(str(tmp_path / "exported")))
    assert "evil_task" not in sys.modules
    assert not (tmp_path / "mark").exists()


def of_another_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(file, 4711, 4711)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4711)


@pytest.mark.parametrize("owned", ["run", "config.yaml", "url"])
def test_a_task_in_the_run_of_another_user_is_imported_only_on_request(
    evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: str
) -> None:
    pytest.importorskip("pwd", reason="files have no owners here")
    where: Path | str = evil
    if owned == "url":
        from metatrain.outer.store import Store

        Store((tmp_path / "store").as_uri()).push(evil)
        where = (tmp_path / "store").as_uri()
    else:
        of_another_user(evil if owned == "run" else evil / "config.yaml", monkeypatch)
    with pytest.raises(UserError) as error:
        loop.resume(where)
    for fact in (str(where), "evil_task:make", "--trust-task"):
        assert fact in str(error.value)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(ValueError, match="evil_task has no function 'make'"):  # it is imported now
        loop.resume(where, trust_task=True)
    assert (tmp_path / "mark").exists()


def test_whose_code_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "name: x\ntask: {name: digits, variants: [{name: 'a.b:c'}]}\n"
        "evaluation: {settings: {A: {name: 'd:e'}}, baselines: [adam, 'f:g', {name: 'h:i'}]}\n"
    )
    config = load_config(file)
    assert config.own_code() == ["a.b:c", "d:e", "f:g", "h:i"]
    require_trust(config, [file], "it")
    with pytest.raises(UserError, match=r"a\.b:c, d:e, f:g, h:i"):
        require_trust(config, None, "it")
    named = load_config(file, ["task.name=m:n", "task.variants=[]"])
    with pytest.raises(UserError, match=r"import d:e, f:g, h:i;"):
        require_trust(named, None, "it", ["task.name=m:n"])
    of_another_user(file, monkeypatch)
    with pytest.raises(UserError, match="belongs to another user"):
        require_trust(config, [file], "it")
