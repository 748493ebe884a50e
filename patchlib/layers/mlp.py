"""The feed-forward half of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .linear import Linear


class MLP(nn.Module):
    """Linear, GELU, linear, on each position alone.

    Args:
        dim: length of a token.
        ratio: width of the hidden layer, in multiples of `dim`.
        approximate: GELU's form: ``"none"`` (exact) or ``"tanh"``.
        drop: probability of dropout after each linear layer.

    Shape: ``(batch, *positions, dim)`` to the same.
    """

    def __init__(self, dim: int, *, ratio: float = 4.0, approximate: str = "none", drop: float = 0.0) -> None:
        super().__init__()
        hidden = hidden_size(dim, ratio)
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLU(nn.Module):
    """The gated form ``fc2(silu(gate) * value)`` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args: as `MLP`; the default ratio of 8/3 keeps its number of parameters.

    Shape: ``(batch, *positions, dim)`` to the same.
    """

    def __init__(self, dim: int, *, ratio: float = 8 / 3, drop: float = 0.0) -> None:
        super().__init__()
        hidden = hidden_size(dim, ratio)
        self.fc1 = Linear(dim, 2 * hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.silu(gate) * value)))


def hidden_size(dim: int, ratio: float) -> int:
    """Width of a hidden layer, `ratio` times `dim`, rounded down.

    Raises:
        ConfigError: nothing would be left.
    """
    if not isinstance(ratio, (int, float)) or not 1 <= dim * ratio < float("inf"):
        raise ConfigError(f"ratio: found {ratio!r}; allowed: a number from 1 / dim = 1 / {dim}")
    return int(dim * ratio + 1e-3)  # a ratio may be a rounded quotient, such as 48 / 11
