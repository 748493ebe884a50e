"""The ConvMixer block."""

import torch
from torch import Tensor, nn

from .activation import activation
from .depthwise import DepthwiseConv
from .drop import DropPath
from .grid import nchw
from .linear import Linear
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
        memory_efficient: keep for the backward pass only what the pointwise convolution gave; the rest, and the input
            of a block that follows another, is computed again, see `recompute`.

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
        self.pointwise = Linear(dim, dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = activation(act)

    def forward(self, grid: Tensor) -> Tensor:
        if self.memory_efficient and torch.is_grad_enabled():
            return remade(self._act_and_norm, recompute(self._mix, grid))
        return self._act_and_norm(self._mix(grid))

    def _mix(self, grid: Tensor) -> Tensor:
        mixed = self.drop_path(self.scale(nchw(self.norm1, self.act(self.depthwise(grid)))))
        # fresh memory costs the CPU more than adding
        return self.pointwise(mixed.add_(grid) if self._owns_mixed() else grid + mixed)

    def _owns_mixed(self) -> bool:
        """Whether the mixed grid may be overwritten: neither the backward pass nor a hook holds it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(self.norm1, nn.BatchNorm2d):
            return False
        hooks = (module._forward_hooks for module in (self.norm1, self.scale, self.drop_path))
        return not any(hooks) and not torch.nn.modules.module._has_any_global_hook()

    def _act_and_norm(self, grid: Tensor) -> Tensor:
        return nchw(self.norm2, self.act(grid))
