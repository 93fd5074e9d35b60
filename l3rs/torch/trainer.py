"""L3RS in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from l3rs.spec import L3RSError
from l3rs.torch.optimizer import L3RS


def observe_trainer(trainer: Any) -> Any:
    """Pass the losses of a `transformers.Trainer` to its L3RS optimizer. Call this before `train()`.

    It wraps `training_step`, which returns every loss, scaled such that those of accumulated micro-batches add up to
    the loss of the step. Choose `lr_scheduler_type="constant"`: the Trainer's default schedule would multiply the
    learned step by a linear decay.

    Args:
      trainer: a `Trainer` (or a subclass) made with `optimizers=(L3RS(…), None)`; it is modified.

    Returns:
      The trainer.

    Raises:
      L3RSError: in `train()`, if the Trainer has another optimizer.

    Example:
      trainer = observe_trainer(Trainer(model, args, train_dataset=data, optimizers=(opt, None)))
      trainer.train()
    """
    training_step = trainer.training_step

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        optimizer = trainer.optimizer
        while not isinstance(optimizer, L3RS) and hasattr(optimizer, "optimizer"):  # accelerate wraps it
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, L3RS):
            raise L3RSError(
                f"the trainer's optimizer is {type(optimizer).__name__}; observe_trainer is for "
                f"Trainer(…, optimizers=(L3RS(…), None))"
            )
        optimizer.observe(loss * trainer.current_gradient_accumulation_steps)  # `observe` averages them
        return loss

    trainer.training_step = observed
    return trainer
