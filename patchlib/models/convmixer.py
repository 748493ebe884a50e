"""ConvMixer: patches, mixed by large depthwise and by pointwise convolutions.

"Patches Are All You Need?", Trockman and Kolter 2022, https://arxiv.org/abs/2201.09792.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import MAX_CLASSES, MAX_DEPTH, MAX_DIM, BaseConfig, choice, flag, integer, kind, number, size
from ..errors import ConfigError
from ..layers.activation import activation
from ..layers.convmixer import ConvMixerBlock
from ..layers.drop import drop_path_schedule
from ..layers.grid import Patches, nchw
from ..layers.patch_embed import PatchEmbed
from .base import ImageModel


@dataclass(frozen=True, kw_only=True)
class ConvMixerConfig(BaseConfig):
    """Sizes of a `ConvMixer`.

    Attributes:
        patch_embed: kind and options of `PatchEmbed`; pixels that fill no patch are dropped, as the authors do.
        rezero: scale each residual branch by a learned scalar that starts at zero.
        drop: probability of dropout before the classifier.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        memory_efficient: train with less memory, see `ConvMixerBlock`.
    """

    dim: int = integer(512, 1, MAX_DIM)
    depth: int = integer(4, 1, MAX_DEPTH)
    kernel_size: int = integer(9, 1, 255)
    patch_size: int | tuple[int, int] = size(16)
    img_size: int | tuple[int, int] = size(192)
    in_chans: int = integer(3, 1, 4096)
    num_classes: int = integer(2, 0, MAX_CLASSES)
    patch_embed: dict[str, Any] = kind("patch_embed", {"kind": "conv"}, shared=("stride", "remainder"))
    act: str = choice("gelu", "gelu", "relu", "silu")
    rezero: bool = flag(False)
    pool: dict[str, Any] = kind("pool", {"kind": "avg"})
    drop: float = number(0.0, 0, 0.99)
    drop_path: float = number(0.0, 0, 0.99)
    memory_efficient: bool = flag(False)

    def check(self) -> None:
        if self.pool["kind"] == "class":
            raise ConfigError("ConvMixerConfig.pool: found 'class', but no class token; allowed: 'avg', 'attention'")


class ConvMixer(ImageModel):
    """Images ``(batch, in_chans, height, width)`` to logits ``(batch, num_classes)``.

    ``ConvMixer(dim=256, depth=8)``, ``ConvMixer(config)`` and ``ConvMixer(config, depth=8)`` all work.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
        InputError: images of the config's own size could not be run.
    """

    Config = ConvMixerConfig

    def __init__(self, config: ConvMixerConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = ConvMixerConfig.of(config, overrides)
        patch_embed = {"remainder": "drop", **config.patch_embed}
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, config.dim, **patch_embed)
        self._check_size(config.img_size, self.patch_embed)
        self.act = activation(config.act)
        self.stem_norm = nn.BatchNorm2d(config.dim)
        self.blocks = nn.ModuleList(
            ConvMixerBlock(
                config.dim,
                config.kernel_size,
                act=config.act,
                rezero=config.rezero,
                drop_path=rate,
                memory_efficient=config.memory_efficient,
            )
            for rate in drop_path_schedule(config.drop_path, config.depth)
        )
        self.norm = nn.Identity()  # each block ends with its own
        self.head = self._make_head()

    def embed(self, images: Tensor) -> Patches:
        grid = nchw(self.stem_norm, self.act(self.patch_embed(images)))
        return Patches(grid, (grid.shape[1], grid.shape[2]))


def _cats_dogs(patch_size: int, depth: int) -> dict[str, Any]:
    return {"dim": 512, "depth": depth, "kernel_size": 9, "patch_size": patch_size, "img_size": 192, "num_classes": 2}


def _imagenet(dim: int, depth: int, kernel_size: int, patch_size: int, act: str = "gelu") -> dict[str, Any]:
    return {
        "dim": dim, "depth": depth, "kernel_size": kernel_size, "patch_size": patch_size,
        "img_size": 224, "num_classes": 1000, "act": act,
    }  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    # the paper, table 1
    "convmixer_768_32": _imagenet(768, 32, 7, 7, "relu"),
    "convmixer_1024_20_ks9_p14": _imagenet(1024, 20, 9, 14),
    "convmixer_1536_20": _imagenet(1536, 20, 9, 7),
    # the CIFAR-10 form in the authors' repository
    "convmixer_256_8": {
        "dim": 256, "depth": 8, "kernel_size": 5, "patch_size": 2, "img_size": 32, "num_classes": 10,
    },
    # cats and dogs, against ViT
    "convmixer_24": _cats_dogs(24, 4),
    "convmixer_16": _cats_dogs(16, 4),
    "convmixer_16_8": _cats_dogs(16, 8),
    # attention or patches, on Imagenette and in the form of its notebook
    "convmixer_256_12": {
        "dim": 256, "depth": 12, "kernel_size": 7, "patch_size": 7, "img_size": 160, "num_classes": 10,
    },
    "convmixer_256_12_cifar": {
        "dim": 256, "depth": 12, "kernel_size": 7, "patch_size": 2, "img_size": 32, "num_classes": 10,
        "patch_embed": {"kind": "conv", "stride": 1}, "rezero": True, "drop": 0.3,
    },
}  # fmt: skip
