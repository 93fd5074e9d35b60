from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from metatrain import report
from metatrain.evaluation.analysis import Findings
from metatrain.evaluation.results import L3RS, Cost, Curve, Record, Results, Speedup
from metatrain.evaluation.statistics import Interval
from metatrain.report import decisions
from metatrain.report import formatting as words
from metatrain.report.figures import log_ticks
from metatrain.report.page import _paid
from tests.metatrain.synthetic import full

_VOID = {"meta", "br", "link", "img", "hr", "input"}


def made(
    losses: dict[str, dict[int, list[float]]],
    setting: str = "",
    trained: tuple[int, int] | None = (10, 100),
    **more: Any,
) -> Results:
    """Results of one setting from {optimizer: {horizon: losses of the seeds}}; accuracy is 1 − loss / 10."""
    records = [
        Record(setting, label, horizon, seed, loss, 1 - loss / 10, 0.1, {}, loss)
        for label, rows in losses.items()
        for horizon, row in rows.items()
        for seed, loss in enumerate(row)
    ]
    horizon = {"horizon": {"min": trained[0], "max": trained[1]}} if trained else {}
    return Results(
        "o", records, more.pop("speedup", []), {}, meta_training={**horizon, **more.pop("spent", {})}, **more
    )


def around(loss: float) -> list[float]:
    return [loss - 0.01, loss, loss + 0.01, loss]


NOISY = [0.3, 0.7, 0.4, 0.6]  # mean 0.5, so wide that it may as well be another's
WITHIN = "Within the range of its meta-training, 10 to 100 steps, L3RS has a lower test loss than the best baseline in "


def joined(*parts: Results) -> Results:
    return dataclasses.replace(parts[0], records=[r for part in parts for r in part.records])


def test_verdict_won() -> None:
    ours, theirs, worse = ({10: around(x), 100: around(x / 2)} for x in (0.5, 0.8, 0.9))
    ratios = [
        Speedup("", label, horizon, ratio, ratio, ratio)
        for label, horizon, ratio in (
            ("adam/a", 10, 2.0),
            ("adam/a", 100, 4.0),
            ("sgd/a", 10, 3.0),
            ("sgd/a", 100, 3.5),
        )
    ]
    found = made({L3RS: ours, "adam/a": theirs, "sgd/a": worse}, speedup=ratios)
    assert report.verdict(found) == (
        f"{WITHIN}2 of 2 comparisons (2 horizons). By the paired 95 % interval it is better in 2, worse in 0 and not "
        "distinguishable in 0. The median speed-up in steps is 2.00× over the quickest baseline."
    )


def test_verdict_lost() -> None:
    found = made({L3RS: {10: around(0.9)}, "adam/a": {10: around(0.5)}, "sgd/a": {10: around(2.0)}})
    assert report.verdict(found) == (
        f"{WITHIN}0 of 1 comparison (1 horizon). By the paired 95 % interval it is better in 0, worse in 1 and not "
        "distinguishable in 0."
    )


def test_verdict_undecided_although_the_mean_is_lower() -> None:
    found = made({L3RS: {10: NOISY}, "adam/a": {10: [0.6, 0.4, 0.5, 0.55]}})
    assert report.verdict(found) == (
        f"{WITHIN}1 of 1 comparison (1 horizon). By the paired 95 % interval it is better in 0, worse in 0 and not "
        "distinguishable in 1."
    )


def test_verdict_beyond_the_range_names_settings() -> None:
    def one(setting: str, beyond: float | list[float]) -> Results:
        theirs = {10: around(0.8), 500: around(0.5)}
        row = beyond if isinstance(beyond, list) else around(beyond)
        return made(
            {L3RS: {10: around(0.5), 500: row}, "adam/a": theirs, "sgd/a": {10: around(0.9), 500: around(0.1)}}, setting
        )

    found = joined(one("A: x", 0.3), one("B: x", 0.9), one("C: x", NOISY), one("D: x", 0.4))
    sentences = Findings(found).verdict()
    assert sentences[0] == f"{WITHIN}4 of 4 comparisons (4 settings × 1 horizon)."
    assert sentences[-1] == (
        "Beyond the range, compared with the best tuned Adam, it is at 500 steps better in A and D, worse in B and "
        "not distinguishable in C."
    )


def test_verdict_beyond_the_range_in_one_setting_has_the_losses() -> None:
    losses = {
        L3RS: {10: around(0.5), 500: around(0.9), 1000: NOISY},
        "sgd/a": {10: around(0.8), 500: around(0.2), 1000: around(0.5)},
    }
    assert Findings(made(losses)).verdict()[-1] == (
        "Beyond the range, compared with the best baseline, it is at 500 steps worse (0.900 against 0.200); at 1,000 "
        "steps not distinguishable (0.500 against 0.500)."
    )


def test_verdict_of_one_seed_claims_nothing() -> None:
    found = made({L3RS: {10: [0.1], 500: [0.1]}, "adam/a": {10: [0.9], 500: [0.9]}})
    assert report.verdict(found) == (
        f"{WITHIN}1 of 1 comparison (1 horizon). One seed gives no interval, so how much of this is chance cannot be "
        "said. Beyond the range, compared with the best tuned Adam, it is at 500 steps not distinguishable (0.100 "
        "against 0.900)."
    )


def test_verdict_without_a_range_or_within_none_of_it_or_without_baselines() -> None:
    losses = {L3RS: {20: around(0.5)}, "adam/a": {20: around(0.9)}}
    assert report.verdict(made(losses, trained=None)).startswith(
        "At 20 steps (the checkpoint does not name its range) L3RS has a lower test loss than the best baseline "
        "in 1 of 1 comparison (1 horizon)."
    )
    assert report.verdict(made(losses, trained=(1, 10))) == (
        "None of the evaluated horizons is in the range of L3RS's meta-training, 1 to 10 steps. Beyond the range, "
        "compared with the best tuned Adam, it is at 20 steps better (0.500 against 0.900)."
    )
    assert report.verdict(made({L3RS: {20: [0.5]}})) == "There is no baseline to compare L3RS with."


def test_a_baseline_that_diverged_is_no_proof_and_l3rs_that_diverged_has_lost() -> None:
    nan = [math.nan, 0.9, 0.9, 0.9]
    theirs = Findings(made({L3RS: {10: around(0.5)}, "adam/a": {10: nan}}))
    assert theirs.tally() == {"all": 1, "lower": 1, "better": 0, "worse": 0, "undecided": 1}
    ours = Findings(made({L3RS: {10: nan}, "adam/a": {10: around(0.5)}}))
    assert ours.tally() == {"all": 1, "lower": 0, "better": 0, "worse": 1, "undecided": 0}


def test_infinite_speedups() -> None:
    losses = {L3RS: {10: around(0.5), 100: around(0.5)}, "adam/a": {10: around(0.9), 100: around(0.9)}}
    ratios = [Speedup("", "adam/a", h, None, None if h == 100 else 3.0, None) for h in (10, 100)]
    findings = Findings(made(losses, speedup=ratios))
    assert findings.speedup("", "adam/a", 10) == Interval(math.inf, 3.0, math.inf)
    assert findings.speedup("", "adam/a", 100) == Interval(math.inf, math.inf, math.inf)
    assert "The median speed-up in steps is ∞" in report.verdict(findings.results)
    alone = made({k: {h: row[:1] for h, row in v.items()} for k, v in losses.items()}, speedup=ratios)
    found = Findings(alone).speedup("", "adam/a", 10)
    assert found is not None
    assert words.bounds(found, "ratio") == ""
    diverged = made({**losses, L3RS: {10: [math.nan] * 4, 100: around(0.5)}}, speedup=ratios)
    assert Findings(diverged).speedup("", "adam/a", 10) is None


def test_strongest_is_the_best_schedule_of_each_family() -> None:
    losses = {L3RS: 0.1, "a/constant": 0.9, "a/cosine": 0.2, "b/constant": 0.3, "b/cosine": 0.4, "c/cosine": math.nan}
    findings = Findings(made({label: {h: [x * h] for h in (1, 10)} for label, x in losses.items()}))
    assert findings.strongest(9) == ["a/cosine", "b/constant", "c/cosine"]
    assert findings.strongest(1) == ["a/cosine"]
    assert findings.ranked == [L3RS, "a/cosine", "b/constant", "b/cosine", "a/constant", "c/cosine"]


def costs(ours: float, theirs: float) -> list[Cost]:
    return [Cost("", L3RS, ours, 3.0), Cost("", "adam/a", theirs, 2.0)]


def test_payback_by_hand() -> None:
    """Adam needs 40 steps for the accuracy that L3RS has after 10: 40 · 0.5 − 10 · 1.0 = 10 s saved."""
    losses = {L3RS: {10: [0.5] * 2, 40: [0.4] * 2}, "adam/a": {10: [0.9] * 2, 40: [0.5] * 2}}
    grid = {"inner_valid_loss": [1.0] * 5, "seeds": 2, "chosen": 1.0, "at_edge": False, "learning_rate": [1.0] * 5}
    found = made(losses, trained=(10, 10), costs=costs(1.0, 0.5), spent={"seconds": 95.0})
    found = dataclasses.replace(found, tuning={"": {"adam/a": {"10": grid, "40": grid}}})
    (paid,) = Findings(found).payback()
    assert (paid.steps, paid.baseline_steps, paid.reached) == (10, pytest.approx(40), True)
    assert paid.saved == pytest.approx(10)
    assert paid.fine_tunings == 10
    assert paid.runs == 10
    assert paid.saved_tuned == pytest.approx(10 + 10 * 20)
    assert paid.fine_tunings_tuned == 1


def test_payback_never_and_never_reached() -> None:
    losses = {L3RS: {10: [0.5] * 2, 40: [0.4] * 2}, "adam/a": {10: [0.9] * 2, 40: [0.5] * 2}}
    slow = made(losses, trained=(10, 10), costs=costs(9.0, 0.5), spent={"seconds": 95.0})
    assert math.isinf(Findings(slow).payback()[0].fine_tunings)
    unreached = {**losses, "adam/a": {10: [0.9] * 2, 40: [0.8] * 2}}
    (paid,) = Findings(made(unreached, trained=(10, 10), costs=costs(1.0, 0.5), spent={"seconds": 95.0})).payback()
    assert not paid.reached
    assert (paid.saved, paid.fine_tunings) == (pytest.approx(10), 10)  # of the 40 steps it had at most
    assert _paid(paid, paid.fine_tunings) == "≤ 10"
    assert _paid(paid, math.inf) == "not known"
    assert _paid(Findings(slow).payback()[0], math.inf) == "never"
    assert Findings(made(losses)).payback() == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.3119, "0.312"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234"), (-0.5, "−0.500"), (0.0, "0"),
     (math.nan, "–"), (math.inf, "∞"), (4.2e-5, "4.2e−5"), (0.02, "0.020")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert words.number(value) == text


def test_words() -> None:
    assert [words.tick(x) for x in (3e-4, 1.5e-5, 0.003, 0.5, 20, 2000, -1)] == [
        "3e−4",
        "1.5e−5",
        "0.003",
        "0.5",
        "20",
        "2,000",
        "−1",
    ]
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.short("A: x") == "A"
    assert words.short("") == "the task"
    assert [words.duration(s) for s in (2e-5, 0.5, 60, 544.8, 9000)] == [
        "20.0 µs",
        "500 ms",
        "60.0 s",
        "9.08 min",
        "2.5 h",
    ]
    assert [words.about(s) for s in (0.1, 400, 9000, 9e5)] == ["1 s", "7 min", "2 h", "10.4 days"]


def test_ticks_are_round_and_few() -> None:
    for low, high in ((0.21, 0.9), (1, 1000), (0.5, 0.52), (3e-4, 0.02)):
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 7
        assert all(low <= tick <= high for tick in ticks)


def test_what_a_layer_is() -> None:
    resnet = {
        "head/bias": 1,
        "head/kernel": 2,
        "stages/0/conv/kernel": 4,
        "stages/0/norm/scale": 1,
        "stages/0/norm/bias": 1,
        "stem/conv/kernel": 4,
    }
    found = decisions.kinds(list(resnet), [[3] * rank for rank in resnet.values()])
    assert [tuple(kind) for kind in found] == [
        ("output", "bias"),
        ("output", "kernel"),
        ("hidden", "kernel"),
        ("norm", "scale"),
        ("norm", "bias"),
        ("input", "kernel"),
    ]
    mlp = [f"layers/{i}/kernel" for i in (0, 1, 10, 2)]
    assert [k.place for k in decisions.kinds(mlp, [[3, 3]] * 4)] == ["input", "hidden", "output", "hidden"]
    assert decisions.kinds(["w"], [[3]]) == [("norm", "scale")]


def test_terminal_table() -> None:
    results = made({L3RS: {10: NOISY}, "adam/a": {10: around(0.5)}, "sgd/a": {10: [math.nan] * 4}})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(results, ""))
    text = console.export_text()
    assert "≈ 0.500 (95.0 %)" in text
    assert [text.index(label) for label in ("L3RS", "adam/a", "sgd/a")] == sorted(
        map(text.index, ("L3RS", "adam/a", "sgd/a"))
    )


class _Page(HTMLParser):
    """Checks nesting while it reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check_page(file: Path) -> _Page:
    """Well-formed, self-contained, and the same in light and dark."""
    source = file.read_text()
    page = _Page(source)
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values(), default=1) == 1
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"""(?:href|src|url\()\s*=?\s*["'(]?\s*(?:https?:)?//""", source)
    assert not re.search(r"@import|/root|/home|/work", source)
    for used in re.findall(r'(?:href="|url\()#([^")]+)', source):
        assert used in ids
    assert "@media screen and (prefers-color-scheme: dark)" in source
    assert "@media print" in source
    defined = set(re.findall(r"(--\w+):", source))
    assert set(re.findall(r"var\((--\w+)\)", source)) <= defined | {"--share", "--width"}
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs.get("aria-hidden") or (attrs.get("role") == "img" and attrs.get("aria-label"))
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if tag == "html":
            assert attrs["lang"] == "en"
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(full(2), tmp_path_factory.mktemp("report"))


def test_page_of_everything(written: Path) -> None:
    page = check_page(written)
    results = full(2)
    for sentence in (*Findings(results).verdict(), *results.notes):
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
    page = check_page(report.write(results, tmp_path))
    assert "Configuration" not in page.text
    assert "What L3RS decides" not in page.text
    assert ("What to know" in page.text) == bool(results.notes)
    assert ("Along a run" in page.text) == bool(results.curves)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PROBE = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, .unseen')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className);
  parent.document.title = JSON.stringify({inner: innerWidth, width: document.documentElement.scrollWidth, wide,
    paper: getComputedStyle(document.body).backgroundColor});
})</script>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def check_in_a_browser(source: str, folder: Path, width: int, scheme: str) -> None:
    """Everything opened, nothing sticks out to the right, the console is silent, and the paper is light or dark."""
    source = source.replace("<details>", "<details open>").replace("</main>", f"</main>{_PROBE}")
    page = folder / "page.html"
    # A frame, because a browser's window is never as narrow as a phone.
    page.write_text(
        f'<!DOCTYPE html><html style="color-scheme: light dark"><body style="margin: 0"><iframe width="{width}" '
        f'height="900" style="border: 0" srcdoc="{html.escape(source)}"></iframe></body></html>'
    )
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    shown = browse(page, "--window-size=1400,1000", preferred, "--dump-dom")
    assert "CONSOLE" not in shown.stderr
    title = re.search(r"<title>({.*?})</title>", shown.stdout)
    assert title
    found = json.loads(title[1])
    assert found["inner"] == width
    assert found["width"] <= width
    assert found["wide"] == []
    brightness = np.mean([int(x) for x in re.findall(r"\d+", found["paper"])[:3]])
    assert (brightness > 128) == (scheme == "light")


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


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


def test_what_iomt_chose_is_drawn(tmp_path: Path) -> None:
    results = full()
    page = report.write(results, tmp_path).read_text()
    assert (tmp_path / "switches-0.png").is_file()
    assert page.count("20 stages, 4 of sgd, 4 of adam, 4 of rmsprop, 4 of sgdm, 4 of adagrad, 1 diverged.") == 2
    assert "What IOMT chooses" not in report.write(dataclasses.replace(results, switches=[]), tmp_path).read_text()
    kept = Results.load(results.save(tmp_path / "new")).switches
    assert kept == results.switches


def test_what_mada_learned_is_drawn(tmp_path: Path) -> None:
    page = report.write(full(), tmp_path).read_text()
    assert "What MADA learns" in page
    assert (tmp_path / "coefficients-0.png").is_file()
    assert page.count("β1, first moment over the steps in") == 2  # a panel in each of two settings
    assert "What MADA learns" not in report.write(dataclasses.replace(full(), coefficients=[]), tmp_path).read_text()
    (tmp_path / "old").mkdir()
    saved = json.loads(full().save(tmp_path / "new").read_text())
    del saved["coefficients"], saved["switches"]  # as results were saved before there were any
    (tmp_path / "old" / "results.json").write_text(json.dumps(saved))
    assert Results.load(tmp_path / "old" / "results.json").coefficients == []
