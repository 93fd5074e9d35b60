"""configs/cluster/grafana-dashboard.json against the metrics that a Ray node exports during a run."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from metatrain.outer.loop import run
from metatrain.ray.metrics import RUN_FIGURES
from tests.metatrain.common import PATIENCE, small_config
from tests.metatrain.nodes import local_ray

DASHBOARD = Path(__file__).parents[2] / "configs" / "cluster" / "grafana-dashboard.json"
_NAME = r"\bray_\w+"


def _queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return variables + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def _exported(text: str) -> dict[str, set[str]]:
    """{metric: names of its labels} of Prometheus' text format."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_panels_fill_the_width_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own
    assert {x for x, _ in cells} == set(range(24))
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_figure_of_a_run_is_on_the_dashboard() -> None:
    shown = set(re.findall(_NAME, " ".join(_queries())))
    assert {f"ray_l3rs_run_{name}" for name in RUN_FIGURES} <= shown


@pytest.mark.slow
def test_a_node_exports_what_the_dashboard_asks_for(tmp_path: Path) -> None:
    with local_ray(num_cpus=2, _system_config={"metrics_report_interval_ms": 500}) as context:
        import ray

        own = context.address_info["node_id"]
        port = next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == own)
        task = {"name": small_config().task.name, "seconds": 0.3}
        outer = {"steps": 8, "population": 4}
        run(small_config(task=task, outer=outer, execution={"backend": "ray", "workers": 1}), tmp_path / "run")
        deadline, missing = time.monotonic() + PATIENCE, {"?"}
        while missing and time.monotonic() < deadline:
            time.sleep(1.0)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            exported = _exported(text)
            missing = {name for query in _queries() for name in re.findall(_NAME, query)} - set(exported)
        assert not missing
        for query in _queries():
            for name, labels in re.findall(rf"({_NAME})\{{(.*?)\}}", query):
                assert set(re.findall(r"(\w+)=", labels)) <= exported[name], query
            for labels in re.findall(r"by \((.*?)\)", query):
                for name in re.findall(_NAME, query):
                    assert set(labels.split(", ")) <= exported[name], query
        [generation] = re.findall(r'^ray_l3rs_run_generation\{.*run="small".*\} (\S+)$', text, re.MULTILINE)
        assert float(generation) == 8
        [steps] = re.findall(r"^ray_l3rs_worker_shards_total\{.*\} (\S+)$", text, re.MULTILINE)
        assert float(steps) >= 8
