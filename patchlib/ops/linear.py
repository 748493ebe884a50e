"""Matrix products in float32 on processors for which torch asks the slower of its two libraries.

On x86 torch gives them to MKL, which on AMD's processors with AVX-512 reaches half of what oneDNN does, the library
that torch carries for convolutions and for bfloat16. Here oneDNN computes a linear layer and both of its gradients.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .plain import needs_graph, plain

# Multiplications from which on oneDNN is asked, since a call of it costs more. Measured with torch 2.13 on one core of
# an AMD EPYC (Zen 5, AVX-512), GFLOP/s of MKL -> oneDNN, the best of six (on two cores the ratios are the same):
#
#   rows, inputs, outputs    forward       input gradient    weight gradient
#   12544,   96,   384        56 -> 214      80 -> 188         84 -> 170
#   12544,  384,    96        80 -> 186      85 -> 193         86 -> 156
#     784,  384,  1536        98 -> 215      96 -> 220         95 -> 202
#     196, 3072,   768        95 -> 210      95 -> 203         95 -> 208
#    4096,  768,   768        98 -> 202      97 -> 203         95 -> 170
#      64,  768,   768        84 -> 185      88 -> 185         93 -> 175
#      16,  192,   768        70 ->  73      76 ->  98         78 ->  74
#       1,  768,   768        25 ->  20      31 ->  20         21 ->  18
LEAST = 1 << 22
ROWS = 32  # and rows, for the same reason
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: `torch.nn.functional.linear`, up to rounding, and as differentiable.

    Args:
        x: ``(*, inputs)``.
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``.

    Returns:
        ``(*, outputs)``.
    """
    if not _prefers_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return (_Linear.apply if trained else _Linear.forward)(x, weight, bias)


def _prefers_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not FASTER or x.dtype != torch.float32 or x.device.type != "cpu" or torch.jit.is_tracing():
        return False
    if x.dim() < 2 or weight.dim() != 2:
        return False
    # not for compiled code, which limits would bind to a range of batches
    if not torch.compiler.is_compiling() and (x.numel() < ROWS * x.shape[-1] or x.numel() * weight.shape[0] < LEAST):
        return False
    if weight.dtype != torch.float32 or x.shape[-1] != weight.shape[1] or torch.is_autocast_enabled("cpu"):
        return False
    return plain(x, weight) if bias is None else plain(x, weight, bias)


def _is_measured_kind() -> bool:
    """Whether this is the kind of machine that was measured, an AMD processor with AVX-512, and torch has oneDNN's
    product."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        with open("/proc/cpuinfo") as file:
            vendor = file.read(200)
        one = torch.ones(1, 1)
        return "AuthenticAMD" in vendor and _product(one, one).item() == 1
    except (OSError, RuntimeError, AttributeError, TypeError):
        return False


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` by oneDNN, of matrices in any layout."""
    if torch.compiler.is_compiling():
        return _opaque_product(a, b, bias)
    bias = None if bias is None else bias.contiguous()  # of another it would read what is no bias
    return _ONEDNN(a, b, bias, "none", [], "")


@torch.library.custom_op(
    "patchlib::linear", mutates_args=(), schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor", device_types="cpu"
)
def _opaque_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`_product` for Inductor, which would take the inner operation for one with a constant weight."""
    return _product(a, b, bias)


_opaque_product.register_fake(lambda a, b, bias: a.new_empty(a.shape[0], b.shape[0]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        into_x, into_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if into_weight else None, weight if into_x else None, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        product: Any = F.linear if needs_graph(grad, *(t for t in (x, weight) if t is not None)) else _product
        rows = grad.reshape(-1, grad.shape[-1])
        into_x = into_weight = into_bias = None
        if weight is not None:
            into_x = product(rows, weight.t()).reshape(*grad.shape[:-1], weight.shape[1])
        if x is not None:
            columns = x.flatten(0, -2).t()
            tall = len(columns) > rows.shape[1]  # oneDNN is the faster the fewer rows its result has
            into_weight = product(rows.t(), columns) if tall else product(columns, rows.t()).t()
        if bias is not None and ctx.needs_input_grad[2]:
            into_bias = rows.sum(0)
        return into_x, into_weight, into_bias


FASTER = _is_measured_kind()


@register_flop_formula([torch.ops.patchlib.linear, *filter(None, [_ONEDNN])])
def _flops(a: list[int], b: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[0]
