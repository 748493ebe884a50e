"""GPT-2: a transformer that predicts each next token.

"Language Models are Unsupervised Multitask Learners", Radford et al. 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import MAX_CLASSES, MAX_DEPTH, MAX_DIM, BaseConfig, integer, kind, number
from ..errors import ConfigError, InputError
from ..layers.attention import Attention
from ..layers.token_image import check_ids
from ..ops.linear import linear
from ..registry import build_block
from .base import LanguageModel

MAX_CONTEXT = 65_536


@dataclass(frozen=True, kw_only=True)
class GPTConfig(BaseConfig):
    """Sizes and choices of a `GPT`.

    Attributes:
        context: how many tokens it reads at once, and how many positions are learned.
        mlp: kind and options; GPT-2's GELU is the tanh form.
        norm: of the blocks and at the end.
        drop: dropout after the embedding, on attention weights, and at the end of each branch.
    """

    vocab_size: int = integer(50_257, 1, MAX_CLASSES)
    context: int = integer(1024, 1, MAX_CONTEXT)
    dim: int = integer(768, 1, MAX_DIM)
    depth: int = integer(12, 1, MAX_DEPTH)
    heads: int = integer(12, 1, 1024)
    mlp: dict[str, Any] = kind("mlp", {"kind": "gelu", "ratio": 4.0, "approximate": "tanh"})
    norm: dict[str, Any] = kind("norm", {"kind": "layer", "eps": 1e-5})
    drop: float = number(0.0, 0, 0.99)

    def check(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"GPTConfig.heads: found {self.heads}; allowed: a divisor of dim={self.dim}")


class KeyValues:
    """The keys and values of one layer for all tokens read so far, in a buffer that doubles when it is full."""

    def __init__(self, batch: int) -> None:
        self.batch, self.length = batch, 0
        self.buffer: Tensor | None = None  # (2, batch, heads, room, head_dim)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds ``(batch, heads, new, head_dim)``; returns all, ``(batch, heads, length, head_dim)`` each."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.buffer is None or self.length > self.buffer.shape[3]:
            grown = keys.new_empty(2, *keys.shape[:2], max(64, 2 * self.length), keys.shape[3])
            if self.buffer is not None:
                grown[:, :, :, :start] = self.buffer[:, :, :, :start]
            self.buffer = grown
        self.buffer[0, :, :, start : self.length] = keys
        self.buffer[1, :, :, start : self.length] = values
        return self.buffer[0, :, :, : self.length], self.buffer[1, :, :, : self.length]


Cache = list[KeyValues]


class CausalAttention(Attention):
    """Each token reads itself and those before it. Dropout falls on the weights too, as in GPT-2.

    Shape: ``(batch, T, dim)`` to the same.
    """

    def forward(self, x: Tensor, cache: KeyValues | None = None) -> Tensor:  # type: ignore[override]
        """With a `cache`, `x` follows what it holds: several tokens if it is empty, one otherwise."""
        q, k, v = self._qkv(x, None)
        if cache is not None:
            k, v = cache.append(k, v)
        drop = self.drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=cache is None or q.shape[2] > 1)
        return self.drop(self.proj(rearrange(mixed, "b h n d -> b n (h d)")))

    def maps(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """The attention weights, ``(batch, heads, T, T)``, where row ``i`` says how much token ``i`` reads of each."""
        q, k, _ = self._qkv(x, angles)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.transpose(-2, -1) * self.head_dim**-0.5).masked_fill(later, -torch.inf).softmax(dim=-1)


class Block(nn.Module):
    """Causal attention, then an MLP, each normed at its entrance and on a residual branch.

    Shape: ``(batch, T, dim)`` to the same.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = build_block("norm", config.norm, config.dim)
        self.attn = CausalAttention(config.dim, config.heads, drop=config.drop)
        self.norm2 = build_block("norm", config.norm, config.dim)
        self.mlp = build_block("mlp", config.mlp, dim=config.dim)
        self.drop = nn.Dropout(config.drop)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as (in, out) in memory: faster for one token, and so GPT-2's files are
                module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)

    def forward(self, x: Tensor, cache: KeyValues | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), cache)
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(LanguageModel):
    """Token ids ``(batch, T)``, ``T <= context``, to logits ``(batch, T, vocab_size)`` of each next token.

    The head is the token embedding. ``GPT(dim=192, depth=6, heads=6)``, ``GPT(config)`` and ``GPT(config, depth=6)``
    all work.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    Config = GPTConfig
    blocks: Any  # a ModuleList of Block

    def __init__(self, config: GPTConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = GPTConfig.of(config, overrides)
        self.context = config.context
        self.token_embed = nn.Embedding(config.vocab_size, config.dim)
        self.pos_embed = nn.Embedding(config.context, config.dim)
        self.drop = nn.Dropout(config.drop)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = build_block("norm", config.norm, config.dim)
        self.init_weights()

    def forward(self, ids: Tensor) -> Tensor:
        """Raises `InputError` for more than `context` tokens, or ids outside the vocabulary."""
        return self._head(self._read(ids))

    def next_logits(self, ids: Tensor) -> Tensor:
        return self._head(self._read(ids)[:, -1])

    def start(self, ids: Tensor) -> tuple[Tensor, Cache]:
        """Reads a prompt ``(batch, T)``: logits of the next token, ``(batch, vocab_size)``, and a cache for `step`."""
        cache = [KeyValues(len(ids)) for _ in self.blocks]
        return self._head(self._read(ids, cache)[:, -1]), cache

    def step(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Reads one more token ``(batch, 1)``: what `start` returns. The cache is changed in place.

        Raises:
            InputError: the batch is not the cache's, or that holds `context` tokens already.
        """
        batch = cache[0].batch
        if ids.shape != (batch, 1):
            raise InputError(f"ids: found {tuple(ids.shape)}; allowed: {(batch, 1)}, one token for each of the cache's")
        if cache[0].length >= self.context:
            raise InputError(f"cache: holds {self.context} tokens, all that the model can read; start with the newest")
        return self._head(self._read(ids, cache)[:, -1]), cache

    def _read(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Ids that follow what the cache holds to normed features, ``(batch, T, dim)``."""
        start = cache[0].length if cache else 0
        check_ids(ids, self.config.vocab_size, self.context - start)
        x = self.drop(self.token_embed(ids) + self.pos_embed.weight[start : start + ids.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        return self.norm(x)

    def _head(self, x: Tensor) -> Tensor:
        return linear(x, self.token_embed.weight)

    def _init_module(self, module: nn.Module) -> None:
        """Normal of 0.02, zero biases; less for the ends of branches, so that their sum does not grow with depth."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            ends_branch = any(module in (block.attn.proj, getattr(block.mlp, "fc2", None)) for block in self.blocks)
            nn.init.normal_(module.weight, std=0.02 * (2 * self.config.depth) ** -0.5 if ends_branch else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    # the paper's table 2, in the released sizes
    "gpt2": {"dim": 768, "depth": 12, "heads": 12},
    "gpt2-medium": {"dim": 1024, "depth": 24, "heads": 16},
    "gpt2-large": {"dim": 1280, "depth": 36, "heads": 20},
    "gpt2-xl": {"dim": 1600, "depth": 48, "heads": 25},
    # a size that a laptop trains
    "gpt_tiny": {"vocab_size": 1024, "context": 256, "dim": 192, "depth": 6, "heads": 6},
}
