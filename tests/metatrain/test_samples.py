"""Generations that evaluate every member on several task samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from metatrain.config import HorizonConfig
from metatrain.outer import loop
from metatrain.outer.metrics import describe_draws, read_metrics
from metatrain.outer.setup import Setup, horizon_at
from metatrain.outer.strategy import mean_ranks
from metatrain.report.history import History
from tests.metatrain.common import REGRESSION, assert_same_theta, metrics, small_config
from tests.metatrain.test_trainer import stopped_at

TASK = {"name": REGRESSION, "variants": [{}, {"examples": 48}]}
SAMPLES = {"steps": 4, "samples": 3}


def test_the_fitness_is_the_mean_of_the_ranks_within_each_sample() -> None:
    losses = np.array([[3.0, 1.0, 2.0, 4.0], [100.0, 300.0, 200.0, 400.0]], np.float32)
    np.testing.assert_array_equal(mean_ranks(losses), [1.0, 1.0, 1.0, 3.0])
    np.testing.assert_array_equal(mean_ranks(losses[:1]), [2.0, 0.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("power", "median", "mean"),
    [
        (0.0, 505, 505),
        (-1.0, 100, 990 / math.log(100)),
        (-1.5, 1000 / 5.5**2, 100),
        (-2.0, 2000 / 101, 1000 * math.log(100) / 99),
    ],
)
def test_horizons_are_drawn_with_the_power_of_their_distribution(power: float, median: float, mean: float) -> None:
    config = HorizonConfig(min=10, max=1000, power=power)
    drawn = [horizon_at(quantile, config) for quantile in (np.arange(10_000) + 0.5) / 10_000]
    assert (drawn[0], drawn[-1]) == (10, pytest.approx(1000, rel=0.03))
    assert drawn == sorted(drawn)
    assert np.median(drawn) == pytest.approx(median, abs=0.6)
    assert np.mean(drawn) == pytest.approx(mean, rel=0.005)


def test_the_line_of_as_many_samples_as_are_allowed_is_read_again(tmp_path: Path) -> None:
    sample = {"horizon": 2500, "task": 30, "init": 1806481815, "meta_loss_mean": 1.1963791847229004}
    line = {"generation": 0, "samples": [sample] * 1000}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [line]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_loss_ranks_worst_and_equal_ones_share_their_ranks(bad: float) -> None:
    losses = np.array([[bad, 1.0, 1e9, 1.0, bad], [5.0, 4.0, 3.0, 2.0, 1.0], [bad] * 5], np.float32)
    np.testing.assert_allclose(mean_ranks(losses) * 3, [3.5 + 4 + 2, 0.5 + 3 + 2, 2 + 2 + 2, 0.5 + 1 + 2, 3.5 + 0 + 2])


def test_one_sample_is_the_first_of_several_and_all_differ() -> None:
    one, several = (Setup.build(small_config(task=TASK, outer={"samples": n})) for n in (1, 3))
    seen = set()
    for number in range(8):
        alone, spec = one.generation(number), several.generation(number)
        assert len(spec.draws) == 3
        [first] = alone.draws
        assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, spec.draws[0])) == jax.tree.map(
            np.ndarray.tolist, jax.tree.map(np.asarray, first)
        )
        np.testing.assert_array_equal(spec.key, alone.key)
        seen |= {tuple(np.asarray(draw.sample.key).tolist()) for draw in spec.draws}
    assert len(seen) == 24
    draws = [draw for number in range(8) for draw in several.generation(number).draws[1:]]
    assert {draw.task for draw in draws} == {0, 1}
    assert len({draw.horizon for draw in draws}) > 2


def test_a_run_of_several_samples_resumes_and_does_not_depend_on_devices(tmp_path: Path) -> None:
    quiet = tmp_path / "quiet"
    shared = {"task": TASK, "outer": SAMPLES, "execution": {"plan": "fused", "members_per_call": 2}}
    loop.run(small_config(**shared), quiet)
    stopped_at(2, tmp_path / "run", **shared)
    with mock.patch("jax.local_devices", return_value=jax.devices()[:1]):
        loop.resume(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(quiet)
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")
    for line in metrics(quiet):
        assert line["horizon"] == pytest.approx(np.mean([each["horizon"] for each in line["samples"]]))
        assert line["meta_loss_mean"] == pytest.approx(np.mean([each["meta_loss_mean"] for each in line["samples"]]))
        assert line["finite"] == 3 * 4
        assert [sorted(each) for each in line["samples"]] == [["horizon", "init", "meta_loss_mean", "task"]] * 3
    history = History.read(quiet / "metrics.jsonl")
    assert history.lowest is not None
    assert np.isfinite(history["horizon"]).all()


def test_metrics_of_losses_that_are_not_finite() -> None:
    draws = Setup.build(small_config(outer={"samples": 2})).generation(0).draws
    line = describe_draws(draws, np.array([[np.nan, 2.0], [1.0, 4.0]], np.float32))
    assert (line["meta_loss_mean"], line["meta_loss_best"], line["finite"]) == ((2.0 + 2.5) / 2, 3.0, 3)
    line = describe_draws(draws, np.array([[np.nan, np.inf], [1.0, 4.0]], np.float32))
    assert (line["meta_loss_mean"], line["meta_loss_best"], line["finite"]) == (2.5, None, 2)
    line = describe_draws(draws, np.full((2, 2), np.nan, np.float32))
    assert (line["meta_loss_mean"], line["meta_loss_best"], line["finite"]) == (None, None, 0)
