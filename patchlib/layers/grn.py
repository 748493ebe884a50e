"""Global response normalisation."""

import torch
from torch import Tensor, nn

from ..ops.grn import global_response_norm


class GRN(nn.Module):
    """Channels compete by their strength over the whole grid (ConvNeXt V2, Woo et al. 2023,
    https://arxiv.org/abs/2301.00808): ``gamma * x * (|x| / mean |x|) + beta + x``.

    Args:
        dim: channels.
        eps: added to the mean, against division by zero.

    Shape: ``(batch, *positions, dim)`` to the same.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return global_response_norm(x, self.weight, self.bias, self.eps)
