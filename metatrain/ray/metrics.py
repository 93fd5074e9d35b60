"""Figures of a run for Prometheus: Ray's nodes export them, with the prefix `ray_`, beside Ray's own.

configs/cluster/grafana-dashboard.json shows them.
"""

from __future__ import annotations

import os
import socket

RUN_FIGURES = {
    "generation": "Generations done.",
    "meta_loss_mean": "Mean meta-loss of the candidates of the last generation.",
    "meta_loss_best": "Lowest meta-loss of a candidate of the last generation.",
    "theta_norm": "Norm of the meta-parameters at the centre of the search.",
    "horizon": "Inner steps of the last generation.",
    "seconds": "Duration of the last generation.",
    "candidate_steps_per_s": "Candidate-steps a second in the last generation.",
    "workers": "Workers at the end of the last generation.",
    "lost": "Workers lost since the start of the run.",
    "duplicated": "Shards started twice since the start of the run.",
    "requeued": "Candidates evaluated again because their worker was lost, since the start of the run.",
    "stale": "Answers that came too late, since the start of the run.",
    "rejected": "Unusable answers since the start of the run.",
    "waited": "Seconds without any worker since the start of the run.",
}
_WORKER = {
    "shards": "Shards that a worker has evaluated.",
    "candidate_steps": "Candidate-steps that a worker has computed.",
    "busy_seconds": "Seconds that a worker has spent on shards.",
}


class RunGauges:
    """The figures of a run's last generation, as gauges `l3rs_run_…` with the tag `run`; see `metatrain.outer.sinks`.

    Args:
      run: its name.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            key: Gauge(f"l3rs_run_{key}", text, ("run",)).set_default_tags({"run": run})
            for key, text in RUN_FIGURES.items()
        }

    def write(self, generation: int, figures: dict[str, float]) -> None:
        for name, value in {**figures, "generation": generation + 1}.items():
            if name in self._gauges:
                self._gauges[name].set(value)

    def close(self) -> None:
        pass


class WorkerCounters:
    """What a worker has done, as counters `l3rs_worker_…` with the tag `worker`, its machine and process."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        tags = {"worker": f"{socket.gethostname()}:{os.getpid()}"}
        self._counters = {
            key: Counter(f"l3rs_worker_{key}", text, ("worker",)).set_default_tags(tags)
            for key, text in _WORKER.items()
        }

    def add(self, candidate_steps: int, seconds: float) -> None:
        """Count a shard."""
        for name, value in (("shards", 1), ("candidate_steps", candidate_steps), ("busy_seconds", seconds)):
            if value > 0:
                self._counters[name].inc(value)
