"""CausalConvLM: ConvNeXt V2's blocks in reading order, a language model that predicts every next token in one pass.

The masks are those of "Pixel Recurrent Neural Networks", van den Oord et al. 2016, https://arxiv.org/abs/1601.06759.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MAX_CLASSES, MAX_DEPTH, MAX_DIM, BaseConfig, integer, kind, number, size
from ..errors import ConfigError, InputError
from ..layers.drop import drop_path_schedule
from ..layers.grid import pair
from ..layers.masked_conv import BlockCache, CausalConvNeXtBlock
from ..layers.token_image import check_ids
from ..ops.linear import linear
from ..registry import build_block
from .base import LanguageModel


@dataclass(frozen=True, kw_only=True)
class CausalConvLMConfig(BaseConfig):
    """Sizes of a `CausalConvLM`.

    Attributes:
        context: tokens that it reads at once; they stand on a grid ``ceil(sqrt(context))`` wide, one a cell.
        kernel_size: side of the whole depthwise kernel, odd, or (height, width); the half after a cell is masked.
        ratio: width of a block's hidden layer, in multiples of `dim`.
        norm: of the blocks and at the end.
        drop: probability of dropout after the embedding and before the head.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
    """

    vocab_size: int = integer(50257, 1, MAX_CLASSES)
    context: int = integer(1024, 1, 65_536)
    dim: int = integer(768, 1, MAX_DIM)
    depth: int = integer(18, 1, MAX_DEPTH)
    kernel_size: int | tuple[int, int] = size(7, 255)
    ratio: float = number(4.0, 0.01, 64)
    norm: dict[str, Any] = kind("norm", {"kind": "layer", "eps": 1e-6})
    drop: float = number(0.0, 0, 0.99)
    drop_path: float = number(0.0, 0, 0.99)

    def check(self) -> None:
        height, width = pair(self.kernel_size)
        if height % 2 == 0 or width % 2 == 0:
            raise ConfigError(f"CausalConvLMConfig.kernel_size: found {self.kernel_size}; allowed: odd sides")
        if width // 2 >= self.grid_width:
            raise ConfigError(
                f"CausalConvLMConfig.kernel_size: found {self.kernel_size}, which reaches {width // 2} cells to the "
                f"right; allowed: less than the grid's width, {self.grid_width} with context={self.context}"
            )

    @property
    def grid_width(self) -> int:
        """Cells in a row."""
        return math.isqrt(self.context - 1) + 1


class ConvCache(NamedTuple):
    """What `CausalConvLM.step` needs of the tokens so far: how many they were, and what each block keeps of them."""

    length: int
    blocks: tuple[BlockCache, ...]


class CausalConvLM(LanguageModel):
    """Token ids ``(batch, T)`` to logits ``(batch, T, vocab_size)``; those at ``t`` depend on tokens 0 to ``t`` alone.

    Tokens stand on a grid in reading order, one a cell at one resolution throughout (merging cells would read ahead).
    Depthwise convolutions see the rows above and the row's beginning, response normalisation the rows above.
    Positions need no embedding: the convolutions tell them apart. The head is the embedding.

    `torch.export` makes one graph for all lengths (``{1: Dim("tokens", max=context)}``, not strict), which always
    computes the whole context; what is exported for one length computes the rows that it needs.

    ``CausalConvLM(dim=192, depth=9)``, ``CausalConvLM(config)`` and ``CausalConvLM(config, depth=6)`` all work.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    Config = CausalConvLMConfig
    blocks: Any

    def __init__(self, config: CausalConvLMConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = config = CausalConvLMConfig.of(config, overrides)
        self.context = config.context
        self.tokens = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.drop = nn.Dropout(config.drop)
        self.blocks = nn.ModuleList(
            CausalConvNeXtBlock(
                config.dim, config.kernel_size, ratio=config.ratio, norm=config.norm, drop_path=rate
            )
            for rate in drop_path_schedule(config.drop_path, config.depth)
        )  # fmt: skip
        self.norm = build_block("norm", config.norm, config.dim)
        self.init_weights()

    def forward(self, ids: Tensor) -> Tensor:
        """Raises `InputError` for more than `context` tokens, or ids outside the vocabulary."""
        grid = self._lay(ids)
        for block in self.blocks:
            grid = block(grid)
        x = grid.flatten(1, 2)
        return self._head(F.pad(x, (0, 0, 0, ids.shape[1] - x.shape[1])))  # exports for any length, as a slice does not

    def next_logits(self, ids: Tensor) -> Tensor:
        return self.start(ids)[0]

    def start(self, ids: Tensor) -> tuple[Tensor, ConvCache]:
        """Reads a prompt, in evaluation mode.

        Args:
            ids: ``(batch, T)``, at most `context` tokens.

        Returns:
            logits of the token that follows ``(batch, vocab_size)``, and the cache that `step` takes.
        """
        grid, caches = self._lay(ids), []
        for block in self.blocks:
            grid, cache = block.start(grid, ids.shape[1])
            caches.append(cache)
        return self._head(grid.flatten(1, 2)[:, ids.shape[1] - 1]), ConvCache(ids.shape[1], tuple(caches))

    def step(self, ids: Tensor, cache: ConvCache) -> tuple[Tensor, ConvCache]:
        """Reads one more token.

        The cache does not grow, so there is no end to a text; `forward` would give the same, were `context` longer.

        Args:
            ids: ``(batch, 1)``.
            cache: from `start` or the `step` before, which stays as it is.

        Returns:
            logits of the token that follows ``(batch, vocab_size)``, and the next cache.
        """
        check_ids(ids, self.config.vocab_size, 1)
        if len(ids) != (batch := len(cache.blocks[0].history)):
            raise InputError(f"ids: found a batch of {len(ids)}; allowed: {batch}, as many as the cache has")
        x, caches, width = F.embedding(ids[:, 0], self.tokens), [], self.config.grid_width
        taps, new_row = self.blocks[0].depthwise.taps(width), cache.length % width == 0
        for block, before in zip(self.blocks, cache.blocks, strict=True):
            x, after = block.step(x, before, taps, new_row)
            caches.append(after)
        return self._head(x), ConvCache(cache.length + 1, tuple(caches))

    def _lay(self, ids: Tensor) -> Tensor:
        """Ids to the grid ``(batch, rows, columns, dim)``, as many rows as they need; empty cells come last."""
        check_ids(ids, self.config.vocab_size, self.context)
        width, count = self.config.grid_width, ids.shape[1]
        x = self.drop(F.embedding(ids, self.tokens))
        # an export for any length gets all rows, since a graph cannot hold for one row and for more; none reads ahead
        most = self.context if isinstance(count, torch.SymInt) else count
        rows = -(-most // width)
        return F.pad(x, (0, 0, 0, rows * width - count)).unflatten(1, (rows, width))

    def _head(self, x: Tensor) -> Tensor:
        return linear(self.drop(self.norm(x)), self.tokens)

    def _init_module(self, module: nn.Module) -> None:
        """Truncated normal of 0.02 for embedding and matrices, zero biases, as in ConvNeXt V2."""
        if module is self:
            nn.init.trunc_normal_(self.tokens, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict[str, Any]] = {
    # as many parameters as gpt_tiny
    "causal_conv_lm_tiny": {"vocab_size": 1024, "context": 256, "dim": 192, "depth": 9},
    # as many as gpt2
    "causal_conv_lm_base": {"vocab_size": 50257, "context": 1024, "dim": 768, "depth": 18},
}
