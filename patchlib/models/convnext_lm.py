"""ConvNeXtV2LM: a window of text as one image, read by a network for images that predicts the next token."""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MAX_CLASSES, MAX_DIM, BaseConfig, choice, integer, plain
from ..errors import ConfigError, InputError, UnknownNameError
from ..layers.pool import AvgPool
from ..layers.token_image import TokenImageEncoder
from ..registry import find_model
from .base import ImageModel, LanguageModel

_TRUNKS = {
    "convmixer": "ConvMixer",
    "convnext": "ConvNeXt",
    "convnextv2": "ConvNeXtV2",
    "patchnet": "PatchNet",
    "vit": "ViT",
}
_SET = ("img_size", "in_chans", "num_classes")


def _trunk(default: dict[str, Any]) -> Any:
    """A config field for a model of images: ``{"kind": family or registered name, **fields of its config}``."""

    def check(where: str, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping) and "kind" not in value:
            value = {**default, **value}
        spec = {"kind": value} if isinstance(value, str) else value
        if not isinstance(spec, Mapping) or not isinstance(spec.get("kind"), str):
            raise ConfigError(
                f"{where}: found {value!r:.80}; allowed: a family ({', '.join(map(repr, _TRUNKS))}) or a registered "
                "model's name, or an object with it as 'kind' and fields of its config"
            )
        spec = {str(key): plain(f"{where}.{key}", option) for key, option in spec.items()}
        for key in _SET:
            if key in spec:
                raise ConfigError(f"{where}.{key}: set by the language model; leave it out")
        _trunk_config(where, spec)
        return spec

    return dataclasses.field(default_factory=lambda: default, metadata={"check": check, "default": default})


def _trunk_config(where: str, spec: Mapping[str, Any], **given: Any) -> tuple[Any, Any]:
    """The class and the config that a trunk's spec means."""
    options = {key: value for key, value in spec.items() if key != "kind"}
    try:
        if spec["kind"] in _TRUNKS:
            module = importlib.import_module(f"..{spec['kind']}", __name__)
            model_class = getattr(module, _TRUNKS[spec["kind"]])
            config = model_class.Config()
        else:
            model_class, config = find_model(spec["kind"])
        if not issubclass(model_class, ImageModel):
            raise ConfigError(f"{spec['kind']!r} is no model of images; allowed: {', '.join(map(repr, _TRUNKS))}, …")
        return model_class, config.replace(**options, **given)
    except (ConfigError, UnknownNameError) as error:
        raise ConfigError(f"{where}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ConvNeXtV2LMConfig(BaseConfig):
    """Sizes and choices of a `ConvNeXtV2LM`.

    Attributes:
        num_tokens: tokens that it reads at once.
        patch_size, channels: of a token's patch; its embedding is ``channels * patch_size**2`` long.
        pos_embed, max_positions, pad_token_id, order: as in `TokenImageEncoder`.
        trunk: the network that reads the image: a family (``"convnextv2"``, ``"convmixer"``, ``"vit"``, …) or a
            registered model's name as ``kind``, and fields of its config; its `drop` falls on what the readout reads.
        readout: from the last grid to one embedding: ``"upsample"``, a transposed convolution along the flattened
            positions, of which the last channel is read; ``"pool"``, the mean, a norm and a matrix.
    """

    vocab_size: int = integer(50257, 1, MAX_CLASSES)
    num_tokens: int = integer(1024, 1, 65_536)
    patch_size: int = integer(16, 1, 256)
    channels: int = integer(3, 1, 4096)
    pos_embed: str = choice("learned", "learned", "sinusoidal")
    max_positions: int | None = integer(None, 1, MAX_CLASSES, optional=True)
    pad_token_id: int | None = integer(None, 0, MAX_CLASSES, optional=True)
    order: str = choice("oldest_first", "oldest_first", "newest_first")
    trunk: dict[str, Any] = _trunk({"kind": "convnextv2", "depths": (3, 3, 20, 3), "dims": (128, 256, 512, 1024)})
    readout: str = choice("upsample", "upsample", "pool")

    def check(self) -> None:
        if self.dim > MAX_DIM:
            raise ConfigError(
                f"ConvNeXtV2LMConfig.channels: found {self.channels} x {self.patch_size}**2 = {self.dim} numbers a "
                f"token; allowed: at most {MAX_DIM}"
            )

    @property
    def dim(self) -> int:
        """Length of a token's embedding."""
        return self.channels * self.patch_size**2


class ConvNeXtV2LM(LanguageModel):
    """Token ids ``(batch, T)``, at most `num_tokens`, to the logits of the token that follows
    ``(batch, 1, vocab_size)``.

    `TokenImageEncoder` makes an image of them, the trunk a grid, the readout an embedding; the head is the encoder's
    table of tokens.

        ConvNeXtV2LM(vocab_size=256, num_tokens=64, patch_size=8, trunk={"kind": "convmixer", "dim": 256})

    Raises:
        ConfigError: a field is unknown, its value is not allowed, or trunk and readout do not fit the image.
    """

    Config = ConvNeXtV2LMConfig

    def __init__(self, config: ConvNeXtV2LMConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = ConvNeXtV2LMConfig.of(config, overrides)
        self.context = config.num_tokens
        self.encoder = TokenImageEncoder(
            config.vocab_size, config.num_tokens, config.patch_size, config.channels, config.pos_embed,
            config.max_positions, config.pad_token_id, config.order,
        )  # fmt: skip
        image = self.encoder.image_size
        model_class, trunk_config = _trunk_config(
            "ConvNeXtV2LMConfig.trunk", config.trunk, img_size=image, in_chans=config.channels, num_classes=0
        )
        try:
            self.trunk = model_class(trunk_config)
            rows, columns = _last_grid(self.trunk, image)
        except InputError as error:  # what would be wrong with an image is wrong with the config here
            raise ConfigError(f"ConvNeXtV2LMConfig.trunk.patch_size: {error}") from error
        self.trunk.head = nn.Dropout(getattr(trunk_config, "drop", 0.0))  # its dropout; the rest is the readout's
        width = self.trunk.num_features
        if config.readout == "pool":
            self.readout: nn.Module = PoolReadout(width, config.dim)
        elif config.dim % (rows * columns):
            raise ConfigError(
                f"ConvNeXtV2LMConfig.readout: 'upsample' spreads an embedding of {config.dim} over the positions, and "
                f"the trunk's last grid has {rows} x {columns}; allowed: a divisor; or use readout='pool'"
            )
        else:
            self.readout = UpsampleReadout(width, config.dim // (rows * columns))
        self.init_weights()

    def forward(self, ids: Tensor) -> Tensor:
        """Raises `InputError` for more than `num_tokens` tokens, or ids outside the vocabulary."""
        patches = self.trunk.encode(self.trunk.embed(self.encoder(ids)))
        x = self.readout(self.trunk.head(self.trunk.to_grid(patches)))
        return F.linear(x, self.encoder.tokens)[:, None]

    def _init_module(self, module: nn.Module) -> None:
        """All but the readout as the trunk does it; the readout starts as torch draws it, which trains well."""
        if module not in tuple(self.readout.modules()):
            self.trunk._init_module(module)


def _last_grid(model: ImageModel, image: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the trunk's output."""
    embed = model.patch_embed
    for length, patch, stride in zip(image, embed.patch_size, embed.stride, strict=True):
        if embed.remainder == "error" and (length - patch) % stride:
            raise InputError(
                f"patches of {patch} pixels do not cover an image of {image[0]} x {image[1]}; choose another, "
                "or patch_embed={'remainder': 'drop'}"
            )
    merged = model.reductions[-1] // embed.stride[0]
    rows, columns = (cells // merged for cells in embed.grid_size(image))
    if not rows * columns:
        raise InputError(f"{model.reductions[-1]} pixels make one cell, and the image has {image[0]} x {image[1]}")
    return rows, columns


class UpsampleReadout(nn.ConvTranspose1d):
    """A transposed convolution along the flattened grid gives `width` channels as long as the embedding; the last one
    is the answer, and the only one that is computed.

    Shape: ``(batch, height, width, dim)`` to ``(batch, height * width * stride)``.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__(width, width, stride, stride=stride)

    def forward(self, grid: Tensor) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        return (grid.flatten(1, 2) @ self.weight[:, -1] + self.bias[-1]).flatten(1)


class PoolReadout(nn.Module):
    """The mean over positions, a norm, a matrix.

    Shape: ``(batch, height, width, dim)`` to ``(batch, out_dim)``.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.pool = AvgPool()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, grid: Tensor) -> Tensor:
        return self.proj(self.norm(self.pool(grid)))


VARIANTS: dict[str, dict[str, Any]] = {
    "convnextv2_lm_base": {},
    # the form that was trained
    "convnextv2_lm_base_256": {"num_tokens": 256, "max_positions": 1024, "order": "newest_first"},
    # as many parameters as gpt_tiny; one cell a token, then ever fewer: most of the work is in the last stage
    "convnextv2_lm_tiny": {
        "vocab_size": 1024, "num_tokens": 256, "patch_size": 8, "order": "newest_first",
        "trunk": {"kind": "convnextv2", "patch_size": 8, "depths": (1, 2, 6), "dims": (48, 96, 192)},
    },
}  # fmt: skip
