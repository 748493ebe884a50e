"""Feature maps of a model's single steps."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from .base import ImageModel


class FeatureInfo(list):
    """A list of ``{"num_chs", "reduction", "module"}``, one entry a feature map, with timm's accessors.

    Each gives what all entries say; with ``idx``, what one entry of the list says, or a list of them.
    """

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self._map(lambda entry: entry["num_chs"], idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self._map(lambda entry: entry["reduction"], idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self._map(lambda entry: entry["module"], idx)

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """The entries themselves, or of each only these keys."""
        return self._map(lambda entry: {key: entry[key] for key in (entry if keys is None else keys)}, idx)

    def _map(self, get: Callable[[dict[str, Any]], Any], idx: int | Sequence[int] | None) -> Any:
        if isinstance(idx, int):
            return get(self[idx])
        return [get(self[i]) for i in (range(len(self)) if idx is None else idx)]


def take_indices(steps: int, indices: int | Iterable[int] | None) -> list[int]:
    """Which of `steps` outputs are meant: a list, the last ``n``, or all; in the given order.

    Raises:
        InputError: one lies outside or is no integer, or there is none.
    """
    try:
        if indices is not None and not isinstance(indices, Iterable):
            last = operator.index(indices)
            if not 1 <= last <= steps:
                raise InputError(f"indices: found {last}; allowed: 1 to {steps}, the number of last steps, or a list")
            return list(range(steps - last, steps))
        chosen = list(range(steps)) if indices is None else [operator.index(i) for i in indices]
    except TypeError as error:
        raise InputError(
            f"indices: found {indices!r:.80}; allowed: integers from {-steps} to {steps - 1} in a list, or one, "
            "the number of last steps"
        ) from error
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
