"""L3RS as a `torch.optim.Optimizer`: step by step the numbers of `l3rs.optimizer`.

Norms, means and sums over a tensor do not see its layout, so a torch weight [out, in] and the flax
kernel [in, out] that the checkpoint knows are one layer; only finding each other takes a rule (`match_layers`).

A step is a pass of reductions over gradients and parameters, one that advances the moments and takes
the directions' inner products, and one that updates. In between, everything small (features, MLP,
coefficients) is computed on the host, in NumPy: two transfers a step, however many layers. The passes
go over pieces that stay in a processor's cache; nothing of the parameters' size is allocated.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from l3rs import features, network
from l3rs.directions import DIRECTIONS, make_direction
from l3rs.guard import Guard, GuardState, adam_share, advance, make_guard, report
from l3rs.io.checkpoint import read_spec, restore, trained_horizon
from l3rs.layers import Convention, Match, MatchBy, Matching, OnUnknown, embedding_weights, kind, match_network
from l3rs.optimizer import _MIN_MIX_NORM, _MIN_RELATIVE_RMS
from l3rs.spec import Direction, L3RSError, Layer, Spec, Theta
from l3rs.theta import check_theta, digest

try:
    import torch
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("l3rs.torch needs torch: pip install l3rs[torch]") from None

Tensors = tuple[Tensor, ...] | list[Tensor]
Moments = list[list[Tensor]]  # of one direction: pieces by moment

# Elements of a piece. On a CPU a piece of each array and what is computed from them stay in its cache;
# elsewhere it bounds the memory that a direction takes while it is in use.
_PIECE = {"cpu": 1 << 19}
_LARGE_PIECE = 1 << 24


class L3RS(torch.optim.Optimizer):
    """A meta-trained optimizer for a PyTorch model.

    Statistics are float32, updates are cast to the parameters' dtype. A layer whose gradient is not
    finite (or so large that its squared norm is not) stays where it is for that step, and its gradient
    counts as zero in the moments; a non-finite loss is left out of the loss features. A parameter
    without a gradient is skipped: it takes no memory and no other layer sees that it is there.

    Every step needs the loss: `step(loss=loss)`, `step(closure)`, or `observe(loss)` before a `step()`
    that somebody else calls. The loss is the plain one: neither scaled (`GradScaler`) nor divided for
    gradient accumulation. With `torch.distributed` initialised it is averaged over all ranks, all of
    which have to step together; parameters must be whole on each (DDP, not FSDP).

    Args:
      params: `model.named_parameters()`, parameters, or param groups of either. Pass frozen ones, too,
        unless the names are the checkpoint's. Descriptor embeddings are read off names; where these do not say how
        deep a layer is, its place among the parameters does, in several groups that among the sorted names.
      checkpoint: what `l3rs.load` takes: a folder, a shipped name or a URL; or meta-parameters and their spec,
        `(theta, spec)`.
      total_steps: the number of steps you are going to train, the horizon T. None means the longest
        that the checkpoint was meta-trained on. Training may go past it, with one warning.
      lr: factor on the step that the network chose. 1 is what was meta-trained; it is here for learning
        rate schedulers and for param groups.
      rename: {name of a parameter: path of its layer in the checkpoint}. With descriptor embeddings, the names
        that layers are described by.
      match: how parameters find their layers, see `match_layers`: by "path", by "order", or "auto": by path,
        and by order if no name is a layer's.
      on_unknown: "error", or "mean": a parameter that is not in the checkpoint's table, or has another shape there,
        gets the mean of all embeddings. "descriptor" is for checkpoints with descriptor embeddings.
      guard: True, or a `Guard`: plain Adam steps for a while when the loss runs away, see `guard_report`. Its
        learning rate is multiplied by `lr`, too.

    Attributes:
      spec: what the optimizer is made of.
      total_steps: T.
      param_groups: beside `params` and `lr`, `layers`: the path of each parameter's layer; None if it has the mean
        embedding. With descriptor embeddings, the path that it is described by.
      state: per parameter `step`, the moments (float32, of its shape), and of the last step `log_norms`
        ([2, S] EMAs), `mix` ([P], μ) and `step_norm` ([], λ without `lr`).

    Raises:
      L3RSError: parameters that have no layer in the checkpoint; not a checkpoint; a step without a loss.

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

    def __init__(
        self,
        params: ParamsT,
        checkpoint: str | os.PathLike[str] | tuple[Theta, Spec],
        total_steps: int | None = None,
        *,
        lr: float | Tensor = 1.0,
        rename: Mapping[str, str] | None = None,
        match: MatchBy = "auto",
        on_unknown: OnUnknown = "error",
        guard: bool | Guard = False,
    ) -> None:
        if isinstance(checkpoint, tuple):
            theta, self.spec = checkpoint
            info: dict[str, Any] = {}
            check_theta(theta, self.spec, "theta")
        else:
            theta, self.spec, info = restore(checkpoint)
        if not lr >= 0:
            raise L3RSError(f"lr is {lr}; it must be a number ≥ 0")
        self.total_steps = _horizon(total_steps, info)
        self._theta = jax.tree.map(np.asarray, theta)
        self._guard = make_guard(guard, self.spec)
        self._matching = Matching.of(self.spec, rename, match, on_unknown)
        self._directions = [_direction(direction) for direction in self.spec.directions]
        self._observed: list[Tensor] = []
        self._warned = False
        super().__init__(params, {"lr": lr})
        self._match(self.param_groups, self._matching)
        # What all layers share lives in the first group: the only place besides a parameter's own state
        # that every tool for saving and sharding optimizers carries along.
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

        With descriptor embeddings all layers' depths are told anew; pass frozen parameters from the start, and they
        stay as they are.

        Args:
          param_group: beside what `torch.optim` takes, `rename`, as of `L3RS`.

        Raises:
          L3RSError: a parameter has no layer in the checkpoint, or that layer has one already.
        """
        group = dict(param_group)
        rename = group.pop("rename", None)
        super().add_param_group(group)
        if "shared" in self.param_groups[0]:  # while constructing, all groups are matched at once
            try:
                how = self._matching
                self._match(self.param_groups[-1:], Matching.of(self.spec, rename, how.by, how.on_unknown))
            except L3RSError:
                self.param_groups.pop()
                raise

    def _match(self, groups: Sequence[dict[str, Any]], how: Matching) -> None:
        params = [param for group in groups for param in group["params"]]
        names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
        for name, param in zip(names, params, strict=True):
            if hasattr(param, "device_mesh") or re.search("_fsdp_wrapped_module|_flat_param", name or ""):
                raise L3RSError(
                    f"parameter {name or ''}{tuple(param.shape)} is sharded; L3RS reads norms of whole layers: use DDP"
                )
            if param.is_complex():
                raise L3RSError(f"parameter {name or ''}{tuple(param.shape)} is complex; L3RS takes real ones")
        devices = {str(param.device) for group in self.param_groups for param in group["params"]}
        if len(devices) > 1:
            raise L3RSError(f"parameters are on {', '.join(sorted(devices))}; they must all be on one device")
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
        # Groups are made by other rules than depth: a split by weight decay puts all norms at the end.
        return TORCH._replace(alphabetical=len(self.param_groups) > 1)

    def _identity(self) -> dict[str, Any]:
        """What a saved state is told by, beside its form."""
        return {"total_steps": self.total_steps, "theta": digest(self._theta)[:16]}

    def _embed(self) -> None:
        """The embeddings of all groups' parameters, from what `layers` says that they are."""
        layers = [path for group in self.param_groups for path in group["layers"]]
        params = [param for group in self.param_groups for param in group["params"]]
        described = [_flax_layer(path, param.shape) for path, param in zip(layers, params, strict=True)]
        rows = {layer.path: row for row, layer in enumerate(self.spec.layers)}
        matches = [Match(None, (), rows.get(path), "") for path in layers]
        weights = embedding_weights(self.spec, matches, described, self._convention)
        embeddings = iter(weights @ self._theta["embedding"])
        self._embeddings = [[next(embeddings) for _ in group["params"]] for group in self.param_groups]

    def observe(self, loss: Tensor | float) -> None:
        """Remember a loss for the next step, for loops in which somebody else calls `step()`.

        Losses of several micro-batches are averaged, those that are finite if any is. Each is the
        micro-batch's own mean loss, not divided by their number. A step that `GradScaler` skips leaves its
        losses for the next one.
        """
        if not isinstance(loss, (Tensor, numbers.Real)):
            raise L3RSError(f"the loss is {loss!r}; it must be a number or a tensor of one")
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss), device="cpu")
        if value.numel() != 1 or value.is_complex():
            raise L3RSError(f"the loss is {value.dtype}{list(value.shape)}; it must be one real number")
        # A copy: what is in the tensor now is the loss, whatever is done to it in place.
        self._observed.append(value.reshape(()).float().clone())

    def guard_report(self) -> dict[str, Any]:
        """What the guard did so far: see `l3rs.guard_report`.

        Raises:
          L3RSError: there is no guard.
        """
        if self._guard is None:
            raise L3RSError("the optimizer has no guard: L3RS(…, guard=True)")
        return report(self._guard_state())

    def _guard_state(self) -> GuardState:
        return GuardState(*self.param_groups[0]["shared"].get("guard", (0, 0, 0, 0, float("inf"))))

    # Compiled, it would be traced anew for every step: its scalars are Python's.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """One step.

        Args:
          closure: clears the gradients, computes them anew and returns the loss. Losses that were given to `observe`
            since the last step, or by the closure, count in place of the one that it returns.
          loss: the loss that the gradients are of; in place of a closure.

        Returns:
          The loss that was passed, or that the closure returned; None, and no step, where the closure has neither a
          loss nor gradients. Without a loss, a step with an `lr` of 0 only makes the state: that is how
          torch.distributed.checkpoint prepares an optimizer to load one.

        Raises:
          L3RSError: no loss; a sparse gradient.
        """
        if closure is not None:
            if loss is not None:
                raise L3RSError("step takes a closure or a loss, not both")
            if not callable(closure):
                raise L3RSError("step takes the loss by its name: step(loss=loss)")
            with torch.enable_grad():
                loss = closure()
        layers = self._layers()
        if loss is not None and not (closure is not None and self._observed):
            self.observe(loss)
        if not self._observed:
            if (closure is not None and not layers) or not any(float(group["lr"]) for group in self.param_groups):
                return None
            raise L3RSError("L3RS reads the loss: call step(loss=loss), step(closure), or observe(loss) before step()")
        observed, self._observed = self._observed, []
        if layers:
            with np.errstate(all="ignore"):  # what is not finite is looked for, and taken out
                self._step(layers, observed)
        return loss

    def _layers(self) -> list[_ActiveLayer]:
        """The parameters that have a gradient; their state is there afterwards."""
        layers = []
        for group, embeddings in zip(self.param_groups, self._embeddings, strict=True):
            for param, path, embedding in zip(group["params"], group["layers"], embeddings, strict=True):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    which = f"{path!r} {tuple(param.shape)}"
                    raise L3RSError(
                        f"the gradient of {which} is sparse; L3RS takes dense ones, e.g. of nn.Embedding(sparse=False)"
                    )
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state |= {
                        name: torch.zeros(shape, dtype=torch.float32, device="cpu")
                        for name, shape in self._small_state().items()
                    }
                    for key in self._moments():
                        state[key] = torch.zeros_like(param, dtype=torch.float32)
                layers.append(_ActiveLayer(param.detach(), param.grad.detach(), state, embedding, group["lr"]))
        return layers

    def _small_state(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is kept of the last step, in a parameter's state."""
        n = len(self._directions)
        return {"log_norms": (2, 2 + n), "mix": (n,), "step_norm": ()}

    def _moments(self) -> list[str]:
        """Names of the moments in a parameter's state: `0/adam/exp_avg`."""
        named = enumerate(zip(self.spec.directions, self._directions, strict=True))
        return [f"{i}/{spec.name}/{moment}" for i, (spec, direction) in named for moment in direction.moments]

    def _step(self, layers: Sequence[_ActiveLayer], observed: Sequence[Tensor]) -> None:
        device = layers[0].param.device
        keys = self._moments()
        pieces = [(layer.param, layer.grad, *(layer.state[key] for key in keys)) for layer in layers]
        passes = list(_buckets(pieces, _PIECE.get(device.type, _LARGE_PIECE)))
        index = np.array([i for bucket in passes for i in bucket.layers])

        # Reductions that need no direction, and whether a gradient may enter the moments at all.
        losses = torch.stack([each.to(device) for each in observed])
        loss = _mean_over_ranks(torch.where(losses.isfinite(), losses, torch.nan).nanmean())
        value, *norms = _host(torch.cat([loss[None], _norms(passes)]))
        gradient, parameter = _per_layer(np.square(norms).reshape(2, -1).T, index).T  # squared norms
        finite = np.isfinite(gradient)

        for layer in layers:
            layer.state["step"] += 1
        steps = np.array([layer.state["step"] for layer in layers], np.float32)

        products: list[Tensor] = []
        for bucket in passes:
            inputs = self._inputs(bucket, finite, steps)
            both = zip(self._directions, inputs.moments, strict=True)
            products += _products([direction.advance(moments, inputs) for direction, moments in both])
        gram = _gram(_per_layer(_host(torch.stack(products)).reshape(len(index), -1), index), len(self._directions))
        moves = finite & np.isfinite(gram).all((1, 2))  # a direction's norm can overflow, too
        gram = np.where(moves[:, None, None], gram, np.float32(0))
        gradient = np.where(finite, gradient, np.float32(0))
        coefficients = self._decide(layers, value, np.sqrt(gradient), np.sqrt(parameter), gram, steps)

        for bucket in passes:
            self._update(bucket, self._inputs(bucket, finite, steps), coefficients[bucket.layers], moves)

    def _update(self, bucket: _Bucket, inputs: _Inputs, factors: np.ndarray, moves: np.ndarray) -> None:
        """Add Σ_p c_p d_p; a layer that does not move still has moments to advance."""
        params, moving = bucket.arrays[0], moves[bucket.layers].tolist()
        aside = any(direction.reads_params for direction in self._directions)
        updates = [
            param if ok and param.dtype == torch.float32 and not aside else torch.zeros_like(param, dtype=torch.float32)
            for param, ok in zip(params, moving, strict=True)
        ]
        for direction, moments, factor in zip(self._directions, inputs.moments, factors.T.tolist(), strict=True):
            direction.add(updates, factor, moments, inputs)
        for direction, moments in zip(self._directions, inputs.moments, strict=True):
            direction.after(moments, inputs)
        for param, update, ok in zip(params, updates, moving, strict=True):
            if ok and update is not param:
                param.add_(update.to(param.dtype))

    def _inputs(self, bucket: _Bucket, finite: np.ndarray, steps: np.ndarray) -> _Inputs:
        params, grads, *moments = bucket.arrays
        slots = iter(moments)
        usable = finite[bucket.layers].tolist()
        return _Inputs(
            params=[param.float() for param in params],
            grads=[
                # A NaN must not enter moments that would keep it for ever.
                grad.float() if ok else torch.zeros_like(grad, dtype=torch.float32)
                for grad, ok in zip(grads, usable, strict=True)
            ],
            moments=[[next(slots) for _ in direction.moments] for direction in self._directions],
            steps=steps[bucket.layers],
        )

    def _decide(
        self,
        layers: Sequence[_ActiveLayer],
        loss: np.float32,
        gradient_norm: np.ndarray,
        parameter_norm: np.ndarray,
        gram: np.ndarray,
        steps: np.ndarray,
    ) -> np.ndarray:
        """What each direction is multiplied by, [L, P].

        Args:
          layers: those that have a gradient.
          loss: of this step.
          gradient_norm, parameter_norm: float32 [L].
          gram: float32 [L, P, P], inner products of the directions.
          steps: float32 [L], how many gradients each layer has seen.
        """
        spec = self.spec
        shared = self._observe_step(loss)
        root_n = np.sqrt([max(layer.param.numel(), 1) for layer in layers]).astype(np.float32)
        direction_norm = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
        norms = np.concatenate([gradient_norm[:, None], parameter_norm[:, None], direction_norm], axis=1)
        log_norms = _safe_log(norms / root_n[:, None])  # [L, S]
        decays = np.array(spec.norm_decays, np.float32)[:, None, None]
        ema = np.stack([_host(layer.state["log_norms"].float()) for layer in layers], axis=1)  # [2, L, S]
        ema = decays * ema + (1 - decays) * log_norms
        seen = _norm_features(log_norms, ema, steps, decays)
        embedding = np.stack([layer.embedding for layer in layers])
        mix, log_step = _network(self._theta, spec, shared, np.concatenate([seen, embedding], axis=1))

        relative = np.maximum(parameter_norm, _MIN_RELATIVE_RMS * root_n)
        step_norm = spec.step_scale * (root_n if spec.step == "rms" else relative) * np.exp(log_step)
        coefficients = _coefficients(mix, step_norm, gram, direction_norm)
        if self._guard is not None and self._guard_state().left > 0:
            mix = np.broadcast_to(adam_share(spec), mix.shape)
            coefficients = self._guard.learning_rate * mix
            step_norm = (coefficients * direction_norm).sum(1)
        for i, layer in enumerate(layers):
            decided = {"log_norms": ema[:, i], "mix": mix[i], "step_norm": step_norm[i]}
            layer.state.update({name: torch.from_numpy(np.array(value)) for name, value in decided.items()})
        lr = np.array([float(layer.lr) for layer in layers], np.float32)
        return -lr[:, None] * coefficients

    def _observe_step(self, loss: np.float32) -> np.ndarray:
        """Count a step and take its loss into the averages; the features that all layers share, [F]."""
        shared, decays = dict(self.param_groups[0]["shared"]), np.array(self.spec.loss_decays, np.float32)
        shared["step"] += 1
        if shared["step"] > self.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"step {shared['step']} is past total_steps={self.total_steps}; L3RS goes on, with the features of a "
                f"training that is over",
                stacklevel=2,
            )
        if np.isfinite(loss):
            shared["first_loss"] = shared["first_loss"] if shared["losses"] else float(loss)
            shared["losses"] += 1
            ema = np.array(shared["loss_ema"], np.float32)
            shared["loss_ema"] = (decays * ema + (1 - decays) * loss).tolist()
        if self._guard is not None:
            fast = shared["loss_ema"][0] / (1 - decays[0] ** shared["losses"]) if shared["losses"] else np.nan
            state = GuardState(*map(np.asarray, self._guard_state()))
            state = advance(self._guard, state, loss, np.float32(fast), np.float32(shared["first_loss"]), np)
            shared["guard"] = [each.item() for each in state]
        self.param_groups[0]["shared"] = shared
        time = _time_features(shared["step"], self.total_steps, self.spec.absolute_time)
        return np.concatenate([time, _loss_features(shared, decays)])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of this optimizer, of the same checkpoint.

        Warns of other meta-parameters and of another `total_steps`: this optimizer's count from here on.

        Raises:
          L3RSError: it is another optimizer's.
        """
        groups = state_dict["param_groups"]
        self._check_state(state_dict)
        for name, own in self._identity().items():
            saved = groups[0]["shared"].get(name, own)
            if saved != own:
                what = "other meta-parameters" if name == "theta" else f"{name}={saved}, not {own}"
                warnings.warn(f"the state was saved with {what}; those of this optimizer count", stacklevel=2)
        super().load_state_dict(state_dict)
        self.param_groups[0]["shared"] = {**self.param_groups[0]["shared"], **self._identity()}
        self._embed()
        indices = (index for group in groups for index in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        moments = set(self._moments())
        for index, param in zip(indices, params, strict=True):
            state = self.state.get(param, {})
            for key, saved in state_dict["state"].get(index, {}).items():
                if key in moments and state[key].dtype != torch.float32:  # torch casts to the parameter's dtype
                    state[key] = saved.to(param.device, torch.float32)
                elif isinstance(saved, Tensor) and key not in moments:
                    state[key] = saved.to("cpu", torch.float32)

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        """A form that is not this optimizer's would be found out in the next step only, when the old state is gone."""
        groups = state_dict["param_groups"]
        paths = [path for group in groups for path in group.get("layers", ())]
        known = "shared" in groups[0] and all("layers" in group for group in groups)
        rows = {layer.path for layer in self.spec.layers}
        if not known or not (self.spec.embedding == "descriptor" or set(paths) - {None} <= rows):
            raise L3RSError("the state dict is not one of an L3RS optimizer with these layers")
        if len(groups[0]["shared"]["loss_ema"]) != len(self.spec.loss_decays):
            raise L3RSError(
                f"the state dict has {len(groups[0]['shared']['loss_ema'])} averages of the loss; this optimizer "
                f"has {len(self.spec.loss_decays)}"
            )
        indices = [index for group in groups for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=False):  # how many there must be is torch's to say
            state = state_dict["state"].get(index)
            if not state:
                continue
            expected = {key: tuple(param.shape) for key in self._moments()}
            expected["log_norms"] = self._small_state()["log_norms"]
            found = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
            found = {key: shape for key, shape in found.items() if "/" in key or key in expected}
            if found != expected:
                theirs, ours = ([f"{k} {s}" for k, s in a.items() if b.get(k) != s] for a, b in
                                ((found, expected), (expected, found)))  # fmt: skip
                raise L3RSError(
                    f"the state dict has {', '.join(theirs) or 'less'} for parameter {index} {tuple(param.shape)}; "
                    f"this optimizer has {', '.join(ours) or 'less'}"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "spec",
            "total_steps",
            "_theta",
            "_guard",
            "_matching",
            "_embeddings",
            "_directions",
            "_observed",
            "_warned",
        )
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}


def _horizon(total_steps: int | None, info: Mapping[str, Any]) -> int:
    if total_steps is None:
        total_steps = trained_horizon(info)
    whole = isinstance(total_steps, numbers.Integral) and not isinstance(total_steps, bool)
    if not whole or not 1 <= total_steps < 2**31:
        raise L3RSError(f"total_steps is {total_steps}; it must be a whole number ≥ 1")
    return int(total_steps)


def observe_trainer(trainer: Any) -> Any:
    """Let the optimizer of a `transformers.Trainer` see the losses; to be called before `train()`.

    `training_step` is the one place that every loss comes through: whatever computes it, and scaled such that those
    of accumulated micro-batches sum up to the loss of the step. Choose `lr_scheduler_type="constant"`: the Trainer's
    default schedule would multiply the learned step by a linear decay.

    Args:
      trainer: a `Trainer` (or a subclass) made with `optimizers=(L3RS(…), None)`; it is changed.

    Returns:
      The trainer.

    Raises:
      L3RSError: from `train()`, if the Trainer has another optimizer.

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
        optimizer.observe(loss * trainer.current_gradient_accumulation_steps)  # `observe` takes their mean
        return loss

    trainer.training_step = observed
    return trainer


# Matching a model's parameters to the layers of the checkpoint


def match_layers(
    optimizer: str | os.PathLike[str] | Spec,
    params: ParamsT,
    *,
    rename: Mapping[str, str] | None = None,
    by: MatchBy = "auto",
    on_unknown: OnUnknown = "error",
) -> tuple[Match, ...]:
    """What each parameter is to an optimizer, in the order given; `L3RS` does the same with these arguments.

    A parameter's layer is that of its name (`.` for `/`, `weight` for `kernel`, `scale` or `embedding`; words that DDP
    and torch.compile put before it do not count), or by order: see `l3rs.layers.match_network`. A shape is the same if
    its dimensions are, in whatever order.

    Args:
      optimizer: a checkpoint, or a spec.
      params: `model.named_parameters()`, or parameters.
      rename, by, on_unknown: see `L3RS`.

    Raises:
      L3RSError: as `L3RS`.
    """
    spec = optimizer if isinstance(optimizer, Spec) else read_spec(optimizer)
    network = []
    for param in params:
        if isinstance(param, dict):
            raise L3RSError("match_layers takes parameters, or (name, parameter) pairs, not param groups")
        name, tensor = param if isinstance(param, tuple) else (None, param)
        network.append((name, tuple(tensor.shape)))
    return match_network(spec, network, Matching.of(spec, rename, by, on_unknown), TORCH)


def _unwrapped(name: str) -> str:
    name = re.sub(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.)", "", name).removeprefix(".")
    return re.sub(r"^(module\.)+", "", name).replace(".", "/")


def _spellings(name: str) -> Iterator[str]:
    """The paths that a torch name may have in JAX; wrappers (DDP, torch.compile) put words before it."""
    path = _unwrapped(name)
    yield path
    if path.endswith("weight"):
        for leaf in ("kernel", "scale", "embedding"):
            yield path.removesuffix("weight") + leaf


def _flax_layer(name: str | None, shape: Sequence[int]) -> Layer:
    """A parameter under the name it is described by, in Flax's layout: [in, out] and [H, W, in, out]."""
    path = _unwrapped(name or "")
    match kind(path, len(shape)):
        case "matrix":
            return Layer(path, tuple(reversed(shape)))
        case "conv":
            return Layer(path, (*shape[2:], shape[1], shape[0]))
    return Layer(path, tuple(shape))


TORCH = Convention(_spellings, lambda shape: tuple(sorted(shape)), alphabetical=False)


# Passes over the parameters


class _ActiveLayer(NamedTuple):
    """A parameter that takes part in this step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    embedding: np.ndarray  # float32 [E]
    lr: float | Tensor


class _Bucket(NamedTuple):
    """Pieces of layers that are worked on together."""

    layers: list[int]  # of each piece, the layer it is of
    arrays: list[list[Tensor]]  # params, grads, and each moment: a tensor a piece


class _Inputs(NamedTuple):
    """What directions are made from: pieces in float32, and gradients that are finite."""

    params: list[Tensor]
    grads: list[Tensor]
    moments: list[Moments]  # of each direction
    steps: np.ndarray  # float32 [pieces], gradients seen, this one included


def _buckets(layers: Sequence[tuple[Tensor, ...]], most: int) -> Iterator[_Bucket]:
    """Buckets of at most `most` elements; each entry of `layers` is a param, its gradient and its moments."""
    indices: list[int] = []
    pieces: list[tuple[Tensor, ...]] = []
    filled = 0
    for i, arrays in enumerate(layers):
        for piece in _pieces(arrays, most):
            if pieces and filled + piece[0].numel() > most:
                yield _Bucket(indices, [list(x) for x in zip(*pieces, strict=True)])
                indices, pieces, filled = [], [], 0
            indices.append(i)
            pieces.append(piece)
            filled += piece[0].numel()
    yield _Bucket(indices, [list(x) for x in zip(*pieces, strict=True)])


def _pieces(arrays: tuple[Tensor, ...], most: int) -> Iterator[tuple[Tensor, ...]]:
    """A layer's arrays as flat views, in pieces; only a gradient of another layout is copied."""
    param, grad, *moments = arrays
    if not param.is_contiguous():  # e.g. channels_last
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        param, grad, *moments = (x.permute(order) for x in arrays)
    if not all(x.is_contiguous() for x in (param, *moments)):  # a parameter with gaps is not flat in any order
        return iter([arrays])
    flat = (param.view(-1), grad.reshape(-1), *(moment.view(-1) for moment in moments))
    if param.numel() <= most:
        return iter([flat])
    return zip(*(x.split(most) for x in flat), strict=True)


def _norms(passes: Sequence[_Bucket]) -> Tensor:
    """Norms of the gradients' pieces, then of the parameters', float32 [2 · pieces]."""
    pieces = [piece for kind in (1, 0) for bucket in passes for piece in bucket.arrays[kind]]
    # The kernel widens while it reads, but does not narrow.
    pieces = [piece.float() if piece.dtype == torch.float64 else piece for piece in pieces]
    return torch.stack(torch._foreach_norm(pieces, 2, torch.float32))


def _products(directions: Sequence[Tensors]) -> list[Tensor]:
    """⟨d_p, d_q⟩ for p ≤ q of each piece, in the order that `_gram` reads."""
    flat = [[piece.reshape(-1) for piece in direction] for direction in directions]
    n = len(flat)
    pairs = [(p, q) for p in range(n) for q in range(p, n)]
    return [torch.dot(flat[p][i], flat[q][i]) for i in range(len(flat[0])) for p, q in pairs]


def _gram(products: np.ndarray, n: int) -> np.ndarray:
    """float32 [L, P, P] from the products of its upper triangle, [L, P (P + 1) / 2]."""
    rows, columns = np.triu_indices(n)
    gram = np.empty((len(products), n, n), np.float32)
    gram[:, rows, columns] = gram[:, columns, rows] = products
    return gram


def _per_layer(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Sums of the pieces' values, [pieces, K] to float32 [L, K]; they overflow where float32 does."""
    sums = np.zeros((index[-1] + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums.astype(np.float32)


def _host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _mean_over_ranks(loss: Tensor) -> Tensor:
    """The loss that all ranks see: different features would tear their parameters apart."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(loss)
        loss = loss / distributed.get_world_size()
    return loss


# Base directions, as in `directions.py`: each points uphill


class _BaseDirection:
    """A base optimizer's direction d, on lists of float32 pieces.

    It is computed twice, first in `advance` and then in `add`: cheaper than to store it. What reads the
    new moments advances them in `advance`, what reads the old ones `after` everything.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    reads_params: ClassVar[bool] = False

    def advance(self, moments: Moments, inputs: _Inputs) -> Tensors:
        """Take the gradients into the moments; d."""
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        """d, from moments that have been advanced."""
        raise NotImplementedError

    def add(self, targets: list[Tensor], factors: list[float], moments: Moments, inputs: _Inputs) -> None:
        """Add factor · d to each target."""
        for target, piece, factor in zip(targets, self.read(moments, inputs), factors, strict=True):
            target.add_(piece, alpha=factor)

    def after(self, moments: Moments, inputs: _Inputs) -> None:
        """Take the gradients into moments that d must not have seen."""


@dataclasses.dataclass(frozen=True)
class _Adam(_BaseDirection):
    """m̂ / (√(v̂ + eps_root) + eps) = √c₂/c₁ · m / (√(v + c₂ eps_root) + √c₂ eps), c: the bias corrections."""

    b1: float
    b2: float
    eps: float
    eps_root: float
    moments = ("exp_avg", "exp_avg_sq")

    def advance(self, moments: Moments, inputs: _Inputs) -> Tensors:
        exp_avg, exp_avg_sq = moments
        if self.eps_root == 0 and all(
            x.is_contiguous() and x.device.type == "cpu" for x in (*inputs.grads, *exp_avg, *exp_avg_sq)
        ):
            return self._fused(exp_avg, exp_avg_sq, inputs)
        torch._foreach_lerp_(exp_avg, inputs.grads, 1 - self.b1)
        torch._foreach_mul_(exp_avg_sq, self.b2)
        torch._foreach_addcmul_(exp_avg_sq, inputs.grads, inputs.grads, 1 - self.b2)
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        pieces = torch._foreach_div(moments[0], self._root(moments[1], inputs.steps))
        torch._foreach_mul_(pieces, self._scale(inputs.steps).tolist())
        return pieces

    def add(self, targets: list[Tensor], factors: list[float], moments: Moments, inputs: _Inputs) -> None:
        scaled = (np.array(factors) * self._scale(inputs.steps)).tolist()
        torch._foreach_addcdiv_(targets, moments[0], self._root(moments[1], inputs.steps), scaled)

    def _fused(self, exp_avg: list[Tensor], exp_avg_sq: list[Tensor], inputs: _Inputs) -> Tensors:
        """One kernel in place of seven: Adam with learning rate -1 makes d of zeros."""
        pieces = [torch.zeros_like(x) for x in exp_avg]
        torch._fused_adam_(
            pieces,
            inputs.grads,
            exp_avg,
            exp_avg_sq,
            [],
            list(torch.from_numpy(inputs.steps).unbind()),
            lr=-1.0,
            beta1=self.b1,
            beta2=self.b2,
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        return pieces

    def _scale(self, steps: np.ndarray) -> np.ndarray:
        return np.sqrt(1 - self.b2 ** steps.astype(float)) / (1 - self.b1 ** steps.astype(float))

    def _root(self, exp_avg_sq: list[Tensor], steps: np.ndarray) -> Tensors:
        correction = 1 - self.b2 ** steps.astype(float)
        if self.eps_root:
            root = torch._foreach_add(exp_avg_sq, (correction * self.eps_root).tolist())
            torch._foreach_sqrt_(root)
        else:
            root = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_add_(root, (np.sqrt(correction) * self.eps).tolist())
        return root


@dataclasses.dataclass(frozen=True)
class _Sgd(_BaseDirection):
    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        del moments
        return inputs.grads


@dataclasses.dataclass(frozen=True)
class _Momentum(_BaseDirection):
    decay: float
    nesterov: bool
    moments = ("trace",)

    def advance(self, moments: Moments, inputs: _Inputs) -> Tensors:
        torch._foreach_mul_(moments[0], self.decay)
        torch._foreach_add_(moments[0], inputs.grads)
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        return torch._foreach_add(inputs.grads, moments[0], alpha=self.decay) if self.nesterov else moments[0]


@dataclasses.dataclass(frozen=True)
class _Lion(_BaseDirection):
    b1: float
    b2: float
    moments = ("exp_avg",)

    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        interpolated = torch._foreach_mul(moments[0], self.b1)
        torch._foreach_add_(interpolated, inputs.grads, alpha=1 - self.b1)
        torch._foreach_sign_(interpolated)
        return interpolated

    def after(self, moments: Moments, inputs: _Inputs) -> None:
        torch._foreach_lerp_(moments[0], inputs.grads, 1 - self.b2)


@dataclasses.dataclass(frozen=True)
class _Rmsprop(_BaseDirection):
    decay: float
    eps: float
    moments = ("square_avg",)

    def advance(self, moments: Moments, inputs: _Inputs) -> Tensors:
        torch._foreach_mul_(moments[0], self.decay)
        torch._foreach_addcmul_(moments[0], inputs.grads, inputs.grads, 1 - self.decay)
        return self.read(moments, inputs)

    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        scale = torch._foreach_add(moments[0], self.eps)
        torch._foreach_rsqrt_(scale)
        torch._foreach_mul_(scale, inputs.grads)
        return scale


@dataclasses.dataclass(frozen=True)
class _WeightDecay(_BaseDirection):
    reads_params = True

    def read(self, moments: Moments, inputs: _Inputs) -> Tensors:
        del moments
        return inputs.params


_DIRECTIONS: dict[str, Callable[..., _BaseDirection]] = {
    "adam": _Adam,
    "sgd": _Sgd,
    "momentum": _Momentum,
    "lion": _Lion,
    "rmsprop": _Rmsprop,
    "weight_decay": _WeightDecay,
}


def _direction(direction: Direction) -> _BaseDirection:
    make_direction(direction)  # the name and the options are right
    if direction.name not in _DIRECTIONS:
        raise L3RSError(f"direction {direction.name!r} is not there in PyTorch; {', '.join(_DIRECTIONS)} are")
    options = inspect.signature(DIRECTIONS[direction.name]).bind(**dict(direction.options))
    options.apply_defaults()
    return _DIRECTIONS[direction.name](**options.arguments)


# Features and network, as in `features.py` and `network.py`, in float32


def _safe_log(x: np.ndarray) -> np.ndarray:
    tiny, huge = np.exp(-features.LOG_LIMIT).astype(np.float32), np.exp(features.LOG_LIMIT).astype(np.float32)
    return np.log(np.clip(np.where(np.isnan(x), np.float32(0), x), tiny, huge))


def _time_features(step: int, total_steps: int, absolute: bool) -> np.ndarray:
    t = np.float32(step)
    time = np.tanh(10 * (t / np.float32(total_steps) - np.array(features.FRACTION_CENTERS, np.float32)))
    if not absolute:
        return time
    return np.concatenate([time, np.tanh(t / np.array(features.ABSOLUTE_SCALES, np.float32) - 1)])


def _loss_features(shared: Mapping[str, Any], decays: np.ndarray) -> np.ndarray:
    ema = np.array(shared["loss_ema"], np.float32)
    if not shared["losses"]:
        return np.zeros(2 * len(ema), np.float32)
    log_ema = _safe_log(ema / np.maximum(1 - decays ** np.float32(shared["losses"]), np.float32(1e-8)))
    log_first = _safe_log(np.array(shared["first_loss"], np.float32))
    ratios = np.concatenate([log_ema[:-1] - log_ema[1:], log_ema - log_first])
    limit = features.RATIO_LIMIT
    return np.concatenate([log_ema[:1] / features.LOG_SCALE, np.clip(ratios, -limit, limit)])


def _norm_features(log_norms: np.ndarray, ema: np.ndarray, steps: np.ndarray, decays: np.ndarray) -> np.ndarray:
    fast, slow = ema / np.maximum(1 - decays ** steps[:, None], np.float32(1e-8))
    limit = features.RATIO_LIMIT
    return np.concatenate([log_norms / features.LOG_SCALE, np.clip(fast - slow, -limit, limit)], axis=1)


def _network(
    theta: Mapping[str, Any], spec: Spec, shared: np.ndarray, per_layer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """μ [L, P] and log of λ over its base [L]."""
    x = np.concatenate([np.broadcast_to(shared, (len(per_layer), len(shared))), per_layer], axis=1)
    for i in range(len(spec.hidden) + 1):
        dense = theta[f"dense_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        if i < len(spec.hidden):
            x = np.tanh(x)
    logits = x[:, :-1] + np.where(np.arange(len(spec.directions)) == 0, spec.mix_bias, -spec.mix_bias).astype(x.dtype)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    limit = network._STEP_LOG_LIMIT
    return odds / odds.sum(axis=1, keepdims=True), np.clip(spec.step_gain * x[:, -1], -limit, limit)


def _coefficients(mix: np.ndarray, step_norm: np.ndarray, gram: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """λ μ_p / (‖d_p‖ ‖Σ_q μ_q unit(d_q)‖), [L, P]; 0 for a direction of norm 0, which has no unit vector."""
    inverse = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    cosine = gram * inverse[:, :, None] * inverse[:, None, :]
    mixed_norm = np.sqrt(np.maximum(np.einsum("lp,lpq,lq->l", mix, cosine, mix), 0))
    return mix * inverse * (step_norm / np.maximum(mixed_norm, np.float32(_MIN_MIX_NORM)))[:, None]
