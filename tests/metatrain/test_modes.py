"""Whole runs and evaluations in every mode of JAX: they work, or end with one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import l3rs
from metatrain.config import dump_config
from metatrain.evaluation.comparison import evaluate
from metatrain.outer.loop import run
from tests.metatrain.commands import metatrain
from tests.metatrain.common import metrics, small_config

MODES = {
    "jax_debug_infs": True,
    "jax_debug_nans": True,
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_disable_jit": True,
}
OUTER = {"steps": 2, "population": 2, "horizon": {"min": 2, "max": 3}}
JUDGED = {"baselines": ["adam"], "schedules": ["constant"], "horizons": [2], "seeds": 1, "curve_points": 1}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quiet") / "run"
    run(small_config(outer=OUTER), folder)
    return folder


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    before = getattr(jax.config, request.param)
    jax.config.update(request.param, MODES[request.param])
    yield request.param
    jax.config.update(request.param, before)


def slow(*modes: str) -> list[Any]:
    """Modes of which the first ones are fast enough for every day."""
    return [pytest.param(name, marks=[] if name in modes else [pytest.mark.slow]) for name in MODES]


@pytest.mark.parametrize("plan", ["fused", pytest.param("stepwise", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", slow("jax_debug_infs", "jax_enable_x64"), indirect=True)
def test_a_run_gives_the_numbers_of_one_without(mode: str, plan: str, quiet: Path, tmp_path: Path) -> None:
    run(small_config(outer=OUTER, execution={"plan": plan}), tmp_path / "run")
    losses = [[line["meta_loss_mean"] for line in metrics(folder)] for folder in (quiet, tmp_path / "run")]
    if mode == "jax_enable_x64":  # random numbers are others
        assert np.isfinite(losses[1]).all()
    else:
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    theta, _, _ = l3rs.restore(tmp_path / "run" / "optimizer")
    assert {x.dtype for x in jax.tree.leaves(theta)} == {np.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_an_evaluation_works(mode: str, quiet: Path) -> None:
    # Without compilation the costs of a step say nothing, and hundreds of steps are timed for them.
    results = evaluate(quiet / "optimizer", small_config(evaluation={**JUDGED, "costs": mode != "jax_disable_jit"}))
    assert all(np.isfinite(record.loss) for record in results.records)


@pytest.mark.parametrize("mode", ["jax_debug_nans"], indirect=True)
def test_what_diverges_is_one_sentence(mode: str, tmp_path: Path) -> None:
    task = {"name": "tests.metatrain.quadratic:diverging"}
    (tmp_path / "config.yaml").write_text(dump_config(small_config(task=task, outer=OUTER)))
    code, _, err = metatrain("run", tmp_path / "config.yaml", "--out", tmp_path / "run")
    [sentence] = [text for text in err.splitlines() if text.startswith("metatrain: ")]
    assert code == 2
    assert "Traceback" not in err
    assert all(fact in sentence for fact in ("nan", mode.upper(), "diverge"))
    assert not (tmp_path / "run").exists()
