"""Meta-training and evaluation of learned optimizers."""

from metatrain.config import Config, UserError, load_config
from metatrain.evaluation.evaluate import Results, evaluate
from metatrain.outer.loop import Run, export, resume, run

__all__ = ["Config", "Results", "Run", "UserError", "evaluate", "export", "load_config", "resume", "run"]
