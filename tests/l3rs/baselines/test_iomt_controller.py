"""The controller of IOMT alone: its choices for made-up losses and parameters."""

import builtins
import collections
import importlib.util

import numpy as np
import optax
import pytest

import l3rs
from l3rs.baselines import iomt
from l3rs.baselines.iomt.compress import Compressor

TWO = {
    "left": iomt.Optimizer(optax.sgd, {"learning_rate": (0.1, 0.01)}),
    "right": iomt.Optimizer(optax.sgd, {"learning_rate": (0.1,), "momentum": (0.5, 0.9)}),
}
FEW = {"initial_stages": 6, "stage_steps": 5}


def falling(rate, rng, steps=5, noise=0.02):
    """Losses [steps + 1] that fall by this share at each step."""
    return 2.0 * np.exp(-rate * np.arange(steps + 1) + noise * rng.normal(size=steps + 1))


def play(rate, stages, *, space=TWO, seed=0, layers=lambda stage: [np.full((3, 2), float(stage))], **options):
    """The history of a simulated run in which losses fall by `rate(choice, stage)` at each step."""
    controller, rng = iomt.Controller(space, iomt.Options(**{**FEW, **options}), seed), np.random.default_rng(seed)
    for stage in range(stages):
        choice = controller.choose(layers(stage))
        controller.observe(falling(rate(choice, stage), rng))
    return controller.history


def without_time(history):
    return [stage._replace(seconds=0.0) for stage in history]


def how(history):
    return collections.Counter(stage.chosen for stage in history)


def test_prefers_the_better_choice():
    """One choice of four is better: after 6 random stages it gets most of the 24 that follow."""
    for seed in range(3):
        history = play(lambda c, _: 0.2 if c.hyperparameters.get("momentum") == 0.9 else 0.0, 30, seed=seed)
        late = history[18:]
        assert sum(stage.hyperparameters.get("momentum") == 0.9 for stage in late) >= 10


def test_the_state_of_the_network_matters():
    """Which optimizer is better depends on the parameters, which alternate between two points: the surrogates learn it
    from features that distinguish the points."""
    place = lambda stage: stage // 4 % 2  # noqa: E731

    def rate(choice, stage):
        return 0.2 if (choice.optimizer == "left") == (place(stage) == 0) else -0.2

    rng = np.random.default_rng(3)
    there = rng.normal(size=(2, 6, 4))

    def layers(stage):
        return [there[place(stage)] + 0.05 * rng.normal(size=(6, 4))]

    history = play(rate, 60, layers=layers, initial_stages=16)
    right = [(stage.optimizer == "left") == (place(i) == 0) for i, stage in enumerate(history)]
    assert sum(right[28:]) >= 0.85 * len(right[28:])
    assert sum(right[:16]) <= 12  # the random start does not reach this


def test_weighted_start_avoids_choices_that_failed():
    """After a stage of score -1 an optimizer's weight is ω_min; uniformly it is drawn every other time."""

    def count(start):
        rate = lambda c, _: -5.0 if c.optimizer == "left" else 0.1  # noqa: E731
        history = play(rate, 80, initial_stages=80, start=start, minimum_weight=0.02)
        assert all(stage.diverged == (stage.optimizer == "left") for stage in history)
        return sum(stage.optimizer == "left" for stage in history)

    # A good stage has a weight of a little more than 1/2, so the other's share is 0.04.
    assert count("weighted") <= 10
    assert count("uniform") >= 25


def test_ablations():
    history = play(lambda *_: 0.1, 9, switch="cyclical")
    assert [stage.optimizer for stage in history] == ["left", "right"] * 4 + ["left"]
    assert [stage.hyperparameters["learning_rate"] for stage in history[::2]] == [0.1, 0.01, 0.1, 0.01, 0.1]
    history = play(lambda *_: 0.1, 40, switch="random")
    assert how(history) == {"random": 40}
    assert len({str(stage.hyperparameters) for stage in history}) == 4
    for options in ({"halving": None}, {"transferability": 0.0}, {"start": "uniform"}, {"variant": "doit"}):
        history = play(lambda *_: 0.1, 12, **{"transferability": 0.5, **options})
        assert how(history) == {"initial": 6, "surrogate": 6}


@pytest.mark.parametrize(
    ("options", "explores"),
    [
        ({}, True),  # σ counts in full
        ({"transferability": 0.9}, False),  # .1 of it
        ({"transferability": 0.5}, True),  # .5
        ({"transferability": 0.9, "halving": 6}, True),  # 1 - .9 / 2
        ({"transferability": 0.9, "halving": 7}, False),  # not yet
        ({"transferability": 0.9, "halving": None}, False),
        ({"variant": "doit", "alpha": 0.1}, False),
        ({"variant": "doit", "alpha": 0.5}, True),
        ({"variant": "iomt", "alpha": 0.1}, True),
    ],
)
def test_equation_7_chooses(monkeypatch, options, explores):
    """After six stages one choice is known (mean 0.3, deviation 0.1) and one is not (0 and 1): the unknown one is
    chosen where more than a third of the deviation counts."""
    space = {name: iomt.Optimizer(optax.sgd, {"learning_rate": (0.1,)}) for name in ("known", "unknown")}
    controller = iomt.Controller(space, iomt.Options(**{**FEW, **options}), seed=0)
    predictions = [(np.array([0.3]), np.array([0.1])), (np.array([0.0]), np.array([1.0]))]
    monkeypatch.setattr(controller._surrogates, "predict", lambda _: predictions)
    for stage in range(6):
        controller.choose([np.full(2, stage)])
        controller.observe([2.0, 1.9])
    assert controller.choose([np.full(2, 6.0)]).optimizer == ("unknown" if explores else "known")


@pytest.mark.parametrize("switch", ["surrogate", "random"])
def test_a_seed_decides_everything(switch):
    runs = [play(lambda c, _: 0.1 * len(c.hyperparameters), 15, seed=seed, switch=switch) for seed in (0, 0, 1)]
    assert without_time(runs[0]) == without_time(runs[1])
    assert without_time(runs[0]) != without_time(runs[2])


@pytest.mark.parametrize("compressor", ["pca", "random_projection"])
def test_features(compressor):
    """Two layers that move apart, one that does not: features of mean 0 and total variance 1."""
    rng = np.random.default_rng(0)
    stages = [
        [rng.normal(size=(90, 70)), np.full(3, 2.0), i * np.ones(5) + 0.1 * rng.normal(size=5)] for i in range(12)
    ]
    compress = Compressor(compressor, 2, seed=0)
    samples = [compress.sample(stage) for stage in stages]
    assert [x.size for x in samples[0]] == [4096, 3, 5]
    compress.fit(samples)
    features = compress.transform(samples)
    assert features.shape == (12, compress.width) == (12, 4)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)  # float32
    np.testing.assert_allclose(features.var(0).sum(), 1, rtol=1e-4)
    order = np.corrcoef(features[:, 2], np.arange(12))[0, 1]
    assert compressor == "random_projection" or abs(order) > 0.99  # the direction in which the layer went
    np.testing.assert_allclose(compress.transform(samples[3:4])[0], features[3], atol=1e-5)  # float32


def test_pca_is_the_projection_on_the_singular_vectors():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 6)) * [5, 3, 1, 1, 1, 1]
    compress = Compressor("pca", 2, seed=0)
    samples = [compress.sample([row]) for row in rows]
    compress.fit(samples)
    centred = rows - rows.mean(0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    expected /= expected.std(0) * np.sqrt(2)
    found = compress.transform(samples)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)  # float32; signs are free


@pytest.mark.slow  # Numba compiles for half a minute
def test_umap():
    pytest.importorskip("umap", reason="umap-learn is not installed")
    assert how(play(lambda *_: 0.1, 9, compressor="umap")) == {"initial": 6, "surrogate": 3}
    assert how(play(lambda *_: 0.1, 5, compressor="umap", initial_stages=1)) == {"initial": 1, "surrogate": 4}


def test_missing_umap_is_reported(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else find(name))
    with pytest.raises(l3rs.L3RSError, match="the compressor 'umap' needs umap-learn: pip install umap-learn"):
        iomt.Controller(TWO, iomt.Options(compressor="umap"))


@pytest.mark.parametrize("size", [1e14, 1e20, 1e38])
def test_huge_parameters(size):
    """A run that diverges and is not rolled back passes through such sizes: a note says what is too large."""
    rng = np.random.default_rng(0)
    layers = lambda stage: [(size if stage == 4 else 1.0) * rng.normal(size=(8, 3))]  # noqa: E731
    history = play(lambda *_: 0.1, 9, layers=layers, initial_stages=3, rollback=False)
    said = ["exceed 1e+15" in " ".join(stage.notes) for stage in history]
    assert said == [stage == 4 and size > 1e15 for stage in range(9)]
    assert np.isfinite([stage.score for stage in history]).all()


def test_missing_scikit_learn_is_reported_before_the_first_stage(monkeypatch):
    find, real = importlib.util.find_spec, builtins.__import__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(l3rs.L3RSError, match="IOMT needs scikit-learn: pip install scikit-learn"):
        iomt.Controller(TWO)

    def refuse(name, *rest):
        assert not name.startswith("sklearn")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert how(play(lambda *_: 0.1, 8, switch="random")) == {"random": 8}  # random choices do not need it


@pytest.mark.parametrize("initial_stages", [0, 1, 2, 6])
def test_parameters_that_never_change(initial_stages):
    """A note says so, and the hyper-parameters are learned nevertheless."""
    history = play(
        lambda c, _: 0.2 if c.hyperparameters["learning_rate"] == 0.01 else 0.0,
        24,
        layers=lambda _: [np.ones((2, 2))],
        initial_stages=initial_stages,
    )
    notes = [stage.notes for stage in history]
    assert notes == [()] * initial_stages + [
        ("the key parameters do not vary: the surrogates see the hyper-parameters only",)
    ] * (24 - initial_stages)
    assert sum(stage.hyperparameters["learning_rate"] == 0.01 for stage in history[14:]) >= 7


def test_nothing_varies_at_all():
    """No hyper-parameters, the same parameters, the same scores."""
    space = {"a": iomt.Optimizer(lambda: optax.sgd(0.1), {}), "b": iomt.Optimizer(lambda: optax.sgd(0.2), {})}
    controller = iomt.Controller(space, iomt.Options(initial_stages=2), seed=0)
    for _ in range(8):
        controller.choose([np.ones(2)])
        controller.observe([1.0, 0.5])
    assert how(controller.history) == {"initial": 2, "surrogate": 6}
    assert len({stage.optimizer for stage in controller.history}) == 2  # equal gains: any


def test_one_choice_needs_no_surrogate():
    history = play(lambda *_: 0.1, 9, space={"only": iomt.Optimizer(optax.sgd, {"learning_rate": [0.1]})})
    assert how(history) == {"only": 9}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e5])
def test_a_loss_that_is_no_longer_finite(bad):
    controller = iomt.Controller(TWO, iomt.Options(initial_stages=1), seed=0)
    for losses in ([2.0, 1.9], [1.9, bad, 1.8], [bad, bad]):
        controller.choose([np.ones(2)])
        controller.observe(losses)
    fine, first, second = controller.history
    assert not fine.diverged
    assert fine.notes == ()
    assert first.diverged
    assert first.score == second.score == -1
    assert "after step 1 of the stage; the stage was rolled back" in first.notes[-1]
    assert f"the loss was {bad:.3g} after step 0" in second.notes[-2]
    assert "bad before its first step" in second.notes[-1]


@pytest.mark.parametrize(("losses", "learned"), [([1.9, np.nan], 2), ([np.nan, np.nan], 1)])
def test_a_choice_is_not_blamed_for_an_earlier_failure(losses, learned):
    """The second of two stages diverges: by itself, or because the loss was already bad."""
    controller = iomt.Controller(TWO, iomt.Options(**FEW), seed=0)
    for values in ([2.0, 1.9], losses):
        controller.choose([np.ones(2)])
        controller.observe(values)
    assert controller.history[1].diverged
    assert (controller._weights == controller.options.minimum_weight).sum() == learned - 1
    assert sum(map(len, controller._surrogates._data)) == learned


def test_a_rise_from_a_tiny_first_loss_is_not_divergence():
    controller = iomt.Controller(TWO, seed=0)
    controller.choose([np.ones(2)])
    assert not controller.observe([1e-9, 3.0]).diverged


def test_parameters_that_are_not_finite():
    """The controller sees such parameters without rollback; the stage says nothing about parameters."""
    history = play(lambda *_: 0.1, 12, layers=lambda stage: [np.full(3, np.nan if stage in (2, 8) else stage)])
    assert [bool(stage.notes) for stage in history] == [stage in (2, 8) for stage in range(12)]
    assert "key parameters are not finite" in history[8].notes[0]


def test_many_stages():
    """Beyond the window of 64, and beyond the last fit of the kernels."""
    history = play(lambda c, _: 0.2 if c.optimizer == "left" else 0.0, 110)
    assert sum(stage.optimizer == "left" for stage in history[80:]) >= 25


def test_choose_and_observe_take_turns():
    controller = iomt.Controller(TWO, seed=0)
    with pytest.raises(l3rs.L3RSError, match="nothing was chosen"):
        controller.observe([1.0, 0.5])
    controller.choose([np.ones(2)])
    with pytest.raises(l3rs.L3RSError, match="was not observed"):
        controller.choose([np.ones(2)])
    with pytest.raises(l3rs.L3RSError, match=r"losses have shape \(1,\)"):
        controller.observe([1.0])
    controller.observe([1.0, 0.5])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stage_steps": 0}, "stage_steps is 0; it must be a whole number ≥ 1"),
        ({"initial_stages": 2.5}, "initial_stages is 2.5"),
        ({"halving": 0}, "halving is 0"),
        ({"components": True}, "components is True"),
        ({"transferability": 1.5}, r"transferability is 1.5; it must be one number in \[0, 1\]"),
        ({"minimum_weight": 0}, r"minimum_weight is 0; it must be one number in \(0, 1\]"),
        ({"alpha": -1}, "alpha is -1"),
        ({"divergence": 0}, "divergence is 0"),
        ({"variant": "DOIT"}, "variant is 'DOIT'; allowed are iomt, doit"),
        ({"switch": "never"}, "allowed are surrogate, random, cyclical"),
        ({"start": ""}, "allowed are weighted, uniform"),
        ({"compressor": "svd"}, "allowed are pca, random_projection, umap"),
        ({"moments": "share"}, "allowed are keep, reset"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        iomt.Options(**options)


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({}, "the space has no optimizer"),
        ({"sgd": iomt.Optimizer(optax.sgd, {"learning_rate": ()})}, r"learning_rate of sgd is \(\)"),
        ({"sgd": iomt.Optimizer(optax.sgd, {"learning_rate": [0.1, np.nan]})}, "one or more finite numbers"),
    ],
)
def test_bad_spaces(space, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        iomt.Controller(space)
