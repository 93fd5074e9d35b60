from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metatrain.config import UserError, dump_config
from metatrain.report import live
from metatrain.report.history import History, running_median
from metatrain.report.live import Live
from tests.metatrain.common import small_config
from tests.metatrain.pages import check_in_a_browser, check_page, needs_browser


def run_folder(folder: Path, generations: int, total: int = 1000, **more: Any) -> Path:
    rng = np.random.default_rng(0)
    (folder / "config.yaml").write_text(dump_config(small_config(outer={"steps": total})))
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(generations):
            horizon = round(10 * 20 ** rng.random())
            loss = 2 / horizon**0.5 + math.exp(-i / 100) + 0.05 * rng.normal()
            line = {
                "generation": i, "horizon": horizon, "init": 0, "meta_loss_mean": loss, "meta_loss_best": loss - 0.1,
                "finite": 32, "theta_norm": 10 + i / 100, "candidate_steps_per_s": 2000.0, "seconds": 0.6, "workers": 2,
            }  # fmt: skip
            file.write(json.dumps({**line, **more}) + "\n")
    return folder


def test_page_of_a_run_in_progress(tmp_path: Path) -> None:
    page = check_page(live.write(run_folder(tmp_path, 700)))
    assert "700 of 1,000 generations done; about 3 min left." in page.text
    assert ("meta", {"http-equiv": "refresh", "content": "60"}) in page.tags
    for title in (
        "Meta-loss",
        "Meta-loss by horizon",
        "Candidate-steps a second",
        "Seconds a generation",
        "Norm of theta",
        "Workers",
    ):
        assert title in page.text
    assert not list(tmp_path.glob("*.tmp"))


def test_page_of_a_run_that_has_ended(tmp_path: Path) -> None:
    finished = check_page(live.write(run_folder(tmp_path, 10, total=10)))
    assert "Finished: 10 generations in 6.00 s." in finished.text
    stopped = check_page(live.write(run_folder(tmp_path, 5, total=10), going=False))
    assert "Stopped after 5 of 10 generations; `metatrain resume` continues it." in stopped.text
    for page in (finished, stopped):
        assert all(attrs.get("http-equiv") != "refresh" for _, attrs in page.tags)


@pytest.mark.filterwarnings("error")
def test_page_of_a_run_with_hardly_any_data(tmp_path: Path) -> None:
    run_folder(tmp_path, 0)
    assert "No generation is done yet" in check_page(live.write(tmp_path)).text
    (tmp_path / "metrics.jsonl").unlink()
    assert "No generation is done yet" in check_page(live.write(tmp_path)).text
    check_page(live.write(run_folder(tmp_path, 1)))
    check_page(live.write(run_folder(tmp_path, 3, meta_loss_mean=None, meta_loss_best=None)))
    check_page(live.write(run_folder(tmp_path, 40, meta_loss_mean=1.0, horizon=10, workers=None)))
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
        live.write(tmp_path / "none")


def test_a_half_written_line_is_skipped(tmp_path: Path) -> None:
    run_folder(tmp_path, 5)
    whole = History.read(tmp_path / "metrics.jsonl")
    for half in ('{"generation": 5, "hor', "7", "", '{"generation": 4}x'):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(half)
        assert History.read(tmp_path / "metrics.jsonl").done == whole.done == 5
        (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text().removesuffix(half))


def test_running_median_by_hand() -> None:
    values = np.array([1.0, 5.0, 2.0, np.nan, np.nan, np.nan, 9.0])
    found = running_median(values, 3)
    np.testing.assert_array_equal(found, [3.0, 2.0, 3.5, 2.0, np.nan, 9.0, 9.0])


def test_bands_hold_every_generation_once(tmp_path: Path) -> None:
    history = History.read(run_folder(tmp_path, 200) / "metrics.jsonl")
    bands = history.bands()
    assert len(bands) == 3
    assert (np.sum([inside for *_, inside in bands], 0) == 1).all()
    assert all(low <= high for low, high, _ in bands)
    assert bands[0][1] < bands[1][0]


def test_a_tick_draws_only_after_an_interval(tmp_path: Path) -> None:
    run_folder(tmp_path, 3)
    page = tmp_path / "report.html"
    drawn = Live(tmp_path)
    drawn.tick()
    page.unlink()
    drawn.tick()
    assert not page.exists()
    drawn.close()
    assert "Stopped after 3" in page.read_text()


def test_a_failure_to_draw_is_one_sentence_and_stops_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder(tmp_path, 3)
    (tmp_path / "report.html").mkdir()
    monkeypatch.setattr(live, "DRAW_SECONDS", 0.0)
    drawn = Live(tmp_path)
    with caplog.at_level(logging.WARNING, "metatrain"):
        drawn.tick()
        drawn.tick()
        drawn.close()
    assert len(caplog.records) == 1
    assert "the page of" in caplog.text


def test_a_page_of_1000_generations_is_small(tmp_path: Path) -> None:
    assert live.write(run_folder(tmp_path, 1000, total=2000)).stat().st_size < 300_000


@needs_browser
def test_page_on_a_phone(tmp_path: Path) -> None:
    page = live.write(run_folder(tmp_path, 300))
    check_in_a_browser(page.read_text(), tmp_path, 390, "dark")


def test_worker_counts_are_on_the_page_of_a_run_on_a_cluster(tmp_path: Path) -> None:
    counts = {"lost": 2, "duplicated": 17, "requeued": 5, "stale": 1, "rejected": 0, "waited": 130.0}
    page = check_page(live.write(run_folder(tmp_path, 50, **counts)))
    shown = {
        "workers lost": "2",
        "shards started twice[^0-9]*": "17",
        "candidates evaluated again[^0-9]*": "5",
        "waited without any worker": "2 min",
    }
    for meaning, number in shown.items():
        assert re.search(rf"{meaning}\s*{number}", page.text), meaning
    assert "Lost, started twice, evaluated again" in page.text
    assert "workers lost" not in check_page(live.write(run_folder(tmp_path, 50))).text
    processes = check_page(live.write(run_folder(tmp_path, 50, lost=1)))  # of this machine
    assert "workers lost" in processes.text
    assert "shards started twice" not in processes.text
