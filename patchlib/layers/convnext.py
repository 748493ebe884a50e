"""The ConvNeXt block, V1 and V2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import build_block
from .depthwise import DepthwiseConv
from .drop import DropPath
from .grn import GRN
from .linear import Linear
from .mlp import hidden_size
from .recompute import recompute
from .scale import LayerScale


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, a norm, and an MLP, on one residual branch (Liu et al. 2022,
    https://arxiv.org/abs/2201.03545; with GRN it is V2's, Woo et al. 2023, https://arxiv.org/abs/2301.00808).

    Args:
        dim: channels.
        kernel_size: side of the depthwise kernel, in patches, or (height, width).
        ratio: width of the hidden layer, in multiples of `dim`.
        grn: V2's response normalisation in the hidden layer.
        layer_scale: V1's learned factor a channel, its start value; None for none.
        norm: kind and options of the norm.
        drop_path: probability that a sample skips the branch in training.
        memory_efficient: keep for the backward pass only the block's input and what the first linear layer gave; the
            rest is computed again.

    Shape: ``(batch, height, width, dim)`` to the same.
    """

    Depthwise: Any = DepthwiseConv  # what a subclass may put in their place
    Response: Any = GRN

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int] = 7,
        *,
        ratio: float = 4.0,
        grn: bool = True,
        layer_scale: float | None = None,
        norm: str | Mapping[str, Any] | None = None,
        drop_path: float = 0.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        hidden = hidden_size(dim, ratio)
        self.depthwise = self.Depthwise(dim, kernel_size)
        self.norm = build_block("norm", norm or {"kind": "layer", "eps": 1e-6}, dim)
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.grn = self.Response(hidden) if grn else nn.Identity()
        self.fc2 = Linear(hidden, dim)
        self.scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`, ``(batch, height, width)`` with 1 where a patch is seen, keeps the others at zero, as sparse
        convolution would in FCMAE pretraining."""
        seen = None if mask is None else mask[..., None].to(grid.dtype)
        x = grid if seen is None else grid * seen
        saving = self.memory_efficient and torch.is_grad_enabled()
        hidden = recompute(self._spread, x) if saving else self._spread(x)
        branch = recompute(self._gather, hidden, seen) if saving else self._gather(hidden, seen)
        x = grid + self.drop_path(self.scale(branch))
        return x if seen is None else x * seen

    def _spread(self, x: Tensor) -> Tensor:
        return self.fc1(self.norm(self.depthwise(x)))

    def _gather(self, hidden: Tensor, seen: Tensor | None) -> Tensor:
        x = self.act(hidden)
        return self.fc2(self.grn(x if seen is None else x * seen))
