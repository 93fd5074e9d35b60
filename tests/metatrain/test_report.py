from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from metatrain import report
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import L3RS, Curve, Results, Speedup
from tests.metatrain.pages import browse, check_in_a_browser, check_page, needs_browser
from tests.metatrain.synthetic import costs, full, made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(Analysis(full(2)), tmp_path_factory.mktemp("report"))


def test_page_of_everything(written: Path) -> None:
    page = check_page(written)
    results = full(2)
    for sentence in (*report.verdict(Analysis(results)), *results.notes):
        assert sentence in page.text
    heads = ["At a glance", "Over the horizon", "All numbers", "Along a run", "What L3RS decides"]
    heads += ["What MADA learns", "What IOMT chooses", "Performance profile", "Costs", "How it was measured"]
    assert sorted(heads, key=page.text.index) == heads
    for label in results.baselines():
        assert page.text.count(label) >= 2 * 6
    assert page.text.index("better in") < page.text.index("What to know") < page.text.index("At a glance")
    assert "∞" in page.text
    assert written.stat().st_size < 1_500_000
    coefficients = ["coefficients-0", "coefficients-1"]
    names = [
        *coefficients,
        "curves",
        "decisions-0",
        "decisions-1",
        "horizons-accuracy",
        "horizons-loss",
        "profile",
        "speedups",
        "switches-0",
        "switches-1",
    ]
    assert sorted(p.name for p in written.parent.iterdir()) == sorted(
        ["report.html", *(f"{name}.{kind}" for name in names for kind in ("png", "svg"))]
    )
    assert (written.parent / "horizons-loss.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "results",
    [
        made({L3RS: {1: [0.5]}, "adam/a": {1: [0.9]}}),
        made({L3RS: {1: [0.5], 10: [math.nan]}, "adam/a": {1: [0.9], 10: [math.nan]}}, trained=None),
        made({L3RS: {10: [0.5, 0.6]}}),
        made(
            {L3RS: {10: [math.nan] * 2}, "adam/a": {10: [0.2, 0.3]}, "<b>&/\"'": {10: [math.inf, math.nan]}},
            "A <i>: x & y",
            speedup=[Speedup("A <i>: x & y", "adam/a", 10, None, None, None)],
            curves=[Curve("A <i>: x & y", L3RS, 10, [0, 10], [None, None], [0.1, None])],
            notes=["a < b & c"],
            costs=costs(1.0, 0.5),
            spent={"seconds": 3.0},
        ),
    ],
    ids=["one seed and one step", "diverged", "no baselines", "names with markup"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_page_of_little(results: Results, tmp_path: Path) -> None:
    page = check_page(report.write(Analysis(results), tmp_path))
    assert "Configuration" not in page.text
    assert "What L3RS decides" not in page.text
    assert ("What to know" in page.text) == bool(results.notes)
    assert ("Along a run" in page.text) == bool(results.curves)


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_page_in_a_browser(written: Path, tmp_path: Path, width: int, scheme: str) -> None:
    check_in_a_browser(written.read_text(), tmp_path, width, scheme)


@needs_browser
def test_page_prints(written: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(written.read_text())
    shown = browse(page, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" not in shown.stderr
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"


def test_choices_of_iomt_are_drawn(written: Path, tmp_path: Path) -> None:
    assert written.with_name("switches-0.png").is_file()
    shown = "20 stages, 4 of sgd, 4 of adam, 4 of rmsprop, 4 of sgdm, 4 of adagrad, 1 diverged."
    assert written.read_text().count(shown) == 2
    results = full()
    assert Results.load(results.save(tmp_path)).switches == results.switches


def test_learned_coefficients_of_mada_are_drawn(written: Path, tmp_path: Path) -> None:
    assert written.with_name("coefficients-0.png").is_file()
    assert written.read_text().count("β1, first moment over the steps in") == 2  # a panel in each of two settings
    (tmp_path / "old").mkdir()
    saved = json.loads(full().save(tmp_path / "new").read_text())
    del saved["coefficients"], saved["switches"]  # as results were saved before there were any
    (tmp_path / "old" / "results.json").write_text(json.dumps(saved))
    assert Results.load(tmp_path / "old" / "results.json").coefficients == []


def test_without_mada_and_iomt_they_are_not_on_the_page(tmp_path: Path) -> None:
    page = report.write(Analysis(dataclasses.replace(full(), coefficients=[], switches=[])), tmp_path).read_text()
    assert "What MADA learns" not in page
    assert "What IOMT chooses" not in page


def test_results_of_the_first_version_are_read_and_shown(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "results.json"
    results = Results.load(golden)
    assert results.optimizers() == ["l3rs", "adam/constant", "adam/cosine", "sgdm/constant", "sgdm/cosine"]
    page = check_page(report.write(Analysis(results), tmp_path))
    for name in (*results.baselines(), "At a glance", "What L3RS decides", "Costs"):
        assert name in page.text
    saved = json.loads(results.save(tmp_path / "again").read_text())
    old = json.loads(golden.read_text())
    assert {key: saved[key] for key in old} == old
    assert {key: value for key, value in saved.items() if key not in old} == {"multipliers": []}
