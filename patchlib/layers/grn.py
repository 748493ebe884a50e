"""Global response normalisation."""

import torch
from torch import Tensor, nn


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
        positions = tuple(range(1, x.dim() - 1))
        strength = torch.linalg.vector_norm(x, dim=positions, keepdim=True)
        response = strength / (strength.mean(dim=-1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias, self.weight * response, x)
