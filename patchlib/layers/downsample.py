"""Fewer, wider patches."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..registry import build_block
from .grid import nchw


class Downsample(nn.Module):
    """A norm, then a convolution that merges ``scale x scale`` patches into one (as between ConvNeXt's stages);
    with ``scale=1``, a change of dim alone.

    Args:
        dim: channels in.
        out_dim: channels out.
        scale: patches merged along each axis.
        norm: kind and options of the norm.

    Shape: ``(batch, height, width, dim)`` to ``(batch, height // scale, width // scale, out_dim)``; rows and columns
    that fill no merged patch are left out.

    Raises:
        InputError: from `forward`, if the grid is smaller than one merged patch.
    """

    def __init__(self, dim: int, out_dim: int, scale: int = 2, *, norm: str | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.norm = build_block("norm", norm or {"kind": "layer", "eps": 1e-6}, dim)
        self.conv = nn.Conv2d(dim, out_dim, scale, stride=scale)

    def forward(self, grid: Tensor) -> Tensor:
        if min(grid.shape[1:3]) < self.scale:
            raise InputError(
                f"grid {grid.shape[1]} x {grid.shape[2]}: too small to merge {self.scale} x {self.scale} patches; "
                "use a larger image"
            )
        return nchw(self.conv, self.norm(grid))
