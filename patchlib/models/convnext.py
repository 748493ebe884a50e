"""ConvNeXt: a residual network of depthwise convolutions with a transformer's proportions.

"A ConvNet for the 2020s", Liu et al. 2022, https://arxiv.org/abs/2201.03545.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    MAX_CLASSES,
    MAX_DEPTH,
    MAX_DIM,
    BaseConfig,
    block_spec,
    flag,
    integer,
    integers,
    kind,
    number,
    size,
)  # fmt: skip
from ..errors import ConfigError, InputError
from ..layers.convnext import ConvNeXtBlock
from ..layers.downsample import Downsample
from ..layers.drop import drop_path_schedule
from ..layers.grid import Patches
from ..layers.head import Head
from ..layers.patch_embed import PatchEmbed
from ..layers.recompute import recompute
from ..registry import build_block
from .base import ImageModel


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig(BaseConfig):
    """Sizes and choices of a `ConvNeXt`.

    Attributes:
        depths: blocks of each stage.
        dims: channels of each stage; between two stages 2 x 2 patches merge into one.
        patch_embed: kind and options of `PatchEmbed`; pixels that fill no patch are dropped, as the authors do.
        grn: V2's response normalisation in each block.
        layer_scale: start value of V1's learned factor a channel on each branch, None for none.
        norm: of the stem, the blocks, between stages and at the end.
        pool: kind and options; ``norm: True`` puts the final norm after the pooling, ``False`` before; a kind and
            options, for instance ``{"kind": "layer", "eps": 1e-12}``, say that it follows and is another than `norm`.
        drop: probability of dropout before the classifier.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        memory_efficient: train with less memory, see `ConvNeXtBlock`.
    """

    depths: tuple[int, ...] = integers((3, 3, 9, 3), 1, MAX_DEPTH)
    dims: tuple[int, ...] = integers((96, 192, 384, 768), 1, MAX_DIM)
    kernel_size: int = integer(7, 1, 255)
    patch_size: int | tuple[int, int] = size(4)
    img_size: int | tuple[int, int] = size(224)
    in_chans: int = integer(3, 1, 4096)
    num_classes: int = integer(1000, 0, MAX_CLASSES)
    patch_embed: dict[str, Any] = kind("patch_embed", {"kind": "conv"}, shared=("stride", "remainder"))
    grn: bool = flag(False)
    layer_scale: float | None = number(1e-6, 0, 1000, optional=True)
    norm: dict[str, Any] = kind("norm", {"kind": "layer", "eps": 1e-6})
    pool: dict[str, Any] = kind("pool", {"kind": "avg", "norm": True}, shared=("norm",))
    drop: float = number(0.0, 0, 0.99)
    drop_path: float = number(0.0, 0, 0.99)
    memory_efficient: bool = flag(False)

    def check(self) -> None:
        name = type(self).__name__
        if len(self.depths) != len(self.dims):
            raise ConfigError(
                f"{name}.dims: found {len(self.dims)} widths {self.dims}; allowed: one a stage, "
                f"and depths={self.depths} has {len(self.depths)}"
            )
        if sum(self.depths) > MAX_DEPTH:
            raise ConfigError(f"{name}.depths: found {sum(self.depths)} blocks in all; allowed: at most {MAX_DEPTH}")
        if not isinstance(self.pool.get("norm", True), bool):
            block_spec("norm", f"{name}.pool.norm", self.pool["norm"])

    @property
    def head_norm(self) -> dict[str, Any] | None:
        """Kind and options of the norm after the pooling, None if the final norm stands before it."""
        norm = self.pool.get("norm", True)
        return norm if isinstance(norm, dict) else self.norm if norm else None


class ConvNeXtStage(nn.Module):
    """Blocks of one width, after `Downsample` in all stages but the first.

    Shape: ``(batch, height, width, in_dim)`` to ``(batch, height / 2, width / 2, dim)``; in the first stage nothing
    changes.
    """

    grad_checkpointing = False

    def __init__(
        self, in_dim: int | None, dim: int, rates: Sequence[float], norm: Mapping[str, Any], **block: Any
    ) -> None:
        super().__init__()
        self.downsample = nn.Identity() if in_dim is None else Downsample(in_dim, dim, 2, norm=norm)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, norm=norm, drop_path=rate, **block) for rate in rates)

    def forward(self, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`, ``(batch, rows, columns)`` with 1 where patches are seen, may be coarser than the grid."""
        grid = self.downsample(grid)
        if mask is not None:
            mask = _stretch(mask, (grid.shape[1], grid.shape[2]))
        for block in self.blocks:
            saving = self.grad_checkpointing and torch.is_grad_enabled()
            grid = recompute(block, grid, mask) if saving else block(grid, mask)
        return grid


def _stretch(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Each entry of the mask covers as many cells as it must."""
    rows, columns = mask.shape[1:]
    if size[0] % rows or size[1] % columns:
        raise InputError(
            f"mask: found {rows} x {columns} for a grid of {size[0]} x {size[1]}; "
            "allowed: the last stage's grid, when the image covers it exactly"
        )
    return mask.repeat_interleave(size[0] // rows, 1).repeat_interleave(size[1] // columns, 2)


class ConvNeXt(ImageModel):
    """Images ``(batch, in_chans, height, width)`` to logits ``(batch, num_classes)``.

    ``ConvNeXt(depths=(2, 2), dims=(64, 128))``, ``ConvNeXt(config)`` and ``ConvNeXt(config, grn=True)`` all work.
    Any image that leaves the last stage one patch works.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
        InputError: images of the config's own size could not be run.
    """

    Config = ConvNeXtConfig

    def __init__(self, config: ConvNeXtConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = self.Config.of(config, overrides)
        dims = config.dims
        patch_embed = {"remainder": "drop", **config.patch_embed}
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dims[0], **patch_embed)
        self._check_size(config.img_size, self.patch_embed, 2 ** (len(dims) - 1))
        self.stem_norm = build_block("norm", config.norm, dims[0])
        rates = iter(drop_path_schedule(config.drop_path, sum(config.depths)))
        self.stages = nn.ModuleList(
            ConvNeXtStage(
                before, dim, [next(rates) for _ in range(depth)], config.norm,
                kernel_size=config.kernel_size, grn=config.grn, layer_scale=config.layer_scale,
                memory_efficient=config.memory_efficient,
            )
            for before, dim, depth in zip((None, *dims), dims, config.depths, strict=False)
        )  # fmt: skip
        self.norm = build_block("norm", config.norm, dims[-1]) if config.head_norm is None else nn.Identity()
        self.head = self._make_head()
        self.init_weights()

    def _make_head(self) -> Head:
        config = self.config
        pool = {key: value for key, value in config.pool.items() if key != "norm"}
        return Head(config.dims[-1], config.num_classes, pool=pool, norm=config.head_norm, drop=config.drop)

    @property
    def steps(self) -> list[nn.Module]:
        return list(self.stages)

    @property
    def widths(self) -> list[int]:
        return list(self.config.dims)

    @property
    def reductions(self) -> list[int]:
        return [self.patch_embed.stride[0] * 2**i for i in range(len(self.stages))]

    def embed(self, images: Tensor) -> Patches:
        grid = self.stem_norm(self.patch_embed(images))
        return Patches(grid, (grid.shape[1], grid.shape[2]))

    def encode(self, patches: Patches, mask: Tensor | None = None) -> Patches:
        """All stages and the final norm.

        Args:
            patches: from `embed`.
            mask: ``(batch, rows, columns)`` over the last stage's grid, 1 where patches are seen; the others stay
                zero in every stage, as in V2's masked pretraining (FCMAE).
        """
        if mask is None:
            return super().encode(patches)
        grid = patches.x
        for stage in self.stages:
            grid = stage(grid, mask)
        return Patches(self.norm(grid), (grid.shape[1], grid.shape[2]))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory, block by block: whole stages would hold most of the network at once."""
        for module in self.modules():
            if isinstance(module, ConvNeXtStage):
                module.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for other classes, freshly initialised; 0 for none. The norm before it stays."""
        norm = self.head.norm
        super().reset_classifier(num_classes, global_pool)
        self.head.norm = norm

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:patch_embed|stem_norm)", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def _init_module(self, module: nn.Module) -> None:
        """Truncated normal of 0.02 for matrices and kernels, zero biases, as the authors do."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _sizes(depths: tuple[int, ...], width: int, **options: Any) -> dict[str, Any]:
    return {"depths": depths, "dims": tuple(width << i for i in range(len(depths))), **options}


VARIANTS: dict[str, dict[str, Any]] = {
    # smaller than the paper's; timm's
    "convnext_atto": _sizes((2, 2, 6, 2), 40),
    "convnext_femto": _sizes((2, 2, 6, 2), 48),
    "convnext_pico": _sizes((2, 2, 6, 2), 64),
    "convnext_nano": _sizes((2, 2, 8, 2), 80),
    "convnext_tiny_hnf": _sizes((3, 3, 9, 3), 96, pool={"kind": "avg", "norm": False}),
    # the paper, section 3
    "convnext_tiny": _sizes((3, 3, 9, 3), 96),
    "convnext_small": _sizes((3, 3, 27, 3), 96),
    "convnext_base": _sizes((3, 3, 27, 3), 128),
    "convnext_large": _sizes((3, 3, 27, 3), 192),
    "convnext_xlarge": _sizes((3, 3, 27, 3), 256),
    # OpenCLIP's
    "convnext_xxlarge": _sizes((3, 4, 30, 3), 384, norm={"kind": "layer", "eps": 1e-5}),
}
