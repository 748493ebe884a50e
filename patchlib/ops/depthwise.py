"""Depthwise convolution whose gradients are as fast as its forward.

The forward on the CPU stays torch's convolution, so that export, quantisers and operation counters see one. What is
slow in torch is the backward; it is written here as forwards:

- The input gradient of a stride-1 convolution is a convolution of the output gradient with the flipped kernels.
- The weight gradient correlates each sample's channel with its own output gradient, and adds over the batch. So it is
  *one* depthwise convolution over ``batch * channels`` channels, whose kernels are the output gradients themselves.

Which of the two ways computes what is chosen by `RULES`, a table with the measurements that made it. CUDA kernels are
in `depthwise_triton`, which is imported when a rule first asks for it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from ..errors import InputError

Size = int | Sequence[int]


class Route(NamedTuple):
    """Who computes the three parts of a convolution.

    Attributes:
        forward: ``"torch"``; ``"float32"``, torch in float32; or ``"triton"``.
        input_grad: ``"torch"``; ``"flip"``, a forward with flipped kernels; or ``"triton"``.
        weight_grad: ``"torch"``; ``"batch"``, one forward over ``batch * channels`` channels; or ``"triton"``.
    """

    forward: str = "torch"
    input_grad: str = "torch"
    weight_grad: str = "torch"


class Rule(NamedTuple):
    """A class of shapes and its route: kernels whose area lies between the two, inputs of at least `elements`."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    area: tuple[int, int]
    elements: int
    route: Route


TORCH = Route()
FLIP = Route(input_grad="flip")
BATCH = Route(input_grad="flip", weight_grad="batch")
TRITON = Route("triton", "triton", "triton")

RULES = (
    Rule("cpu", (torch.float32, torch.bfloat16), (12, 4096), 1 << 14, BATCH),
    Rule("cpu", (torch.float32, torch.bfloat16), (1, 11), 1 << 14, FLIP),
    Rule("cpu", (torch.float16,), (1, 4096), 0, Route("float32")),
)
"""The first rule that fits decides; where none does, torch computes everything."""

_CHUNK = 1 << 18  # elements a thread: what a chunk's temporaries need stays in the cache
_DIRECT_PADDING = 4  # the widest zero border that oneDNN's direct kernel takes on AVX2 (6 on AVX-512)
_PLAIN = (Tensor, torch.nn.Parameter)


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
    """Convolves each channel with a kernel of its own; `depthwise_conv2d_reference` in plain torch.

    Differentiable as torch's convolution is: twice, in forward mode, under `torch.func` and `vmap`, `torch.compile`
    and autocast.

    Args:
        x: ``(batch, channels, height, width)``, in either memory format; the result has the same.
        weight: ``(channels, 1, kernel height, kernel width)``.
        bias: ``(channels,)``.
        stride: step between outputs, one number or (vertical, horizontal).
        padding: rows and columns of zeros on each side, one number or (vertical, horizontal), or ``"same"``: as many
            as keep height and width, an even kernel's odd one at the bottom and right. ``"same"`` needs stride 1.
        dilation: distance between a kernel's taps, one number or (vertical, horizontal).
        route: who computes what, instead of what `RULES` says.

    Returns:
        ``(batch, channels, height', width')``.

    Raises:
        InputError: the shapes do not fit each other, or `padding` is neither ``"same"`` nor numbers.
    """
    _check(x, weight)
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "same":
        if stride != (1, 1):
            raise InputError(f"padding 'same' needs stride 1, not {stride}; give the padding as numbers")
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if total[0] % 2 or total[1] % 2:
            x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
        pads = (total[0] // 2, total[1] // 2)
    else:
        pads = _pair("padding", padding)
    if route is None:
        route = choose_route(x, weight, stride, pads, dilation)

    if route.forward == "float32":
        wide = depthwise_conv2d(x.float(), weight.float(), None if bias is None else bias.float(), stride, pads, dilation)
        return wide.half()
    if route == TORCH:
        return F.conv2d(x, weight, bias, stride, pads, dilation, weight.shape[0])
    x, weight, bias = _autocast(x, weight, bias)
    if route.forward == "triton":
        return _forward_op(x, weight, bias, pads)
    if _differentiates(x, weight):
        return _Depthwise.apply(x, weight, bias, pads, route.input_grad, route.weight_grad)
    return F.conv2d(x, weight, bias, 1, pads, 1, weight.shape[0])
