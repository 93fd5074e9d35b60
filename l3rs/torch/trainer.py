"""L3RS in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3rs.spec import L3RSError
from l3rs.torch.optimizer import L3RS


def observe_trainer(trainer: Any) -> Any:
    """Pass the losses of a `transformers.Trainer` to its L3RS optimizer. Call this before `train()`.

    It wraps `training_step` and `compute_loss`, and passes on the plain loss of each micro-batch, before the Trainer
    divides it for gradient accumulation. Where the model divides the loss by the Trainer's `num_items_in_batch`
    itself, the losses of a step's micro-batches add up to the plain loss; where it does not, their mean is.

    Choose `lr_scheduler_type="constant"`: the Trainer's default, "linear", decays `lr` from 1 to 0 during the training,
    and so multiplies a step that already follows a learned schedule. The Trainer's `learning_rate` and `weight_decay`
    have no effect: pass `lr` and `weight_decay` to L3RS.

    Args:
      trainer: a `Trainer` (or a subclass) made with `optimizers=(L3RS(…), None)`; it is modified.

    Returns:
      The trainer.

    Raises:
      L3RSError: in `train()`, if the Trainer has another optimizer, or its own `training_step` does not call
        `compute_loss`.

    Example:
      trainer = observe_trainer(Trainer(model, args, train_dataset=data, optimizers=(opt, None)))
      trainer.train()
    """
    training_step, compute_loss = trainer.training_step, trainer.compute_loss
    computed: list[Tensor] = []  # in this training step
    is_share: list[bool] = []  # whether the model divides by the items of all micro-batches; empty before it is known

    def observed_loss(*args: Any, **kwargs: Any) -> Any:
        items: Any = kwargs.get("num_items_in_batch")
        probes = not is_share and items is not None and trainer.current_gradient_accumulation_steps > 1
        if probes:
            kwargs["num_items_in_batch"] = items = torch.as_tensor(items).detach().float().requires_grad_()
        result = compute_loss(*args, **kwargs)
        loss = result[0] if kwargs.get("return_outputs") else result
        if probes:
            is_share.append(_depends_on(loss, items))
        computed.append(loss.detach())
        return result

    def observed_step(*args: Any, **kwargs: Any) -> Tensor:
        optimizer = _unwrapped(trainer.optimizer)
        computed.clear()
        loss = training_step(*args, **kwargs)
        if not computed:
            raise L3RSError(
                "the trainer's training_step does not call compute_loss; pass each micro-batch's loss to the "
                "optimizer's observe(loss) there, in place of observe_trainer"
            )
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)
        shares = any(is_share) if declared is None else declared
        factor = trainer.current_gradient_accumulation_steps if shares else 1  # `observe` averages the micro-batches
        optimizer.observe(torch.stack([each.mean() for each in computed]).mean() * factor)
        return loss

    trainer.training_step, trainer.compute_loss = observed_step, observed_loss
    return trainer


def _unwrapped(optimizer: Any) -> L3RS:
    while not isinstance(optimizer, L3RS) and hasattr(optimizer, "optimizer"):  # accelerate wraps it
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, L3RS):
        raise L3RSError(
            f"the trainer's optimizer is {type(optimizer).__name__}; observe_trainer is for "
            f"Trainer(…, optimizers=(L3RS(…), None))"
        )
    return optimizer


def _depends_on(loss: Tensor, leaf: Tensor) -> bool:
    """Whether `leaf` is in the graph that `loss` was computed with."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False
