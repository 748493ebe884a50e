"""Less memory for more time: gradient checkpointing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..ops.plain import transformed


def recompute(function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """``function(x, *args)`` that keeps no inner activations: the backward pass computes them again from `x` (Chen et
    al. 2016, https://arxiv.org/abs/1604.06174). In place of an `x` that `remade` gave, it keeps what that was made
    from. Batch norms count the batch once, not twice.

    Until the backward pass, parameters, buffers and training mode have to stay as they are: the second run reads them
    where they stand, so `torch.func.functional_call` does not reach it. Where a function is traced, exported, or
    transformed by `torch.func`, it just runs.

    Args:
        function: a module, or a method of one.
        x: its input, of any shape.
        args: further arguments.

    Returns:
        what the function returns.
    """
    if transformed():
        return function(x, *args)
    if torch.compiler.is_compiling():  # what the compiler traces twice, it runs without the second run's side effects
        return checkpoint(function, x, *args, use_reentrant=False)
    module: Any = getattr(function, "__self__", function)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Untouched(module)

    recipe: _Recipe | None = getattr(x, "_recipe", None)
    if recipe is None or recipe.version != x._version:  # written to since
        return checkpoint(function, x, *args, use_reentrant=False, context_fn=contexts)
    first = [x]

    def run(_: Tensor, *args: Any) -> Tensor:
        return function(first.pop() if first else recipe.again(), *args)

    return checkpoint(run, recipe.source, *args, use_reentrant=False, context_fn=contexts)


def remade(function: Callable[[Tensor], Tensor], x: Tensor, *, keep: bool = True) -> Tensor:
    """``function(x)``, so cheap that the result is worth no memory: a `recompute` that takes it keeps `x` in its place.

    Args:
        function: a module, or a method of one, without randomness.
        x: its input, of any shape.
        keep: whether inner activations are kept; if not, the function too is run by `recompute`.
    """
    result = function(x) if keep else recompute(function, x)
    if result.requires_grad and not transformed() and not torch.compiler.is_compiling():
        _Recipe(function, x, result._version).note_on(result)
    return result


class _Recipe(NamedTuple):
    """How a tensor is made again, noted on the tensor, and valid for the version that it had then."""

    function: Callable[[Tensor], Tensor]
    source: Tensor
    version: int

    def note_on(self, result: Tensor) -> None:
        result._recipe = self  # type: ignore[attr-defined]

    def again(self) -> Tensor:
        module: Any = getattr(self.function, "__self__", self.function)
        with torch.no_grad(), _Untouched(module):
            result = self.function(self.source).requires_grad_()
        self._replace(version=result._version).note_on(result)  # for a `recompute` inside of the one that asks
        return result


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
