"""Without JAX, optax and Orbax: optimizers are found, read and checked, and the rest says what to install."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

HIDE = """
import sys

HIDDEN = {"jax", "jaxlib", "optax", "orbax", "tensorstore", "flax"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def run(code, hide=True):
    """What `code` prints in a new process, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", (HIDE if hide else "") + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_reading_needs_no_jax():
    code = """
import json, numpy, l3rs
found = {}
for name in l3rs.available():
    theta, spec, info = l3rs.restore(name)
    assert l3rs.info(name)["spec"] == spec.to_json()
    found[name] = [type(theta["embedding"]) is numpy.ndarray, info["horizon"]["max"] > 0]
print(json.dumps(found))
"""
    shipped = {path.parent.name for path in ROOT.glob("checkpoints/*/l3rs.json")}
    assert run(code) == {name: [True, True] for name in shipped}


def test_reading_does_not_import_jax():
    """Where it is installed, too."""
    code = """
import json, sys, l3rs
l3rs.restore("universal")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    assert not set(run(code, hide=False)) & {"jax", "jaxlib", "optax", "orbax", "tensorstore"}


def test_what_needs_jax_says_so():
    golden = str(ROOT / "tests/l3rs/golden/v1/checkpoint")
    code = f"""
import json, l3rs
said = []
for action in (
    lambda: l3rs.load("universal", 10),
    lambda: l3rs.learned_optimizer,
    lambda: l3rs.init_meta_params,
    lambda: l3rs.save("/nowhere", *l3rs.restore("universal")[:2]),
    lambda: l3rs.restore({golden!r}),
):
    try:
        action()
        said.append("nothing")
    except (ImportError, l3rs.L3RSError) as error:
        said.append(str(error))
print(json.dumps(said))
"""
    sentences = run(code)
    assert len(sentences) == 5
    for sentence in sentences:
        assert "pip install 'l3rs[jax]'" in sentence
        assert "\n" not in sentence
    assert golden in sentences[-1]
