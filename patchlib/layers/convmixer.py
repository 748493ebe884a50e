"""The ConvMixer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import activation
from .depthwise import DepthwiseConv
from .drop import DropPath
from .grid import grid_to_nchw, nchw, nchw_to_grid
from .recompute import recompute, remade
from .scale import LayerScale


class ConvMixerBlock(nn.Module):
    """A depthwise convolution mixes positions, with a residual; a pointwise one mixes channels
    (Trockman and Kolter 2022, https://arxiv.org/abs/2201.09792).

    Args:
        dim: channels.
        kernel_size: side of the depthwise kernel, in patches.
        act: ``"gelu"``, ``"relu"`` or ``"silu"``.
        rezero: scale the residual branch by one learned scalar that starts at zero.
        drop_path: probability that a sample skips the depthwise branch in training.
        memory_efficient: keep for the backward pass only what the pointwise convolution gave (after ReLU, if that is
            the activation); the rest, and the input of a block that follows another, is computed again by `recompute`.

    Shape: ``(batch, height, width, dim)`` to the same.

    Raises:
        ConfigError: an activation or a kernel that there is not.
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
        self.pointwise = Pointwise(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = activation(act)

    def forward(self, grid: Tensor) -> Tensor:
        if not self.memory_efficient or not torch.is_grad_enabled():
            return self._norm(self.act(self._mix(grid)))
        product = recompute(self._mix, grid)
        if isinstance(self.act, nn.ReLU):  # its backward needs what it gave alone, and so does the norm's
            return remade(self._norm, self.act(product))
        return remade(self._act_and_norm, product, keep=False)

    def _mix(self, grid: Tensor) -> Tensor:
        image = grid_to_nchw(grid)
        mixed = self.drop_path(self.scale(self.norm1(grid_to_nchw(self.act(self.depthwise(grid))))))
        # fresh memory costs the CPU more than adding
        return self.pointwise(nchw_to_grid(mixed.add_(image) if self._owns_mixed() else image + mixed))

    def _owns_mixed(self) -> bool:
        """Whether nobody else can hold what was mixed: it comes from a batch norm, and no hook has seen it."""
        if torch.compiler.is_compiling() or torch.nn.modules.module._has_any_global_hook():
            return False
        passed = self.norm1, self.scale, self.drop_path
        hooked = any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in passed)
        return isinstance(self.norm1, nn.BatchNorm2d) and not hooked

    def _norm(self, grid: Tensor) -> Tensor:
        return nchw(self.norm2, grid)

    def _act_and_norm(self, grid: Tensor) -> Tensor:
        return self._norm(self.act(grid))


class Pointwise(nn.Module):
    """A matrix on each position, run as a 1x1 convolution: torch asks the faster library for it on every processor, and
    a `recompute` stops before its product, which it need not know.

    Shape: ``(batch, height, width, dim)`` to the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` and `nn.Conv2d`: uniform, up to one over the root of the inputs."""
        bound = self.bias.numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, grid: Tensor) -> Tensor:
        return nchw_to_grid(F.conv2d(grid_to_nchw(grid), self.weight[:, :, None, None], self.bias))
