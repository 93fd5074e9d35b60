"""The page of an evaluation: what stands in it, in the order of a reader's questions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from omegaconf import OmegaConf

from metatrain.evaluation.analysis import Findings, Payback
from metatrain.evaluation.results import L3RS
from metatrain.report import coefficients, decisions, figures, switches
from metatrain.report import formatting as words
from metatrain.report.figures import Plate
from metatrain.report.html import write_page
from metatrain.report.theme import swatch

_SHOWN = 8  # baselines in the visible table of a setting


class Cell(NamedTuple):
    text: str
    small: str = ""
    kind: str = ""  # classes of style.css
    mark: str = ""  # behind the text


class Row(NamedTuple):
    name: str
    cells: list[Cell]
    kind: str = ""


class Grid(NamedTuple):
    """A table: a row an optimizer, mostly; a column a horizon."""

    caption: str
    corner: str
    columns: list[Cell]
    rows: list[Row]


class Figures(NamedTuple):
    """A plate as the page wants it."""

    name: str
    titles: list[str]
    panels: list[Markup]
    legend: list[tuple[str, Markup]]
    width: float  # of a panel that stands alone, rem


class Section(NamedTuple):
    """The tables of a setting."""

    setting: str
    main: Grid
    hidden: int  # baselines that only the long tables have
    more: list[Grid]


def write_report(findings: Findings, folder: Path) -> Path:
    """`report.html`, and the plates as files."""
    folder.mkdir(parents=True, exist_ok=True)
    results = findings.results
    paths = {path.setting: path for path in results.paths}
    plates: dict[str, Plate | None] = {
        "loss": figures.horizons(findings, "loss"),
        "accuracy": figures.horizons(findings, "accuracy"),
        "speedups": figures.speedups(findings) if results.speedup and len(results.settings()) > 1 else None,
        "curves": figures.curves(findings),
        "profile": figures.profile(findings),
    }
    found = [decisions.plate(path, f"decisions-{i}") for i, path in enumerate(paths.values())]
    learned = [
        coefficients.plate([path for path in results.coefficients if path.setting == setting], f"coefficients-{i}")
        for i, setting in enumerate(dict.fromkeys(path.setting for path in results.coefficients))
    ]
    chosen = [
        switches.plate([history for history in results.switches if history.setting == setting], f"switches-{i}")
        for i, setting in enumerate(dict.fromkeys(history.setting for history in results.switches))
    ]
    for plate in [*plates.values(), *found, *learned, *chosen]:
        if plate is not None:
            plate.save(folder)
    return write_page(
        folder / "report.html",
        "report.html",
        findings=findings,
        results=results,
        words=words,
        checkpoint="/".join(Path(results.optimizer).parts[-2:]),
        verdict=findings.verdict(),
        tiles=_tiles(findings),
        glance=_glance(findings),
        plates={name: None if plate is None else _shown(plate) for name, plate in plates.items()},
        decisions=[_shown(plate) for plate in found],
        learned=[_shown(plate) for plate in learned],
        chosen=[_shown(plate) for plate in chosen],
        sections=[_section(findings, setting) for setting in results.settings()],
        costs=_costs(findings),
        payback=[_payback(p) for p in findings.payback()],
        tuning=[grid for setting in results.settings() if (grid := _tuning(findings, setting))],
        config=OmegaConf.to_yaml(OmegaConf.create(results.config)) if results.config else "",
        environment=_flat(results.environment),
        meta_training=_meta_training(results.meta_training),
    )


def _shown(plate: Plate) -> Figures:
    # Markup: both are made of our own text and escaped names.
    return Figures(
        plate.name,
        [panel.title for panel in plate.panels],
        [Markup(svg) for svg in plate.inline()],
        [(label, Markup(swatch(look))) for label, look in plate.legend],
        7 * plate.size[0],
    )


def _tiles(findings: Findings) -> list[tuple[str, str]]:
    """The verdict's numbers once more, for whoever reads nothing else: number, and what it is."""
    if not findings.results.baselines() or not findings.inside:
        return []
    tally = findings.tally()
    tiles = [(f"{tally['lower']} of {tally['all']}", "comparisons with a lower test loss than the best baseline")]
    if findings.results.seeds() > 1:
        tiles.append((f"{tally['better']} : {tally['worse']}", "better : worse by the paired 95 % interval"))
    if (median := findings.median_speedup()) is not None:
        tiles.append((words.ratio(median), "median speed-up in steps over the quickest baseline"))
    if paid := findings.payback():
        first = paid[0]
        where = f" in {words.short(first.setting)}" if len(findings.results.settings()) > 1 else ""
        tiles.append((_paid(first, first.fine_tunings), f"fine-tunings{where} until meta-training has paid for itself"))
    return tiles


def _heads(findings: Findings) -> list[Cell]:
    return [Cell(f"{h:,}", kind="beyond" if h in findings.beyond else "") for h in findings.results.horizons()]


def _glance(findings: Findings) -> Grid | None:
    """L3RS against the best baseline everywhere: settings × horizons."""
    results = findings.results
    if not results.baselines():
        return None
    marks = {"better": "▼", "worse": "▲", "undecided": "≈"}
    rows = []
    for setting in results.settings():
        cells = []
        for horizon in results.horizons():
            best = findings.best(setting, horizon)
            assert best is not None
            outcome = findings.outcome(setting, best, horizon)
            ours, theirs = (findings.mean(setting, label, horizon) for label in (L3RS, best))
            change = ours / theirs - 1 if theirs > 0 else math.nan
            text = words.percent(change, 0) if change <= 0 or math.isnan(change) else f"+{words.percent(change, 0)}"
            cells.append(Cell(f"{marks[outcome]} {text}", best, outcome))
        rows.append(Row(setting or "the task", cells))
    return Grid("Test loss of L3RS relative to the best baseline", "setting", _heads(findings), rows)


def _section(findings: Findings, setting: str) -> Section:
    ranked = findings.ranked_in(setting)
    theirs = [label for label in ranked if label != L3RS]
    top = set(theirs[:_SHOWN])
    shown = [label for label in ranked if label == L3RS or label in top]
    horizons = findings.results.horizons()
    lowest = {h: _lowest([findings.mean(setting, label, h) for label in ranked]) for h in horizons}
    highest = {h: max(findings.mean(setting, label, h, "accuracy") for label in ranked) for h in horizons}
    target = {h: max(findings.mean(setting, label, h, "accuracy") for label in theirs or ranked) for h in horizons}

    def grid(caption: str, labels: list[str], cell: Callable[[str, int], Cell]) -> Grid:
        rows = [
            Row(words.optimizer(label), [cell(label, h) for h in horizons], "ours" if label == L3RS else "")
            for label in labels
        ]
        return Grid(caption, "optimizer", _heads(findings), rows)

    def main(label: str, horizon: int) -> Cell:
        loss = findings.mean(setting, label, horizon)
        mark = {"undecided": "≈", "worse": "↓"}.get(_outcome(findings, setting, label, horizon), "")
        accuracy = words.percent(findings.mean(setting, label, horizon, "accuracy"))
        return Cell(words.number(loss), accuracy, "best" if loss == lowest[horizon] else "", mark)

    def loss(label: str, horizon: int) -> Cell:
        found = findings.interval(setting, label, horizon)
        return Cell(words.number(found.value), words.bounds(found), "best" if found.value == lowest[horizon] else "")

    def accuracy(label: str, horizon: int) -> Cell:
        found = findings.interval(setting, label, horizon, "accuracy")
        best = "best" if found.value == highest[horizon] else ""
        return Cell(words.percent(found.value), words.bounds(found, "percent"), best)

    def difference(label: str, horizon: int) -> Cell:
        found = findings.difference(setting, label, horizon)
        small = words.bounds(found, "signed")
        wins = words.percent(findings.results.win_rate(setting, label, horizon), 0)
        return Cell(words.signed(found.value), f"{small}{' · ' if small else ''}{wins} won",
                    _outcome(findings, setting, label, horizon))  # fmt: skip

    def speedup(label: str, horizon: int) -> Cell:
        found = findings.speedup(setting, label, horizon)
        return Cell(words.MISSING) if found is None else Cell(words.ratio(found.value), words.bounds(found, "ratio"))

    def to_target(label: str, horizon: int) -> Cell:
        steps = findings.results.steps_to(setting, label, target[horizon])
        seconds = steps * findings.results.seconds_a_step(label)
        text = words.number(round(steps, 1)) if math.isfinite(steps) else "∞"
        return Cell(text, "" if not math.isfinite(seconds) else words.duration(seconds))

    def area(label: str, horizon: int) -> Cell:
        return Cell(words.number(findings.mean(setting, label, horizon, "auc")))

    # A value, its interval and its win rate cannot be compared with those of L3RS itself.
    more = [
        grid("Test loss, mean and 95 % interval", ranked, loss),
        grid("Test accuracy, mean and 95 % interval", ranked, accuracy),
        grid("Test loss minus that of L3RS, paired 95 % interval, and the share of seeds that L3RS wins", theirs,
             difference),
        grid("Steps, and time, to the best baseline’s accuracy at each horizon", ranked, to_target),
        grid("Area under the test loss along the run, over its steps", ranked, area),
    ]  # fmt: skip
    if findings.results.speedup:
        more.insert(3, grid("Speed-up F: the baseline’s steps over L3RS’s, for its accuracy", theirs, speedup))
    return Section(
        setting,
        grid("Test loss, and accuracy below it", shown, main),
        len(theirs) - len(top),
        [g for g in more if g.rows],
    )


def _outcome(findings: Findings, setting: str, label: str, horizon: int) -> str:
    return "" if label == L3RS else findings.outcome(setting, label, horizon)


def _lowest(losses: list[float]) -> float:
    return min((x for x in losses if not math.isnan(x)), default=math.nan)


def _costs(findings: Findings) -> Grid | None:
    """Time and memory of a step: one schedule of each family, for schedules cost nothing."""
    costs = {cost.optimizer: cost for cost in findings.results.costs}
    labels = [label for label in [L3RS, *findings.strongest(len(costs))] if label in costs]
    if not labels:
        return None
    units = {
        family: next((c.seconds_a_step for c in costs.values() if words.family(c.optimizer) == family), math.nan)
        for family in ("sgd", "sgdm", "adam")
    }
    units = {family: seconds for family, seconds in units.items() if seconds > 0}
    longest = max(costs[label].seconds_a_step for label in labels)
    rows = []
    for label in labels:
        cost = costs[label]
        bar = f"{100 * cost.seconds_a_step / longest:.0f}"
        cells = [Cell(words.duration(cost.seconds_a_step), bar, "bar")]
        cells += [Cell(f"{cost.seconds_a_step / seconds:.2f}×") for seconds in units.values()]
        cells.append(Cell(f"{cost.state_floats_a_parameter:.2f}"))
        name = words.optimizer(label) if label == L3RS else words.family(label)
        rows.append(Row(name, cells, "ours" if label == L3RS else ""))
    heads = ["time a step", *(f"÷ {family}" for family in units), "state, floats a parameter"]
    return Grid("Cost of a training step", "optimizer", [Cell(head) for head in heads], rows)


def _paid(p: Payback, count: float) -> str:
    """A number of fine-tunings; only a bound is known where no baseline has L3RS's accuracy."""
    if math.isinf(count):
        return "never" if p.reached else "not known"
    return f"{'' if p.reached else '≤ '}{count:,.0f}"


def _payback(p: Payback) -> Row:
    steps = f"{p.baseline_steps:,.0f} steps" if p.reached else "never: ∞ steps"

    def saving(seconds: float) -> str:
        if seconds > 0:
            return f"{'' if p.reached else 'at least '}{words.duration(seconds)}"
        return f"none ({words.duration(-seconds)} more)" if p.reached else "not known"

    return Row(
        words.short(p.setting),
        [
            Cell(f"{p.steps:,} steps", words.duration(p.seconds)),
            Cell(steps, p.baseline),
            Cell(_paid(p, p.fine_tunings), saving(p.saved)),
            Cell(_paid(p, p.fine_tunings_tuned), f"{saving(p.saved_tuned)}, {words.counted(p.runs, 'run')}")
            if p.runs else Cell(words.MISSING),
        ],
    )  # fmt: skip


def _tuning(findings: Findings, setting: str) -> Grid | None:
    """The chosen learning rates, and how many values were tried."""
    grids = findings.results.tuning.get(setting) or {}
    if not grids:
        return None
    smallest = min(len(grid["inner_valid_loss"]) for of in grids.values() for grid in of.values())

    def cell(label: str, horizon: int) -> Cell:
        grid = grids[label].get(str(horizon))
        if grid is None:
            return Cell(words.MISSING)
        tried = len(grid["inner_valid_loss"])
        small = (
            f"{tried} tried" + (", grown" if tried > smallest else "") + (", at the edge" if grid["at_edge"] else "")
        )
        return Cell(words.number(grid["chosen"]), small, "worse" if grid["at_edge"] else "")

    horizons = findings.results.horizons()
    rows = [Row(label, [cell(label, h) for h in horizons]) for label in findings.ranked_in(setting) if label in grids]
    return Grid(f"{setting or 'The task'}: chosen learning rates", "optimizer", _heads(findings), rows)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key} ") if isinstance(item, dict) else [(f"{prefix}{key}", str(item))]
    return rows


def _meta_training(info: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "horizon" in info:
        rows.append(("horizons", f"{info['horizon']['min']:,} … {info['horizon']['max']:,} steps"))
    for key, shown in (("generations", "{:,}"), ("candidate_steps", "{:,}")):
        if key in info:
            rows.append((key.replace("_", "-"), shown.format(info[key])))
    if "seconds" in info:
        rows.append(("wall time", words.duration(float(info["seconds"]))))
    return rows
