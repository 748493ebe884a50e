"""The linear layer of all blocks."""

from torch import Tensor, nn

from ..ops.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`, about twice as fast in float32 on AMD's processors with AVX-512, see `patchlib.ops.linear`.

    Shape: ``(*, in_features)`` to ``(*, out_features)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
