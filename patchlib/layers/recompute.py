"""Less memory for more time: gradient checkpointing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)


def recompute(function: Callable[..., Tensor], *args: Any, keep_products: bool = False) -> Tensor:
    """``function(*args)`` that keeps no inner activations: the backward pass computes them again (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174). Batch norms count the batch once, not twice.

    Args:
        function: a module, or a method of one.
        args: its arguments.
        keep_products: keep what matrix products (linear layers, 1x1 convolutions) gave, the part that is costly to
            compute again; norms, activations and depthwise convolutions are cheap beside it.
    """
    if torch.compiler.is_compiling():  # a compiler's second run writes no buffers, and it knows contexts by name only
        if keep_products:
            return checkpoint(function, *args, use_reentrant=False, context_fn=_keeping_products)
        return checkpoint(function, *args, use_reentrant=False)
    module: Any = getattr(function, "__self__", function)
    selective = _keeping_products if keep_products else noop_context_fn

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = selective()
        return first, _Both(_Untouched(module), again)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    pointwise = operator is torch.ops.aten.convolution.default and args[1].shape[2:].numel() == 1
    return CheckpointPolicy.MUST_SAVE if pointwise or operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def _keeping_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_keep_products)


class _Both(ExitStack):
    """Two contexts as one."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> "_Both":
        for context in self.contexts:
            self.enter_context(context)
        return self


class _Untouched:
    """While it lasts, the batch norms in a module leave their running statistics as they are."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.saved = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, deepcopy(norm.num_batches_tracked)

    def __exit__(self, *exception: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
