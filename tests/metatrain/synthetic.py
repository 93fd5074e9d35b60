"""Results computed by a formula, with everything that a page can show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from l3rs.baselines import iomt
from l3rs.baselines.mada import DOMAIN
from metatrain.evaluation.records import (
    L3RS,
    CoefficientPath,
    Cost,
    Curve,
    DecisionPath,
    Record,
    Results,
    Speedup,
    SwitchHistory,
)
from metatrain.evaluation.statistics import area_under_curve, speedup

SETTINGS = (
    "A: resnet8(imagenet → imagenet25)",
    "B: resnet8(imagenet → places25)",
    "C: resnet8(places → imagenet25)",
    "D: resnet8(places → places25)",
    "E: resnet8(random → imagenet25)",
)
HORIZONS = (10, 30, 100, 200, 500, 1000)
BASELINES = tuple(
    f"{name}/{schedule}" for name in ("adam", "sgdm", "lion", "mada") for schedule in ("constant", "cosine")
)
LAYERS = [
    (f"dense_{i}/{leaf}", shape)
    for i, wide in enumerate(([196, 64], [64, 64], [64, 10]))
    for leaf, shape in (("bias", wide[1:]), ("kernel", wide))
]


def switched() -> tuple[list[dict[str, Any]], list[float | None]]:
    """Stages and losses of a run of IOMT in which one stage diverged."""
    names = ("sgd", "adam", "rmsprop", "sgdm", "adagrad")
    stages = []
    for i in range(20):
        chosen = "initial" if i < 8 else "surrogate"
        stage = iomt.Stage(10 * i, 10, names[i % 5], {"learning_rate": 0.1}, 0.1, chosen, i == 3, 0.01, ())
        stages.append({**stage._asdict(), "notes": []})
    losses: list[float | None] = [2.3 * 0.99**step for step in range(201)]
    losses[35] = None
    return stages, losses


def full(count: int = 5) -> Results:
    """`count` settings, six horizons (the last two beyond meta-training), eight baselines, six seeds."""
    settings = SETTINGS[:count]
    rng = np.random.default_rng(0)
    records, curves = [], []
    for s, setting in enumerate(settings):
        common = rng.normal(0, 0.01, 6)
        for o, label in enumerate((L3RS, *BASELINES)):
            for horizon in HORIZONS:
                # L3RS is far ahead when steps are few, and falls behind beyond its range.
                lead = 0.42 - 0.125 * math.log10(horizon) * (1 + 0.12 * s) if label == L3RS else 0.02 * (o % 5)
                loss = (0.25 + 0.05 * s) + 2.6 * (horizon + 4) ** -0.42 * (1 + (o > 0) * 0.04 * o - lead * (o == 0))
                loss = loss * (1 + 0.03 * lead * (o > 0)) + common + rng.normal(0, 0.012, 6)
                accuracy = np.clip(1 - loss / 3.2, 0.01, 0.99)
                steps = sorted({math.ceil(horizon * (k / 16) ** 2) for k in range(17)})
                shape = [1 / (1 + 3 * k / horizon) for k in steps]
                falls = [float(3.2 - (3.2 - loss.mean()) * (1 - x) / (1 - shape[-1])) for x in shape]
                auc = area_under_curve(steps, falls)
                curves.append(Curve(setting, label, horizon, steps, list(falls), [1 - x / 3.4 for x in falls]))
                records += [
                    Record(
                        setting,
                        label,
                        horizon,
                        i,
                        float(loss[i]),
                        float(accuracy[i]),
                        0.1,
                        {} if o == 0 else {"learning_rate": 0.01},
                        auc,
                    )
                    for i in range(6)
                ]
    bare = Results("", records, [], {})
    ratios = []
    for setting in settings:
        ours = bare.accuracy_curve(setting, L3RS)
        for label in BASELINES:
            theirs = bare.accuracy_curve(setting, label)
            for at, horizon in enumerate(HORIZONS):
                found = [x if math.isfinite(x) else None for x in speedup(HORIZONS, ours, theirs, at)]
                ratios.append(Speedup(setting, label, horizon, *found))
    rates = [2.0**-k for k in range(14, 3, -1)]
    grid = {"learning_rate": rates, "inner_valid_loss": [1.0] * 11, "seeds": 3, "chosen": rates[5], "at_edge": False}
    edge = {**grid, "learning_rate": [0.1] * 23, "inner_valid_loss": [1.0] * 23, "chosen": 2.0, "at_edge": True}
    t = np.arange(100)[:, None, None] / 99
    away = np.clip(0.15 + 0.5 * t + 0.06 * np.arange(6)[:, None] * (1 - t) + 0.02 * np.sin(20 * t), 0, 1)
    size = 3e-3 * np.exp(-2.2 * t[..., 0] + 0.3 * np.arange(6) * (1 - t[..., 0]))
    return Results(
        optimizer="runs/digits-mlp/optimizer",
        records=records,
        speedup=ratios,
        tuning={
            setting: {
                label: {str(h): edge if (label, h) == ("mada/cosine", 1000) else grid for h in HORIZONS}
                for label in BASELINES
            }
            for setting in settings
        },
        curves=curves,
        paths=[
            DecisionPath(
                setting,
                100,
                [n for n, _ in LAYERS],
                [x for _, x in LAYERS],
                ["adam", "sgd"],
                np.concatenate([1 - away, away], -1).tolist(),
                size.tolist(),
            )
            for setting in settings[:2]
        ],
        coefficients=[
            CoefficientPath(
                setting,
                label,
                list(range(1, 101)),
                {
                    name: (low + (high - low) * (1 - 0.4 * t[:, 0, 0] ** power)).tolist()
                    for name, (low, high) in DOMAIN.items()
                    if name != "learning_rate"
                },
            )
            for setting in settings[:2]
            for label, power in (("mada/constant", 1), ("hyper_adam/constant", 3))
        ],
        switches=[SwitchHistory(setting, "iomt/constant", *switched()) for setting in settings[:2]],
        costs=[
            Cost(SETTINGS[0], label, 1e-3 * (1 + 0.1 * i), 2.0 if i else 3.1)
            for i, label in enumerate((L3RS, *BASELINES))
        ],
        notes=[
            f"{settings[-1]}: mada/cosine has its best learning rate for 1000 steps, 2, at the edge of a grid of 23",
            "lion/warmup_cosine was left out: it has no such schedule",
        ],
        meta_training={
            "horizon": {"min": 10, "max": 200},
            "generations": 1000,
            "candidate_steps": 2_059_552,
            "seconds": 544.8,
        },
        environment={"date": "2026-11-22", "versions": {"jax": "0.8", "l3rs": "0.1"}, "cores": 2},
        config={"name": "digits-mlp", "task": {"name": "digits"}, "outer": {"steps": 1000, "sigma": 0.05}},
    )


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


NOISY = [0.3, 0.7, 0.4, 0.6]  # mean 0.5, with an interval that contains most other means


def costs(ours: float, theirs: float) -> list[Cost]:
    return [Cost("", L3RS, ours, 3.0), Cost("", "adam/a", theirs, 2.0)]
