"""The controller of IOMT chooses the optimizer of the next stage. It runs on the host, apart from any training loop."""

from __future__ import annotations

import dataclasses
import time
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from l3rs.baselines import common
from l3rs.baselines.iomt.compress import FAR, Compressor, CompressorName, Layers, is_finite
from l3rs.baselines.iomt.score import DIVERGED, acquisition, sampling_weight, stage_score
from l3rs.baselines.iomt.space import SPACE, Choice, Moments, Space, choices
from l3rs.baselines.iomt.surrogate import Surrogates
from l3rs.spec import L3RSError

Variant = Literal["iomt", "doit"]
Switch = Literal["surrogate", "random", "cyclical"]
Start = Literal["weighted", "uniform"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The numbers and ablations of IOMT. "Open" means that the source gives no value or rule.

    Attributes:
      stage_steps: τ, training steps a stage.
      initial_stages: n_ini, stages of random choice before the surrogates choose; 50 in the paper's
        full training.
      transferability: ω_t, see `transferability`. 0 is for a model that was not pretrained: equation 7
        without ω_t.
      halving: n of equation 7. Open; counted in stages. None for no halving.
      alpha: α, the weight of the spread in a stage's score. Open; large values reward noise.
      minimum_weight: ω_min of the initial phase. Open.
      variant: "iomt", or "doit", in whose equation 7 α weighs the deviation, too.
      switch: "surrogate"; or the ablations "random", and "cyclical", through all choices in an
        order that changes the optimizer each time.
      start: the initial phase draws optimizers "weighted" by their last scores, or "uniform". The
        hyper-parameters are drawn uniformly.
      compressor: of the key parameters: "pca", "random_projection" or "umap" (needs umap-learn, and
        seconds for a fit).
      components: features a layer of the key parameters.
      moments: "keep" or "reset" an optimizer's state when it takes over, see `interleave`. Open.
      rollback: restore the parameters from before a stage that diverged; its steps still count. Not
        in the source, where such a run would be lost.
      divergence: a stage diverges if a loss is not finite or exceeds this factor times the run's
        first loss (or this factor itself, if the first is below 1; absolute values). Its score is -1;
        the optimizer is not penalised if the loss was already bad before the stage. Not in the source.
    """

    stage_steps: int = 25
    initial_stages: int = 20
    transferability: float = 0.0
    halving: int | None = 20
    alpha: float = 0.1
    minimum_weight: float = 0.1
    variant: Variant = "iomt"
    switch: Switch = "surrogate"
    start: Start = "weighted"
    compressor: CompressorName = "pca"
    components: int = 2
    moments: Moments = "keep"
    rollback: bool = True
    divergence: float = 100.0

    def __post_init__(self) -> None:
        for name, least in (("stage_steps", 1), ("initial_stages", 0), ("components", 1), ("halving", 1)):
            value = getattr(self, name)
            if not (name == "halving" and value is None) and (type(value) is not int or value < least):
                raise L3RSError(f"{name} is {value!r}; it must be a whole number ≥ {least}")
        common.number("transferability", self.transferability, lambda x: 0 <= x <= 1, "in [0, 1]")
        common.number("minimum_weight", self.minimum_weight, lambda x: 0 < x <= 1, "in (0, 1]")
        common.not_negative("alpha", self.alpha)
        common.positive("divergence", self.divergence)
        allowed = {"variant": Variant, "switch": Switch, "start": Start, "compressor": CompressorName}
        for name, kind in {**allowed, "moments": Moments}.items():
            if getattr(self, name) not in get_args(kind):
                raise L3RSError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(get_args(kind))}")


class Stage(NamedTuple):
    """What happened in one stage."""

    step: int  # training steps before it
    steps: int  # its own, τ but for the last
    optimizer: str
    hyperparameters: dict[str, float]
    score: float  # s, in [-1, 1]
    chosen: str  # "initial", "surrogate", "random", "cyclical", or "only": there was no other choice
    diverged: bool
    seconds: float  # the controller's own, before and after the stage
    notes: tuple[str, ...]  # for people


class Controller:
    """Chooses the optimizer of each stage and learns from the results.

    Call `choose` before a stage and `observe` after it:

      >>> import numpy as np
      >>> from l3rs.baselines import iomt
      >>> controller = iomt.Controller(iomt.SPACE, iomt.Options(initial_stages=2), seed=0)
      >>> for losses in ([2.0, 1.5], [1.5, 1.6], [1.5, 1.2]):
      ...     choice = controller.choose([np.ones((3, 2))])  # the key parameters
      ...     stage = controller.observe(losses)
      >>> [stage.chosen for stage in controller.history]
      ['initial', 'initial', 'surrogate']

    Args:
      space: the optimizers to choose from.
      options: numbers and ablations.
      seed: of all random choices. With the same seed and inputs, two controllers make the same choices.

    Attributes:
      history: the stages so far.

    Raises:
      L3RSError: the space is not valid, or a package is missing.

    Reference: Interleaving Optimizers for DNN Training (IOMT), Algorithm 1, and Towards Dynamic
    Interleaving Optimizer (DOIT).
    """

    def __init__(self, space: Space = SPACE, options: Options | None = None, seed: int = 0) -> None:
        self.options = Options() if options is None else options
        self.history: list[Stage] = []
        self._choices = choices(space)
        self._random = np.random.default_rng(seed)
        self._weights = np.ones(len(self._choices))  # ω_r
        self._limit = np.inf  # a stage with a loss above it diverged
        self._pending: _Pending | None = None
        self._surrogates: Surrogates | None = None
        if self.options.switch == "surrogate" and sum(map(len, self._choices)) > 1:
            compressor = Compressor(self.options.compressor, self.options.components, seed)
            self._surrogates = Surrogates(self._choices, compressor)

    def choose(self, layers: Layers) -> Choice:
        """Choose the optimizer of the next stage.

        Args:
          layers: the current key parameters, arrays of the same shapes at every stage.

        Raises:
          L3RSError: the last stage was not observed.
        """
        if self._pending is not None:
            raise L3RSError("the last stage was not observed; call observe(losses) after each choose(layers)")
        start = time.perf_counter()
        notes: list[str] = []
        sample = self._surrogates.compressor.sample(layers) if self._surrogates else []
        if not is_finite(sample):
            notes.append(
                f"key parameters are not finite, or exceed {FAR:g}: the surrogates assume average ones "
                "and skip the stage"
            )
        optimizer, choice, chosen = self._decide(sample, notes)
        self._pending = _Pending(optimizer, choice, chosen, sample, notes, time.perf_counter() - start)
        return self._choices[optimizer][choice]

    def observe(self, losses: npt.ArrayLike) -> Stage:
        """Learn from the result of the last choice.

        Args:
          losses: [steps + 1], before the stage and after each of its steps.

        Returns:
          The stage, which is also the last of the history.

        Raises:
          L3RSError: nothing was chosen, or fewer than two losses.
        """
        start = time.perf_counter()
        values = np.asarray(losses, np.float64)
        if self._pending is None:
            raise L3RSError("nothing was chosen; call choose(layers) before each observe(losses)")
        if values.ndim != 1 or len(values) < 2:
            raise L3RSError(f"losses have shape {values.shape}; they must be [steps + 1], steps ≥ 1")
        optimizer, choice, chosen, sample, notes, seconds = self._pending
        self._pending = None
        bad = self._bad(values)
        diverged = bool(bad.any())
        score = DIVERGED if diverged else stage_score(values, self.options.alpha)
        if diverged:
            end = "the stage was rolled back" if self.options.rollback else "training went on"
            notes.append(f"the loss was {values[bad.argmax()]:.3g} after step {bad.argmax()} of the stage; {end}")
        if bad[0]:
            notes.append("the loss was bad before its first step: its optimizer is not penalised")
        else:
            self._weights[optimizer] = sampling_weight(score, self.options.minimum_weight)
            if self._surrogates and is_finite(sample):
                self._surrogates.add(optimizer, choice, sample, score)
        stage = Stage(
            step=sum(before.steps for before in self.history),
            steps=len(values) - 1,
            optimizer=self._choices[optimizer][choice].optimizer,
            hyperparameters=self._choices[optimizer][choice].hyperparameters,
            score=score,
            chosen=chosen,
            diverged=diverged,
            seconds=seconds + time.perf_counter() - start,
            notes=tuple(notes),
        )
        self.history.append(stage)
        return stage

    def _decide(self, sample: list[np.ndarray], notes: list[str]) -> tuple[int, int, str]:
        """(optimizer, its choice, how it was chosen)"""
        stage, count = len(self.history), len(self._choices)
        if sum(map(len, self._choices)) == 1:
            return 0, 0, "only"
        if self.options.switch == "cyclical":
            optimizer = stage % count
            return optimizer, stage // count % len(self._choices[optimizer]), "cyclical"
        if self._surrogates is None:
            return *self._draw(np.ones(count)), "random"
        if stage < self.options.initial_stages:
            weights = self._weights if self.options.start == "weighted" else np.ones(count)
            return *self._draw(weights), "initial"
        return *self._best(self._surrogates, sample, notes), "surrogate"

    def _draw(self, weights: np.ndarray) -> tuple[int, int]:
        optimizer = int(self._random.choice(len(weights), p=weights / weights.sum()))
        return optimizer, int(self._random.integers(len(self._choices[optimizer])))

    def _best(self, surrogates: Surrogates, sample: list[np.ndarray], notes: list[str]) -> tuple[int, int]:
        """The choice with the largest e; a random one of several."""
        predictions = surrogates.predict(sample)
        if not surrogates.compressor.width:
            notes.append("the key parameters do not vary: the surrogates see the hyper-parameters only")
        gains = np.concatenate(
            [
                acquisition(
                    mean,
                    std,
                    len(self.history),
                    transferability=self.options.transferability,
                    halving=self.options.halving,
                    weight=self.options.alpha if self.options.variant == "doit" else 1.0,
                )
                for mean, std in predictions
            ]
        )
        places = [(i, j) for i, of_one in enumerate(self._choices) for j in range(len(of_one))]
        return places[self._random.choice(np.flatnonzero(gains == gains.max()))]

    def _bad(self, losses: np.ndarray) -> np.ndarray:
        """Which losses show that training diverged."""
        if not self.history:
            self._limit = self.options.divergence * max(abs(losses[0]), 1.0)
        return ~(np.abs(losses) <= self._limit) | ~np.isfinite(losses)


class _Pending(NamedTuple):
    """A choice whose stage has not been observed yet."""

    optimizer: int
    choice: int
    chosen: str
    sample: list[np.ndarray]
    notes: list[str]
    seconds: float
