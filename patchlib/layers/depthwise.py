"""Depthwise convolution on grids."""

from torch import Tensor, nn

from ..ops.depthwise import depthwise_conv2d
from .grid import checked_pair, nchw_to_grid


class DepthwiseConv(nn.Conv2d):
    """Each channel is convolved by a kernel of its own; the grid keeps its size.

    Args:
        dim: channels.
        kernel_size: side of the kernel, or (height, width).
        bias: whether a bias is added.

    Shape: ``(batch, height, width, dim)`` to the same.

    Raises:
        ConfigError: the kernel has no size from 1.
    """

    def __init__(self, dim: int, kernel_size: int | tuple[int, int] = 7, *, bias: bool = True) -> None:
        super().__init__(dim, dim, checked_pair("kernel_size", kernel_size), groups=dim, padding="same", bias=bias)

    def forward(self, grid: Tensor) -> Tensor:
        return nchw_to_grid(depthwise_conv2d(grid.permute(0, 3, 1, 2), self.weight, self.bias))
