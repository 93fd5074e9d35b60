"""The look of the page, of its figures and of the figures as files.

Figures are drawn in the colours of the light page. Inside the page each colour becomes the CSS variable of the same
name in `templates/style.css`, so that a figure follows the reader's choice of light or dark.
"""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline

INK, MUTED, RULE, SHADE, PAPER = "#23211f", "#6d6a65", "#dcd9d2", "#f4f2ec", "#fffffe"
# After Okabe and Ito, so that colour-blind readers can tell them apart. The first is L3RS.
SERIES = ("#d55e00", "#0072b2", "#009e73", "#b0478f", "#a07800", "#7a7466")
_VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", SHADE: "shade", PAPER: "paper",
    **{colour: f"c{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip
MARKERS = "os^Dv*"  # tell the series apart in greyscale prints
FILE_DPI = 200

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "l3rs",
    "text.parse_math": False,  # a dollar sign in the name of a setting is a dollar sign
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "xtick.major.width": 0.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 4,
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
}


class Look(NamedTuple):
    """How a series is drawn."""

    colour: str
    marker: str = ""
    width: float = 1.1
    dash: str = "-"  # of matplotlib: "-", "--", ":", "-."


def look(rank: int) -> Look:
    """The look of L3RS (rank 0), or of one of the baselines after it."""
    return Look(SERIES[rank], MARKERS[rank], 1.9 if rank == 0 else 1.1)


_DASHES = {"-": "", "--": "5 3", ":": "1.2 2.4", "-.": "5 2 1.2 2"}


def swatch(look: Look) -> str:
    """An SVG element with a piece of the line and its marker, for a legend in HTML."""
    colour = f"var(--{_VARIABLES[look.colour]})"
    dash = f' stroke-dasharray="{_DASHES[look.dash]}"' if _DASHES[look.dash] else ""
    parts = _marker(look.marker, colour)
    if look.width:
        parts = f'<path d="M1 6H29" style="stroke:{colour};stroke-width:{look.width + 0.4:.1f}"{dash}/>{parts}'
    return f'<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">{parts}</svg>'


def _marker(name: str, colour: str) -> str:
    if not name:
        return ""
    style = MarkerStyle(name)
    outline = style.get_path().transformed(style.get_transform()).interpolated(4 if name == "o" else 1)
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    pieces = []
    for points, code in outline.iter_segments(curves=True):
        pairs = points.reshape(-1, 2)
        pieces.append(letters.get(code, "Z"))
        if code != Outline.CLOSEPOLY:
            pieces.append(" ".join(f"{15 + 7 * x:.1f} {6 - 7 * y:.1f}" for x, y in pairs))
    return f'<path d="{"".join(pieces)}" style="fill:{colour}"/>'


def inline_svg(figure: Figure, name: str, message: str) -> str:
    """A figure as an SVG element for the page.

    Args:
      figure: drawn in the colours above.
      name: the prefix of its ids; unique in the page.
      message: a description, for readers who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box
    body = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    kept = set(re.findall(r"""(?:href="|url\()#([^")]+)""", body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in kept else "", body)
    body = re.sub(r"""(?:xlink:)?(href="|url\()#""", rf"\1#{name}-", body)
    # Round coordinates to hundredths of a point, but not the numbers between tags: those are labels.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*|font-size: ([\d.]+px); font-family: [^;\"]*", r"font-size: \1\2", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], body)
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{_escape(message)}">{body}</svg>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
