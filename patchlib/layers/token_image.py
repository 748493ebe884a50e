"""Tokens laid out as an image."""

import math
from typing import TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from .pos_embed import sinusoid


class TokenImageEncoder(nn.Module):
    """Each token becomes one patch of an image, so that any model of images can read text.

    A token's embedding, ``channels * patch_size**2`` long, plus its position's, is folded into a patch in the order
    (channel, row, column), as `PatchEmbed` cuts them. Patches stand in reading order on the smallest grid that is
    ``ceil(sqrt(num_tokens))`` wide: 1024 tokens of length 768 give a 3 x 512 x 512 image. Positions count tokens, not
    cells, and cells without a token never change what another holds.

    Args:
        vocab_size: how many tokens there are.
        num_tokens: how many the image has room for.
        patch_size: side of a token's patch in pixels.
        channels: of the image.
        pos_embed: ``"learned"`` or ``"sinusoidal"``.
        max_positions: rows of the learned table, `num_tokens` if left out.
        pad_token_id: the token whose embedding, without a position, fills missing cells; None for zeros.
        order: ``"oldest_first"``, or ``"newest_first"``: the newest token stands in the first cell, and the position
            is the distance from it.

    Shape: ids ``(batch, T)`` with ``T <= num_tokens`` to ``(batch, channels, height, width)``, see `image_size`.

    Raises:
        InputError: from `forward`, if there are more tokens than fit, or ids outside the vocabulary (see `check_ids`).
        ConfigError: an argument is impossible.
    """

    def __init__(
        self,
        vocab_size: int,
        num_tokens: int = 1024,
        patch_size: int = 16,
        channels: int = 3,
        pos_embed: str = "learned",
        max_positions: int | None = None,
        pad_token_id: int | None = None,
        order: str = "oldest_first",
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "num_tokens": num_tokens, "patch_size": patch_size, "channels": channels}
        for name, size in sizes.items():
            if not is_integer(size) or size < 1:
                raise ConfigError(f"{name}: found {size!r}; allowed: an integer from 1")
        self.dim = dim = channels * patch_size**2
        if order not in ("oldest_first", "newest_first"):
            raise ConfigError(f"order: found {order!r}; allowed: 'oldest_first', 'newest_first'")
        if pos_embed not in ("learned", "sinusoidal"):
            raise ConfigError(f"pos_embed: found {pos_embed!r}; allowed: 'learned', 'sinusoidal'")
        if pos_embed == "sinusoidal" and dim % 2:
            raise ConfigError(f"pos_embed: sinusoidal positions need an even channels * patch_size**2; found {dim}")
        if max_positions is not None and (
            pos_embed != "learned" or not is_integer(max_positions) or max_positions < num_tokens
        ):
            raise ConfigError(
                f"max_positions: found {max_positions!r} with pos_embed={pos_embed!r}; "
                f"allowed: at least num_tokens={num_tokens}, of a learned table; leave it out otherwise"
            )
        if pad_token_id is not None and not (is_integer(pad_token_id) and 0 <= pad_token_id < vocab_size):
            raise ConfigError(f"pad_token_id: found {pad_token_id!r}; allowed: 0 to {vocab_size - 1}, or None")
        self.vocab_size, self.num_tokens, self.patch_size, self.channels = vocab_size, num_tokens, patch_size, channels
        self.pad_token_id, self.order = pad_token_id, order
        self.tokens = nn.Parameter(torch.empty(vocab_size, dim))
        learned = pos_embed == "learned"
        self.positions = nn.Parameter(torch.empty(max_positions or num_tokens, dim)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of 0.02, as in GPT-2."""
        nn.init.normal_(self.tokens, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        columns = math.isqrt(self.num_tokens - 1) + 1
        return -(-self.num_tokens // columns), columns

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        rows, columns = self.grid_size
        return rows * self.patch_size, columns * self.patch_size

    def forward(self, ids: Tensor, check: bool | None = None) -> Tensor:
        """`check` is passed to `check_ids`."""
        return self.to_image(self.embed(ids, check))

    def embed(self, ids: Tensor, check: bool | None = None) -> Tensor:
        """Token ids ``(batch, T)`` to embeddings with positions ``(batch, T, channels * patch_size**2)``."""
        check_ids(ids, self.vocab_size, self.num_tokens, check)
        count = ids.shape[1]
        places = torch.arange(count, device=ids.device)
        table = sinusoid(places, self.dim) if self.positions is None else self.positions[:count]
        if self.order == "newest_first":
            table = table.flip(0)
        return F.embedding(ids, self.tokens) + table.to(self.tokens.dtype)

    def to_image(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``(batch, T, channels * patch_size**2)``, oldest first, to the image."""
        if embeddings.dim() != 3 or embeddings.shape[1] > self.num_tokens or embeddings.shape[2] != self.dim:
            raise InputError(
                f"embeddings: found {tuple(embeddings.shape)}; allowed: (batch, up to {self.num_tokens}, {self.dim})"
            )
        if self.order == "newest_first":
            embeddings = embeddings.flip(1)
        rows, columns = self.grid_size
        missing = rows * columns - embeddings.shape[1]
        if self.pad_token_id is None:
            cells = F.pad(embeddings, (0, 0, 0, missing))
        else:
            cells = torch.cat(
                [embeddings, self.tokens[self.pad_token_id].expand(embeddings.shape[0], missing, -1)], dim=1
            )
        size = self.patch_size
        return rearrange(cells, "b (h w) (c p q) -> b c (h p) (w q)", w=columns, p=size, q=size)

    def to_embeddings(self, image: Tensor, count: int | None = None) -> Tensor:
        """The exact inverse of `to_image`.

        Args:
            image: ``(batch, channels, height, width)``.
            count: how many tokens went in, `num_tokens` if left out.

        Returns:
            ``(batch, count, channels * patch_size**2)``, oldest first.
        """
        if tuple(image.shape[1:]) != (self.channels, *self.image_size):
            allowed = (self.channels, *self.image_size)
            raise InputError(f"image: found {tuple(image.shape)}; allowed: (batch, *{allowed})")
        count = self.num_tokens if count is None else count
        if not 0 <= count <= self.num_tokens:
            raise InputError(f"count: found {count}; allowed: 0 to {self.num_tokens}")
        size = self.patch_size
        cells = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)[:, :count]
        return cells.flip(1) if self.order == "newest_first" else cells

    def extra_repr(self) -> str:
        return f"{self.num_tokens} tokens of {self.vocab_size} as {self.channels} x {self.image_size}, {self.order}"


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int of Python's, which True and False are not meant to be."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_ids(ids: Tensor, vocab_size: int, most: int | None = None, check: bool | None = None) -> None:
    """Raises `InputError` unless `ids` are ``(batch, T)`` integers from 0 to ``vocab_size - 1``, and ``T`` is from 1 to
    `most`.

    Looking at the values takes a synchronisation on an accelerator and cannot be compiled; `check` says whether to do
    it. Left out, it is done in eager mode on the CPU.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"ids: found {ids.dtype} {tuple(ids.shape)}; allowed: int64 or int32 (batch, tokens)")
    count = ids.shape[1]
    if count < 1 or (most is not None and count > most):
        allowed = "at least 1" if most is None else f"1 to {most}; crop to the newest"
        raise InputError(f"ids: found {count} tokens; allowed: {allowed}")
    if check is None:
        check = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if check and ids.numel() and (ids.amin() < 0 or ids.amax() >= vocab_size):
        row, place = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
        raise InputError(
            f"ids[{row}, {place}]: found {ids[row, place].item()}; allowed: 0 to {vocab_size - 1} "
            "(do tokeniser and model belong together?)"
        )
