"""Vision Transformer, DeiT and DeiT III.

"An Image is Worth 16x16 Words", Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    MAX_CLASSES,
    MAX_DEPTH,
    MAX_DIM,
    BaseConfig,
    choice,
    flag,
    group,
    integer,
    kind,
    number,
    size,
)  # fmt: skip
from ..errors import ConfigError, InputError
from ..layers.drop import drop_path_schedule
from ..layers.grid import Patches
from ..layers.head import Head
from ..layers.patch_embed import PatchEmbed
from ..layers.pos_embed import RotaryPE
from ..layers.transformer import TransformerBlock
from ..registry import build_block
from .base import ImageModel


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BaseConfig):
    """Sizes and choices of a `ViT`.

    Attributes:
        tokens: how many tokens that are no patches go in front.
        pos_embed: kind and options; ``covers_prefix``: whether those tokens have positions too.
        attention: ``head_dim`` is ``dim / heads`` if None; ``norm`` is a kind of norm for queries and keys.
        norm: of the blocks and at the end.
        block: ``"pre"`` or ``"post"``: where the norms of a block stand.
        pool: kind and options; ``norm: True`` puts the final norm after the pooling instead of before.
        drop: dropout after positions, in attention and MLP, and before the classifier.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
        layer_scale: start value of a learned factor a channel on each branch, None for none.
    """

    dim: int = integer(768, 1, MAX_DIM)
    depth: int = integer(12, 1, MAX_DEPTH)
    heads: int = integer(12, 1, 1024)
    patch_size: int | tuple[int, int] = size(16)
    img_size: int | tuple[int, int] = size(224)
    in_chans: int = integer(3, 1, 4096)
    num_classes: int = integer(1000, 0, MAX_CLASSES)
    patch_embed: dict[str, Any] = kind("patch_embed", {"kind": "conv"}, shared=("stride", "remainder"))
    tokens: dict[str, int] = group(
        **{"class": integer(1, 0, 1), "register": integer(0, 0, 64), "distill": integer(0, 0, 1)}
    )
    pos_embed: dict[str, Any] | None = kind(
        "pos_embed", {"kind": "learned", "covers_prefix": True}, shared=("covers_prefix",), optional=True
    )
    attention: dict[str, Any] = group(
        qkv_bias=flag(True),
        head_dim=integer(None, 1, 4096, optional=True),
        norm=kind("norm", None, optional=True),
    )
    mlp: dict[str, Any] = kind("mlp", {"kind": "gelu", "ratio": 4.0})
    norm: dict[str, Any] = kind("norm", {"kind": "layer", "eps": 1e-6})
    block: str = choice("pre", "pre", "post")
    pool: dict[str, Any] = kind("pool", {"kind": "class", "norm": False}, shared=("norm",))
    drop: float = number(0.0, 0, 0.99)
    drop_path: float = number(0.0, 0, 0.99)
    layer_scale: float | None = number(None, 0, 1000, optional=True)

    def check(self) -> None:
        if self.attention["head_dim"] is None and self.dim % self.heads:
            raise ConfigError(
                f"ViTConfig.heads: found {self.heads}; allowed: a divisor of dim={self.dim}, "
                "or set attention={'head_dim': …}"
            )
        if not isinstance(self.pool.get("norm", False), bool):
            raise ConfigError(
                f"ViTConfig.pool.norm: found {self.pool['norm']!r:.80}; allowed: true or false; "
                "which norm it is says ViTConfig.norm"
            )
        if self.pool["kind"] == "class" and not self.tokens["class"]:
            raise ConfigError(
                "ViTConfig.pool: found 'class' without a class token; use pool='avg' or tokens={'class': 1}"
            )
        if self.tokens["distill"] and self.pool["kind"] != "class":
            raise ConfigError(
                f"ViTConfig.pool: found {self.pool['kind']!r} with a distillation token; allowed: 'class'"
            )

    @property
    def prefix(self) -> int:
        """How many tokens go in front of the patches."""
        return sum(self.tokens.values())


class ViT(ImageModel):
    """Images ``(batch, in_chans, height, width)`` to logits ``(batch, num_classes)``.

    ``ViT(dim=512, depth=4, heads=8)``, ``ViT(config)`` and ``ViT(config, depth=6)`` all work. Any image that the
    patches cover works: learned positions are resampled to its grid.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
        InputError: images of the config's own size could not be run.
    """

    Config = ViTConfig

    def __init__(self, config: ViTConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = ViTConfig.of(config, overrides)
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, config.dim, **config.patch_embed)
        self._check_size(config.img_size, self.patch_embed)
        self.cls_token = self._make_tokens("class")
        self.dist_token = self._make_tokens("distill")
        self.reg_token = self._make_tokens("register")
        self.pos_embed = self._make_positions()
        self.pos_drop = nn.Dropout(config.drop)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.dim, config.heads, attention=config.attention, mlp=config.mlp, norm=config.norm,
                order=config.block, layer_scale=config.layer_scale, drop=config.drop, drop_path=rate,
            )
            for rate in drop_path_schedule(config.drop_path, config.depth)
        )  # fmt: skip
        self.norm = nn.Identity() if config.pool.get("norm") else build_block("norm", config.norm, config.dim)
        self.head = self._make_head()
        self.init_weights()

    def _make_tokens(self, name: str) -> nn.Parameter | None:
        count = self.config.tokens[name]
        return nn.Parameter(torch.empty(1, count, self.config.dim)) if count else None

    def _make_positions(self) -> nn.Module | None:
        config = self.config
        if config.pos_embed is None:
            return None
        spec = {key: value for key, value in config.pos_embed.items() if key != "covers_prefix"}
        return build_block(
            "pos_embed", spec, dim=config.dim, size=self.patch_embed.grid_size(config.img_size),
            prefix=config.prefix if self._covers_prefix else 0,
            head_dim=config.attention["head_dim"] or config.dim // config.heads,
        )  # fmt: skip

    def _make_head(self) -> Head:
        config = self.config
        pool = {key: value for key, value in config.pool.items() if key != "norm"}
        norm = config.norm if config.pool.get("norm") else None
        head = DistilledHead if config.tokens["distill"] else Head
        return head(config.dim, config.num_classes, pool=pool, norm=norm, drop=config.drop)

    @property
    def _covers_prefix(self) -> bool:
        return bool(self.config.pos_embed and self.config.pos_embed.get("covers_prefix", True))

    def embed(self, images: Tensor) -> Patches:
        grid = self.patch_embed(images)
        size, prefix = (grid.shape[1], grid.shape[2]), self.config.prefix
        x = grid.flatten(1, 2)
        given = (self.cls_token, self.dist_token, self.reg_token)
        tokens = [token.expand(x.shape[0], -1, -1) for token in given if token is not None]
        if self.pos_embed is None or isinstance(self.pos_embed, RotaryPE):
            x = torch.cat([*tokens, x], dim=1)
        elif self._covers_prefix:
            x = self.pos_embed(torch.cat([*tokens, x], dim=1), size=size, prefix=prefix)
        else:
            x = torch.cat([*tokens, self.pos_embed(x, size=size, prefix=0)], dim=1)
        return Patches(self.pos_drop(x), size, prefix)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, self.config.prefix, pre_logits)

    def get_classifier(self) -> Any:
        """The last linear layer; with a distillation token, both."""
        return (self.head.fc, self.head.fc_dist) if self.config.tokens["distill"] else self.head.fc

    def _step_arguments(self, patches: Patches) -> tuple[Tensor, ...]:
        if not isinstance(self.pos_embed, RotaryPE):
            return ()
        angles = self.pos_embed(patches.size, patches.prefix, patches.x.device)
        if patches.keep is None:
            return (angles,)
        first, rest = angles[: patches.prefix], angles[patches.prefix :]
        return (torch.cat([first.expand(patches.x.shape[0], -1, -1), rest[patches.keep]], dim=1),)

    def _init_module(self, module: nn.Module) -> None:
        """Truncated normal of 0.02 for matrices and tokens, zero biases, as in DeiT; patches keep torch's own."""
        if module is self:
            for token in (self.cls_token, self.dist_token, self.reg_token):
                if token is not None:
                    nn.init.trunc_normal_(token, std=0.02)
        elif isinstance(module, nn.Linear) and module is not self.patch_embed.proj:
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class DistilledHead(Head):
    """DeiT's two classifiers, of the class token and of the distillation token (Touvron et al. 2020,
    https://arxiv.org/abs/2012.12877). Their mean is the answer; in training with ``separate = True`` both are
    returned, for the teacher's loss."""

    def __init__(self, dim: int, num_classes: int, **options: Any) -> None:
        super().__init__(dim, num_classes, **options)
        self.fc_dist = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.separate = False

    def forward(self, x: Tensor, prefix: int = 0, pre_logits: bool = False) -> Any:
        if prefix < 2:
            raise InputError("this head reads a class and a distillation token; the input has too few prefix tokens")
        first, second = self.norm(x[:, 0]), self.norm(x[:, 1])
        if pre_logits:
            return (first + second) / 2
        logits, distilled = self.fc(self.drop(first)), self.fc_dist(self.drop(second))
        return (logits, distilled) if self.separate and self.training else (logits + distilled) / 2


# ViT's table 1; tiny and small from DeiT, medium and huge from DeiT III, giant from "Scaling Vision Transformers"
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "medium": {"dim": 512, "depth": 12, "heads": 8},
    "betwixt": {"dim": 640, "depth": 12, "heads": 10},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "huge": {"dim": 1280, "depth": 32, "heads": 16},
    "giant": {"dim": 1408, "depth": 40, "heads": 16, "mlp": {"ratio": 48 / 11}},
}
_GAP: dict[str, Any] = {"tokens": {"class": 0}, "pool": {"kind": "avg"}}
_GAP_SCALED = {**_GAP, "attention": {"qkv_bias": False}, "layer_scale": 1e-6}
_DEIT3 = {"pos_embed": {"kind": "learned", "covers_prefix": False}, "layer_scale": 1e-6}


def _family(name: str, sizes: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Variants named ``name.format(size, patch, image)``, one for each ``size/patch/image`` in `sizes`."""
    variants = {}
    for word in sizes.split():
        size, patch, image = word.split("/")
        variant = {**_SIZES[size], "patch_size": int(patch), "img_size": int(image), **options}
        variants[name.format(size, patch, image)] = variant
    return variants


def _cats_dogs(patch_size: int, patch_embed: str) -> dict[str, Any]:
    return {
        "dim": 512, "depth": 4, "heads": 8, "patch_size": patch_size, "img_size": 192, "num_classes": 2,
        "patch_embed": patch_embed, "attention": {"qkv_bias": False},
    }  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    **_family(
        "vit_{}_patch{}_{}",
        "tiny/16/224 tiny/16/384 small/8/224 small/16/224 small/16/384 small/32/224 small/32/384 base/8/224 "
        "base/16/224 base/16/384 base/32/224 base/32/384 large/14/224 large/16/224 large/16/384 large/32/224 "
        "large/32/384 huge/14/224",
    ),
    **_family("vit_{}_patch{}_gap_{}", "huge/14/224 huge/16/448 giant/16/224", **_GAP),
    **_family("vit_{}_patch{}_gap_{}", "medium/16/240 medium/16/256 medium/16/384 betwixt/16/256", **_GAP_SCALED),
    # timm's has 16 heads, unlike its other base models
    **_family("vit_{}_patch{}_gap_{}", "base/16/224", **_GAP, heads=16),
    **_family("deit_{}_patch{}_{}", "tiny/16/224 small/16/224 base/16/224 base/16/384"),
    **_family(
        "deit_{}_distilled_patch{}_{}",
        "tiny/16/224 small/16/224 base/16/224 base/16/384",
        tokens={"class": 1, "distill": 1},
    ),
    **_family(
        "deit3_{}_patch{}_{}",
        "small/16/224 small/16/384 medium/16/224 base/16/224 base/16/384 large/16/224 large/16/384 huge/14/224",
        **_DEIT3,
    ),
    # cats and dogs, against ConvMixer
    "vit_24_linear": _cats_dogs(24, "linear"),
    "vit_24_conv": _cats_dogs(24, "conv"),
    "vit_16_linear": _cats_dogs(16, "linear"),
    "vit_16_conv": _cats_dogs(16, "conv"),
    # attention or patches, in its notebook's form
    "vit_128_6_cifar": {
        "dim": 128, "depth": 6, "heads": 8, "mlp": {"ratio": 2.0}, "patch_size": 4, "img_size": 32,
        "num_classes": 10, "patch_embed": "linear", "drop": 0.2,
    },
    # early convolutions in a ViT
    "vit_early_conv_128_6": {
        "dim": 128, "depth": 6, "heads": 16, "mlp": {"ratio": 16.0}, "patch_size": 16, "img_size": 224,
        "num_classes": 2, "patch_embed": {"kind": "early_conv", "widths": (48, 96, 192, 384)},
        "attention": {"qkv_bias": False, "head_dim": 64},
    },
}  # fmt: skip
