"""Learned scale of a residual branch."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """One learned factor a channel (Touvron et al. 2021, https://arxiv.org/abs/2103.17239).

    Args:
        dim: channels; ``dim=1`` scales all alike, and with ``init=0`` that is ReZero's scalar.
        init: start value.

    Shape: ``(batch, *positions, dim)`` to the same.
    """

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
