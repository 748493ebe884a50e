"""Less memory for more time: gradient checkpointing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, *args: Any) -> Tensor:
    """``module(*args)`` that keeps no inner activations: the backward pass computes them again (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174). Batch norms count the batch once, not twice."""
    if torch.compiler.is_compiling():  # the compiler's second run writes no buffers, and it takes no contexts
        return checkpoint(module, *args, use_reentrant=False)
    return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (_Statistics(), _Statistics(module)))


class _Statistics:
    """While it lasts, the training batch norms in a module leave their running statistics alone."""

    def __init__(self, module: nn.Module | None = None) -> None:
        modules = () if module is None else module.modules()
        self.norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.track_running_stats = False

    def __exit__(self, *exception: object) -> None:
        for norm in self.norms:
            norm.track_running_stats = True
