"""Pages of results that others have made: names that matplotlib reads, folders with links, values of any kind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain import report
from metatrain.config import UserError
from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import Results
from tests.metatrain.synthetic import full


def test_dollar_signs_in_names_and_links_in_the_folder(tmp_path: Path) -> None:
    name = r"A: $\frac{x}$ and $y_{$"
    parts = {}
    for field in ("records", "speedup", "curves", "paths", "coefficients", "switches", "costs"):
        parts[field] = [dataclasses.replace(part, setting=name) for part in getattr(full(1), field)]
    results = dataclasses.replace(full(1), **parts, tuning={name: next(iter(full(1).tuning.values()), {})})
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "results"
    results.save(folder)
    for file in ("report.html", "horizons-loss.png", "horizons-loss.svg"):
        (folder / file).symlink_to(victim)
    page = report.write(Analysis(Results.load(folder / "results.json")), folder)
    assert r"$\frac{x}$" in page.read_text()
    assert victim.read_text() == "mine"
    assert (folder / "horizons-loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "horizons-loss.png").is_symlink()


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["<script>alert(1)</script>", "{{ 7 * 7 }}", "$x_{$", "../../x", "\x1b[2J", "l3rs", "%n%s"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@functools.cache
def _small() -> dict[str, Any]:
    """A results.json with something in every part, as JSON."""
    results = full(1)
    horizons = (30, 500)
    some = {
        name: [part for part in getattr(results, name) if getattr(part, "horizon", 30) in horizons]
        for name in ("records", "speedup", "curves")
    }
    with tempfile.TemporaryDirectory() as folder:
        dataclasses.replace(results, **some).save(Path(folder))
        return dict(json.loads((Path(folder) / "results.json").read_text()))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a tree of JSON; of a list, to its first and last items alone."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from _places(value[i], (*path, i))


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_any_value_anywhere_is_a_page_or_a_sentence(data: st.DataObject) -> None:
    """What is drawn says nothing as markup, and what cannot be drawn is refused in one line."""
    changed = copy.deepcopy(_small())
    path = data.draw(st.sampled_from(sorted(set(_places(changed)) - {()}, key=str)))
    node: Any = changed
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = data.draw(_VALUES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        file.write_text(json.dumps(changed))
        page, refusal = _page(file)
    assert refusal is None or ("results.json" in refusal and "\n" not in refusal)
    assert "<script>alert" not in page
    assert page or refusal


def _page(file: Path) -> tuple[str, str | None]:
    """The page of a results.json, or why there is none."""
    try:
        return report.write(Analysis(Results.load(file)), file.parent).read_text(), None
    except UserError as error:
        return "", str(error)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("records", 0, "seed"), 99, "it has . records of"),
        (("curves", 0, "loss"), [1.0], "a curve has lists of"),
        (("paths", 0, "mix"), [], "a path has"),
        (("paths", 0, "mix", 0), [], "a path has lists of"),
        (("coefficients", 0, "values", "c"), [], "coefficients has lists"),
        (("coefficients", 0, "values"), {"q": [1.0]}, "coefficients"),
        (("switches", 0, "losses"), [], "a history has lists of"),
        (("switches", 0, "stages"), [], "no stages"),
        (("switches", 0, "stages", 0), {}, "stages"),
        (("costs", 0, "seconds_a_step"), 0, "a cost has 0"),
        (("tuning",), {"A": {"sgdm": {"30": None}}}, "tuning"),
        (("tuning",), {"A": {"sgdm": {"many": {}}}}, "tuning"),
    ],
    ids=str,
)
def test_parts_that_do_not_belong_together(path: tuple[Any, ...], value: Any, sentence: str, tmp_path: Path) -> None:
    changed = copy.deepcopy(_small())
    node: Any = changed
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=sentence) as refused:
        Results.load(tmp_path / "results.json")
    assert "\n" not in str(refused.value)
