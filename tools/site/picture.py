"""The picture of the README and of the home page, from an evaluation, in light and dark.

    python -m tools.site.picture runs/evaluation-resnet20-imagenet25/results.json docs/images/resnet20

writes `resnet20-light.svg` and `resnet20-dark.svg`: the report's own figure of test loss and speed-up over the horizon,
for the first setting.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from pathlib import Path

from metatrain.evaluation.analysis import Analysis
from metatrain.evaluation.records import Results
from metatrain.report import figures, theme

_STYLE = Path(theme.__file__).with_name("templates") / "style.css"


def main(results: str, destination: str) -> None:
    plate = figures.horizons(Analysis(Results.load(results)), "loss")
    plate = dataclasses.replace(plate, panels=[plate.panels[0]._replace(title="Test loss"), plate.panels[-1]])
    with tempfile.TemporaryDirectory() as folder:
        plate.save(Path(folder))
        text = (Path(folder) / f"{plate.name}.svg").read_text(encoding="utf-8")
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r"font: ((?:bold )?[\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = text.replace(f"fill: {theme.PAPER}", "fill: none", 1)  # the page's own colour is behind it
    text = re.sub(r"\s*\n\s*", "\n", text).strip() + "\n"
    Path(f"{destination}-light.svg").write_text(text, encoding="utf-8")
    Path(f"{destination}-dark.svg").write_text(_dark(text), encoding="utf-8")


def _dark(text: str) -> str:
    """The same in the colours that the report has in the dark."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in _STYLE.read_text().split("@media")[:2]
    )
    names = {**{light[name]: name for name in dark if name in light}, theme.PAPER: "paper"}
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: dark.get(names.get(colour[0], ""), colour[0]), text)


if __name__ == "__main__":
    main(*sys.argv[1:])
