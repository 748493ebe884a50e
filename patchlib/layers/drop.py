"""Stochastic depth."""

from torch import Tensor, nn

from ..errors import ConfigError


class DropPath(nn.Module):
    """Zeroes a residual branch for whole samples, in training only (Huang et al. 2016,
    https://arxiv.org/abs/1603.09382). What remains is scaled up, so that the expectation stays.

    Args:
        p: probability that a sample's branch is dropped.

    Shape: ``(batch, …)`` to the same.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"drop_path: found {p}; allowed: from 0 to below 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = 1 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop_path_schedule(rate: float, depth: int) -> list[float]:
    """The rates of `depth` blocks, growing linearly from 0 to `rate`, as the paper has them."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]
