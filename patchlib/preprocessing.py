"""From photographs to what a model takes: resize, crop, normalise, by the numbers its weights were trained with."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MAX_SIDE, BaseConfig, choice, integers, number
from .errors import ConfigError, InputError
from .weights.load import without_wrappers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in Pillow
_MAX_VALUES = 2**28  # of one input, and of one resized image: 1 GiB in float32


def _colour(default: tuple[float, ...] | None, allowed: str, is_allowed: Callable[[float], bool]) -> Any:
    """A field with one number for each channel, or one (alone or in a tuple) for all."""

    def check(where: str, value: Any) -> tuple[float, ...] | None:
        if value is None and default is None:
            return None
        parts = value if isinstance(value, (list, tuple)) else (value,)
        numeric = all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in parts)
        if not numeric or not all(map(is_allowed, parts)):
            raise ConfigError(
                f"{where}: found {repr(value)[:80]}; allowed: numbers {allowed}, one for each channel or one for all "
                f"(what is meant for pixels from 0 to 255 is to be divided by 255)"
            )
        return tuple(map(float, parts))

    return dataclasses.field(default=default, metadata={"check": check, "default": default})


@dataclass(frozen=True, kw_only=True)
class Preprocess(BaseConfig):
    """Turns images into model input: resizes, crops and normalises them.

    PIL images come out as from timm's evaluation transform with the same numbers (to 1e-5, from rounding alone).
    Arrays and tensors are resampled by torch, in Pillow's order of steps. Against the PIL image of the same photograph,
    in grey levels (1/255, before the division by `std`): uint8, rounded as in Pillow, differs by at most 2 and on
    average over an image by less than 0.1; floats, never rounded, by at most 2 and on average by less than 0.5.
    `"nearest"` is the same in all of them.

    Args:
        input_size: `(channels, height, width)` of the result, in pixels.
        interpolation: the resampling filter: `"nearest"`, `"bilinear"`, `"bicubic"`, and for PIL images also `"box"`,
            `"hamming"`, `"lanczos"`. All but `"nearest"` are antialiased.
        crop_pct: the part of the resized image's side that the crop keeps, from 0.1 to 1.
        crop_mode: `"center"` scales the image to cover `size / crop_pct` and keeps its middle; `"squash"` scales both
            sides to `size / crop_pct`, whatever the shape was; `"border"` scales the longest side to it and fills up
            with the background (letterbox; nothing of the image is lost where `crop_pct` is 1).
        mean, std: for each channel, of pixels between 0 and 1; one number stands for all channels.
        background: the colour of the border, between 0 and 1, for each channel or one for all; by default the mean.

    Raises:
        ConfigError: a field is of the wrong kind or out of range.

    The names are those of timm's `pretrained_cfg`. Another crop for the same model:
    `patchlib.preprocess(model).replace(crop_mode="border", crop_pct=1.0)`.
    """

    input_size: tuple[int, int, int] = integers((3, 224, 224), 1, MAX_SIDE, most=3)
    interpolation: str = choice("bicubic", "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
    crop_pct: float = number(0.875, 0.1, 1)
    crop_mode: str = choice("center", "center", "squash", "border")
    mean: tuple[float, ...] = _colour(IMAGENET_MEAN, "from 0 to 1", lambda value: 0 <= value <= 1)
    std: tuple[float, ...] = _colour(IMAGENET_STD, "above 0, up to 1", lambda value: 0 < value <= 1)
    background: tuple[float, ...] | None = _colour(None, "from 0 to 1", lambda value: 0 <= value <= 1)

    def check(self) -> None:
        if len(self.input_size) != 3 or math.prod(self.input_size) > _MAX_VALUES:
            raise ConfigError(
                f"Preprocess.input_size: found {self.input_size}; allowed: (channels, height, width) with a product of "
                f"at most {_MAX_VALUES}"
            )
        channels = self.input_size[0]
        for name in ("mean", "std", "background"):
            value = getattr(self, name)
            if value is not None and len(value) not in (1, channels):
                raise ConfigError(
                    f"Preprocess.{name}: found {len(value)} numbers; allowed: 1, or {channels} for the {channels} "
                    f"channels of input_size"
                )
            if value is not None and len(value) == 1:
                object.__setattr__(self, name, value * channels)

    def __call__(self, images: Any) -> Tensor:
        """Prepares one image, a batch, or a list of either.

        Args:
            images: a PIL image of any mode; a numpy array `(height, width)`, `(height, width, channels)` or
                `(batch, height, width, channels)`; a tensor `(channels, height, width)` or
                `(batch, channels, height, width)`; or a list or tuple of such, whose sizes may differ.
                Arrays and tensors hold uint8, or floats from 0 to 1.

        Where the model takes 3 channels, grey images are repeated and alpha is dropped, not blended (as timm and
        `Image.convert("RGB")` do); where it takes 1, colours are turned into grey. For other numbers of channels
        the image must have exactly as many. 16-bit grey PIL images are scaled to 8 bits (Pillow's own conversion,
        and so timm's, cuts them off at 255). The EXIF orientation is not applied, as in timm: photographs straight
        from a camera want `PIL.ImageOps.exif_transpose` first.

        Returns:
            `(batch, channels, height, width)` in float32, on the device of the tensors; gradients flow back to
            float tensors.

        Raises:
            InputError: wrong kind, rank, channels or range; NaN; an empty or unreadable image.
        """
        if not isinstance(images, (list, tuple)):
            return self._normalise(self._prepare(images, "the image"))
        if not images:
            raise InputError("no images: the list is empty")
        return self._normalise(torch.cat([self._prepare(image, f"image {i}") for i, image in enumerate(images)]))

    def _prepare(self, image: Any, name: str) -> Tensor:
        """One resized and cropped image or batch, `(batch, channels, height, width)`, floats from 0 to 1."""
        pil, numpy = sys.modules.get("PIL.Image"), sys.modules.get("numpy")
        if pil is not None and isinstance(image, pil.Image):
            return self._prepare_pil(image, name)
        if numpy is not None and isinstance(image, numpy.ndarray):
            image = _array_to_tensor(image, name)
        elif not isinstance(image, Tensor):
            hint = "; open a file with PIL.Image.open(path)" if isinstance(image, (str, bytes)) else ""
            raise InputError(
                f"{name}: found {type(image).__name__}; allowed: PIL images, numpy arrays, tensors, lists of them{hint}"
            )
        return self._prepare_tensor(image, name)

    def _prepare_pil(self, image: Any, name: str) -> Tensor:
        pil = sys.modules["PIL.Image"]
        channels, height, width = self.input_size
        resized, (top, left) = self._layout(image.height, image.width, name)
        image = _convert_pil(image, channels, name)
        if image.size != resized[::-1]:
            image = image.resize(resized[::-1], pil.Resampling[self.interpolation.upper()])
        fill = tuple(round(255 * value) for value in self.background or self.mean)
        canvas = pil.new(image.mode, (width, height), fill if channels > 1 else fill[0])
        canvas.paste(image, (-left, -top))
        pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
        return pixels.view(1, height, width, channels).permute(0, 3, 1, 2).float() / 255

    def _prepare_tensor(self, image: Tensor, name: str) -> Tensor:
        images = _check_tensor(image, name)
        levels = 255 if images.dtype == torch.uint8 else None
        images = _convert_channels(images.float(), self.input_size[0], levels, name)
        resized, (top, left) = self._layout(images.shape[-2], images.shape[-1], name)
        images = self._resize(images, resized, levels, name) / (levels or 1)

        _, height, width = self.input_size
        images = images[..., max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
        if images.shape[-2:] == (height, width):
            return images
        fill = images.new_tensor([round(255 * value) / 255 for value in self.background or self.mean])
        canvas = fill[:, None, None].repeat(len(images), 1, height, width)
        top, left = max(-top, 0), max(-left, 0)
        canvas[..., top : top + images.shape[-2], left : left + images.shape[-1]] = images
        return canvas

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def _layout(self, height: int, width: int, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """The resized `(height, width)`, and the `(top, left)` in it of the crop: below 0 where a border is added.

        Each rounding is the one of timm 1.0.31 and torchvision 0.28 for PIL images: another moves pixels.
        """
        if min(height, width) < 1:
            raise InputError(f"{name}: found a height and width of {height} and {width}; allowed: 1 or more")
        target = self.input_size[1:]
        scaled = tuple(math.floor(side / self.crop_pct) for side in target)
        if self.crop_mode == "squash":
            resized = scaled
        elif self.crop_mode == "center" and scaled[0] == scaled[1]:
            shortest = min(height, width)
            resized = (int(scaled[0] * height / shortest), int(scaled[0] * width / shortest))
        else:
            furthest = max if self.crop_mode == "border" else min
            ratio = furthest(height / scaled[0], width / scaled[1])
            resized = (max(1, round(height / ratio)), max(1, round(width / ratio)))
        if math.prod(resized) * self.input_size[0] > _MAX_VALUES:
            raise InputError(
                f"{name}: found {height}x{width} pixels, so elongated that resizing makes {resized[0]}x{resized[1]}; "
                f"crop it first, or use crop_mode='squash' or 'border'"
            )
        top, left = (
            round((side - goal) / 2) if side >= goal else -((goal - side) // 2)
            for side, goal in zip(resized, target, strict=True)
        )
        return (resized[0], resized[1]), (top, left)

    def _resize(self, images: Tensor, size: tuple[int, int], levels: int | None, name: str) -> Tensor:
        """Resizes one axis after the other; clamps after each, and rounds integers, as Pillow does."""
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise InputError(
                f"{name}: interpolation {self.interpolation!r} is for PIL images only; arrays and tensors allow "
                f"'nearest', 'bilinear', 'bicubic'"
            )
        height, width = images.shape[-2:]
        if self.interpolation == "nearest":
            rows, columns = _nearest(height, size[0]), _nearest(width, size[1])
            return images[..., rows, :][..., columns]
        # the order of Pillow 13, which shows where an edge overshoots and is clamped (Pillow 12: always width first)
        height_first = height > size[0] and height - size[0] > 2 * (width - size[1])
        for step in ((size[0], width) if height_first else (height, size[1]), size):
            if images.shape[-2:] != step:
                images = F.interpolate(images, step, mode=self.interpolation, antialias=True)
                images = (images + 0.5).floor().clamp(0, levels) if levels else images.clamp(0, 1)
        return images


def _nearest(side: int, goal: int) -> list[int]:
    """Which of `side` pixels each of `goal` copies: Pillow's running sum, for its rounding where two are as near."""
    centers = itertools.accumulate(itertools.repeat(side / goal, goal - 1), initial=side / goal / 2)
    return [min(math.floor(center), side - 1) for center in centers]


def preprocess(model_or_spec: nn.Module | Preprocess | Mapping[str, Any]) -> Preprocess:
    """Returns what prepares images for a model, from its weights' own numbers.

    Args:
        model_or_spec: an image model, wrapped for data-parallel training or not: its `info["preprocessing"]` holds the
            numbers, and where there are none its `config.img_size` the size; the number of channels is always that of
            `config.in_chans`. Or a dict of `Preprocess`'s fields. Or a `Preprocess`, which is returned as it is. Fields
            left out take the defaults of `Preprocess`: ImageNet's mean and standard deviation, bicubic, a central crop
            of 0.875.

    For a model that takes 1 channel, the three numbers of a mean become its grey value (ITU-R 601-2).

    Raises:
        ConfigError: an unknown field, or a value out of range.
        InputError: the argument is neither an image model nor one of the above.

    Example:
        >>> prepare = preprocess({"input_size": (3, 192, 192), "crop_pct": 1.0})
        >>> prepare(torch.zeros(3, 480, 640, dtype=torch.uint8)).shape
        torch.Size([1, 3, 192, 192])
    """
    if isinstance(model_or_spec, Preprocess):
        return model_or_spec
    if isinstance(model_or_spec, Mapping):
        return Preprocess.from_dict(model_or_spec)
    if not isinstance(model_or_spec, nn.Module):
        raise InputError(
            f"preprocess: found {type(model_or_spec).__name__}; allowed: an image model, a dict, a Preprocess "
            f"(images go to what it returns: preprocess(model)(images))"
        )
    model = without_wrappers(model_or_spec)
    config = getattr(model, "config", None)
    size, channels = getattr(config, "img_size", None), getattr(config, "in_chans", None)
    spec = (getattr(model, "info", None) or {}).get("preprocessing") or {}
    if not spec and size is None and channels is None:
        raise InputError(
            f"preprocess: {type(model).__name__} has neither info['preprocessing'] nor a config with img_size "
            f"or in_chans, as image models have; give the numbers: preprocess({{'input_size': (3, 224, 224)}})"
        )
    if not isinstance(spec, Mapping):
        raise ConfigError(f"info['preprocessing']: found {type(spec).__name__}; allowed: a dict of Preprocess's fields")
    if "input_size" not in spec:
        height, width = (size, size) if isinstance(size, int) else size or Preprocess.input_size[1:]
        spec = {**spec, "input_size": (_made_for(spec), height, width)}
    elif _made_for(spec) == channels and isinstance(spec["input_size"], (list, tuple)):  # the mean is this model's own
        spec = {**spec, "input_size": (channels, *spec["input_size"][1:])}
    prepare = Preprocess.from_dict(spec)
    return prepare if channels in (None, prepare.input_size[0]) else _with_channels(prepare, channels)


def _made_for(spec: Mapping[str, Any]) -> int:
    """The number of channels that a mean is for."""
    mean = spec.get("mean", IMAGENET_MEAN)
    return len(mean) if isinstance(mean, (list, tuple)) and len(mean) > 1 else 3


def _with_channels(prepare: Preprocess, channels: int) -> Preprocess:
    """The same for another number of channels, as far as the numbers tell."""

    def convert(colour: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if colour is None or len(set(colour)) == 1:
            return colour and colour[:1]
        if (len(colour), channels) == (3, 1):
            return (sum(weight * part for weight, part in zip(_LUMA, colour, strict=True)),)
        return colour

    colours = {name: convert(getattr(prepare, name)) for name in ("mean", "std", "background")}
    try:
        return prepare.replace(input_size=(channels, *prepare.input_size[1:]), **colours)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; for a model of {channels} channels say them: model.info['preprocessing'] = "
            f"{{'mean': [{channels} numbers], 'std': [{channels} numbers]}}"
        ) from error


def _convert_pil(image: Any, channels: int, name: str) -> Any:
    """The image in a mode of `channels` bands of 8 bits."""
    try:
        image.load()
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if channels in (1, 3) and image.mode not in ("I", "F"):
            return image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name}: cannot be read with {channels} channels: {error}") from error
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: found mode {image.mode!r}, whose range is not known; scale it to 8 bits first")
    if image.mode not in ("LA", "RGBA", "CMYK") or len(image.getbands()) != channels:
        raise InputError(f"{name}: found mode {image.mode!r}; allowed: images with the model's {channels} channels")
    return image


def _array_to_tensor(array: Any, name: str) -> Tensor:
    """Channels first, as a batch, what an array holds channels last."""
    numpy = sys.modules["numpy"]
    if array.ndim not in (2, 3, 4):
        raise InputError(
            f"{name}: found an array of shape {array.shape}; allowed: (height, width), (height, width, channels), "
            f"(batch, height, width, channels)"
        )
    dtype = array.dtype.newbyteorder("=")
    if dtype not in ("uint8", "float16", "float32", "float64"):
        raise _wrong_dtype(name, array.dtype)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[-1] > 4 and array.shape[-3] in (1, 3):
        raise InputError(f"{name}: found an array of shape {array.shape}; the channels of an array come last")
    # torch takes neither foreign byte orders nor negative strides, and warns of read-only memory
    tensor = torch.from_numpy(numpy.require(array, dtype, ["C", "W"]))
    return (tensor if tensor.ndim == 4 else tensor[None]).permute(0, 3, 1, 2)


def _check_tensor(image: Tensor, name: str) -> Tensor:
    """The image as a batch, its values checked."""
    if image.ndim not in (3, 4):
        raise InputError(
            f"{name}: found a tensor of shape {tuple(image.shape)}; allowed: (channels, height, width), "
            f"(batch, channels, height, width)"
        )
    if image.numel() == 0:
        raise InputError(f"{name}: found a tensor of shape {tuple(image.shape)}, which is empty")
    if image.is_floating_point():
        lowest, highest = (value.item() for value in image.detach().aminmax())
        if math.isnan(lowest):
            raise InputError(f"{name}: found NaN; allowed: floats from 0 to 1")
        if lowest < 0 or highest > 1:
            hint = "is it normalised already?" if lowest < 0 else "divide by 255, or pass uint8"
            raise InputError(f"{name}: found floats from {lowest:.4g} to {highest:.4g}; allowed: from 0 to 1; {hint}")
    elif image.dtype != torch.uint8:
        raise _wrong_dtype(name, image.dtype)
    return image if image.ndim == 4 else image[None]


def _wrong_dtype(name: str, dtype: Any) -> InputError:
    return InputError(f"{name}: found {dtype}; allowed: uint8 from 0 to 255, or floats from 0 to 1")


def _convert_channels(images: Tensor, channels: int, levels: int | None, name: str) -> Tensor:
    """The images in grey or colour, without alpha, where the model takes 1 or 3 channels."""
    found = images.shape[1]
    if found == channels:
        return images
    if channels not in (1, 3) or found > 4:
        hint = "; the channels of a tensor come first" if images.shape[-1] in (channels, 1, 3) else ""
        raise InputError(f"{name}: found {found} channels; allowed: the model's {channels}{hint}")
    if found < 3:
        return images[:, :1].expand(-1, channels, -1, -1)
    if channels == 3:
        return images[:, :3]
    grey = (images[:, :3] * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    return grey.round() if levels else grey
