"""The ConvMixer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.depthwise import depthwise_conv2d
from .activation import activation
from .depthwise import DepthwiseConv
from .drop import DropPath
from .grid import grid_to_nchw, nchw_to_grid
from .recompute import cheap, recompute
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
        memory_efficient: keep for the backward pass only what the pointwise convolution gave (after ReLU, if that is
            the activation); the rest, and the input of a block that follows another, is computed again.

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
        self.depthwise = Depthwise(dim, kernel_size)
        self.norm1 = nn.BatchNorm2d(dim)
        self.scale = LayerScale(1, init=0.0) if rezero else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.pointwise = Pointwise(dim, dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = activation(act, inplace=True)

    def forward(self, grid: Tensor) -> Tensor:
        if not self.memory_efficient or not torch.is_grad_enabled():
            return self._norm(self.act(self._mix(grid)))
        product = recompute(self._mix, grid)
        if isinstance(self.act, nn.ReLU):  # it writes in place and keeps what it wrote
            return cheap(self._norm, self.act(product))
        return cheap(self._act_and_norm, product, keep=False)

    def _mix(self, grid: Tensor) -> Tensor:
        # From here to `_norm` the grid is an image, whose memory is the same: in-place operations on views, as a
        # permuted tensor is, would cost copies in the backward pass.
        image = grid_to_nchw(grid)
        mixed = self.norm1(self.act(self.depthwise(image)))
        image = self.drop_path(self.scale(mixed)).add_(image)  # in place: fresh memory costs the CPU more than adding
        return self.pointwise(image)

    def _norm(self, image: Tensor) -> Tensor:
        return nchw_to_grid(self.norm2(image))

    def _act_and_norm(self, image: Tensor) -> Tensor:
        return self._norm(self.act(image))


class Depthwise(DepthwiseConv):
    """`DepthwiseConv` on an image.

    Shape: ``(batch, dim, height, width)`` to the same.
    """

    def forward(self, image: Tensor) -> Tensor:
        return depthwise_conv2d(image, self.weight, self.bias)


class Pointwise(nn.Linear):
    """A matrix on each position of an image, run as a 1x1 convolution, which was the faster of the two in float32
    (32 against 65 ms for 4 x 32 x 32 positions of 768, on two AMD cores with torch 2.13).

    Shape: ``(batch, in_features, height, width)`` to ``(batch, out_features, height, width)``.
    """

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.weight[:, :, None, None], self.bias)
