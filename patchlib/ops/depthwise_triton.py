# Triton compiles tuples joined by +, not unpacked ones, and their length is none of mypy's business.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Depthwise convolution in Triton, for channels_last tensors with stride 1 on CUDA.

At 7x7 in half precision the arithmetic (98 operations an output) takes about as long as the memory traffic (4 bytes),
so both kernels are made for few instructions beside the multiply-adds:

- Lanes run over channels, with 16-byte loads. A thread holds a strip of `cols` neighbouring outputs in registers, and
  uses each input that it loads for all of the up to `kernel width` outputs that it belongs to.
- The weight gradient holds, for a block of channels, all taps of some kernel rows in registers, and walks down a strip
  of the image. Programs share out strips and samples; each writes one partial sum, and a second pass adds these in a
  fixed order, so that there are no atomics and every run gives the same bits.

Half precision accumulates in float32. Nothing is tuned at run time: tiles come from `FORWARD` and `WEIGHT_GRAD`.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What one program computes.

    Attributes:
        cols: neighbouring outputs of one thread, at most; fewer where that suits the width better.
        block: channels, a power of two, at most; the largest that divides the channels is taken.
        lanes: channels of one thread.
        warps: of 32 threads.
    """

    cols: int
    block: int
    lanes: int
    warps: int


# by bytes of an element
FORWARD = {2: Tile(8, 64, 8, 4), 4: Tile(8, 64, 4, 4)}
WEIGHT_GRAD = {2: Tile(8, 64, 8, 2), 4: Tile(8, 64, 4, 4)}
PROGRAMS = 1024  # of the weight gradient: enough to fill a GPU of 132 multiprocessors, few partial sums


_RUNTIME = ["height", "width", "out_height", "out_width", "pad_down", "pad_across"]  # one compilation for all sizes


@triton.jit(do_not_specialize=["lines", *_RUNTIME])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    lines,
    height,
    width,
    out_height,
    out_width,
    channels,
    pad_down,
    pad_across,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    blocks = tl.cdiv(channels, block)
    strips = tl.cdiv(out_width, cols)
    program = tl.program_id(0)
    left = (program // blocks) % strips * cols
    line = program // blocks // strips * rows + tl.arange(0, rows)[:, None]
    # every operand has the shape (rows, block), and so the same layout: no exchange through shared memory
    zero = tl.zeros((rows, block), tl.int32)
    channel = zero + (program % blocks) * block + tl.arange(0, block)[None, :]
    first = zero + left - pad_across
    known = channel < channels
    inside = known & (line < lines)
    top = line % out_height - pad_down
    sample = line // out_height
    if wide:
        line = line.to(tl.int64)
        sample = sample.to(tl.int64)
    x_at = x_ptr + ((sample * height + top) * width + left - pad_across) * channels + channel

    start = tl.zeros((rows, block), tl.float32)
    if bias_ptr is not None:
        start = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    sums = (start,)
    for _ in tl.static_range(cols - 1):
        sums = sums + (start,)

    for i in range(kernel_height):
        seen = inside & (top + i >= 0) & (top + i < height)
        taps = ()
        for j in tl.static_range(kernel_width):
            at = weight_ptr + (i * kernel_width + j) * channels + channel
            taps = taps + (tl.load(at, mask=known, other=0.0).to(tl.float32),)
        for s in tl.static_range(cols + kernel_width - 1):
            mask = seen & (first + s >= 0) & (first + s < width)
            value = tl.load(x_at + (i * width + s) * channels, mask=mask, other=0.0).to(tl.float32)
            for j in tl.static_range(kernel_width):
                if s - j >= 0 and s - j < cols:
                    sums = sums[: s - j] + (tl.fma(value, taps[j], sums[s - j]),) + sums[s - j + 1 :]

    y_at = y_ptr + (line * out_width + left) * channels + channel
    for t in tl.static_range(cols):
        y = sums[t]
        if scale_ptr is not None:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
            scale = tl.load(scale_ptr + channel, mask=known, other=0.0).to(tl.float32)
            y = tl.fma(y, scale, tl.load(shift_ptr + channel, mask=known, other=0.0).to(tl.float32))
        tl.store(y_at + t * channels, y.to(y_ptr.dtype.element_ty), mask=inside & (first + t < out_width - pad_across))


@triton.jit(do_not_specialize=["units", "splits", *_RUNTIME])
def _weight_grad_kernel(
    grad_ptr,
    x_ptr,
    part_ptr,
    units,
    splits,
    height,
    width,
    out_height,
    out_width,
    channels,
    pad_down,
    pad_across,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    blocks = tl.cdiv(channels, block)
    strips = tl.cdiv(out_width, cols)
    groups: tl.constexpr = (kernel_height + rows - 1) // rows
    program = tl.program_id(0)
    split = program // blocks // groups
    zero = tl.zeros((rows, block), tl.int32)
    channel = zero + (program % blocks) * block + tl.arange(0, block)[None, :]
    i = program // blocks % groups * rows + tl.arange(0, rows)[:, None]
    inside = (channel < channels) & (i < kernel_height)

    sums = (tl.zeros((rows, block), tl.float32),)
    for _ in tl.static_range(kernel_width - 1):
        sums = sums + (tl.zeros((rows, block), tl.float32),)

    for unit in range(split, units, splits):
        sample = unit // strips
        left = unit % strips * cols
        first = zero + left - pad_across
        if wide:
            sample = sample.to(tl.int64)
        x_at = x_ptr + ((sample * height + i - pad_down) * width + left - pad_across) * channels + channel
        grad_at = grad_ptr + (sample * out_height * out_width + left) * channels + channel
        for row in range(out_height):
            seen = inside & (row + i - pad_down >= 0) & (row + i - pad_down < height)
            grads = ()
            for t in tl.static_range(cols):
                mask = inside & (first + t < out_width - pad_across)
                at = grad_at + (row * out_width + t) * channels
                grads = grads + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
            for s in tl.static_range(cols + kernel_width - 1):
                mask = seen & (first + s >= 0) & (first + s < width)
                value = tl.load(x_at + (row * width + s) * channels, mask=mask, other=0.0).to(tl.float32)
                for j in tl.static_range(kernel_width):
                    if s - j >= 0 and s - j < cols:
                        sums = sums[:j] + (tl.fma(value, grads[s - j], sums[j]),) + sums[j + 1 :]

    part_at = part_ptr + (split * kernel_height + i) * kernel_width * channels + channel
    for j in tl.static_range(kernel_width):
        tl.store(part_at + j * channels, sums[j], mask=inside)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """A depthwise convolution with stride 1, and after it, if `affine` is given, ``gelu(y) * scale + shift``.

    Args:
        x: ``(batch, channels, height, width)``, float16, bfloat16 or float32; copied unless channels_last.
        weight: ``(channels, 1, kernel height, kernel width)``, in the dtype of `x`.
        bias: ``(channels,)``.
        padding: zeros at each side, down and across.
        affine: scale and shift, ``(channels,)``.
        tile: taken as it is; by default `FORWARD` has it.

    Returns:
        ``(batch, channels, new height, new width)``, channels_last.
    """
    batch, channels, height, width = x.shape
    kernel = weight.shape[2:]
    out_height, out_width = (n + 2 * p - k + 1 for n, p, k in zip((height, width), padding, kernel, strict=True))
    x = x.contiguous(memory_format=torch.channels_last)
    y = x.new_empty((batch, out_height, out_width, channels)).permute(0, 3, 1, 2)
    if tile is None:
        tile = _fitted(FORWARD[x.element_size()], channels, out_width, kernel[1])
    rows = 32 * tile.warps * tile.lanes // tile.block
    lines = batch * out_height
    programs = triton.cdiv(lines, rows) * triton.cdiv(out_width, tile.cols) * triton.cdiv(channels, tile.block)
    scale, shift = affine or (None, None)
    with _device(x):
        _forward_kernel[(programs,)](
            x,
            weight.reshape(channels, -1).t().contiguous(),
            bias,
            scale,
            shift,
            y,
            lines,
            height,
            width,
            out_height,
            out_width,
            channels,
            *padding,
            *kernel,
            rows,
            tile.cols,
            tile.block,
            max(x.numel(), y.numel()) >= 2**31,
            num_warps=tile.warps,
            num_stages=1,
        )
    return y


def weight_grad(
    grad: Tensor, x: Tensor, kernel_size: Sequence[int], padding: Sequence[int], *, tile: Tile | None = None
) -> Tensor:
    """The gradient for the kernels of a depthwise convolution with stride 1.

    Args:
        grad: the gradient for the output, ``(batch, channels, new height, new width)``, in the dtype of `x`.
        x: the input, ``(batch, channels, height, width)``; both are copied unless channels_last.
        kernel_size: down and across.
        padding: zeros at each side of the input, down and across.
        tile: taken as it is; by default `WEIGHT_GRAD` has it.

    Returns:
        ``(channels, 1, kernel height, kernel width)`` in the dtype of `x`.
    """
    batch, channels, height, width = x.shape
    out_height, out_width = grad.shape[2:]
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    if tile is None:
        tile = _fitted(WEIGHT_GRAD[x.element_size()], channels, out_width, kernel_size[1])
    rows = 32 * tile.warps * tile.lanes // tile.block
    units = batch * triton.cdiv(out_width, tile.cols)
    share = triton.cdiv(channels, tile.block) * triton.cdiv(kernel_size[0], rows)
    splits = min(units, triton.cdiv(PROGRAMS, share))
    parts = x.new_empty((splits, kernel_size[0] * kernel_size[1], channels), dtype=torch.float32)
    with _device(x):
        _weight_grad_kernel[(share * splits,)](
            grad,
            x,
            parts,
            units,
            splits,
            height,
            width,
            out_height,
            out_width,
            channels,
            *padding,
            *kernel_size,
            rows,
            tile.cols,
            tile.block,
            max(x.numel(), grad.numel()) >= 2**31,
            num_warps=tile.warps,
            num_stages=1,
        )
    return parts.sum(0).t().reshape(channels, 1, *kernel_size).to(x.dtype)


def _fitted(tile: Tile, channels: int, out_width: int, kernel_width: int) -> Tile:
    """`tile` with the strip that costs least over a row, and a block that divides the channels."""

    def cost(cols: int) -> int:
        loads = cols + 2 * kernel_width  # each about two instructions beside the multiply-adds
        return triton.cdiv(out_width, cols) * (cols * kernel_width + 2 * loads)

    block, warps = tile.block, tile.warps
    while channels % block and block > 16:
        block, warps = block // 2, max(1, warps // 2)
    return Tile(min(range(tile.cols, 0, -1), key=cost), block, tile.lanes, warps)


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The kernels' device; nothing for the CPU, where Triton's interpreter runs."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
