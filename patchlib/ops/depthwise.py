"""Depthwise convolution whose gradients are about as fast as its forward.

What is slow in torch is the backward, the weight gradient above all. Here both gradients are written as forwards:

- The input gradient of a convolution with stride 1 is a convolution of the output gradient with flipped kernels.
- The weight gradient correlates every channel of every sample with its own output gradient, then adds over the batch.
  So it is *one* depthwise convolution over ``batch * channels`` channels whose kernels are the output gradients.

The forward on the CPU stays torch's, so that export, quantisers and operation counters see a convolution. Who computes
what is decided by `RULES`, a table with the measurements that made it beside it. The kernels for CUDA are in
`depthwise_triton`, imported when a rule first asks for them.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..errors import InputError, require
from .plain import is_batch, needs_graph, plain, transformed

Size = int | Sequence[int]


class Route(NamedTuple):
    """Who computes the three parts of a depthwise convolution.

    Attributes:
        forward: ``"torch"``, or ``"float32"`` (torch, after a cast), or ``"triton"``.
        input_grad: ``"torch"``, or ``"flip"`` (a forward with flipped kernels), or ``"triton"``.
        weight_grad: ``"torch"``, or ``"batch"`` (one forward over ``batch * channels`` channels), or ``"triton"``.
    """

    forward: str = "torch"
    input_grad: str = "torch"
    weight_grad: str = "torch"


class Rule(NamedTuple):
    """A route, and when it is taken: on `device`, in one of `dtypes`, for kernels of at least `taps` taps over inputs
    of at least `elements` elements."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    taps: int
    elements: int
    route: Route


TORCH = Route()
BATCH = Route(input_grad="flip", weight_grad="batch")
TRITON = Route("triton", "triton", "triton")

# The first rule that fits decides; where none does, torch computes everything. Measured with torch 2.13 on 2 cores of
# an AMD EPYC (Zen 5, AVX-512, about 170 GFLOP/s in float32 matrix products), channels_last, by
# `python -m benchmarks.depthwise`. Rates in GFLOP/s, torch's own -> ours:
#
#   batch x channels, side, kernel    float32: forward, input, weight gradient    bfloat16
#   32 x 512, 12, 9                            133,  70 -> 111,  12 -> 120        207, 127 -> 208,  7 -> 110
#   8 x 768, 32, 7                             107, 100 -> 142,  10 ->  65        265, 147 -> 253,  7 ->  60
#   64 x 256, 16, 5                            158, 107 -> 155,  15 ->  58        205,  99 -> 193,  7 ->  50
#   16 x 96, 56, 7                             114,  99 -> 111,  18 ->  65        303, 154 -> 284, 13 ->  60
#   16 x 192, 28, 7                            162, 117 -> 179,  24 ->  90        283, 215 -> 263, 16 ->  80
#   16 x 384, 14, 7                            200, 116 -> 200,  25 ->  80        315, 195 -> 310, 13 ->  75
#   16 x 768, 7, 7                             212,  92 -> 203,  17 ->  80        210, 133 -> 206,  5 ->  75
#   16 x 256, 28, 3                             51,  38 ->  54,  35 ->  18 (torch has a kernel of its own for 3x3)
#   1 x 64, 16, 7                              a step takes as long either way; for less, calls cost more than they save
#
# float16 has no kernel on such a CPU: torch needs 100 times as long as in float32, casts included. On CUDA torch's own
# stays until the Triton kernels have been measured; a rule with `TRITON` switches them on.
RULES = (
    Rule("cpu", (torch.float32, torch.bfloat16), 16, 1 << 15, BATCH),
    Rule("cpu", (torch.float16,), 1, 0, Route("float32")),
)
_OTHER_FORWARDS = {(rule.device, d) for rule in RULES if rule.route.forward != "torch" for d in rule.dtypes}

_CHUNK = 1 << 19  # elements of a chunk for each thread: larger ones leave the cache, smaller ones cost calls
_DIRECT_PADDING = 4  # oneDNN's direct kernel takes no wider border: 4 on AVX2, 6 on AVX-512; past it, it is 20x slower


def depthwise_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = "same",
    dilation: Size = 1,
) -> Tensor:
    """What `depthwise_conv2d` computes, in plain torch."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, weight.shape[0])


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = "same",
    dilation: Size = 1,
    *,
    route: Route | None = None,
) -> Tensor:
    """Convolves each channel with a kernel of its own.

    Equal to `depthwise_conv2d_reference` up to rounding, and as differentiable: twice, forward mode, `torch.func`,
    `torch.compile`, autocast. Half precision accumulates in float32.

    Args:
        x: ``(batch, channels, height, width)`` in either memory format, which the result keeps.
        weight: ``(channels, 1, kernel height, kernel width)``.
        bias: ``(channels,)``.
        stride: steps between outputs, down and across (or one number for both, as below).
        padding: zeros at each side, down and across; or ``"same"``, which keeps height and width and puts an even
            kernel's odd zero at the bottom and right.
        dilation: distance between the taps of a kernel, down and across.
        route: who computes what; by default `RULES` decide. Strides and dilations are always torch's.

    Returns:
        ``(batch, channels, new height, new width)``.

    Raises:
        InputError: an argument has another shape, or ``"same"`` is asked for with a stride.
    """
    if torch.jit.is_tracing():
        return depthwise_conv2d_reference(x, weight, bias, stride, padding, dilation)
    _check(x, weight, bias)
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if padding == "same":
        if stride != (1, 1):
            raise InputError(f"padding='same' needs stride 1, found {stride}; give the padding as numbers")
        x, pads = _same(x, [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)])
    else:
        pads = _pair("padding", padding)
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if route is None:
        asked = differentiates or (x.device.type, _dtype(x)) in _OTHER_FORWARDS
        route = choose_route(x, weight, stride, pads, dilation) if asked else TORCH
    elif (stride, dilation) != ((1, 1), (1, 1)):
        route = TORCH

    if route.forward == "float32":
        wide = x.float(), weight.float(), None if bias is None else bias.float()
        with torch.autocast(x.device.type, enabled=False):
            y = depthwise_conv2d(*wide, stride, pads, dilation)
        return y.to(_dtype(x))
    if route.forward == "triton":
        return _conv2d(*_cast(x, weight, bias), pads)
    if differentiates and route != TORCH:
        return _Depthwise.apply(*_cast(x, weight, bias), pads, route.input_grad, route.weight_grad)
    return F.conv2d(x, weight, bias, stride, pads, dilation, weight.shape[0])


def choose_route(x: Tensor, weight: Tensor, stride: Size = 1, padding: Size = 0, dilation: Size = 1) -> Route:
    """The route that `RULES` give a convolution. It is torch's own for strides and dilations, for export, and wherever
    gradients may be asked for in a way that only torch's are written for: `torch.func`, forward mode, subclasses."""
    if transformed():  # first: a rule's limits would bind an exported dynamic batch
        return TORCH
    device, dtype, kernel, elements = x.device.type, _dtype(x), weight.shape[2:], x.numel()
    if all(device != rule.device for rule in RULES) or device != weight.device.type or elements == 0:
        return TORCH
    if _pair("stride", stride) != (1, 1) or _pair("dilation", dilation) != (1, 1):
        return TORCH
    if any(p >= k for p, k in zip(_pair("padding", padding), kernel, strict=True)):
        return TORCH
    if _dtype(weight) != dtype:
        return TORCH
    for rule in RULES:
        if rule.device == device and dtype in rule.dtypes and kernel.numel() >= rule.taps and elements >= rule.elements:
            return rule.route if plain(x, weight) else TORCH
    return TORCH


def depthwise_input_grad(grad: Tensor, weight: Tensor, padding: Size, *, route: Route | None = None) -> Tensor:
    """The gradient for the input of a depthwise convolution with stride 1.

    Args:
        grad: the gradient for the output, ``(batch, channels, new height, new width)``.
        weight: ``(channels, 1, kernel height, kernel width)``.
        padding: zeros at each side of the input, down and across.
        route: who computes; by default `RULES` decide.

    Returns:
        ``(batch, channels, height, width)`` in the memory format of `grad`.
    """
    channels, _, *kernel = weight.shape
    pads = _pair("padding", padding)
    way = (choose_route(grad, weight, 1, pads) if route is None else route).input_grad
    back = [k - 1 - p for k, p in zip(kernel, pads, strict=True)]
    if way == "torch" or min(back) < 0:
        size = [grad.shape[2 + i] + back[i] - pads[i] for i in (0, 1)]
        x = grad.new_empty((grad.shape[0], channels, *size)).to(memory_format=_format(grad))
        return _torch_backward(grad, x, weight, pads, (True, False))[0]
    if way == "triton" and not needs_graph(grad, weight):
        return _conv2d(grad, weight.flip(2, 3), None, back)
    return F.conv2d(grad, weight.flip(2, 3), None, 1, back, 1, channels)


def depthwise_weight_grad(
    grad: Tensor, x: Tensor, kernel_size: Size, padding: Size, *, route: Route | None = None
) -> Tensor:
    """The gradient for the kernels of a depthwise convolution with stride 1.

    Args:
        grad: the gradient for the output, ``(batch, channels, new height, new width)``.
        x: the input, ``(batch, channels, height, width)``.
        kernel_size: down and across.
        padding: zeros at each side of the input, down and across.
        route: who computes; by default `RULES` decide.

    Returns:
        ``(channels, 1, kernel height, kernel width)`` in the dtype of `x`.
    """
    kernel, pads = _pair("kernel_size", kernel_size), _pair("padding", padding)
    weight = x.new_empty((x.shape[1], 1, *kernel))
    way = (choose_route(x, weight, 1, pads) if route is None else route).weight_grad
    if way == "torch" or needs_graph(grad, x):
        return _torch_backward(grad, x, weight, pads, (False, True))[1]
    if way == "batch" and not torch.compiler.is_compiling():
        return _batch_weight_grad(grad, x, kernel, pads)
    return _weight_grad(grad, x, kernel, pads)


def depthwise_gelu_affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    padding: Size,
    *,
    route: Route | None = None,
) -> Tensor:
    """``gelu(depthwise_conv2d(x, weight, bias)) * scale + shift``, for inference: the front half of a ConvMixer block
    with its batch norm as an affine. On CUDA it is one kernel where `RULES` say so.

    Args:
        x: ``(batch, channels, height, width)``.
        weight: ``(channels, 1, kernel height, kernel width)``.
        bias, scale, shift: ``(channels,)``; `bias` may be None.
        padding: zeros at each side, down and across.
        route: who computes; by default `RULES` decide.

    Returns:
        ``(batch, channels, new height, new width)``.
    """
    pads = _pair("padding", padding)
    way = choose_route(x, weight, 1, pads) if route is None else route
    if way.forward == "triton" and not torch.is_grad_enabled():
        return _gelu_affine(x, weight, bias, scale, shift, pads)
    y = F.gelu(depthwise_conv2d(x, weight, bias, 1, pads, route=way))
    return y * scale[:, None, None] + shift[:, None, None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *options = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
    ctx.format, ctx.options = _format(x), options


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    pads, *ways = ctx.options
    route = Route("torch", *ways) if ways else TRITON
    into_x = into_weight = into_bias = None
    with torch.autocast(grad.device.type, enabled=False):
        if not is_batch(grad):
            grad = grad.contiguous(memory_format=ctx.format)
        if ctx.needs_input_grad[0]:
            into_x = depthwise_input_grad(grad, weight, pads, route=route)
        if ctx.needs_input_grad[1]:
            into_weight = depthwise_weight_grad(grad, x, weight.shape[2:], pads, route=route)
        if ctx.needs_input_grad[2]:
            into_bias = grad.sum((0, 2, 3))
    return into_x, into_weight, into_bias, None, *(None for _ in ways)


class _Depthwise(torch.autograd.Function):
    """torch's forward with the gradients of this file."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, pads: Sequence[int], *ways: str) -> Tensor:
        return F.conv2d(x, weight, bias, 1, pads, 1, weight.shape[0])

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


def _batch_weight_grad(grad: Tensor, x: Tensor, kernel: Sequence[int], pads: Sequence[int]) -> Tensor:
    batch, channels = x.shape[:2]
    work = torch.promote_types(x.dtype, torch.float32)
    border = [0, 0, 0, 0]
    if max(pads) > _DIRECT_PADDING:
        border, pads = [pads[1], pads[1], pads[0], pads[0]], (0, 0)
    chunks = math.ceil(x.numel() / (_CHUNK * torch.get_num_threads()))
    size = math.ceil(batch / max(1, chunks))
    total = x.new_zeros((channels, *kernel), dtype=work)
    with torch.autocast(x.device.type, enabled=False):
        for images, kernels in zip(x.split(size), grad.split(size), strict=True):
            images = F.pad(images.to(work), border) if any(border) else images.to(work)
            images = _planes(images).flatten(0, 1)[None]
            kernels = _planes(kernels.to(work)).flatten(0, 1)[:, None]
            part = F.conv2d(images, kernels, None, 1, pads, 1, len(kernels))
            total += part.view(-1, channels, *kernel).sum(0)
    return total[:, None].to(x.dtype)


def _planes(x: Tensor) -> Tensor:
    """`x` in the contiguous format."""
    if x.is_contiguous() or x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    # torch transposes with vector instructions only in channel_shuffle on channels_last, four times as fast as a copy
    batch, channels, height, width = x.shape
    if batch < torch.get_num_threads():  # it shares out matrices, not parts of one: one for each row, rows then moved
        rows = _transpose(x.permute(0, 2, 3, 1).reshape(batch * height, width, channels))
        return rows.view(batch, height, channels, width).transpose(1, 2).contiguous()
    return _transpose(x.permute(0, 2, 3, 1).view(batch, height * width, channels)).view(x.shape)


def _transpose(matrices: Tensor) -> Tensor:
    """``(n, rows, columns)`` to ``(n, columns, rows)``, both contiguous."""
    n, rows, columns = matrices.shape
    lanes = matrices.view(1, n, 1, rows * columns).permute(0, 3, 1, 2)
    return F.channel_shuffle(lanes, rows).permute(0, 2, 3, 1).reshape(n, columns, rows)


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pads: Sequence[int], mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    steps, none = (1, 1), (0, 0)
    into_x, into_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, steps, pads, steps, False, none, weight.shape[0], (*mask, False)
    )
    return into_x, into_weight


@torch.library.custom_op(
    "patchlib::depthwise_weight_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, SymInt[] kernel_size, SymInt[] padding) -> Tensor",
)
def _weight_grad(grad: Tensor, x: Tensor, kernel_size: Sequence[int], padding: Sequence[int]) -> Tensor:
    if x.device.type == "cpu":
        return _batch_weight_grad(grad, x, kernel_size, padding)
    return _triton().weight_grad(grad, x, kernel_size, padding)


@torch.library.custom_op(
    "patchlib::depthwise_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, SymInt[] padding) -> Tensor",
)
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    return _triton().forward(x, weight, bias, padding)


@torch.library.custom_op(
    "patchlib::depthwise_gelu_affine",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor shift, SymInt[] padding) -> Tensor",
)
def _gelu_affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, padding: Sequence[int]
) -> Tensor:
    return _triton().forward(x, weight, bias, padding, affine=(scale, shift))


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, kernel_size: Sequence[int], padding: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[1], 1, *kernel_size))


def _like_output(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    size = [x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i] + 1 for i in (0, 1)]
    return x.new_empty((*x.shape[:2], *size)).to(memory_format=torch.channels_last)


_conv2d.register_fake(lambda x, weight, bias, padding: _like_output(x, weight, padding))
_gelu_affine.register_fake(lambda x, weight, bias, scale, shift, padding: _like_output(x, weight, padding))
_conv2d.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.patchlib.depthwise_weight_grad)
def _weight_grad_flops(grad: list[int], x: list[int], kernel_size: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(grad) * math.prod(kernel_size)


@register_flop_formula([torch.ops.patchlib.depthwise_conv2d, torch.ops.patchlib.depthwise_gelu_affine])
def _conv2d_flops(x: list[int], weight: list[int], *args: Any, out_shape: list[int], **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[2:])


def _triton() -> Any:
    require("triton", "dev")
    return import_module(".depthwise_triton", __package__)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise InputError(f"x has shape {tuple(x.shape)}; it must be (batch, channels, height, width)")
    if weight.dim() != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}; for {x.shape[1]} channels it must be "
            f"({x.shape[1]}, 1, kernel height, kernel width)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias has shape {tuple(bias.shape)}; it must be ({x.shape[1]},)")


def _pair(name: str, value: str | Size) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, str) or len(value) != 2:
        also = ", or 'same'" if name == "padding" else ""
        raise InputError(f"{name}={value!r}; it must be a number or a pair (down, across){also}")
    return value[0], value[1]


def _same(x: Tensor, total: list[int]) -> tuple[Tensor, tuple[int, int]]:
    """`x` with the odd zeros that an even kernel needs, and the padding for each side that remains."""
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of `x` is computed in, autocast or not."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _cast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as autocast does, beforehand: what is saved for backward is then what was convolved."""
    return [None if t is None else t.to(_dtype(t)) for t in tensors]


def _format(x: Tensor) -> torch.memory_format:
    last = not is_batch(x) and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
