"""Positions of patches: sinusoidal, learned, rotary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from .grid import pair


class SinusoidalPE(nn.Module):
    """Adds the sines and cosines of "Attention Is All You Need" (Vaswani et al. 2017, section 3.5):
    ``PE(p, 2i) = sin(p / temperature^(2i/dim))`` and ``PE(p, 2i+1) = cos(p / temperature^(2i/dim))``.

    Nothing is learned and nothing stored, so any length works.

    Args:
        dim: length of a patch's vector; even, and a multiple of 4 for ``axes=2``.
        axes: 1 counts patches in reading order (with prefix tokens first, if there are any);
            2 gives the first half of `dim` to the row and the second to the column, and nothing to prefix tokens.
        temperature: the base of the wavelengths.

    Shape: ``(batch, height, width, dim)`` or ``(batch, prefix + tokens, dim)``, the same out.
    """

    def __init__(self, dim: int, *, axes: int = 1, temperature: float = 10_000.0) -> None:
        super().__init__()
        if axes not in (1, 2):
            raise ConfigError(f"axes: found {axes}; allowed: 1 (reading order) or 2 (rows and columns)")
        if dim % (2 * axes):
            raise ConfigError(f"dim: found {dim}; sinusoidal positions along {axes} axes take a multiple of {2 * axes}")
        self.dim, self.axes, self.temperature = dim, axes, temperature

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, prefix: int = 0) -> Tensor:
        return x + self.table(x, size, prefix).to(x.dtype)

    def table(self, x: Tensor, size: tuple[int, int] | None = None, prefix: int = 0) -> Tensor:
        """What is added to `x`, in float32 and of the shape of one of its samples."""
        if self.axes == 1:
            positions = torch.arange(x.shape[1:-1].numel(), device=x.device)
            return sinusoid(positions, self.dim, self.temperature).reshape(x.shape[1:])
        if x.dim() != 4 and size is None:
            raise InputError("sinusoidal positions along 2 axes need a grid (batch, height, width, dim), or size=")
        height, width = size or (x.shape[1], x.shape[2])
        rows = sinusoid(torch.arange(height, device=x.device), self.dim // 2, self.temperature)
        columns = sinusoid(torch.arange(width, device=x.device), self.dim // 2, self.temperature)
        table = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        if x.dim() == 4:
            return table
        return F.pad(table.flatten(0, 1), (0, 0, prefix, 0))


def sinusoid(positions: Tensor, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Sines at even and cosines at odd places: ``(n,)`` positions to ``(n, dim)``, float32."""
    frequencies = temperature ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class LearnedPE(nn.Module):
    """Adds a learned vector to each position; for another grid than its own it resizes the table.

    Args:
        dim: length of a patch's vector.
        size: height and width of the grid, in patches, that the table is learned on.
        prefix: how many leading tokens that are no patches (class, register) have positions of their own.

    Shape: ``(batch, height, width, dim)`` or ``(batch, prefix + tokens, dim)``, the same out.
    """

    def __init__(self, dim: int, size: int | tuple[int, int], prefix: int = 0) -> None:
        super().__init__()
        self.size, self.prefix = pair(size), prefix
        self.table = nn.Parameter(torch.empty(1, prefix + self.size[0] * self.size[1], dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, prefix: int = 0) -> Tensor:
        if x.dim() != 4 and size is None and x.shape[1] - self.prefix != self.size[0] * self.size[1]:
            raise InputError(
                f"learned positions: found {x.shape[1] - self.prefix} patches for a table of {self.size[0]} x "
                f"{self.size[1]}; pass a grid (batch, height, width, dim), or size=, to have the table resized"
            )
        if x.dim() == 4:
            size = (x.shape[1], x.shape[2])
            if self.prefix:
                raise InputError(
                    f"learned positions: found a grid, for a table that begins with {self.prefix} prefix tokens; "
                    "pass a sequence (batch, prefix + tokens, dim) and size="
                )
        table = self.table if size is None else resize_positions(self.table, self.size, size, self.prefix)
        return x + table.reshape(1, *x.shape[1:]).to(x.dtype)

    @torch.no_grad()
    def resize(self, size: int | tuple[int, int]) -> None:
        """Resamples the table to another grid, for good."""
        if pair(size) == self.size:
            return
        table = resize_positions(self.table, self.size, pair(size), self.prefix)
        self.table, self.size = nn.Parameter(table, self.table.requires_grad), pair(size)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """Resamples a table ``(1, prefix + old height * old width, dim)`` to another grid, bicubic and antialiased
    (as FlexiViT and timm do); the first `prefix` rows are kept. Returns it unchanged for the same grid."""
    if tuple(old) == tuple(new):
        return table
    kept, positions = table[:, :prefix], table[:, prefix:]
    image = positions.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(new), mode="bicubic", antialias=True)
    return torch.cat([kept, image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


class RotaryPE(nn.Module):
    """Axial rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864; on two axes as Heo et al. 2024,
    https://arxiv.org/abs/2403.13298): one half of each head turns with the row, the other with the column.

    The angles are an argument of `Attention`: ``attention(x, RotaryPE(head_dim)((height, width)))``.

    Args:
        head_dim: length of a head's query; a multiple of 4.
        temperature: the base of the wavelengths.

    Shape: a grid's ``(height, width)`` to angles ``(prefix + height * width, head_dim / 2)``; prefix tokens
    do not turn.
    """

    def __init__(self, head_dim: int, *, temperature: float = 100.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ConfigError(f"head_dim: found {head_dim}; rotary positions on two axes take a multiple of 4")
        self.head_dim, self.temperature = head_dim, temperature

    def forward(self, size: tuple[int, int], prefix: int = 0, device: torch.device | None = None) -> Tensor:
        height, width = size
        steps = torch.arange(0, self.head_dim, 4, device=device, dtype=torch.float32) / self.head_dim
        frequencies = self.temperature**-steps
        rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies
        columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies
        angles = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        return F.pad(angles.flatten(0, 1), (0, 0, prefix, 0))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns each pair ``(x[i], x[i + head_dim / 2])`` by its angle.

    Shape: ``(batch, tokens, heads, head_dim)`` and ``(tokens, head_dim / 2)`` or ``(batch, tokens, head_dim / 2)``.
    """
    angles = angles[..., None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
