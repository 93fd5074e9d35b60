"""`import l3rs` is light, and the package does not depend on those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import l3rs

FORBIDDEN = {
    *("ray", "flax", "evosax", "tensorflow_datasets", "tensorflow", "torch", "orbax", "tasks", "metatrain"),
    *("pydantic", "omegaconf", "sklearn", "matplotlib", "fsspec", "huggingface_hub"),
}


def test_import_loads_nothing_heavy():
    code = "import sys, l3rs; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stdout.split())
    assert {"l3rs", "numpy", "safetensors"} <= loaded
    assert not loaded & FORBIDDEN


def test_submodules_are_imported_when_accessed():
    code = "import l3rs; print(l3rs.baselines.mada.__name__); import sys; sys.modules['torch'] = None; l3rs.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["mada"]
    assert (
        done.stderr.splitlines()[-1]
        == "ImportError: l3rs.torch needs torch: pip install 'l3rs[torch]' ('.[torch]' in a checkout)"
    )
    with pytest.raises(AttributeError, match="module 'l3rs' has no attribute 'jax'"):
        _ = l3rs.jax


def test_core_modules_import_only_what_is_installed_with_them():
    """Static, so that an import inside a function counts too."""
    allowed = {"jax", "numpy", "optax", "safetensors", "l3rs", *sys.stdlib_module_names}
    files = sorted(Path(l3rs.__file__).parent.rglob("*.py"))
    assert len(files) >= 8
    for file in files:
        if file.parent.name == "torch":  # the extra
            continue
        # Imported inside functions: for URLs of checkpoints, and by single baselines.
        extras = {
            "locations.py": {"fsspec", "huggingface_hub"},
            "orbax_store.py": {"orbax", "tensorstore"},
            "orbax_limits.py": {"tensorstore"},
            "baselines": {"matplotlib"},
            "iomt": {"matplotlib", "sklearn", "threadpoolctl", "umap"},
        }
        asked_for = extras.get(file.name, set()) | extras.get(file.parent.name, set())
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "l3rs"]
            for name in names:
                assert name.partition(".")[0] in allowed | asked_for, f"{file.name} imports {name}"


def test_nothing_can_unpickle():
    for file in Path(l3rs.__file__).parent.rglob("*.py"):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not imported & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, file.name


def test_public_face():
    assert set(l3rs.__all__) == {
        *("Direction", "Guard", "L3RSError", "L3RSState", "Layer", "Match", "Spec"),
        *(
            "available",
            "guard_report",
            "info",
            "init_meta_params",
            "learned_optimizer",
            "load",
            "match_layers",
            "restore",
            "save",
        ),
    }
    for name in l3rs.__all__:
        assert getattr(l3rs, name).__doc__
    assert issubclass(l3rs.L3RSError, ValueError)
