"""Weights of one shape for a model of another: pure functions of tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from ..layers.grid import pair
from ..layers.patch_embed import PatchEmbed, resize_kernel
from ..layers.pos_embed import LearnedPE, resize_positions

_MOST = 2**26  # numbers in the matrices that resize a kernel: 256 MiB, for patches of 90 x 90 pixels


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """A patch kernel ``(dim, channels, height, width)`` for images of another number of channels.

    One channel gets the sum of all kernels, so that a grey image gives what the same picture in equal channels gave;
    from one channel or to others, kernels are repeated and scaled, so that the response keeps its size.
    """
    channels = kernel.shape[1]
    if channels == in_chans:
        return kernel
    if in_chans == 1:
        return kernel.float().sum(dim=1, keepdim=True).to(kernel.dtype)
    repeats = -(-in_chans // channels)
    repeated = kernel.float().repeat(1, repeats, 1, 1)[:, :in_chans]
    return (repeated * (channels / in_chans)).to(kernel.dtype)


def adapt(name: str, tensor: Tensor, target: Tensor, module: Any, source: Any) -> Tensor:
    """One tensor of a checkpoint in the shape that the model has for it, where patchlib knows how; else unchanged.

    Args:
        name: our name of the parameter.
        tensor: what the checkpoint holds.
        target: the model's parameter; only its shape is read.
        module: the block that owns the parameter or holds its owner: positions and patches can be adapted.
        source: the config of the checkpoint, None if unknown.
    """
    if isinstance(module, PatchEmbed) and name.endswith("proj.weight"):
        return _adapt_patches(tensor, target, module, source)
    if isinstance(module, LearnedPE) and tensor.dim() == 3 and tensor.shape[-1] == target.shape[-1]:
        grid = _grid(tensor.shape[1] - module.prefix, source, module)
        return tensor if grid is None else resize_positions(tensor, grid, module.size, module.prefix)
    return tensor


def _adapt_patches(weight: Tensor, target: Tensor, module: PatchEmbed, source: Any) -> Tensor:
    """Linear and conv patches into each other; other channels; other patch sizes."""
    if module.kind not in ("linear", "conv") or weight.dim() not in (2, 4) or len(weight) != module.dim:
        return weight
    if weight.dim() == 4:
        kernel = weight
    else:
        size = pair(source.patch_size) if source is not None else module.patch_size
        channels = source.in_chans if source is not None else module.in_chans
        if weight.shape[1] != channels * size[0] * size[1]:
            return weight
        kernel = weight.reshape(len(weight), channels, *size)
    old, new = math.prod(kernel.shape[2:]), math.prod(module.patch_size)
    if 0 in kernel.shape or (tuple(kernel.shape[2:]) != module.patch_size and old * max(old, new) > _MOST):
        return weight
    kernel = resize_kernel(adapt_channels(kernel, module.in_chans), module.patch_size)
    return kernel.reshape(target.shape)


def _grid(positions: int, source: Any, module: LearnedPE) -> tuple[int, int] | None:
    """Height and width of the grid that a table of positions was learned on; None if it cannot be told."""
    if source is not None:
        cut = {key: value for key, value in source.patch_embed.items() if key in ("stride", "remainder")}
        with torch.device("meta"):
            grid = PatchEmbed(source.patch_size, 1, 1, **cut).grid_size(source.img_size)
        return grid if grid[0] * grid[1] == positions else None
    if positions == module.size[0] * module.size[1]:
        return module.size
    side = math.isqrt(max(positions, 0))
    return (side, side) if side * side == positions and positions else None
