"""A `TorchTask` in one process: its model, which any number of training runs start from without loading it again."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tasks.base import TaskError
from tasks.torch import Batch, TorchTask, accuracy, batch_length, describe_batch, fetch, to_device

_ORDER = 1 << 32  # seeds from here on are of epochs, below of steps


class _Loaded(NamedTuple):
    """The model of one init, and what it takes to start it again."""

    init: int
    model: nn.Module
    saved: dict[str, Tensor]  # copies of what trains, and of the buffers
    versions: dict[str, int]  # of the frozen parameters, which nothing may change
    training: dict[str, bool]  # each module's mode in training


class Training:
    """The model of a task, and the steps of its training.

    Use it inside `deterministic()`.

    Args:
      task: what is trained.

    Attributes:
      task: it.
    """

    def __init__(self, task: TorchTask) -> None:
        self.task = task
        self._loaded: _Loaded | None = None
        self._earlier: list[weakref.ref[nn.Parameter]] = []  # what trains in networks that are still in memory
        self._order: tuple[Any, np.ndarray] = (None, np.zeros(0, int))
        self._splits: dict[str, list[Batch]] = {}

    @property
    def model(self) -> nn.Module:
        assert self._loaded is not None, "call start first"
        return self._loaded.model

    def start(self, init: int) -> list[tuple[str, nn.Parameter]]:
        """Put the model back to an init; returns its parameters that train, by name."""
        loaded = self._loaded
        if loaded is None or loaded.init != init or not _reset(loaded):
            self._loaded = loaded = None  # free the old one first
            self._loaded = loaded = self._load(init)
        return [(name, param) for name, param in loaded.model.named_parameters() if param.requires_grad]

    def loss(self, key: Sequence[int], step: int) -> Tensor:
        """The loss of a step of the run with this key, with its gradients to come; seeds dropout and augmentation."""
        assert self._loaded is not None, "call start first"
        for name, module in self._loaded.model.named_modules():
            module.training = self._loaded.training[name]
        _seed_all(step_seed(key, step))
        return self._loss(self.batch(key, step))

    def batch(self, key: Sequence[int], step: int) -> Batch:
        """The batch of a step. A dataset is shuffled for every epoch; what is left of an epoch is dropped."""
        task = self.task
        if task.is_drawn:
            return to_device(task.train(torch.Generator().manual_seed(step_seed(key, step))), task.device)
        epoch, i = divmod(step, len(task.train) // task.batch_size)
        which = (*(int(k) for k in key), epoch)
        if self._order[0] != which:
            order = np.random.default_rng(step_seed(key, _ORDER + epoch)).permutation(len(task.train))
            self._order = (which, order)
        rows = self._order[1][i * task.batch_size : (i + 1) * task.batch_size]
        return to_device(fetch(task.train, rows.tolist(), task.collate_fn), task.device)

    @torch.no_grad()
    def score(self, split: str) -> tuple[float, float]:
        """Mean loss and metric of the model on "inner_valid", "outer_valid" or "test"."""
        _seed_all(0)
        self.model.eval()
        if self.task.score is not None:
            return self._own_score(split)
        total = np.zeros(2)
        outputs: list[Any] = []
        hook = self.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            for batch in self._batches(split):
                outputs.clear()
                loss = float(self._loss(batch))
                right = accuracy(outputs[-1], batch) if outputs else np.nan
                total += np.array([loss, right]) * batch_length(batch)
        finally:
            hook.remove()
        loss, metric = total / sum(map(batch_length, self._batches(split)))
        return float(loss), float(metric)

    def _own_score(self, split: str) -> tuple[float, float]:
        task = self.task
        assert task.score is not None
        with self._precision():
            found = task.score(self.model, getattr(task, split))
        try:
            loss, metric = found
            return float(loss), float(metric)
        except (TypeError, ValueError):
            raise TaskError(
                f"task {task.name!r}: score returned {describe_batch(found)}; it must be (loss, metric), two numbers"
            ) from None

    def _loss(self, batch: Batch) -> Tensor:
        with self._precision():
            try:
                loss = self.task.loss(self.model, batch)
            except TaskError as error:  # of the default loss, which does not know whose it is
                raise TaskError(f"task {self.task.name!r}: {error}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TaskError(f"task {self.task.name!r}: loss returned {describe_batch(loss)}; it must be one number")
        return loss.reshape(()).float()

    def _precision(self) -> Any:
        if self.task.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.task.device).type, self.task.autocast)

    def _batches(self, split: str) -> list[Batch]:
        """A split as batches, kept in memory."""
        if split not in self._splits:
            data, size = getattr(self.task, split), self.task.eval_batch_size
            rows = [range(first, min(first + size, len(data))) for first in range(0, len(data), size)]
            self._splits[split] = [to_device(fetch(data, r, self.task.collate_fn), self.task.device) for r in rows]
        return self._splits[split]

    def _load(self, init: int) -> _Loaded:
        _seed_all(init)
        model = self.task.model(init)
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"task {self.task.name!r}: model({init}) returned {type(model).__name__}; it must be a torch.nn.Module"
            )
        check_parameters(self.task, model)
        self._check_that_it_is_new(model)
        if not model.training:  # as `from_pretrained` returns them
            model.train()
        return _Loaded(
            init=init,
            model=model,
            saved={name: tensor.detach().clone() for name, tensor in _changing(model).items()},
            versions=_frozen_versions(model),
            training={name: module.training for name, module in model.named_modules()},
        )

    def _check_that_it_is_new(self, model: nn.Module) -> None:
        """Raise TaskError if a parameter was trained before: a result must not depend on what ran earlier."""
        earlier = {id(param) for ref in self._earlier if (param := ref()) is not None}
        training = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        if used := [name for name, param in training if id(param) in earlier]:
            raise TaskError(
                f"task {self.task.name!r}: model(i) returns parameter {used[0]} of an earlier network again, which "
                "training changes; build a new network each time, e.g. with copy.deepcopy(network)"
            )
        self._earlier = [ref for ref in self._earlier if ref() is not None]
        self._earlier += [weakref.ref(param) for _, param in training]


def check_parameters(task: TorchTask, model: nn.Module) -> None:
    """Raise TaskError unless L3RS can train the model's parameters.

    Raises:
      TaskError: none trains; one is not real; two share memory; one is on another device than the task's.
    """
    training = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not training:
        raise TaskError(f"task {task.name!r}: no parameter of the model trains; set requires_grad of those that should")
    device = torch.device(task.device)
    memory: list[tuple[int, int, int, str]] = []
    for name, param in training:
        if param.device.type != device.type or device.index not in (None, param.device.index):
            raise TaskError(
                f"task {task.name!r}: parameter {name} is on {param.device}, but the task's device is {task.device}; "
                "move the model in model(i), or pass device=… to TorchTask"
            )
        if not param.is_floating_point():
            raise TaskError(f"task {task.name!r}: parameter {name} is {param.dtype}; what trains must be a real float")
        first = param.data_ptr()
        memory.append((param.untyped_storage().data_ptr(), first, first + param.numel() * param.element_size(), name))
    for (storage, _, end, one), (other, first, _, two) in zip(sorted(memory), sorted(memory)[1:], strict=False):
        if storage == other and first < end:
            raise TaskError(
                f"task {task.name!r}: parameters {one} and {two} share memory but are two parameters; make them one "
                "(b.weight = a.weight), so that it takes one step"
            )


def step_seed(key: Sequence[int], step: int) -> int:
    """The seed of a step, a function of the sample's key, uint32 [2]; in [0, 2⁶³)."""
    entropy = np.random.SeedSequence([int(part) for part in key], spawn_key=(step,))
    return int(entropy.generate_state(1, np.uint64)[0]) >> 1


@contextlib.contextmanager
def deterministic(device: str = "cpu") -> Iterator[None]:
    """Compute with one thread and deterministic algorithms; restore these settings and all generators afterwards.

    On a GPU an operation without a deterministic algorithm gives a warning instead of an error.
    """
    threads, states = torch.get_num_threads(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=torch.device(device).type != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # augmentation of the user's reads it
    torch.manual_seed(seed)


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: parameters that train, and buffers."""
    trained = {f"param {name}": param for name, param in model.named_parameters() if param.requires_grad}
    return {**trained, **{f"buffer {name}": buffer for name, buffer in model.named_buffers()}}


def _frozen_versions(model: nn.Module) -> dict[str, int]:
    return {name: param._version for name, param in model.named_parameters() if not param.requires_grad}


@torch.no_grad()
def _reset(loaded: _Loaded) -> bool:
    """Put parameters and buffers back in place; False where a run has changed more than their values."""
    now, saved = _changing(loaded.model), loaded.saved
    if _shapes(now) != _shapes(saved) or _frozen_versions(loaded.model) != loaded.versions:
        return False
    for name, tensor in now.items():
        tensor.copy_(saved[name])
        tensor.grad = None
    return True


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
