"""The page of an evaluation: its content, in the order of a reader's questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.payback import Payback, paybacks
from metatrain.report import coefficients, decisions, figures, formatting, switches, tables
from metatrain.report.html import write_page
from metatrain.report.plates import Plate
from metatrain.report.theme import swatch
from metatrain.report.verdict import verdict
from metatrain.report.zoo import zoo


class Figures(NamedTuple):
    """A plate as the page shows it."""

    name: str
    panels: list[tuple[str, Markup]]  # title, SVG
    legend: list[tuple[str, Markup]]
    width: str  # of a panel that stands alone
    single: bool


class Series(NamedTuple):
    """Plates of several settings: the first one is visible, the others can be unfolded."""

    first: Figures
    others: list[Figures]
    summary: str  # of the others


def write_report(analysis: Analysis, folder: Path) -> Path:
    """Write `report.html`, and the plates as files."""
    folder.mkdir(parents=True, exist_ok=True)
    single, per_setting = _plates(analysis)
    for plate in [*single.values(), *(plate for plates in per_setting.values() for plate in plates)]:
        if plate is not None:
            plate.save(folder)
    results = analysis.results
    paid = paybacks(analysis)
    return write_page(
        folder / "report.html",
        "report.html",
        **_head(analysis),
        **_captions(analysis),
        tiles=_tiles(analysis, paid),
        glance=tables.glance(analysis),
        zoo=zoo(analysis),
        plates={name: None if plate is None else _shown(plate) for name, plate in single.items()},
        series={name: _series(plates) for name, plates in per_setting.items()},
        sections=[tables.section(analysis, setting) for setting in results.settings()],
        costs=tables.costs(analysis),
        payback=[tables.payback_row(payback) for payback in paid],
        tuning=[grid for setting in results.settings() if (grid := tables.tuning(analysis, setting))],
        config=yaml.safe_dump(results.config, allow_unicode=True, sort_keys=False) if results.config else "",
        environment=_flat(results.environment),
        meta_training=_meta_training(results.meta_training),
    )


def _plates(analysis: Analysis) -> tuple[dict[str, Plate | None], dict[str, list[Plate]]]:
    """Plates of all settings together; and plates of one setting each."""
    results = analysis.results
    single = {
        "loss": figures.horizons(analysis, "loss"),
        "accuracy": figures.horizons(analysis, "accuracy"),
        "speedups": figures.speedups(analysis) if results.speedup and len(results.settings()) > 1 else None,
        "curves": figures.curves(analysis),
        "profile": figures.profile(analysis),
    }
    paths = {path.setting: path for path in results.paths}
    learned, chosen = _by_setting(results.coefficients), _by_setting(results.switches)
    return single, {
        "decisions": [decisions.plate(path, f"decisions-{i}") for i, path in enumerate(paths.values())],
        "learned": [coefficients.plate(of, f"coefficients-{i}") for i, of in enumerate(learned)],
        "chosen": [switches.plate(of, f"switches-{i}") for i, of in enumerate(chosen)],
    }


def _by_setting(parts: Sequence[Any]) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for part in parts:
        groups.setdefault(part.setting, []).append(part)
    return list(groups.values())


def _shown(plate: Plate) -> Figures:
    # These are safe as markup: made of our own text and escaped names.
    return Figures(
        plate.name,
        [(panel.title, Markup(svg)) for panel, svg in zip(plate.panels, plate.inline(), strict=True)],
        [(label, Markup(swatch(look))) for label, look in plate.legend],
        f"{7 * plate.size[0]:.1f}rem",
        len(plate.panels) == 1,
    )


def _series(plates: list[Plate]) -> Series | None:
    if not plates:
        return None
    first, *others = map(_shown, plates)
    return Series(first, others, f"In the other setting{'s' if len(others) > 1 else ''}")


def _head(analysis: Analysis) -> dict[str, Any]:
    """Title, byline, verdict and notes."""
    results = analysis.results
    counts = ((len(results.settings()), "setting"), (len(results.horizons()), "horizon"), (results.seeds(), "seed"))
    first, *others = verdict(analysis)
    return {
        "checkpoint": "/".join(Path(results.optimizer).parts[-2:]),
        "title": f"L3RS against {formatting.counted(len(results.baselines()), 'tuned baseline')}",
        "date": results.environment.get("date", ""),
        "scope": ", ".join(formatting.counted(count, noun) for count, noun in counts),
        "verdict": first,
        "verdict_more": " ".join(others),
        "notes": results.notes,
    }


def _captions(analysis: Analysis) -> dict[str, Any]:
    """What the sentences of the template depend on."""
    results = analysis.results
    return {
        "beyond": bool(analysis.beyond),
        "intervals": results.seeds() > 1,
        "seeds": formatting.counted(results.seeds(), "seed"),
        "families": "the strongest families" if len(results.baselines()) > 5 else "each family",
        "has_speedup": bool(results.speedup),
        "curve_steps": f"{figures.longest_inside(analysis):,}",
        "curve_range": bool(analysis.inside) and analysis.range_known,
        "many_settings": len(results.settings()) > 1,
        "costs_setting": formatting.short(results.costs[0].setting) if results.costs else "",
    }


def _tiles(analysis: Analysis, paid: list[Payback]) -> list[tuple[str, str]]:
    """The numbers of the verdict at a glance: number, and its meaning."""
    if not analysis.results.baselines() or not analysis.inside:
        return []
    tally = analysis.tally
    tiles = [(f"{tally['lower']} of {tally['all']}", "comparisons with a lower test loss than the best baseline")]
    if analysis.results.seeds() > 1:
        tiles.append((f"{tally['better']} : {tally['worse']}", "better : worse by the paired 95 % interval"))
    if (median := analysis.median_speedup) is not None:
        tiles.append((formatting.ratio(median), "median speed-up in steps over the quickest baseline"))
    if paid:
        where = f" in {formatting.short(paid[0].setting)}" if len(analysis.results.settings()) > 1 else ""
        count = tables.fine_tunings(paid[0], paid[0].fine_tunings)
        tiles.append((count, f"fine-tunings{where} until meta-training has paid for itself"))
    return tiles


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key} ") if isinstance(item, dict) else [(f"{prefix}{key}", str(item))]
    return rows


def _meta_training(info: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "horizon" in info:
        rows.append(("horizons", f"{info['horizon']['min']:,} … {info['horizon']['max']:,} steps"))
    counts = ("generations", "candidate_steps")
    rows += [(key.replace("_", "-"), f"{info[key]:,}") for key in counts if key in info]
    if "seconds" in info:
        rows.append(("wall-clock time", formatting.duration(float(info["seconds"]))))
    return rows
