"""The grid, `(batch, height, width, dim)`: the views that convolutions need of it, and how it travels in a model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InputError


def nchw(module: Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
    """Runs on a grid a module made for ``(batch, channels, height, width)``; both ways are views.

    Shape: ``(batch, height, width, dim)`` to ``(batch, height', width', dim')``.
    """
    return nchw_to_grid(module(grid_to_nchw(grid)))


def grid_to_nchw(grid: Tensor) -> Tensor:
    """``(batch, height, width, dim)`` as ``(batch, dim, height, width)`` in torch's channels_last format: a view."""
    return grid.permute(0, 3, 1, 2)


def nchw_to_grid(image: Tensor) -> Tensor:
    """``(batch, dim, height, width)`` as a grid ``(batch, height, width, dim)``: a view."""
    return image.permute(0, 2, 3, 1)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """``7`` to ``(7, 7)``; a pair stays."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def checked_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """`pair` of an argument that must hold integers from 1.

    Raises:
        ConfigError: it does not.
    """
    sides = (value, value) if isinstance(value, int) else value
    if isinstance(sides, (tuple, list)) and len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides):
        return sides[0], sides[1]
    raise ConfigError(f"{name}: found {value!r}; allowed: an integer from 1, or two: (height, width)")


class Patches(NamedTuple):
    """What `embed` and `encode` pass on.

    Attributes:
        x: a grid ``(batch, height, width, dim)`` or a sequence ``(batch, prefix + tokens, dim)``.
        size: the grid's (height, width), in patches.
        prefix: how many leading tokens of a sequence are no patches.
        keep: ``(batch, tokens)``, the indices in reading order of the patches that are left; None if all are.
    """

    x: Tensor
    size: tuple[int, int]
    prefix: int = 0
    keep: Tensor | None = None

    def select(self, keep: Tensor) -> "Patches":
        """Only the patches with these indices ``(batch, tokens)``, as masked training needs; prefix tokens stay.

        Raises:
            InputError: this is a grid (convolutions need every cell), or patches are missing already.
        """
        if self.x.dim() == 4:
            raise InputError("select: this model carries a grid, which cannot lose patches; multiply it by a mask")
        if self.keep is not None:
            raise InputError("select: patches have been taken out already")
        dim = self.x.shape[-1]
        patches = self.x[:, self.prefix :].gather(1, keep[..., None].expand(-1, -1, dim))
        return self._replace(x=torch.cat([self.x[:, : self.prefix], patches], dim=1), keep=keep)
