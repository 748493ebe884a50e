"""Multi-head self-attention."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import build_block
from .linear import Linear
from .pos_embed import rotate


class Attention(nn.Module):
    """Every position reads every other (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Args:
        dim: length of a token.
        heads: number of heads.
        head_dim: length of a head's query, key and value; ``dim / heads`` if left out.
        qkv_bias: whether queries, keys and values have a bias.
        norm: kind of norm on each head's queries and keys (``"layer"``, ``"rms"``), None for none.
        drop: probability that dropout zeroes an entry of the output.

    Shape: ``(batch, *positions, dim)`` to the same; a grid or a sequence.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        norm: str | Mapping[str, Any] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(heads, int) or heads < 1 or (head_dim is None and dim % heads):
            raise ConfigError(f"heads: found {heads}; allowed: a divisor of dim={dim}, or give head_dim")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        inner = heads * self.head_dim
        self.qkv = Linear(dim, 3 * inner, bias=qkv_bias)
        if norm is not None:
            spec = {"kind": norm} if isinstance(norm, str) else norm
            self.q_norm = build_block("norm", spec, self.head_dim)
            self.k_norm = build_block("norm", spec, self.head_dim)
        self.normed = norm is not None
        self.proj = Linear(inner, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """`angles`, from `RotaryPE`, turn queries and keys."""
        q, k, v = self._qkv(x, angles)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return self.drop(self.proj(mixed)).reshape(x.shape)

    def maps(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """The attention weights, which the fused kernel does not return: ``(batch, heads, tokens, tokens)``,
        where row ``i`` says how much token ``i`` reads of each."""
        q, k, _ = self._qkv(x, angles)
        return (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1)

    def _qkv(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x.flatten(1, -2)), "b n (three h d) -> three b n h d", three=3, h=self.heads)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
