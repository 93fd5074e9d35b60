"""A training problem of a PyTorch model. It needs the extra `torch`, and `import tasks` does not import it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tasks.base import AnyTask, Data, TaskError, pip_install

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(f"tasks.torch needs torch: {pip_install('torch')}") from None
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from tasks.user_code import first_line

_HELD_OUT = 1 << 20  # inits of this index and above are never used in meta-training
_POOLS = {"meta_train": range(_HELD_OUT), "held_out": range(_HELD_OUT, 2 * _HELD_OUT)}
_INPUT_NAMES = ("labels", "label")  # of the labels, in a batch that is a mapping

Batch = Any  # what `collate_fn` returns


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the usual classifiers.

    A batch (inputs, labels): the cross-entropy of `model(inputs)`, or of its "logits". A mapping: the model takes it as
    keyword arguments and returns its loss, as models of `transformers` do.
    """
    if isinstance(batch, Mapping):
        loss = _field(model(**batch), "loss")
        if loss is None:
            raise TaskError(f"the model returns no loss for a batch with {', '.join(map(str, batch))}; pass loss=…")
        return loss
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise TaskError(f"a batch is {describe_batch(batch)}; without loss=… it must be (inputs, labels) or a mapping")
    inputs, labels = batch
    output = model(inputs)
    logits = _logits(output)
    if not isinstance(logits, Tensor):
        raise TaskError(
            f"the model returns {describe_batch(output)}; without loss=… it must return logits, alone or as `logits`"
        )
    try:
        return nn.functional.cross_entropy(logits, labels)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise TaskError(
            f"the cross-entropy of logits {describe_batch(logits)} and labels {describe_batch(labels)} failed: "
            f"{first_line(error).rstrip('.')}; without loss=… each label must be a whole number below the number of "
            "its logits"
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTask(AnyTask):
    """A PyTorch model, its data and its loss.

    A training run is a function of the init index and a seed: the seed decides the batches and, through PyTorch's,
    NumPy's and Python's global generators, dropout and augmentation. All candidates of a generation share them. On a
    CPU results are equal bit for bit, in any process: it uses one thread and deterministic algorithms. On a GPU they
    are as repeatable as PyTorch's operations there.

    Attributes:
      name: for display.
      model: init index -> the network to train, e.g. pretrained weights and a fresh head. PyTorch's generator is
        seeded with the index. Parameters with `requires_grad` train. Modules that are in eval mode while the model is
        in training mode stay so in training, such as frozen batch norm.
      train: the training data: a map-style dataset, which is shuffled every epoch, or a function that draws a batch
        with a `torch.Generator`.
      inner_valid, outer_valid, test: the other splits, map-style datasets, or whatever `score` takes.
      loss: (model, batch) -> mean loss over the batch.
      score: (model, split) -> (mean loss, a metric such as accuracy); the model is in eval mode. By default the mean
        of `loss`, and the accuracy if the model's outputs are logits [B, classes] of labels [B], else NaN.
      batch_size: examples a step.
      eval_batch_size: examples a forward pass of the default `score`.
      collate_fn: a list of examples -> batch.
      autocast: data type of mixed precision, or None.
      device: of the model; batches are moved there.
      pools: init indices, "meta_train" for meta-training and "held_out" for evaluation.
      recipe: (name, options) from which `make_task` builds this task again in another process; set by `make_task`.
    """

    name: str
    model: Callable[[int], nn.Module]
    train: Any
    inner_valid: Any
    outer_valid: Any
    test: Any
    loss: Callable[[nn.Module, Batch], Tensor] = default_loss
    score: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None
    batch_size: int = 32
    eval_batch_size: int = 128
    collate_fn: Callable[[list[Any]], Batch] = default_collate
    autocast: torch.dtype | None = None
    device: str = "cpu"
    pools: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=lambda: dict(_POOLS))
    recipe: tuple[str, Mapping[str, Any]] | None = None
    data: Data = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._check_pools()
        if isinstance(self.model, nn.Module):
            raise TaskError(
                f"task {self.name!r}: model is a network; it must be a function that returns a new one for each init "
                "index, e.g. lambda init: copy.deepcopy(network)"
            )
        try:
            torch.device(self.device)
        except RuntimeError:
            raise TaskError(
                f"task {self.name!r}: device is {self.device!r}; it must be one of PyTorch's, e.g. cpu or cuda:0"
            ) from None
        for name in ("batch_size", "eval_batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise TaskError(f"task {self.name!r}: {name} is {getattr(self, name)!r}; it must be a whole number ≥ 1")
        if not self.is_drawn and len(self.train) < self.batch_size:
            raise TaskError(
                f"task {self.name!r}: batch_size is {self.batch_size}, but train has {len(self.train)} examples"
            )
        for split in ("inner_valid", "outer_valid", "test") if self.score is None else ():
            data = getattr(self, split)
            if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
                raise TaskError(
                    f"task {self.name!r}: {split} is {type(data).__name__}; it must be a map-style dataset with at "
                    "least one example, unless score=… takes it"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes build the task again: models, datasets and local functions need not be picklable."""
        if self.recipe is None:
            raise TaskError(
                f"task {self.name!r} cannot be sent to another process: it needs a function that returns it, "
                "task.name=package.module:function"
            )
        return _rebuild, self.recipe

    @property
    def label(self) -> str:
        """Its name in messages: that by which `make_task` found it, if it did."""
        return self.name if self.recipe is None else self.recipe[0]

    @property
    def is_drawn(self) -> bool:
        """Whether `train` is a function, not a dataset.

        Raises:
          TaskError: it is neither.
        """
        if hasattr(self.train, "__len__") and hasattr(self.train, "__getitem__"):
            return False
        if callable(self.train):
            return True
        raise TaskError(
            f"task {self.name!r}: train is {type(self.train).__name__}; it must be a map-style dataset, with __len__ "
            "and __getitem__, or a function that draws a batch with a torch.Generator"
        )


def _rebuild(name: str, options: Mapping[str, Any]) -> TorchTask:
    from tasks.registry import build_task

    task = build_task(name, options)
    assert isinstance(task, TorchTask)
    return task


def fetch(data: Any, rows: Sequence[int], collate_fn: Callable[[list[Any]], Batch]) -> Batch:
    """The batch of some examples of a map-style dataset."""
    if isinstance(data, TensorDataset) and collate_fn is default_collate:
        return list(data[torch.as_tensor(rows)])
    many = getattr(data, "__getitems__", None)
    return collate_fn(many(list(rows)) if many else [data[int(row)] for row in rows])


def to_device(batch: Batch, device: str) -> Batch:
    """A batch with its tensors on a device."""
    if hasattr(batch, "to"):  # a tensor, or transformers' BatchEncoding
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def batch_length(batch: Batch) -> int:
    """The number of examples in a batch, the leading axis of its first tensor."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)


def accuracy(output: Any, batch: Batch) -> float:
    """The share of labels that have the largest logit; NaN where outputs and labels are not of that kind."""
    logits, labels = _logits(output), None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in _INPUT_NAMES if name in batch), None)
    elif isinstance(batch, Sequence) and len(batch) == 2:
        labels = batch[1]
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return math.nan
    if labels.ndim != 1 or logits.ndim != 2 or len(logits) != len(labels):  # labels of tokens may be shifted, or none
        return math.nan
    return (logits.argmax(-1) == labels).double().mean().item()


def describe_batch(batch: Batch) -> str:
    """A batch's types and shapes in words, for error messages."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(f'{key}: {describe_batch(value)}' for key, value in batch.items())}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {', '.join(map(describe_batch, batch))}"
    return type(batch).__name__


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for value in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ():
        yield from _tensors(value)


def _field(output: Any, name: str) -> Any:
    """An entry of a mapping, or an attribute; None without one."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    return _field(output, "logits")
