"""PatchNet: a model given as data. Any registered block may follow any other on the grid."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import (
    MAX_CLASSES,
    BaseConfig,
    integer,
    kind,
    number,
    size,
    stages,
)  # fmt: skip
from ..errors import ConfigError, PatchlibError
from ..layers.downsample import Downsample
from ..layers.drop import drop_path_schedule
from ..layers.grid import Patches
from ..layers.patch_embed import PatchEmbed
from ..registry import build_block
from .base import ImageModel


@dataclass(frozen=True, kw_only=True)
class PatchNetConfig(BaseConfig):
    """A stack of blocks as data.

    Attributes:
        stages: one object a stage: ``kind`` of block, ``depth``, ``dim``, ``downsample`` (how many patches merge into
            one along each axis before the stage, 1 if left out), and options of the block.
        pos_embed: added to the first grid; None where blocks see positions themselves, as convolutions do.
        norm: before the pooling; None for none.
        drop: probability of dropout before the classifier.
        drop_path: stochastic depth of the last block, for blocks that have it; it grows linearly from 0.
    """

    stages: tuple[dict[str, Any], ...] = stages(({"kind": "convmixer", "depth": 4, "dim": 256},))
    patch_size: int | tuple[int, int] = size(16)
    img_size: int | tuple[int, int] = size(224)
    in_chans: int = integer(3, 1, 4096)
    num_classes: int = integer(1000, 0, MAX_CLASSES)
    patch_embed: dict[str, Any] = kind("patch_embed", {"kind": "conv"}, shared=("stride", "remainder"))
    pos_embed: dict[str, Any] | None = kind("pos_embed", None, optional=True)
    norm: dict[str, Any] | None = kind("norm", {"kind": "layer", "eps": 1e-6}, optional=True)
    pool: dict[str, Any] = kind("pool", {"kind": "avg"})
    drop: float = number(0.0, 0, 0.99)
    drop_path: float = number(0.0, 0, 0.99)

    def check(self) -> None:
        if self.pos_embed is not None and self.pos_embed["kind"] == "rotary":
            raise ConfigError(
                "PatchNetConfig.pos_embed: found 'rotary', which turns queries and keys in a ViT; "
                "allowed: positions that are added to the grid, 'learned' or 'sinusoidal'"
            )
        if self.pool["kind"] == "class":
            raise ConfigError("PatchNetConfig.pool: found 'class', but no class token; allowed: 'avg', 'attention'")


class PatchNet(ImageModel):
    """Images ``(batch, in_chans, height, width)`` to logits ``(batch, num_classes)``.

        PatchNet(
            patch_size=8,
            stages=[
                {"kind": "convmixer", "depth": 4, "dim": 256},
                {"kind": "transformer", "depth": 4, "dim": 512, "downsample": 2, "heads": 8},
            ],
        )

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
        InputError: images of the config's own size could not be run.
    """

    Config = PatchNetConfig

    def __init__(self, config: PatchNetConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = PatchNetConfig.of(config, overrides)
        dim = config.stages[0]["dim"]
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim, **config.patch_embed)
        merged = math.prod(stage["downsample"] for stage in config.stages)
        self._check_size(config.img_size, self.patch_embed, merged)
        self.pos_embed = None
        if config.pos_embed is not None:
            grid = self.patch_embed.grid_size(config.img_size)
            self.pos_embed = build_block("pos_embed", config.pos_embed, dim=dim, size=grid, prefix=0)
        rates = iter(drop_path_schedule(config.drop_path, sum(stage["depth"] for stage in config.stages)))
        self.blocks = nn.ModuleList()
        for i, stage in enumerate(config.stages):
            options = {key: value for key, value in stage.items() if key not in ("depth", "dim", "downsample")}
            layers: list[nn.Module] = []
            if stage["dim"] != dim or stage["downsample"] > 1:
                layers.append(Downsample(dim, stage["dim"], stage["downsample"]))
            dim = stage["dim"]
            try:
                for _ in range(stage["depth"]):
                    layers.append(build_block("stage", options, dim=dim, drop_path=next(rates)))
            except PatchlibError as error:
                raise type(error)(f"PatchNetConfig.stages[{i}]: {error}") from error.__cause__ or error
            self.blocks.append(nn.Sequential(*layers))
        self.norm = nn.Identity() if config.norm is None else build_block("norm", config.norm, dim)
        self.head = self._make_head()

    def embed(self, images: Tensor) -> Patches:
        grid = self.patch_embed(images)
        if self.pos_embed is not None:
            grid = self.pos_embed(grid)
        return Patches(grid, (grid.shape[1], grid.shape[2]))

    @property
    def widths(self) -> list[int]:
        return [stage["dim"] for stage in self.config.stages]

    @property
    def reductions(self) -> list[int]:
        pixels, answer = self.patch_embed.stride[0], []
        for stage in self.config.stages:
            pixels *= stage["downsample"]
            answer.append(pixels)
        return answer


VARIANTS: dict[str, dict[str, Any]] = {
    # a hybrid to start from: convolutions where patches are many, attention where they are few
    "patchnet_tiny": {
        "patch_size": 8,
        "stages": (
            {"kind": "convmixer", "depth": 4, "dim": 128, "kernel_size": 7},
            {"kind": "transformer", "depth": 4, "dim": 256, "downsample": 2, "heads": 4},
        ),
    },
}
