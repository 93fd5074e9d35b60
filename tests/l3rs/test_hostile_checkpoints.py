"""Malicious checkpoints: each is refused with one sentence, quickly and in little memory; nothing else is touched."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import l3rs

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {version: ROOT / f"tests/l3rs/golden/v{version}/checkpoint" for version in (1, 2)}
MAX_SECONDS, MAX_MEGABYTES = 5, 300

# A case changes a copy of the golden checkpoint of format 1 or 2.
CASES = {}


def case(version, name=None):
    def add(change):
        CASES[name or change.__name__] = (version, change)
        return change

    return add


def manifest_case(name, change):
    """A case that changes the parsed manifest."""

    def apply(folder):
        manifest = json.loads((folder / "l3rs.json").read_text())
        change(manifest)
        (folder / "l3rs.json").write_text(json.dumps(manifest))

    case(2, name)(apply)


def spec_case(name, **fields):
    manifest_case(name, lambda manifest: manifest["spec"].update(fields))


# The manifest

spec_case("hidden_of_a_million_layers", hidden=[1] * 1_000_000)
spec_case("hidden_of_two_million_wrong_layers", hidden=["x"] * 500_000)
spec_case("hidden_of_an_enormous_width", hidden=[10**9])
spec_case("hidden_of_large_widths", hidden=[60_000, 60_000])
spec_case("hidden_of_a_number_with_4000_digits", hidden=[10**4000])
spec_case("an_enormous_embedding", embedding_dim=10**12)
spec_case("a_million_layers", layers=[["a", []]] * 400_000)
spec_case("a_layer_with_a_long_path", layers=[["a" * 1_000_000, [1]]])
spec_case("a_layer_of_many_dimensions", layers=[["a", [1] * 100_000]])
spec_case("a_layer_of_enormous_size", layers=[["a", [10**4000, 3]]])
spec_case("layers_that_are_text", layers="abc")
spec_case("a_hundred_thousand_directions", directions=["adam"] * 100_000)
spec_case("an_option_beyond_floats", directions=[{"name": "adam", "b1": 10**400}])
spec_case("an_option_that_is_nan", directions=[{"name": "adam", "b1": float("nan")}])
spec_case("a_hundred_thousand_decays", loss_decays=[0.5] * 100_000)
spec_case("a_scale_beyond_floats", step_scale=10**400)
spec_case("an_embedding_that_is_a_list", embedding=[["table"]])
manifest_case("a_spec_with_many_fields", lambda m: m["spec"].update({str(i): i for i in range(100_000)}))
manifest_case("info_is_a_list", lambda m: m.update(info=[]))
manifest_case("info_is_text", lambda m: m.update(info="x"))
manifest_case("sha256_is_a_list", lambda m: m.update(sha256=[]))
manifest_case("format_is_true", lambda m: m.update(format=True))
manifest_case("format_is_enormous", lambda m: m.update(format=10**4000))


@case(2)
def a_deeply_nested_manifest(folder):
    (folder / "l3rs.json").write_text('{"info":' + "[" * 1_000_000)


@case(2)
def a_manifest_of_ten_gigabytes(folder):
    os.truncate(folder / "l3rs.json", 10 << 30)


@case(2)
def a_manifest_that_is_a_pipe(folder):
    (folder / "l3rs.json").unlink()
    os.mkfifo(folder / "l3rs.json")


@case(2)
def a_manifest_that_is_a_device(folder):
    (folder / "l3rs.json").unlink()
    (folder / "l3rs.json").symlink_to("/dev/zero")


@case(2)
def a_manifest_that_is_a_link(folder):
    (folder / "l3rs.json").unlink()
    (folder / "l3rs.json").symlink_to(GOLDEN[2] / "l3rs.json")


# theta.safetensors


def write_safetensors(folder, header, values=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    (folder / "theta.safetensors").write_bytes(start + text + values)


def header_of(folder):
    data = (folder / "theta.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@case(2)
def values_that_are_a_pipe(folder):
    (folder / "theta.safetensors").unlink()
    os.mkfifo(folder / "theta.safetensors")


@case(2)
def values_that_are_a_device(folder):
    (folder / "theta.safetensors").unlink()
    (folder / "theta.safetensors").symlink_to("/dev/zero")


@case(2)
def values_that_are_a_folder(folder):
    (folder / "theta.safetensors").unlink()
    (folder / "theta.safetensors").mkdir()


@case(2)
def values_of_ten_gigabytes(folder):
    os.truncate(folder / "theta.safetensors", 10 << 30)


@case(2)
def a_header_of_enormous_length(folder):
    write_safetensors(folder, {}, length=2**63)


@case(2)
def a_deeply_nested_header(folder):
    write_safetensors(folder, b"[" * 50_000)


@case(2)
def a_header_of_many_arrays(folder):
    write_safetensors(folder, {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)})


@case(2)
def an_array_of_enormous_shape(folder):
    header, values = header_of(folder)
    header["embedding"]["shape"] = [2**40, 2**40]
    write_safetensors(folder, header, values)


@case(2)
def an_array_of_another_shape(folder):
    header, values = header_of(folder)
    header["embedding"]["shape"] = header["embedding"]["shape"][::-1]
    write_safetensors(folder, header, values)


@case(2)
def an_array_of_another_dtype(folder):
    header, values = header_of(folder)
    header["embedding"]["dtype"] = "I32"
    write_safetensors(folder, header, values)


@case(2)
def an_array_with_a_path_for_a_name(folder):
    header, values = header_of(folder)
    header["../../embedding"] = header.pop("embedding")
    write_safetensors(folder, header, values)


@case(2)
def arrays_that_overlap(folder):
    header, values = header_of(folder)
    header["embedding"]["data_offsets"] = header["dense_0/bias"]["data_offsets"]
    write_safetensors(folder, header, values)


# theta/, Orbax's folder, which is read for format 1


def entry_of(folder, name):
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'theta'}/"}).result()
    return store, store.read(name).result().value


def change_array(folder, **changes):
    store, text = entry_of(folder, "embedding/.zarray")
    store.write("embedding/.zarray", json.dumps({**json.loads(text), **changes}).encode()).result()


case(1, "an_orbax_array_of_enormous_shape")(lambda folder: change_array(folder, shape=[2**16, 2**16]))
case(1, "an_orbax_array_in_enormous_chunks")(lambda folder: change_array(folder, chunks=[2**16, 2**16]))
case(1, "an_orbax_array_of_another_dtype")(lambda folder: change_array(folder, dtype="<f8"))
case(1, "an_orbax_array_with_another_compressor")(lambda folder: change_array(folder, compressor={"id": "bz2"}))
case(1, "an_orbax_array_with_wrong_types")(lambda folder: change_array(folder, shape="xy", chunks=None))


def zstd_bomb(n_blocks):
    """A frame of blocks of 4 bytes, each of which repeats one byte 128 Ki times."""
    blocks = [((1 << 17) << 3 | 1 << 1 | (i == n_blocks - 1)).to_bytes(3, "little") + b"\0" for i in range(n_blocks)]
    return b"\x28\xb5\x2f\xfd" + b"\x00\x58" + b"".join(blocks)


@case(1)
def an_orbax_chunk_of_436_kilobytes_that_becomes_14_gigabytes(folder):
    store, _ = entry_of(folder, "embedding/.zarray")
    store.write("embedding/0.0", zstd_bomb(109_000)).result()


@case(1)
def an_orbax_chunk_that_becomes_a_gigabyte(folder):
    store, _ = entry_of(folder, "embedding/.zarray")
    store.write("embedding/0.0", zstd_bomb(8_000)).result()


@case(1)
def an_orbax_folder_with_an_unknown_entry(folder):
    store, _ = entry_of(folder, "embedding/.zarray")
    store.write("../../outside", b"0").result()


@case(1)
def an_orbax_folder_with_an_extra_array(folder):
    store, text = entry_of(folder, "embedding/.zarray")
    store.write("more/.zarray", text).result()


@case(1)
def an_orbax_folder_with_a_pipe(folder):
    os.mkfifo(folder / "theta" / "pipe")


@case(1)
def an_orbax_file_that_is_a_pipe(folder):
    (folder / "theta" / "_METADATA").unlink()
    os.mkfifo(folder / "theta" / "_METADATA")


@case(1)
def an_orbax_file_that_is_a_device(folder):
    (folder / "theta" / "manifest.ocdbt").unlink()
    (folder / "theta" / "manifest.ocdbt").symlink_to("/dev/zero")


@case(1)
def an_orbax_folder_that_is_a_link(folder):
    shutil.move(folder / "theta", folder / "elsewhere")
    (folder / "theta").symlink_to(folder / "elsewhere")


@case(1)
def an_orbax_file_of_ten_gigabytes(folder):
    (folder / "theta" / "large").touch()
    os.truncate(folder / "theta" / "large", 10 << 30)


@case(1)
def an_orbax_folder_of_many_files(folder):
    for i in range(1000):
        (folder / "theta" / str(i)).touch()


@case(1)
def deeply_nested_orbax_metadata(folder):
    (folder / "theta" / "_METADATA").write_text("[" * 100_000)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of each case, all loaded by one process; a case that hangs or kills it has none."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes in folders")
    folder = tmp_path_factory.mktemp("hostile")
    for name, (version, change) in CASES.items():
        change(Path(shutil.copytree(GOLDEN[version], folder / name)))
    command = [sys.executable, "-m", "tests.l3rs.hostile", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            text, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
    found = {}
    for line in text.splitlines():
        found |= json.loads(line)
    return found


def test_there_are_enough_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_refused_quickly_and_in_little_memory(outcomes, name):
    assert name in outcomes, "the process hung or was killed here, or before"
    outcome = outcomes[name]
    assert outcome["kind"] == "L3RSError", outcome
    assert "\n" not in outcome["said"]
    assert name in outcome["said"], "the sentence does not name the folder"
    assert len(outcome["said"]) < 2000
    assert outcome["seconds"] < MAX_SECONDS
    assert outcome["megabytes"] < MAX_MEGABYTES


# Names from a store


@pytest.fixture
def store():
    """A folder of fsspec's store in memory with the golden checkpoint in it."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    for file in GOLDEN[1].rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/hostile/it/{file.relative_to(GOLDEN[1]).as_posix()}", file.read_bytes())
    yield memory
    memory.rm("/hostile", recursive=True)


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/outside", "theta/../../outside", "theta/./x", "theta//x", "theta/C:x", "theta\\x"]
)
def test_a_store_that_lists_names_outside_its_folder(store, tmp_path, monkeypatch, name):
    (tmp_path / "scratch" / "deeper").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch" / "deeper"))
    monkeypatch.setattr(type(store), "find", lambda *_, **__: [name if name.startswith("/") else f"/hostile/it/{name}"])
    with pytest.raises(l3rs.L3RSError) as error:
        l3rs.restore("memory://hostile/it")
    assert "memory://hostile/it" in str(error.value)
    assert repr(name) in str(error.value)
    assert not list(tmp_path.rglob("*outside*"))
    assert not Path("/etc/outside").exists()


def test_a_store_with_too_many_files(store):
    for i in range(300):
        store.pipe_file(f"/hostile/it/theta/{i}", b"0")
    with pytest.raises(l3rs.L3RSError, match=r"memory://hostile/it.*too many files"):
        l3rs.restore("memory://hostile/it")


def test_a_store_with_a_large_file(store, monkeypatch):
    """It is not read to its end."""
    monkeypatch.setattr("l3rs.io.locations._MAX_BYTES", 10_000)
    store.pipe_file("/hostile/it/theta/large", b"0" * 20_000)
    with pytest.raises(l3rs.L3RSError, match=r"memory://hostile/it.*theta/large.*too large"):
        l3rs.restore("memory://hostile/it")


@pytest.mark.parametrize("file", ["l3rs.json", "theta/_METADATA"])
def test_a_file_url_with_a_link(tmp_path, file):
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    folder = Path(shutil.copytree(GOLDEN[1], tmp_path / "it"))
    shutil.move(folder / file, tmp_path / "secret")
    (folder / file).symlink_to(tmp_path / "secret")
    with pytest.raises(l3rs.L3RSError, match=f"{file} is not a regular file"):
        l3rs.restore(f"file://{folder}")
