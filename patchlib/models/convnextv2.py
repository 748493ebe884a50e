"""ConvNeXt V2: ConvNeXt with global response normalisation instead of layer scale.

"ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", Woo et al. 2023,
https://arxiv.org/abs/2301.00808.
"""

from dataclasses import dataclass
from typing import Any

from ..config import flag, number
from .convnext import ConvNeXt, ConvNeXtConfig


@dataclass(frozen=True, kw_only=True)
class ConvNeXtV2Config(ConvNeXtConfig):
    """`ConvNeXtConfig` with V2's choices as defaults."""

    grn: bool = flag(True)
    layer_scale: float | None = number(None, 0, 1000, optional=True)


class ConvNeXtV2(ConvNeXt):
    """`ConvNeXt` whose config is V2's; ``ConvNeXtV2(depths=(2, 2), dims=(64, 128))``."""

    Config = ConvNeXtV2Config


def _sizes(depths: tuple[int, ...], width: int) -> dict[str, Any]:
    return {"depths": depths, "dims": tuple(width << i for i in range(len(depths)))}


VARIANTS: dict[str, dict[str, Any]] = {
    # the paper, appendix A
    "convnextv2_atto": _sizes((2, 2, 6, 2), 40),
    "convnextv2_femto": _sizes((2, 2, 6, 2), 48),
    "convnextv2_pico": _sizes((2, 2, 6, 2), 64),
    "convnextv2_nano": _sizes((2, 2, 8, 2), 80),
    "convnextv2_tiny": _sizes((3, 3, 9, 3), 96),
    "convnextv2_base": _sizes((3, 3, 27, 3), 128),
    "convnextv2_large": _sizes((3, 3, 27, 3), 192),
    "convnextv2_huge": _sizes((3, 3, 27, 3), 352),
    # not in the paper; timm's
    "convnextv2_small": _sizes((3, 3, 27, 3), 96),
}
