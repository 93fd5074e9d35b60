"""L3RS as a `torch.optim.Optimizer`, step by step the same numbers as `l3rs.optimizer`.

A step makes one pass of reductions over gradients and parameters, one that updates the moments and computes
the directions' inner products, and one that updates the parameters. In between, `l3rs.core` computes everything small
on the host, in NumPy: three transfers per step, however many layers there are. The passes work on pieces that stay in a
processor's cache and allocate nothing of the parameters' size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from l3rs import core, first_steps
from l3rs.core import check_total_steps
from l3rs.decide import decide
from l3rs.guard import Guard, GuardState, init_guard, make_guard, report
from l3rs.io.checkpoint import DEFAULT, chosen_horizon, restore
from l3rs.layers import Convention, Match, MatchBy, Matching, OnUnknown, match_network, network_facts
from l3rs.scale_free import expected_norm
from l3rs.spec import L3RSError, Spec, Theta
from l3rs.theta import check_theta, digest
from l3rs.torch.active import ActiveLayers
from l3rs.torch.checks import as_loss, check_devices, check_group, check_params, warn_of_small_lr
from l3rs.torch.directions import make_directions
from l3rs.torch.names import TORCH, flax_layer
from l3rs.torch.passes import host, mean_loss
from l3rs.torch.state import check_state, keep_precision, layer_names, numpy_theta, small_state, warn_of_identity


class L3RS(torch.optim.Optimizer):
    """A meta-trained optimizer for a PyTorch model.

    Statistics are float32, updates are cast to the parameters' dtype. A layer whose gradient is not
    finite (or so large that its squared norm is not) stays where it is for that step, and its gradient
    counts as zero in the moments; a non-finite loss does not enter the loss features. A parameter
    without a gradient is skipped: it takes no memory and does not affect other layers.

    Every step needs the loss: `step(loss=loss)`, `step(closure)`, or `observe(loss)` before a `step()`
    that other code calls. Pass the plain loss, neither scaled (`GradScaler`) nor divided for
    gradient accumulation. With `torch.distributed` initialised it is averaged over all ranks, which
    must all step together; each rank must hold whole parameters (DDP, not FSDP).

    Args:
      params: `model.named_parameters()`, parameters, or param groups of either. Descriptor embeddings, as those of
        `universal`, need names. In form 2 only parameters that train count, so frozen ones may be passed or left out;
        in form 1 pass them, too, unless the names are the checkpoint's: there, where a name does not tell how deep a
        layer is, its position among the parameters does, or among the sorted names if there are several groups.
      checkpoint: a folder, a shipped name or a URL, as in `l3rs.load`, or meta-parameters and their spec,
        `(theta, spec)`.
      total_steps: the number of steps that you are going to train, the horizon T. None means the longest
        horizon of the checkpoint's meta-training. Training may go past it, with one warning.
      lr: a factor on the step that the network chooses, for learning-rate schedulers and param groups. The
        optimizer was meta-trained with 1; a rate for Adam, such as 1e-3, is far too small.
      weight_decay: decoupled, as in AdamW, for all groups that have none of their own: a parameter p of n elements
        becomes p · (1 - lr · weight_decay · r) before the learned step λ is taken, where r = λ/√n is its RMS. It takes
        the place of AdamW's learning rate, which is about the RMS of Adam's step: values for AdamW can be kept.
      rename: {name of a parameter: path of its layer in the checkpoint}. With descriptor embeddings, the name from
        which a layer's descriptors are computed.
      match: how parameters map to layers, see `match_layers`: by "path", by "order", or "auto": by path,
        and by order if no name is in the checkpoint.
      on_unknown: "error", or "mean": a parameter that is not in the checkpoint's table, or has another shape there,
        gets the mean of all embeddings. "descriptor" is for checkpoints with descriptor embeddings.
      guard: True, or a `Guard`: take plain Adam steps for a while when the loss diverges, see `guard_report`. `lr`
        multiplies Adam's learning rate, too.

    Attributes:
      spec: the optimizer's spec.
      total_steps: T.
      param_groups: besides `params`, `lr` and `weight_decay`, `layers`: the path of each parameter's layer; None if it
        has the mean embedding. With descriptor embeddings, the name from which its descriptors are computed.
      state: per parameter `step`, the moments (float32, of its shape), and of the last step `log_norms`
        ([2, S] EMAs), `mix` ([P], μ) and `step_norm` ([], λ without `lr`).

    Raises:
      L3RSError: a parameter has no layer in the checkpoint; the checkpoint cannot be read; a step has no loss; a param
        group has an unknown key.

    Example:
      >>> import torch
      >>> from l3rs.torch import L3RS
      >>> model = torch.nn.Sequential(
      ...     torch.nn.Linear(196, 64),
      ...     torch.nn.ReLU(),
      ...     torch.nn.Linear(64, 64),
      ...     torch.nn.ReLU(),
      ...     torch.nn.Linear(64, 10),
      ... )
      >>> opt = L3RS(model.named_parameters(), "checkpoints/digits-mlp", total_steps=100)
      >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 196)), torch.arange(8))
      >>> loss.backward()
      >>> _ = opt.step(loss=loss)
      >>> opt.param_groups[0]["layers"][:2]
      ['layers/0/kernel', 'layers/0/bias']
    """

    # Views into the tensors of `state`, made anew where it was replaced; not part of a copy.
    _active: ActiveLayers | None = None

    def __init__(
        self,
        params: ParamsT,
        checkpoint: str | os.PathLike[str] | tuple[Theta, Spec] = DEFAULT,
        total_steps: int | None = None,
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        rename: Mapping[str, str] | None = None,
        match: MatchBy = "auto",
        on_unknown: OnUnknown = "error",
        guard: bool | Guard = False,
    ) -> None:
        if isinstance(checkpoint, tuple):
            theta, self.spec = checkpoint
            info: Mapping[str, Any] = {}
            check_theta(theta, self.spec, "theta")
        else:
            theta, self.spec, info = restore(checkpoint)
        check_group({"lr": lr, "weight_decay": weight_decay})
        self.total_steps = check_total_steps(chosen_horizon(info, total_steps))
        self._theta = numpy_theta(theta)
        self._guard = make_guard(guard, self.spec)
        self._matching = Matching.of(self.spec, rename, match, on_unknown)
        self._directions = make_directions(self.spec.directions)
        self._observed: list[Tensor] = []
        self._warned = self._warned_of_first_steps = False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        warn_of_small_lr(self.param_groups)
        self._match(self.param_groups, self._matching)
        # What all layers share is in the first group: besides a parameter's own state, this is the only place
        # that every tool for saving and sharding optimizers keeps.
        ema = [0.0] * len(self.spec.loss_decays)
        self.param_groups[0]["shared"] = {
            "step": 0,
            "losses": 0,
            "first_loss": 0.0,
            "loss_ema": ema,
            **self._identity(),
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, e.g. once they are no longer frozen.

        With descriptor embeddings this changes the depth of all layers; in form 1 it does not if frozen parameters are
        passed from the start.

        Args:
          param_group: what `torch.optim` takes, and `rename`, as in `L3RS`.

        Raises:
          L3RSError: a parameter has no layer in the checkpoint, or another parameter has that layer.
        """
        group = dict(param_group)
        constructing = not (self.param_groups and "shared" in self.param_groups[0])  # all groups are matched at once
        rename = None if constructing else group.pop("rename", None)
        if "rename" in group:
            raise L3RSError("a param group has 'rename'; pass it to L3RS(…, rename=…), for all groups")
        check_group(group)
        super().add_param_group(group)
        if not constructing:
            try:
                how = self._matching
                self._match(self.param_groups[-1:], Matching.of(self.spec, rename, how.by, how.on_unknown))
            except L3RSError:
                self.param_groups.pop()
                raise

    def _match(self, groups: Sequence[dict[str, Any]], how: Matching) -> None:
        params = [param for group in groups for param in group["params"]]
        names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
        check_params(names, params)
        check_devices([param for group in self.param_groups for param in group["params"]])
        taken = {path for group in self.param_groups for path in group.get("layers", ())}
        network = [(name, tuple(param.shape)) for name, param in zip(names, params, strict=True)]
        matches = match_network(self.spec, network, how, self._convention, taken - {None})
        if self.spec.embedding == "descriptor":
            paths = iter([how.rename.get(name, name) for name in names])
        else:
            paths = iter([None if match.row is None else match.source for match in matches])
        for group in groups:
            group["layers"] = [next(paths) for _ in group["params"]]
        self._embed()

    @property
    def _convention(self) -> Convention:
        # Groups do not follow depth: a split by weight decay puts all norms at the end.
        return TORCH._replace(alphabetical=len(self.param_groups) > 1)

    def _identity(self) -> dict[str, Any]:
        """What identifies a saved state, besides its shapes."""
        return {"total_steps": self.total_steps, "theta": digest(self._theta)[:16]}

    def _embed(self) -> None:
        """Compute from `layers` what is known of all parameters; in form 2, of those that train."""
        layers = [path for group in self.param_groups for path in group["layers"]]
        params = [param for group in self.param_groups for param in group["params"]]
        self._trains = self._training()
        chosen = [i for i, trains in enumerate(self._trains) if trains or self.spec.form == 1]
        paths = [layers[i] for i in chosen]
        # A layer that the checkpoint does not know has no path there, but its name says what it is.
        names = layer_names(self.param_groups)
        described = [flax_layer(names[i], params[i].shape) for i in chosen]
        rows = {layer.path: row for row, layer in enumerate(self.spec.layers)}
        matches = [Match(path, x.shape, rows.get(path), "") for path, x in zip(paths, described, strict=True)]
        self._facts = network_facts(self._theta, self.spec, matches, described, self._convention)
        self._rows = {params[i]: row for row, i in enumerate(chosen)}
        self._active = None

    def _training(self) -> list[bool]:
        params = (param for group in self.param_groups for param in group["params"])
        return [param.requires_grad or param.grad is not None for param in params]

    def observe(self, loss: Tensor | float) -> None:
        """Remember a loss for the next step, for training loops in which other code calls `step()`.

        Losses of several micro-batches are averaged: the finite ones, if there are any. Each must be the
        micro-batch's own mean loss, not divided by the number of micro-batches. If `GradScaler` skips a step, its
        losses count in the next one.
        """
        self._observed.append(as_loss(loss))

    def guard_report(self) -> dict[str, Any]:
        """What the guard did so far, see `l3rs.guard_report`.

        Raises:
          L3RSError: the optimizer has no guard.
        """
        if self._guard is None:
            raise L3RSError("the optimizer has no guard: L3RS(…, guard=True)")
        return report(self._guard_state())

    def _guard_state(self) -> GuardState:
        saved = self.param_groups[0]["shared"].get("guard")
        return init_guard(np) if saved is None else GuardState(*map(np.asarray, saved))

    # torch.compile would trace it again for every step, because its scalars are Python's.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """One step.

        Args:
          closure: clears the gradients, computes them again and returns the loss. Losses that were passed to `observe`
            since the last step, or by the closure, count in place of the one that it returns.
          loss: the loss of the gradients; in place of a closure, or with one that returns None.

        Returns:
          The loss that was passed, or that the closure returned; None, without a step, if the closure produces neither
          a loss nor gradients. Without a loss, a step with an `lr` of 0 only creates the state:
          torch.distributed.checkpoint prepares an optimizer for loading in this way.

        Raises:
          L3RSError: there is no loss; a gradient is sparse.
        """
        if closure is not None:
            if not callable(closure):
                raise L3RSError("pass the loss by keyword: step(loss=loss)")
            with torch.enable_grad():
                returned = closure()
            if loss is not None and returned is not None:
                raise L3RSError("step takes a closure that returns a loss, or a loss, not both")
            # Lightning adds a closure that does nothing to a loss.
            closure, loss = (closure, returned) if loss is None else (None, loss)
        layers = self._active_layers()
        if loss is not None and not (closure is not None and self._observed):
            self.observe(loss)
        if not self._observed:
            if (closure is not None and layers is None) or not any(float(group["lr"]) for group in self.param_groups):
                return None
            raise L3RSError(
                "L3RS needs the loss: call step(loss=loss), step(closure), or observe(loss) before step(); where "
                "Accelerate or Lightning wraps the optimizer, optimizer.optimizer.observe(loss)"
            )
        observed, self._observed = self._observed, []
        if layers is not None:
            with np.errstate(all="ignore"):  # non-finite values are detected and excluded
                self._step(layers, observed)
        return loss

    def _active_layers(self) -> ActiveLayers | None:
        """The parameters that have a gradient, None if there are none; creates their state if it does not exist."""
        if self.spec.form == 2 and self._trains != self._training():
            self._embed()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if not params:
            return None
        if not all(param.grad.layout is torch.strided for param in params):
            self._refuse_sparse()
        states = [self.state[param] for param in params]
        if self._active is None or not self._active.holds(params, states):
            for param, state in zip(params, states, strict=True):
                if not state:
                    state |= self._new_state(param)
            rows = np.array([self._rows[param] for param in params])
            made_of = (params, states, self._facts.of(rows), self.spec, self._directions, self._moments())
            self._active = ActiveLayers(*made_of, before=self._active)
        return self._active

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for param, path in zip(group["params"], group["layers"], strict=True):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise L3RSError(
                        f"the gradient of {path!r} {tuple(param.shape)} is sparse; L3RS needs dense ones, e.g. "
                        f"nn.Embedding(sparse=False)"
                    )

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        small = small_state(self.spec).items()
        return {
            "step": 0,
            **{name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in small},
            **{key: torch.zeros_like(param, dtype=torch.float32) for key in self._moments()},
        }

    def _moments(self) -> list[str]:
        """Names of the moments in a parameter's state: `0/adam/exp_avg`."""
        named = enumerate(zip(self.spec.directions, self._directions, strict=True))
        return [f"{i}/{spec.name}/{moment}" for i, (spec, direction) in named for moment in direction.moments]

    def _step(self, layers: ActiveLayers, observed: Sequence[Tensor]) -> None:
        loss = host(mean_loss([each.to(layers.params[0].device) for each in observed]))
        n_layers, n_directions = len(layers.params), len(self._directions)
        blocks = layers.blocks()

        # Reductions that need no direction, and whether a gradient may enter the moments at all.
        squared = np.empty((n_layers, 2), np.float32)
        for each, block in blocks:
            squared[each] = block.squared_norms()
        gradient_squared, parameter_squared = squared.T
        finite = np.isfinite(gradient_squared)
        steps = layers.count_step()

        gram = np.empty((n_layers, n_directions, n_directions), np.float32)
        for each, block in blocks:
            gram[each] = block.gram(finite[each], steps[each])

        measured = core.measure(loss, steps, layers.root_n, gradient_squared, parameter_squared, gram, np)
        factors, decay = self._decide(layers, measured)
        for each, block in blocks:
            block.add(factors[each], decay[each], measured.moves[each])

    def _decide(self, layers: ActiveLayers, measured: core.Statistics) -> tuple[np.ndarray, np.ndarray]:
        """Choose the step and remember it; the factor of each direction, [L, P], and of the parameters, [L]."""
        guard = None if self._guard is None else self._guard_state()
        memory = layers.small.read(self.param_groups[0]["shared"], guard)
        total_steps = np.asarray(self.total_steps)
        decision, memory = decide(self._theta, self.spec, memory, measured, layers.facts, total_steps, self._guard, np)
        self._remember(memory)
        layers.small.write(memory, decision)
        lr, weight_decay = self._per_layer("lr", "weight_decay")
        self._warn_of_first_steps(layers, lr * decision.step_norm, memory, measured)
        return -lr[:, None] * decision.coefficients, -lr * weight_decay * decision.step_norm / measured.root_n

    def _per_layer(self, *options: str) -> list[np.ndarray]:
        """Options of the param groups, for each parameter with a gradient, each float32 [L]."""
        counts = [sum(param.grad is not None for param in group["params"]) for group in self.param_groups]
        values = [np.array([float(group[option]) for group in self.param_groups], np.float32) for option in options]
        return [np.repeat(each, counts) for each in values]

    def _warn_of_first_steps(
        self, layers: ActiveLayers, step_norm: np.ndarray, memory: core.Memory, measured: core.Statistics
    ) -> None:
        if self._warned_of_first_steps or measured.steps.max() > first_steps.N_STEPS:
            return
        usual_norm = expected_norm(self.spec, layers.facts, memory, measured, np)
        is_matrix = np.array([param.dim() > 1 for param in layers.params])
        found = first_steps.too_long(step_norm, usual_norm, is_matrix)
        if found is not None:
            self._warned_of_first_steps = True
            warnings.warn(found, stacklevel=2)

    def _remember(self, memory: core.Memory) -> None:
        """Store what all layers share."""
        shared = {
            **self.param_groups[0]["shared"],
            "step": memory.step.item(),
            "losses": memory.loss.observed.item(),
            "first_loss": memory.loss.first.item(),
            "loss_ema": memory.loss.ema.tolist(),
        }
        if memory.guard is not None:
            shared["guard"] = [each.item() for each in memory.guard]
        self.param_groups[0]["shared"] = shared
        if shared["step"] > self.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"step {shared['step']} is past total_steps={self.total_steps}; L3RS continues with the features of "
                f"t / T of a training that is over",
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of an L3RS with the same checkpoint.

        Warns if the state was saved with other meta-parameters or another `total_steps`: this optimizer keeps its own.

        Raises:
          L3RSError: the state is from another kind of optimizer, or has other layers, or the same in another order.
        """
        groups = state_dict["param_groups"]
        averages = {name: shape for name, shape in small_state(self.spec).items() if name in ("log_norms", "memory")}
        shapes = [{key: tuple(param.shape) for key in self._moments()} | averages
                  for group in self.param_groups for param in group["params"]]  # fmt: skip
        check_state(state_dict, self.spec, shapes, self.param_groups)
        warn_of_identity(groups[0]["shared"], self._identity())
        super().load_state_dict(state_dict)
        self.param_groups[0]["shared"] = {**self.param_groups[0]["shared"], **self._identity()}
        self._embed()
        params = [param for group in self.param_groups for param in group["params"]]
        keep_precision(state_dict, [self.state.get(param, {}) for param in params], self._moments())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("weight_decay", 0.0)  # of a state that was saved without

    def __getstate__(self) -> dict[str, Any]:
        own: tuple[str, ...] = ("spec", "total_steps", "_theta", "_guard", "_matching", "_facts", "_rows", "_trains")
        own += ("_directions", "_observed", "_warned", "_warned_of_first_steps")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}
