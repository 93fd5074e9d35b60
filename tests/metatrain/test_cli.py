"""The command line: exit codes, one sentence, nothing overwritten; where it matters in a process of its own."""

from __future__ import annotations

import functools
import importlib.metadata
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import l3rs
from metatrain.config import dump_config
from tests.metatrain.commands import COMMAND, ENVIRONMENT, ROOT, metatrain, metatrain_process, refused
from tests.metatrain.common import PATIENCE, small_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(dump_config(small_config()))
    return file


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = metatrain_process("run", config, "outer.steps=3", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "generation 3/3" in done.stdout  # plain lines without a terminal
    assert "\x1b" not in done.stdout
    assert f"the optimizer is in {folder}/optimizer" in done.stdout
    return folder


def test_submit_needs_an_absolute_path_or_a_url(config: Path) -> None:
    sentence = refused(metatrain("submit", config, "--out", "runs/x"))
    assert sentence.startswith("metatrain: --out is runs/x;")
    assert "absolute path or a URL" in sentence


def test_inspect_and_export(finished: Path, tmp_path: Path) -> None:
    done = metatrain("inspect", finished / "optimizer")
    assert done.returncode == 0
    for words in ("meta-parameters", "adam, sgd", "task: regression", "w  [4]"):
        assert words in done.stdout
    assert "fits any network" in metatrain("inspect", "universal").stdout
    assert metatrain("export", finished, tmp_path / "x").returncode == 0
    assert (tmp_path / "x" / "l3rs.json").is_file()


def test_evaluate_prints_a_table_and_where_the_page_is(finished: Path, config: Path, tmp_path: Path) -> None:
    words = ("evaluate", finished / "optimizer", config, "--horizons", "1,8", "--seeds", "2", "--out", tmp_path / "e")
    done = metatrain(*words)
    assert done.returncode == 0, done.stderr
    assert "adam/cosine" in done.stdout
    assert f"report: {tmp_path / 'e' / 'report.html'}" in done.stdout
    assert (tmp_path / "e" / "horizons-loss.png").read_bytes().startswith(b"\x89PNG")
    assert "exists; choose another folder" in refused(metatrain(*words))
    (tmp_path / "e" / "report.html").unlink()
    assert metatrain("report", tmp_path / "e").returncode == 0
    assert (tmp_path / "e" / "report.html").is_file()


def test_baselines_alone(config: Path, tmp_path: Path) -> None:
    done = metatrain(
        "evaluate", "-", config, "--horizons", "4", "--seeds", "2", "--baselines", "sgd", "--out", tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    assert "sgd/cosine" in done.stdout
    assert "l3rs" not in done.stdout.lower()
    assert "Warning" not in done.stderr
    assert "baselines alone" in refused(metatrain("report", tmp_path / "b"))


def test_a_run_has_a_page(finished: Path, tmp_path: Path) -> None:
    assert "finished" in (finished / "report.html").read_text()
    done = metatrain("report", finished)
    assert done.stdout.strip() == f"report: {finished / 'report.html'}"
    assert "neither an evaluation" in refused(metatrain("report", tmp_path))


def test_help_and_version_import_nothing_heavy() -> None:
    """`--help` must take less than a second, and importing JAX alone may take longer."""
    code = """
import contextlib, sys
from metatrain import cli
for words in (["--help"], ["--version"], ["run", "--help"]):
    sys.argv = ["metatrain", *words]
    with contextlib.suppress(SystemExit):
        cli.main()
heavy = ("jax", "numpy", "omegaconf", "ray", "matplotlib", "tasks", "l3rs")
print(sorted(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"l3rs {importlib.metadata.version('l3rs')}" in done.stdout
    assert "Configuration, a YAML file" in done.stdout
    assert "runs/NAME" in done.stdout  # brackets in a help text are not taken for markup


def test_without_its_packages_the_command_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; import metatrain.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'l3rs[metatrain]'" in done.stderr


def test_commands_that_only_look_at_a_run_do_without_jax(config: Path, tmp_path: Path) -> None:
    """`status` of a folder, and commands that ask a cluster, up to its answer."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.read_text())
    code = f"""
import contextlib, sys
from metatrain import cli
from metatrain.ray import jobs
jobs.client = lambda *_: sys.exit(print("asks the cluster"))
asking = (["list"], ["status", "a"], ["logs", "a"], ["stop", "a"], ["submit", {str(config)!r}])
for words in (["status", {str(folder)!r}], *asking):
    sys.argv = ["metatrain", *words]
    with contextlib.suppress(SystemExit):
        cli.main()
heavy = ("jax", "jaxlib", "optax", "flax", "evosax", "ray", "tasks", "torch", "matplotlib")
print(sorted(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing computed yet" in done.stdout
    assert done.stdout.count("asks the cluster") == 5
    assert done.stdout.splitlines()[-1] == "[]"


def test_files_beside_the_configuration_replace_no_package(config: Path, tmp_path: Path) -> None:
    """The current folder comes behind installed packages, and only if a task of the user's own is named."""
    for name in ("tasks", "l3rs", "typer", "fsspec", "logging", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file beside the configuration was executed')\n")
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "metatrain" / "quadratic.py").read_text())

    metatrain_here = functools.partial(metatrain_process, folder=tmp_path)
    assert metatrain_here("list-tasks").returncode == 0
    done = metatrain_here("run", config, "task.name=mine:regression", "outer.steps=1", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert metatrain_here("export", "run", "optimizer").returncode == 0
    assert "mine" in refused(metatrain_here("run", config, "task.name=mine:missing", "--out", "other"))


def test_list_tasks() -> None:
    done = metatrain("list-tasks")
    assert done.returncode == 0
    assert "digits" in done.stdout
    assert "batch_size" in done.stdout


def test_refusals(finished: Path, config: Path, tmp_path: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert "resume it with" in refused(metatrain("run", config, "--out", finished))
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert "no such file" in refused(metatrain("run", tmp_path / "none.yaml"))
    assert "outer.sigmma" in refused(metatrain("run", config, "outer.sigmma=1"))
    assert "unknown task 'digitz'" in refused(metatrain("run", config, "task.name=digitz"))
    assert refused(metatrain("run", config, "task.name=mine.py")).endswith("for a function of that file mine:FUNCTION")
    assert "task.colour is not an option" in refused(metatrain("run", config, "task.colour=red"))
    assert "is empty" in refused(metatrain("run", config, "task.examples=0", "--out", tmp_path / "r"))
    assert "not a run" in refused(metatrain("resume", tmp_path))
    assert "not an L3RS checkpoint" in refused(metatrain("inspect", tmp_path))
    assert "--horizons" in refused(metatrain("evaluate", finished / "optimizer", config, "--horizons", "ten"))
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sentence = refused(metatrain("run", config, "--out", tmp_path / "file" / "run"))
    assert "cannot be written" in sentence
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_destination_is_checked_before_anything_is_computed(finished: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "e" / "report.html").mkdir(parents=True)
    for words in (
        ("evaluate", finished / "optimizer", config, "--out", tmp_path / "file"),
        ("evaluate", finished / "optimizer", config, "--out", tmp_path / "file" / "e"),
        ("evaluate", finished / "optimizer", config, "--out", tmp_path / "e"),
        ("export", finished, tmp_path / "file" / "x"),
        ("report", tmp_path / "e"),
    ):
        done = metatrain(*words)
        assert "cannot be written" in refused(done)
        assert not done.stdout
    sentence = refused(metatrain("export", finished, tmp_path / "e"))
    assert "exists; choose another folder" in sentence
    assert "overwrite" not in sentence  # export has no such option


def test_status_of_a_folder_needs_no_cluster(finished: Path, tmp_path: Path) -> None:
    done = metatrain("status", finished)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{finished}: finished, generation 3/3, meta-loss ")
    assert "left" not in done.stdout
    assert "not a run" in refused(metatrain("status", tmp_path))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_reported_and_what_was_saved_is_kept(config: Path, tiny_disk: Path) -> None:
    folder = tiny_disk / "run"
    done = metatrain_process("run", config, "outer.steps=500", "checkpoint.keep=1000", "--out", folder)
    assert done.returncode == 3, done.stderr
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    saved = max(int(p.name) for p in (folder / "state").iterdir() if p.name.isdigit())
    subprocess.run(["mount", "-o", "remount,size=20m", tiny_disk], check=True)
    assert metatrain("export", folder, tiny_disk / "optimizer").returncode == 0
    assert l3rs.info(tiny_disk / "optimizer")["info"]["generations"] == saved >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_resume(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    """There is a checkpoint in every generation: the signal is likely to arrive while one is being written."""
    folder = tmp_path / "run"
    words = ["run", str(config), "outer.steps=100000", "task.seconds=0.02", "--out", str(folder)]
    process = subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_metrics(folder, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"resume with: metatrain resume {folder}" in out
    assert "Traceback" not in err
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert f"stopped after {done} of 100000 generations" in out
    assert str(done) in {p.name for p in (folder / "state").iterdir()}


def wait_for_metrics(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the run has finished a generation."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise TimeoutError("no generation")


def test_prepare_and_pretrain_go_through_variants_and_settings(tmp_path: Path) -> None:
    texts = [tmp_path / f"{name}.txt" for name in "abc"]
    for text in texts:
        text.write_text("to be or not to be " * 40)
    config = tmp_path / "texts.yaml"
    source = "source: {{tfds: null, file: {}}}"
    config.write_text(
        "name: texts\n"
        "task:\n  name: text\n"
        "  variants:\n" + "".join(f"    - {{{source.format(text)}}}\n" for text in texts[:2]) + ""
        f"evaluation:\n  settings:\n    A: {{}}\n    C: {{{source.format(texts[2])}}}\n"
    )
    done = metatrain("prepare", config, f"task.source.file={texts[0]}", "task.source.tfds=null")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(text) for text in texts]  # A is the setting of meta-training, and named once

    config.write_text(
        "name: digits\ntask:\n  name: digits\n  starts: [random]\n  variants: [{target: mnist}, {target: uci}]\n"
    )
    done = metatrain("pretrain", config)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_inspect_shows_how_the_layers_of_a_network_are_matched(finished: Path, config: Path, tmp_path: Path) -> None:
    done = metatrain("inspect", finished / "optimizer", "--network", config)
    assert done.returncode == 0, done.stderr
    assert "w  [4]  ← w" in done.stdout
    variants = tmp_path / "variants.yaml"  # of one name: both are shown
    variants.write_text("name: x\ntask: {name: digits, init: random, variants: [{model: mlp}, {model: cnn}]}\n")
    assert (
        metatrain("inspect", "universal", "--network", variants).stdout.count("digits(random → mnist) ← universal") == 2
    )

    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from safetensors.torch import save_file

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 5))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    done = metatrain("inspect", "universal", "--network", tmp_path / "model.safetensors")
    assert done.returncode == 0, done.stderr
    assert "0.weight  [8, 3, 3, 3]  ← descriptor" in done.stdout
    assert "running_mean" not in done.stdout

    # Sorted naturally: in the file, "10.weight" is before "2.weight". Only what is trained is a layer.
    wide = torch.nn.ModuleDict({"dense": torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(12)])})
    save_file({**wide.state_dict(), "position_ids": torch.arange(3)}, tmp_path / "wide.safetensors")
    layers = {f"dense_{i}": {"kernel": np.zeros((4, 4)), "bias": np.zeros(4)} for i in range(12)}
    spec = l3rs.Spec.create(layers)
    l3rs.save(tmp_path / "table", l3rs.init_meta_params(jax.random.key(0), spec), spec)
    done = metatrain("inspect", tmp_path / "table", "--network", tmp_path / "wide.safetensors", "--match", "auto")
    assert done.returncode == 0, done.stderr
    shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for i in range(12):
        assert f"dense.{i}.weight [4, 4] ← dense_{i}/kernel" in shown
    assert "position_ids" not in done.stdout

    table = tmp_path / "model.safetensors"
    assert "layer '0.weight' (8, 3, 3, 3) is not a layer that" in refused(
        metatrain("inspect", "digits-mlp", "--network", table, "--match", "path")
    )
    done = metatrain("inspect", "digits-mlp", "--network", table, "--on-unknown", "mean")
    assert done.stdout.count("← mean") == 6
    assert "no such file" in refused(metatrain("inspect", "universal", "--network", "none.safetensors"))
    assert "NETWORK=CHECKPOINT" in refused(metatrain("inspect", "universal", "--network", table, "--rename", "fc"))
