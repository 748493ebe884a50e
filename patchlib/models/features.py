"""Feature maps of a model's single steps."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from .base import ImageModel


class FeatureInfo(list):
    """A list of ``{"num_chs", "reduction", "module"}``, one entry a feature map, with timm's accessors."""

    def channels(self) -> list[int]:
        return [entry["num_chs"] for entry in self]

    def reduction(self) -> list[int]:
        return [entry["reduction"] for entry in self]

    def module_name(self) -> list[str]:
        return [entry["module"] for entry in self]


def take_indices(steps: int, indices: int | Iterable[int] | None) -> list[int]:
    """Which of `steps` outputs are meant: a list, the last ``n``, or all; in the given order.

    Raises:
        InputError: one lies outside, or there is none.
    """
    if isinstance(indices, int):
        if not 1 <= indices <= steps:
            raise InputError(f"indices: found {indices}; allowed: 1 to {steps}, the number of last steps, or a list")
        return list(range(steps - indices, steps))
    chosen = list(range(steps) if indices is None else indices)
    if not chosen:
        raise InputError(f"indices: found none; allowed: {-steps} to {steps - 1} (there are {steps} steps)")
    for i in chosen:
        if not -steps <= i < steps:
            raise InputError(f"indices: found {i}; allowed: {-steps} to {steps - 1} (there are {steps} steps)")
    return [i % steps for i in chosen]


class FeatureExtractor(nn.Module):
    """A model that returns the feature maps of single steps instead of classes: ``features_only=True``.

    What follows the last of these steps does not run; its parameters stop training, so that no optimiser and no
    distributed wrapper waits for gradients of theirs.

    Shape: ``(batch, channels, height, width)`` to a list of
    ``(batch, num_chs, height / reduction, width / reduction)``.
    """

    def __init__(self, model: "ImageModel", out_indices: int | Iterable[int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.out_indices = take_indices(len(model.steps), out_indices)
        for unused in (*model.steps[max(self.out_indices) + 1 :], model.norm, model.head):
            unused.requires_grad_(False)
        self.feature_info = FeatureInfo(model.feature_info[i] for i in self.out_indices)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def info(self) -> dict[str, Any]:
        return self.model.info

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(images, self.out_indices, stop_early=True, intermediates_only=True)
