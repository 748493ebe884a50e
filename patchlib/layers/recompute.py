"""Less memory for more time: gradient checkpointing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary


def recompute(function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """``function(x, *args)`` that keeps no inner activations: the backward pass computes them again from `x` (Chen et
    al. 2016, https://arxiv.org/abs/1604.06174), which it keeps unless `x` is `cheap`. Batch norms count the batch
    once, not twice.

    Args:
        function: a module, or a method of one.
        x: its input.
        args: further arguments.
    """
    if torch.compiler.is_compiling():  # a compiler's second run writes no buffers
        return checkpoint(function, x, *args, use_reentrant=False)
    module: Any = getattr(function, "__self__", function)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Untouched(module)

    recipe = _RECIPES.get(x)
    if recipe is None or recipe.version != x._version:  # written to since
        return checkpoint(function, x, *args, use_reentrant=False, context_fn=contexts)
    ready, differentiable, make = [x], x.requires_grad, recipe.make

    def run(source: Tensor, *args: Any) -> Tensor:
        made = ready.pop() if ready else make(source).requires_grad_(differentiable)
        return function(made, *args)

    return checkpoint(run, recipe.source, *args, use_reentrant=False, context_fn=contexts)


def cheap(function: Callable[[Tensor], Tensor], x: Tensor, *, keep: bool = True) -> Tensor:
    """``function(x)``, a result worth no memory: a `recompute` that takes it keeps `x` in its place, and computes it
    again when it needs it.

    Args:
        function: a module, or a method of one, without randomness.
        x: its input.
        keep: whether inner activations are kept; if not, `recompute` runs the function.
    """
    result = function(x) if keep else recompute(function, x)
    if torch.compiler.is_compiling():
        return result
    module: Any = getattr(function, "__self__", function)

    def make(source: Tensor) -> Tensor:
        with torch.no_grad(), _Untouched(module):
            return function(source)

    _RECIPES[result] = _Recipe(make, x, result._version)
    return result


class _Recipe(NamedTuple):
    """How a tensor is made again: ``make(source)``, as long as its version is the one noted."""

    make: Callable[[Tensor], Tensor]
    source: Tensor
    version: int


_RECIPES = WeakTensorKeyDictionary()


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
