"""The ConvMixer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import activation
from .depthwise import DepthwiseConv
from .drop import DropPath
from .grid import nchw
from .recompute import recompute
from .scale import LayerScale


class ConvMixerBlock(nn.Module):
    """A depthwise convolution mixes positions, with a residual; a pointwise one mixes channels
    (Trockman and Kolter 2022, https://arxiv.org/abs/2201.09792).

    Args:
        dim: channels.
        kernel_size: side of the depthwise kernel, in patches.
        act: ``"gelu"`` or ``"relu"``.
        rezero: scale the residual branch by one learned scalar that starts at zero.
        drop_path: probability that a sample skips the depthwise branch in training.
        memory_efficient: keep for the backward pass only what the pointwise convolution gave; the rest, and the input
            of a block that follows another, is computed again.

    Shape: ``(batch, height, width, dim)`` to the same.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 9,
        *,
        act: str = "gelu",
        rezero: bool = False,
        drop_path: float = 0.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        self.depthwise = DepthwiseConv(dim, kernel_size)
        self.norm1 = nn.BatchNorm2d(dim)
        self.scale = LayerScale(1, init=0.0) if rezero else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.pointwise = Pointwise(dim, dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = activation(act, inplace=not memory_efficient)  # what is kept must stay

    def forward(self, grid: Tensor) -> Tensor:
        if self.memory_efficient and torch.is_grad_enabled():
            return recompute(self._finish, recompute(self._mix, grid), cheap=True)
        return self._finish(self._mix(grid))

    def _mix(self, grid: Tensor) -> Tensor:
        mixed = nchw(self.norm1, self.act(self.depthwise(grid)))
        grid = self.drop_path(self.scale(mixed)).add_(grid)  # in place: fresh memory costs the CPU more than adding
        return self.pointwise(grid)

    def _finish(self, product: Tensor) -> Tensor:
        return nchw(self.norm2, self.act(product))


class Pointwise(nn.Linear):
    """A matrix on each position, run as a 1x1 convolution, which was the faster of the two in float32
    (32 against 65 ms for 4 x 32 x 32 positions of 768, on two AMD cores with torch 2.13).

    Shape: ``(batch, height, width, in_features)`` to ``(batch, height, width, out_features)``.
    """

    def forward(self, grid: Tensor) -> Tensor:
        return nchw(lambda image: F.conv2d(image, self.weight[:, :, None, None], self.bias), grid)
