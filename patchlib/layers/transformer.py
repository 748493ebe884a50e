"""The transformer block."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import build_block
from .attention import Attention
from .drop import DropPath
from .scale import LayerScale


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each on a residual branch.

    Args:
        dim: length of a token.
        heads: number of attention heads.
        attention: further options of `Attention`, e.g. ``{"qkv_bias": False}``.
        mlp: kind and options, e.g. ``{"kind": "swiglu"}``.
        norm: kind and options of the norms.
        order: ``"pre"`` normalises what enters a branch (ViT), ``"post"`` the sum after it (the 2017 transformer).
        layer_scale: start value of a learned factor a channel on each branch (CaiT), None for none.
        drop: probability of dropout in both branches.
        drop_path: probability that a sample skips a branch in training.

    Shape: ``(batch, *positions, dim)`` to the same; a grid or a sequence.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        attention: Mapping[str, Any] | None = None,
        mlp: str | Mapping[str, Any] | None = None,
        norm: str | Mapping[str, Any] | None = None,
        order: str = "pre",
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if order not in ("pre", "post"):
            raise ConfigError(f"order: found {order!r}; allowed: 'pre', 'post'")
        norm = norm or {"kind": "layer", "eps": 1e-6}
        self.norm1 = build_block("norm", norm, dim)
        self.attn = Attention(dim, heads, drop=drop, **(attention or {}))
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = build_block("norm", norm, dim)
        self.mlp = build_block("mlp", mlp or {"kind": "gelu"}, dim=dim, drop=drop)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.order = order

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """`angles`, from `RotaryPE`, turn the attention's queries and keys."""
        if self.order == "pre":
            x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), angles)))
            return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self.drop_path(self.ls1(self.attn(x, angles))))
        return self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
