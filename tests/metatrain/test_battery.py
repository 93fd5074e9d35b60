"""Wrong input to every command, all in one process: exit code 2, one sentence, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain.config import Config
from tests.metatrain import commands
from tests.metatrain.commands import metatrain
from tests.metatrain.synthetic import full

GOOD = "name: x\ntask: {name: text, source: {file: text.txt, tfds: null}}\n"
CONFIG_COMMANDS = (["run"], ["evaluate", "-"], ["prepare"], ["pretrain"], ["estimate"], ["submit"])
FOLDER_COMMANDS = (["resume"], ["report"], ["status"], ["export"])
COMMANDS = (*(c[0] for c in (*CONFIG_COMMANDS, *FOLDER_COMMANDS)), "inspect", "list-tasks", "list", "logs", "stop")

Call = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of these tests, with wrong files in it."""
    folder = tmp_path_factory.mktemp("battery")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder").mkdir()
    (folder / "device").symlink_to("/dev/zero")
    (folder / "gone").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    os.truncate(folder / "large.yaml", 10 << 30)
    (folder / "linked").mkdir()
    (folder / "linked" / "config.yaml").symlink_to(folder / "good.yaml")
    (folder / "piped").mkdir()
    os.mkfifo(folder / "piped" / "results.json")
    os.mkfifo(folder / "piped" / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
            patch.delenv(variable, raising=False)
        yield folder


@pytest.fixture
def refused(place: Path) -> Call:
    """Run a command; returns the one sentence with which it is refused."""

    def refuse(*words: str) -> str:
        before = sorted(place.rglob("*"))
        sentence = commands.refused(metatrain(*words))
        assert sentence.startswith("metatrain: ")
        assert 20 < len(sentence) < 3000
        assert sorted(place.rglob("*")) == before
        return sentence

    return refuse


FILES: dict[str, str | bytes] = {
    "good.yaml": GOOD,
    "text.txt": "to be or not to be " * 40,
    "empty.yaml": "",
    "list.yaml": "- a\n",
    "scalar.yaml": "7",
    "broken.yaml": "name: [",
    "latin.yaml": "name: ä".encode("latin-1"),
    "binary.yaml": bytes(range(256)),
    "nul.yaml": "name: \0",
    "deep.yaml": "a: " + "[" * 3000,
    "tag.yaml": "name: !!python/object/apply:os.system [id]\n",
    "twice.yaml": GOOD + "name: y\n",
    "number.yaml": GOOD + "1: 2\n",
    "unknown.yaml": GOOD + "outerr: {}\n",
    "missing_name.yaml": "task: {name: digits}\n",
    "missing_task.yaml": "name: x\n",
    "circle.yaml": "name: ${seed}\nseed: ${name}\ntask: {name: digits}\n",
    "aliases.yaml": "a: &a [1, 1]\n" + "b: &b [" + "*a, " * 3000 + "]\nc: [" + "*b, " * 3000 + "]\n",
    "large.yaml": "name: x\n",
    "file": "in the way",
    "bad.safetensors": b"\xff" * 100,
    "bad_run/config.yaml": "name: [",
    "unfinished/config.yaml": GOOD,
    "broken_task.py": "def make(:\n",
    "raising_task.py": "raise RuntimeError('at import')\n",
    "own_code.py": (
        "import optax\nfrom tasks import Task\nvalue = 3\n"
        "def plain(): return 3\n"
        "def lies() -> Task: return 3\n"
        "def fails() -> Task: raise RuntimeError('within')\n"
        "def exits() -> Task: raise SystemExit(0)\n"
        "def needs(x) -> Task: return x\n"
        "def no_optimizer(learning_rate): return learning_rate\n"
        "def no_arguments(): return optax.sgd(1.0)\n"
        "def bad_rate(learning_rate): return optax.sgd(learning_rate)\n"
        "bad_rate.learning_rate = 'x'\n"
    ),
}
BAD_CONFIGS = (
    "none.yaml", "folder", "gone", "loop", "device", "pipe", "large.yaml", "x" * 400, "a\0b", "file/x",
    "empty.yaml", "list.yaml", "scalar.yaml", "broken.yaml", "latin.yaml", "binary.yaml", "nul.yaml", "deep.yaml",
    "tag.yaml", "twice.yaml", "number.yaml", "unknown.yaml", "missing_name.yaml", "missing_task.yaml", "circle.yaml",
    "aliases.yaml",
)  # fmt: skip


@pytest.mark.parametrize("config", BAD_CONFIGS, ids=lambda name: name[:20].replace("\0", "0"))
@pytest.mark.parametrize("command", CONFIG_COMMANDS, ids=lambda command: command[0])
def test_configs(refused: Call, command: list[str], config: str) -> None:
    sentence = refused(*command, config)
    assert "NUL" in sentence if "\0" in config else config in sentence


OVERRIDES = (
    "=1", "outer", "outer=5", "outer=null", "outer.stepz=1", "outer.steps", "outer.steps=", "outer.steps=many",
    "outer.steps=0", "outer.steps=-1", "outer.steps=1.5", "outer.steps=08", "outer.steps=1:30", "outer.steps=true",
    "outer.steps=[1]", "outer.steps={a: 1}", f"outer.steps={'9' * 40}", f"outer.steps={'9' * 5000}", "outer.steps='5'",
    "outer.population=3", "outer.population=0", "outer.population=1e18", "outer.sigma=0", "outer.sigma=.nan",
    "outer.sigma=1e400", "outer.sigma=x", "outer.sigma=true", "outer.strategy=cma", "outer.strategy=[snes]",
    "outer.horizon=10", "outer.horizon.min=0", "outer.horizon.min=500", "outer.horizon.max=1e18", "outer.horizon.x=1",
    "outer.learning_rate=-1", "outer.max_failures=0", "outer.samples=0", "outer.samples=1.5", "outer.samples=1001",
    "name=a b", "name=../x", "name=", "name=5", f"name={'x' * 300}",
    "name=a${b", "name=${b}", "name=${oc.env:L3RS_NO_SUCH_VARIABLE}", "name=${oc.nothing:1}", "seed=-1",
    "seed=2147483648",
    "seed=08", "seed=true", "seed=null", "seed='7'", "task=5", "task=null", "task.name=5", "task.name=[text]",
    "task.variants=5", "task.variants=[5]", "optimizer.hidden=16,16", "optimizer.hidden=[0]", "optimizer.hidden=[true]",
    "optimizer.hidden=[1000000000]", "optimizer.hidden=16", "optimizer.embedding=row", "optimizer.embedding_dim=0",
    "optimizer.directions=adam", "optimizer.directions=[]", "optimizer.directions=[adamm]", "optimizer.directions=[5]",
    "optimizer.directions=[{name: adam, b3: 1}]", "optimizer.directions=[{name: adam, b1: [1]}]",
    "optimizer.directions=[{b1: 1}]", "optimizer.step=x", "optimizer.step_scale=0", "optimizer.loss_decays=[1, 2]",
    "optimizer.loss_decays=[.5]", "optimizer.norm_decays=[.5]", "optimizer.absolute_time=1", "optimizer.layers=[]",
    "execution.backend=cloud", "execution.address=5", "execution.address=10.0.0.5:1", "execution.workers=0",
    "execution.workers=x", "execution.plan=quick", "execution.resources_per_worker={CPU: 0}", "execution.autoscaling=1",
    "execution.resources_per_worker=3", "execution.members_per_call=0", "checkpoint.every=0", "checkpoint.keep=1e18",
    "logging.tensorboard=on", "evaluation.horizons=10", "evaluation.horizons=[]", "evaluation.horizons=[0]",
    "evaluation.seeds=99999999999", "evaluation.tuning_seeds=7", "evaluation.settings=[]", "evaluation.settings={a: 1}",
    "evaluation.guard=3", "evaluation.guard={x: 1}", "evaluation.guard={bound: x}", "evaluation.multipliers=[0]",
    "evaluation.baselines=adam", "evaluation.baselines=[5]", "evaluation.schedules=cosine", "evaluation.curve_points=0",
    "a=[", "a: b", "a..b=1", "outer[0]=1", "task.x=!!binary aGk=", "task.x=!!timestamp 2020-01-01", "x=" + "[" * 500,
)  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:40])
def test_overrides(refused: Call, override: str) -> None:
    assert override.partition("=")[0].split(".")[0].split("[")[0][:10] in refused("run", "good.yaml", override)


TASKS = (
    "task.name=", "task.name=digitz", "task.name=a:", "task.name=:b", "task.name=.a:b", "task.name=no.such:thing",
    "task.name=os:system", "task.name=os:nothing", "task.name=json:dumps", "task.name=own_code:plain",
    "task.name=own_code:value", "task.name=own_code:lies", "task.name=own_code:fails", "task.name=own_code:exits",
    "task.name=own_code:needs", "task.name=broken_task:make", "task.name=raising_task:make", "task.colour=red",
    "task.source.file=none.txt", "task.source.file=folder", "task.source.file=5", "task.source=5", "task.batch_size=0",
    "task.batch_size=x", "task.augment=5", "task.augment={flip: x}",
)  # fmt: skip


@pytest.mark.parametrize("override", TASKS)
def test_tasks(refused: Call, override: str) -> None:
    refused("run", "good.yaml", override)


BAD_FOLDERS = (
    "none", "folder", "file", "file/x", "gone", "loop", "device", "pipe", "bad_run", "linked", "piped", "x" * 400,
    "a\0b", "/proc", "/dev/null", "nowhere://a/b", "memory://nothing", "file:///proc/nothing", "://", "s3://",
)  # fmt: skip


@pytest.mark.parametrize("folder", BAD_FOLDERS, ids=lambda name: name[:20].replace("\0", "0"))
@pytest.mark.parametrize("command", FOLDER_COMMANDS, ids=lambda command: command[0])
def test_folders(refused: Call, command: list[str], folder: str) -> None:
    refused(*command, folder, *(["new"] if command == ["export"] else []))


OTHER = (
    ["export", "unfinished", "new"], ["export", "unfinished", "file"], ["export", "unfinished", "file/x"],
    ["export", "unfinished", "/proc/new"], ["export", "unfinished", "a\0b"], ["export", "unfinished", "x" * 400],
    ["export", "unfinished", "new", "--results", "none.json"], ["export", "unfinished", "new", "--results", "folder"],
    ["resume", "unfinished", "outer"], ["resume", "unfinished", "execution.workers=x"],
    ["run", "good.yaml", "--out", "folder"], ["run", "good.yaml", "--out", "file"],
    ["run", "good.yaml", "--out", "file/x"],
    ["run", "good.yaml", "--out", "/proc/x"], ["run", "good.yaml", "--out", "/proc/x/y"],
    ["run", "good.yaml", "--out", "a\0"],
    ["run", "good.yaml", "--out", "x" * 400], ["run", "good.yaml", "--out", "nowhere://x"],
    *([command, *more] for command in ("evaluate",) for more in (
        ["none", "good.yaml"], ["folder", "good.yaml"], ["file", "good.yaml"], ["", "good.yaml"], ["a\0b", "good.yaml"],
        ["hf://x", "good.yaml"], ["nowhere://x", "good.yaml"], ["x" * 400, "good.yaml"], ["device", "good.yaml"],
    )),
    *(["evaluate", "-", "good.yaml", *more] for more in (
        ["--horizons", "ten"], ["--horizons", ""], ["--horizons", "1,,2"], ["--horizons", "0"], ["--horizons", "-1"],
        ["--horizons", "1e3"], ["--horizons", "1_0"], ["--horizons", "9" * 30], ["--horizons", "1.5"],
        ["--horizons", "٣"],
        ["--seeds", "0"], ["--seeds", "x"], ["--seeds", "-1"], ["--seeds", "99999999999"], ["--seeds", "1.5"],
        ["--tuning-seeds", "0"], ["--tuning-seeds", "100"], ["--tuning-seeds", "x"], ["--baselines", "adma"],
        ["--baselines", "l3rs"], ["--baselines", "adam,,"], ["--baselines", ":f"], ["--baselines", ".a:b"],
        ["--baselines", "os:nothing"], ["--baselines", "os:path"], ["--baselines", "os:getcwd"],
        ["--baselines", "own_code:no_optimizer"], ["--baselines", "own_code:no_arguments"],
        ["--baselines", "own_code:bad_rate"], ["--baselines", "own_code:value"], ["--baselines", "broken_task:make"],
        ["--baselines", "raising_task:make"], ["--schedules", "linear"], ["--schedules", "constant,"],
        ["--multipliers", "x"], ["--multipliers", "0"], ["--multipliers", "-1"], ["--multipliers", "nan"],
        ["--multipliers", "1e999"], ["--settings", "none"], ["--out", "file"], ["--out", "file/x"],
        ["--out", "/proc/x"],
        ["--out", "a\0b"], ["--out", "x" * 400], ["--out", "loop"],
    )),
    *(["inspect", *more] for more in (
        ["none"], ["folder"], ["file"], ["device"], ["pipe"], [""], ["a\0b"], ["x" * 400], ["hf://x"], ["hf://a/b/c"],
        ["nowhere://x"], ["memory://nothing"], ["file:///proc/x"],
        ["universal", "--network", "none.yaml"], ["universal", "--network", "folder"],
        ["universal", "--network", "tag.yaml"],
        ["universal", "--network", "none.safetensors"], ["universal", "--network", "bad.safetensors"],
        ["universal", "--network", "bad.safetensors", "--rename", "x"], ["universal", "--network", "a\0.safetensors"],
    )),
    *([command, *name, "--address", address] for command, name in (
        ("submit", ["good.yaml"]), ("list", []), ("status", ["x"]), ("logs", ["x"]), ("stop", ["x"]),
    ) for address in ("", "x", "http://", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:1", "127.0.0.1:99999999", "[::1",
    "a\0:1")),
    ["submit", "good.yaml", "--out", "relative"],
    ["estimate", "good.yaml", "--workers", "x"], ["estimate", "good.yaml", "--workers", ""],
    ["estimate", "good.yaml", "--workers", "0x1"], ["estimate", "good.yaml", "--workers", "-1"],
    ["runn"], ["--nope"], ["list-tasks", "x"], ["run"], ["evaluate"], ["evaluate", "-"], ["export", "a"], ["inspect"],
    *([command, "--nope"] for command in COMMANDS),
)  # fmt: skip


@pytest.mark.parametrize("words", OTHER, ids=lambda words: " ".join(words)[:60].replace("\0", "0"))
def test_options(refused: Call, words: list[str]) -> None:
    refused(*words)


RESULTS: dict[str, Callable[[dict], object]] = {
    "no_records": lambda r: r.pop("records"),
    "empty": lambda r: r.update(records=[]),
    "records_are_text": lambda r: r.update(records="x"),
    "records_are_numbers": lambda r: r.update(records=[1]),
    "a_record_lacks_a_field": lambda r: r["records"][0].pop("seed"),
    "a_loss_is_text": lambda r: r["records"][0].update(loss="low"),
    "a_loss_is_a_list": lambda r: r["records"][0].update(loss=[]),
    "a_setting_is_a_number": lambda r: r["records"][0].update(setting=5),
    "a_setting_of_300_thousand_characters": lambda r: r["records"][0].update(setting="x" * 300_000),
    "a_horizon_is_0": lambda r: r["records"][0].update(horizon=0),
    "a_horizon_is_enormous": lambda r: r["records"][0].update(horizon=10**18),
    "a_seed_of_a_thousand_digits": lambda r: r["records"][0].update(seed=10**1000),
    "hparams_are_a_list": lambda r: r["records"][0].update(hparams=[]),
    "many_horizons": lambda r: r.update(records=[{**r["records"][0], "horizon": i} for i in range(1, 2000)]),
    "many_settings": lambda r: r.update(records=[{**r["records"][0], "setting": str(i)} for i in range(2000)]),
    "many_seeds": lambda r: r.update(records=[{**r["records"][0], "seed": i} for i in range(2000)]),
    "speedup_is_text": lambda r: r.update(speedup="x"),
    "curves_are_numbers": lambda r: r.update(curves=[1]),
    "paths_lack_fields": lambda r: r.update(paths=[{}]),
    "notes_are_numbers": lambda r: r.update(notes=[1]),
    "notes_are_text": lambda r: r.update(notes="x"),
    "config_is_a_list": lambda r: r.update(config=[]),
    "environment_is_null": lambda r: r.update(environment=None),
    "optimizer_is_a_list": lambda r: r.update(optimizer=[]),
    "half_a_character": lambda r: r.update(optimizer="\ud800"),
    "another_field": lambda r: r.update(colour=1),
    "deep_config": lambda r: r.update(config=json.loads('{"a":' * 50 + "1" + "}" * 50)),
    "meta_training_is_a_list": lambda r: r.update(meta_training=[]),
    "tuning_is_a_list": lambda r: r.update(tuning=[]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> str:
    return full(1).save(tmp_path_factory.mktemp("results")).read_text()


@pytest.mark.parametrize("name", RESULTS)
def test_results(refused: Call, place: Path, results: str, name: str) -> None:
    data = json.loads(results)
    RESULTS[name](data)
    (place / "hostile").mkdir(exist_ok=True)
    (place / "hostile" / "results.json").write_text(json.dumps(data))
    assert "results.json" in refused("report", "hostile")


@pytest.mark.parametrize("damage", ["text", "deep", "large", "device", "link", "latin"])
def test_damaged_results(refused: Call, place: Path, results: str, damage: str) -> None:
    folder = place / f"damaged-{damage}"
    folder.mkdir()
    file = folder / "results.json"
    if damage in ("device", "link"):
        (place / "whole.json").write_text(results)
        file.symlink_to("/dev/zero" if damage == "device" else place / "whole.json")
    else:
        file.write_bytes({"text": b"{", "deep": b"[" * 100_000, "large": b"{}", "latin": b'{"a": "\xe4"}'}[damage])
    if damage == "large":
        os.truncate(file, 10 << 30)
    refused("report", folder.name)


KEYS = sorted(
    f"{section}.{key}" if fields else section
    for section, field in Config.model_fields.items()
    for fields in [getattr(field.annotation, "model_fields", {})]
    for key in fields or [""]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5).map(repr)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@given(key=st.sampled_from(KEYS) | st.text(max_size=10), value=VALUES.map(json.dumps) | st.text(max_size=30))
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
def test_any_value_of_any_key(place: Path, key: str, value: str) -> None:
    """`prepare` computes nothing: the value is accepted, or refused with a sentence."""
    del place
    code, _, err = metatrain("prepare", "good.yaml", "--", f"{key}={value}")
    assert code in (0, 2), err
    assert len(err.splitlines()) == (code == 2), err
    assert "Traceback" not in err


def test_the_battery_is_large() -> None:
    n_cases = len(BAD_CONFIGS) * len(CONFIG_COMMANDS) + len(BAD_FOLDERS) * len(FOLDER_COMMANDS)
    assert n_cases + len(OVERRIDES) + len(TASKS) + len(OTHER) + len(RESULTS) >= 250
