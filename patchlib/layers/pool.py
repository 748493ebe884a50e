"""From all positions to one vector."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from .linear import Linear


class AvgPool(nn.Module):
    """The mean over patches; prefix tokens are left out.

    Shape: ``(batch, *positions, dim)`` to ``(batch, dim)``.
    """

    def forward(self, x: Tensor, prefix: int = 0) -> Tensor:
        return x.flatten(1, -2)[:, prefix:].mean(dim=1)


class ClassPool(nn.Module):
    """The class token, which is the first.

    Shape: ``(batch, prefix + tokens, dim)`` to ``(batch, dim)``.
    """

    def forward(self, x: Tensor, prefix: int = 1) -> Tensor:
        if not prefix:
            raise InputError("class pooling needs a class token; this input has none; use pool='avg'")
        return x[:, 0]


class AttentionPool(nn.Module):
    """A learned query reads all positions (Set Transformer's pooling, Lee et al. 2019,
    https://arxiv.org/abs/1810.00825).

    Args:
        dim: length of a token.
        heads: number of attention heads.

    Shape: ``(batch, *positions, dim)`` to ``(batch, dim)``.
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__()
        if not isinstance(heads, int) or heads < 1 or dim % heads:
            raise ConfigError(f"heads: found {heads}; allowed: a divisor of dim={dim}")
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.kv = Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, x: Tensor, prefix: int = 0) -> Tensor:
        k, v = rearrange(self.kv(x.flatten(1, -2)), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        q = rearrange(self.query.expand(x.shape[0], -1, -1), "b n (h d) -> b h n d", h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 d -> b (h d)"))
