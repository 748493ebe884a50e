"""Convolution and normalisation in reading order: a cell never sees one after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.depthwise import depthwise_conv2d
from ..ops.grn import energy, respond
from .convnext import ConvNeXtBlock
from .grid import grid_to_nchw, nchw_to_grid, pair
from .grn import GRN


class CausalDepthwiseConv(nn.Module):
    """A depthwise convolution masked in reading order: the rows of the kernel above the cell, and of the cell's own
    row what lies left of it and itself (PixelCNN, van den Oord et al. 2016, https://arxiv.org/abs/1601.06759).

    The rows are one line of tokens that is folded, so the kernel reads on where a row ends: left of a row's first cell
    is the last one of the row above. Without that, PixelCNN's blind spot would hide the newest tokens from the first
    cells of a row.

    Args:
        dim: channels.
        kernel_size: side of the whole kernel, odd, or (height, width); its lower half is masked.
        bias: whether a bias is added.

    Shape: ``(batch, height, width, dim)`` to the same. ``weight`` is ``(dim, taps)``, the taps in reading order; a
    masked tap has no parameter.
    """

    def __init__(self, dim: int, kernel_size: int | tuple[int, int] = 7, *, bias: bool = True) -> None:
        super().__init__()
        height, width = pair(kernel_size)
        if height % 2 == 0 or width % 2 == 0:
            raise ConfigError(f"kernel_size: found {kernel_size}; a causal kernel has odd sides")
        self.rows, self.reach = height // 2, width // 2
        self.weight = nn.Parameter(torch.empty(dim, self.rows * width + self.reach + 1))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's convolutions: uniform within ``1 / sqrt(taps)``."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, grid: Tensor) -> Tensor:
        width, dim = grid.shape[2:]
        line = F.pad(grid.flatten(1, 2), (0, 0, self.before(width), self.reach))
        rows = line.unfold(1, width + 2 * self.reach, width).movedim(2, 3)  # each with its neighbours' ends
        kernel = F.pad(self.weight, (0, self.reach)).view(dim, 1, self.rows + 1, 2 * self.reach + 1)
        image = grid_to_nchw(rows.contiguous())
        return nchw_to_grid(depthwise_conv2d(image, kernel, self.bias, padding=0))

    def before(self, width: int) -> int:
        """How many tokens before a cell the kernel reaches back, on a grid of this width."""
        return self.rows * width + self.reach

    def taps(self, width: int) -> Tensor:
        """Where the taps are in the newest ``before(width) + 1`` cells of a grid of this width."""
        starts = torch.arange(self.rows + 1, device=self.weight.device)[:, None] * width
        columns = torch.arange(2 * self.reach + 1, device=self.weight.device)
        return (starts + columns).flatten()[: self.weight.shape[1]]

    def step(self, history: Tensor, taps: Tensor) -> Tensor:
        """One cell's output.

        Args:
            history: ``(batch, before(width) + 1, dim)``, the newest cells, oldest first, with zeros before the first.
            taps: from `taps`.

        Returns:
            ``(batch, dim)``.
        """
        mixed = torch.einsum("btd,dt->bd", history[:, taps], self.weight)
        return mixed if self.bias is None else mixed + self.bias


class CausalGRN(GRN):
    """`GRN` whose strengths in a row are norms over the rows above it; in the first row all channels are equally
    strong.

    A strength of its own for each cell would cost more passes over the wide tensor than the rest of the block.

    Shape: ``(batch, height, width, dim)`` to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        above = energy(x, 2).cumsum(1)[:, :-1]
        return self.respond(x, F.pad(above, (0, 0, 1, 0))[:, :, None])

    def respond(self, x: Tensor, above: Tensor) -> Tensor:
        """Cells, ``(batch, …, dim)``, by the sums of squares in the rows above them."""
        strength = (above + 1e-6).sqrt()  # what every channel starts from
        return respond(x, strength, self.weight, self.bias, self.eps)


class BlockCache(NamedTuple):
    """What `CausalConvNeXtBlock.step` needs of the cells so far.

    Attributes:
        history: ``(batch, cells that the kernel reaches back, dim)``, the newest inputs.
        above: ``(batch, hidden)``, sums of squares in the rows above.
        row: ``(batch, hidden)``, in the newest row so far.
    """

    history: Tensor
    above: Tensor
    row: Tensor


class CausalConvNeXtBlock(ConvNeXtBlock):
    """V2's `ConvNeXtBlock` in reading order.

    `start` and `step`, for evaluation, run it cell by cell, with a cache that does not grow.

    Args: as `ConvNeXtBlock`.

    Shape: ``(batch, height, width, dim)`` to the same.
    """

    Depthwise = CausalDepthwiseConv
    Response = CausalGRN
    depthwise: CausalDepthwiseConv
    grn: CausalGRN

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int] = 7,
        *,
        ratio: float = 4.0,
        norm: Mapping[str, Any] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(dim, kernel_size, ratio=ratio, norm=norm, drop_path=drop_path)

    def start(self, grid: Tensor, count: int) -> tuple[Tensor, BlockCache]:
        """What `forward` gives, and the cache after the first `count` cells."""
        width = grid.shape[2]
        hidden = self.act(self.fc1(self.norm(self.depthwise(grid))))
        before = self.depthwise.before(width)
        row, column = divmod(count - 1, width)
        cache = BlockCache(
            F.pad(grid.flatten(1, 2)[:, :count], (0, 0, before, 0))[:, count:],
            energy(hidden[:, :row], (1, 2)),
            energy(hidden[:, row, : column + 1], 1),
        )
        return grid + self.fc2(self.grn(hidden)), cache

    def step(self, x: Tensor, cache: BlockCache, taps: Tensor, new_row: bool) -> tuple[Tensor, BlockCache]:
        """The next cell ``(batch, dim)``, which may begin a row, and the cache after it; `taps`: the convolution's."""
        history, above, row = cache
        if new_row:
            above, row = above + row, torch.zeros_like(row)
        history = torch.cat([history, x[:, None]], dim=1)
        hidden = self.act(self.fc1(self.norm(self.depthwise.step(history, taps))))
        x = x + self.fc2(self.grn.respond(hidden, above))
        return x, BlockCache(history[:, 1:], above, row + energy(hidden[:, None], 1))
