"""From patches to classes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..registry import build_block


class Head(nn.Module):
    """Pooling, dropout, classifier.

    Args:
        dim: length of a patch's vector.
        num_classes: 0 leaves the pooled vector as it is.
        pool: kind and options of the pooling.
        norm: kind and options of a norm between pooling and classifier, None for none.
        drop: probability of dropout before the classifier.

    Shape: ``(batch, *positions, dim)`` to ``(batch, num_classes)``.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        pool: Mapping[str, Any],
        norm: Mapping[str, Any] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.pool = build_block("pool", pool, dim=dim)
        self.norm = nn.Identity() if norm is None else build_block("norm", norm, dim)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, prefix: int = 0, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(self.pool(x, prefix)))
        return x if pre_logits else self.fc(x)
