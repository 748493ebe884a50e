"""Global response normalisation with a backward that reads and writes the wide tensors half as often as autograd's."""

from typing import Any

import torch
from torch import Tensor

from .plain import needs_graph, plain


def global_response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """``weight * x * (|x| / mean |x|) + bias + x`` (ConvNeXt V2, Woo et al. 2023, https://arxiv.org/abs/2301.00808).

    Equal to `global_response_norm_reference`, gradients too, up to rounding.

    Args:
        x: ``(batch, *positions, channels)``. The norm ``|x|`` of each channel is over the positions, the mean of the
            norms over the channels.
        weight, bias: ``(channels,)``.
        eps: added to the mean, against division by zero.

    Returns:
        The shape and dtype of `x`.
    """
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling() and plain(x, weight, bias):
        return _GRN.apply(x, weight, bias, eps)[0]
    return global_response_norm_reference(x, weight, bias, eps)


def global_response_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """What `global_response_norm` computes, with autograd's gradients."""
    return respond(x, _norm(energy(x, _positions(x), keepdim=True), eps), weight, bias, eps)


def energy(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Sums of squares, at least in float32; on the CPU several times as fast as torch's `vector_norm`."""
    x = x.float() if x.dtype == torch.float16 else x  # squares of 256 and more overflow it
    return x.square().sum(dim, keepdim=keepdim, dtype=torch.promote_types(x.dtype, torch.float32))


def respond(x: Tensor, strength: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Each channel scaled by its strength, ``(batch, …, channels)``, among the channels, plus what came in."""
    factor = 1 + weight * (strength / (strength.mean(dim=-1, keepdim=True) + eps))
    return torch.addcmul(bias.to(x.dtype), factor.to(x.dtype), x)  # one pass over the wide tensor


def _positions(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim() - 1))


def _norm(total: Tensor, eps: float) -> Tensor:
    """The bound keeps the gradient finite where a channel is zero throughout."""
    return total.clamp_min(eps**2).sqrt()


class _GRN(torch.autograd.Function):
    """``(output, sums of squares)``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = energy(x, _positions(x), keepdim=True)
        return respond(x, _norm(total, eps), weight, bias, eps), total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, total = ctx.saved_tensors
        if needs_graph(grad, x, weight, bias):
            wanted = [t for t in (x, weight, bias) if t.requires_grad]
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                y = global_response_norm_reference(x, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
            return *(next(found) if t.requires_grad else None for t in (x, weight, bias)), None
        norm = _norm(total, ctx.eps)
        inverse = 1 / (norm.mean(dim=-1, keepdim=True) + ctx.eps)
        wide = grad * x
        into_factor = wide.sum(_positions(x), keepdim=True, dtype=total.dtype)  # the factor is 1 + weight * share
        into_share = into_factor * weight
        into_norm = inverse * (into_share - (into_share * norm).mean(dim=-1, keepdim=True) * inverse)
        pull = (into_norm / norm).where(total >= ctx.eps**2, 0)  # d|x| / dx = x / |x|
        factor = 1 + weight * (norm * inverse)
        torch.mul(grad, factor.to(x.dtype), out=wide).addcmul_(x, pull.to(x.dtype))
        into_weight = (into_factor * norm * inverse).flatten(0, -2).sum(0).to(weight.dtype)
        into_bias = grad.flatten(0, -2).sum(0, dtype=total.dtype).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return wide, into_weight, into_bias, None
