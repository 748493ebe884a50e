"""Less memory for more time: gradient checkpointing."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, *args: Any) -> Tensor:
    """``module(*args)`` that keeps no inner activations: the backward pass computes them again (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174). Batch norms count the batch once, not twice."""
    if torch.compiler.is_compiling():  # a compiler's second run writes no buffers, and it takes no contexts
        return checkpoint(module, *args, use_reentrant=False)
    return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (_Untouched(), _Untouched(module)))


class _Untouched:
    """While it lasts, the batch norms in a module leave their running statistics as they are."""

    def __init__(self, module: nn.Module | None = None) -> None:
        modules = () if module is None else module.modules()
        self.norms = [m for m in modules if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.saved = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, deepcopy(norm.num_batches_tracked)

    def __exit__(self, *exception: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
