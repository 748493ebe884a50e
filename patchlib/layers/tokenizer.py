"""Images to tokens in one step."""

import torch
from torch import Tensor, nn

from .patch_embed import PatchEmbed
from .pos_embed import SinusoidalPE


class ImageTokenizer(nn.Module):
    """Linear patches, a class token in front, sinusoidal positions over all of them: what a transformer reads.

    The class token is position 0; patches follow in reading order.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: channels of the images.
        dim: length of a token; even.
        remainder: as in `PatchEmbed`.

    Shape: ``(batch, in_chans, height, width)`` to ``(batch, 1 + patches, dim)``.
    """

    def __init__(
        self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, dim: int = 768, *, remainder: str = "error"
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim, "linear", remainder=remainder)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = SinusoidalPE(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(1, 2)
        return self.pos_embed(torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1))
