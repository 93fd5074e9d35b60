"""L3RS for PyTorch: `l3rs.torch.L3RS` is an ordinary `torch.optim.Optimizer`. Nothing here imports JAX."""

from l3rs.extras import pip_install as _pip_install

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(f"l3rs.torch needs torch: {_pip_install('torch')}") from None

from l3rs.torch.names import match_layers
from l3rs.torch.optimizer import L3RS
from l3rs.torch.trainer import observe_trainer

__all__ = ["L3RS", "match_layers", "observe_trainer"]
