"""IOMT and DOIT: training with interleaved optimizers, chosen stage by stage.

Every τ steps a controller chooses the optimizer and its hyper-parameters for the next stage: at first at random, later
by the predictions of Gaussian processes from the state of the network.

train = iomt.make_train(loss, batch)
result = train(params, stats, data, steps=1000)

`Controller` and `interleave` are its two halves, for your own training loop. It needs scikit-learn, and umap-learn
for the compressor "umap". `metatrain.report.switches.plot_history` draws a run.
"""

from l3rs.baselines.iomt.compress import key_parameters
from l3rs.baselines.iomt.controller import Controller, Options, Stage
from l3rs.baselines.iomt.score import acquisition, sampling_weight, stage_score
from l3rs.baselines.iomt.space import (
    LARGER_SPACE,
    SPACE,
    Choice,
    InterleavedState,
    Optimizer,
    Space,
    encode,
    interleave,
)
from l3rs.baselines.iomt.train import NoFiniteStartError, Result, make_train
from l3rs.baselines.iomt.transferability import leep, logme, transferability

__all__ = [
    "LARGER_SPACE",
    "SPACE",
    "Choice",
    "Controller",
    "InterleavedState",
    "NoFiniteStartError",
    "Optimizer",
    "Options",
    "Result",
    "Space",
    "Stage",
    "acquisition",
    "encode",
    "interleave",
    "key_parameters",
    "leep",
    "logme",
    "make_train",
    "sampling_weight",
    "stage_score",
    "transferability",
]
