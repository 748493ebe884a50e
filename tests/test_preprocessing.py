"""preprocess: PIL images against timm's own results, arrays and tensors against PIL images, and what is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import nn

from patchlib.errors import ConfigError, InputError
from patchlib.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocess, preprocess

GOLDENS = Path(__file__).parent / "goldens" / "preprocessing" / "timm.safetensors"
with safe_open(GOLDENS, "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])
LEVEL = 1 / 255


def photograph(name: str) -> Image.Image:
    return Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("RGB")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain(**numbers: Any) -> Preprocess:
    """One that leaves values between 0 and 1."""
    return Preprocess(mean=0.0, std=1.0, **numbers)


# against timm


@pytest.mark.parametrize("case", CASES)
def test_pil_images_equal_timm(case: str) -> None:
    photo, box, mode, numbers = CASES[case].values()
    with safe_open(GOLDENS, "pt") as file:
        expected = file.get_tensor(case)
    image = photograph(photo).crop(box).convert(mode)
    result = preprocess(numbers)(image)
    assert result.shape == (1, *numbers["input_size"])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"crop_pct": 0.89}, {"interpolation": "bilinear"}, {"std": 0.23}])
def test_a_wrong_number_would_be_seen(change: dict[str, Any]) -> None:
    with safe_open(GOLDENS, "pt") as file:
        expected = file.get_tensor("center")
    result = preprocess(CASES["center"]["numbers"]).replace(**change)(photograph("chelsea"))
    assert (result[0] - expected).abs().max() > 1e-2


# tensors and arrays against PIL images


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(224, 224), (97, 133)])
def test_tensors_are_within_the_stated_tolerance(crop_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    prepare = plain(input_size=(3, *size), crop_mode=crop_mode, interpolation=interpolation, crop_pct=0.9)
    whole = photograph("coffee")
    for image in (whole, whole.crop((20, 3, 97, 400)), whole.crop((5, 100, 300, 140)), photograph("astronaut")):
        expected = prepare(image)
        integers = (prepare(pixels(image)) - expected).abs()
        floats = (prepare(pixels(image) / 255) - expected).abs()
        if interpolation == "nearest":
            assert max(integers.max(), floats.max()) < 1e-6
        assert integers.max() < 2.01 * LEVEL
        assert integers.mean() < 0.1 * LEVEL
        assert floats.max() < 2 * LEVEL
        assert floats.mean() < 0.5 * LEVEL


def test_arrays_are_tensors_with_the_channels_last() -> None:
    prepare = Preprocess(input_size=(3, 64, 48))
    array = np.array(photograph("chelsea"))
    expected = prepare(pixels(photograph("chelsea")))
    read_only = array.copy()
    read_only.flags.writeable = False
    for same in (array, array[None], read_only, np.asfortranarray(array)):
        torch.testing.assert_close(prepare(same), expected, rtol=0, atol=0)
    torch.testing.assert_close(prepare(array[:, ::-1]), prepare(array[:, ::-1].copy()), rtol=0, atol=0)
    as_floats = prepare((array / 255).astype(np.float32))
    torch.testing.assert_close(prepare((array / 255).astype(">f8")), as_floats, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_give_float32(dtype: torch.dtype) -> None:
    image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    prepare = Preprocess(input_size=(3, 32, 32))
    assert prepare(image).dtype == torch.float32
    torch.testing.assert_close(prepare(image), prepare(image.float()), rtol=0, atol=1e-5)


def test_gradients_flow_back_to_float_tensors() -> None:
    image = torch.full((3, 40, 60), 0.5, requires_grad=True)
    Preprocess(input_size=(3, 32, 32), crop_mode="border", crop_pct=1.0)(image).sum().backward()
    assert image.grad is not None
    assert image.grad.min() > 0  # each pixel reaches the letterbox


def test_nothing_depends_on_torch_defaults() -> None:
    expected = Preprocess()(photograph("chelsea"))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        result = Preprocess()(photograph("chelsea"))
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


# batches


def test_lists_mix_kinds_and_sizes() -> None:
    prepare = Preprocess(input_size=(3, 32, 40))
    cat, cup = photograph("chelsea"), photograph("coffee")
    result = prepare([cat, pixels(cup), np.array(cat)])
    assert result.shape == (3, 3, 32, 40)
    torch.testing.assert_close(result[:1], prepare(cat), rtol=0, atol=0)
    torch.testing.assert_close(result[1:2], prepare(pixels(cup)), rtol=0, atol=0)
    batch = torch.stack([pixels(cat), pixels(cat).flip(0)])
    torch.testing.assert_close(prepare(batch)[1:], prepare(pixels(cat).flip(0)), rtol=0, atol=0)


# channels and modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted_as_pillow_does(mode: str, channels: int) -> None:
    image = photograph("chelsea").convert(mode)
    expected = image.convert("RGB" if channels == 3 else "L")
    array = np.array(expected).reshape(expected.height, expected.width, channels)
    prepare = plain(input_size=(channels, 48, 48))
    assert (prepare(image) - prepare(array)).abs().max() < 2.01 * LEVEL


def test_alpha_is_dropped_and_transparency_of_palettes_too() -> None:
    image = photograph("chelsea")
    prepare = Preprocess(input_size=(3, 32, 32))
    clear = image.copy()
    clear.putalpha(0)
    torch.testing.assert_close(prepare(clear), prepare(image), rtol=0, atol=0)
    torch.testing.assert_close(prepare(np.array(clear)), prepare(np.array(image)), rtol=0, atol=0)
    file = io.BytesIO()
    image.convert("P").save(file, "PNG", transparency=0)
    torch.testing.assert_close(prepare(Image.open(file)), prepare(image.convert("P")), rtol=0, atol=0)


def test_sixteen_bits_keep_their_range() -> None:
    grey = np.array(photograph("chelsea").convert("L"))
    prepare = plain(input_size=(1, 48, 48), crop_pct=1.0)
    for order in ("<u2", ">u2"):
        deep = (grey.astype(np.uint16) * 257).astype(order)
        mode = "I;16" if order == "<u2" else "I;16B"
        image = Image.frombytes(mode, deep.shape[::-1], deep.tobytes())
        assert (prepare(image) - prepare(Image.fromarray(grey))).abs().max() < 1.01 * LEVEL
    file = io.BytesIO()
    image.convert("I").convert("I;16").save(file, "PNG")  # which Pillow before 10.3 reads in a mode without a range
    assert (prepare(Image.open(file)) - prepare(Image.fromarray(grey))).abs().max() < 1.01 * LEVEL


def test_grey_and_colour_tensors_become_what_the_model_takes() -> None:
    cat = photograph("chelsea")
    one, three = plain(input_size=(1, 32, 32)), plain(input_size=(3, 32, 32))
    grey = np.array(cat.convert("L"))
    assert (one(pixels(cat)) - one(cat)).abs().max() < 2.01 * LEVEL
    assert (one(pixels(cat) / 255) - one(cat)).abs().max() < 2 * LEVEL
    torch.testing.assert_close(one(grey), one(torch.from_numpy(grey)[None]), rtol=0, atol=0)
    torch.testing.assert_close(three(grey), one(grey).expand(-1, 3, -1, -1), rtol=0, atol=0)


def test_other_numbers_of_channels_pass_as_they_are() -> None:
    bands = torch.rand(5, 20, 20, generator=torch.Generator().manual_seed(0))
    prepare = Preprocess(input_size=(5, 20, 20), crop_pct=1.0, mean=[0.1, 0.2, 0.3, 0.4, 0.5], std=0.5)
    expected = (bands - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])[:, None, None]) / 0.5
    torch.testing.assert_close(prepare(bands)[0], expected)
    rgba = photograph("chelsea").convert("RGBA")
    four = plain(input_size=(4, 30, 30), crop_pct=1.0)
    assert (four(rgba) - four(np.array(rgba))).abs().max() < 2.01 * LEVEL
    assert four(rgba)[:, 3].min() == 1


# border


def test_letterbox_keeps_the_whole_image_on_the_background() -> None:
    image = Image.new("RGB", (60, 30), (255, 0, 0))
    prepare = plain(input_size=(3, 40, 40), crop_mode="border", crop_pct=1.0, background=(0.0, 0.2, 1.0))
    for kind in (image, pixels(image), pixels(image) / 255):
        result = prepare(kind)[0]
        torch.testing.assert_close(result[:, 10:30], torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 20, 40))
        for border in (result[:, :10], result[:, 30:]):
            torch.testing.assert_close(border, torch.tensor([0.0, 0.2, 1.0])[:, None, None].expand(3, 10, 40))


def test_the_background_is_the_mean_by_default() -> None:
    result = Preprocess(input_size=(3, 40, 40), crop_mode="border", crop_pct=1.0)(photograph("coffee"))
    assert result[..., 0, :].abs().max() < 0.5 * LEVEL / min(IMAGENET_STD)


def test_the_orientation_in_exif_is_the_callers() -> None:
    image = photograph("coffee")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = Image.open(file)
    prepare = Preprocess(input_size=(3, 32, 32))
    torch.testing.assert_close(prepare(turned), prepare(image), rtol=0, atol=0)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(prepare(ImageOps.exif_transpose(turned)), prepare(upright), rtol=0, atol=0)


# what is refused

WRONG_IMAGES = {
    "path": ("cat.jpg", r"found str.*PIL\.Image\.open"),
    "number": (3.0, "found float; allowed: PIL images, numpy arrays, tensors"),
    "nested list": ([[torch.zeros(3, 8, 8)]], "image 0: found list"),
    "no images": ([], "the list is empty"),
    "rank 2": (torch.zeros(8, 8), r"shape \(8, 8\); allowed: \(channels, height, width\)"),
    "rank 5": (torch.zeros(1, 1, 3, 8, 8), "allowed"),
    "channels last": (torch.zeros(224, 200, 3), "found 224 channels.*come first"),
    "array channels first": (np.zeros((3, 224, 200)), r"shape \(3, 224, 200\).*come last"),
    "array rank": (np.zeros(8), r"shape \(8,\)"),
    "too many channels": (torch.zeros(7, 8, 8), "found 7 channels; allowed: the model's 3"),
    "empty": (torch.zeros(3, 0, 8), "empty"),
    "empty batch": (torch.zeros(0, 3, 8, 8), "empty"),
    "empty array": (np.zeros((0, 8, 3)), "empty"),
    "empty PIL": (Image.new("RGB", (0, 5)), "height and width of 5 and 0"),
    "int64": (torch.zeros(3, 8, 8, dtype=torch.int64), "found torch.int64; allowed: uint8"),
    "bool": (np.zeros((8, 8, 3), dtype=bool), "found bool"),
    "object": (np.zeros((8, 8, 3), dtype=object), "found object"),
    "0 to 255 as floats": (torch.full((3, 8, 8), 254.0), "from 254 to 254.*divide by 255"),
    "normalised": (torch.linspace(-2, 2, 192).view(3, 8, 8), "from -2 to 2.*normalised already"),
    "NaN": (torch.full((3, 8, 8), torch.nan), "NaN"),
    "infinite": (torch.full((3, 8, 8), torch.inf), "from inf to inf"),
    "second in a list": ([torch.zeros(3, 8, 8), torch.zeros(8, 8)], "image 1: found a tensor of shape"),
    "mode F": (Image.new("F", (8, 8)), "mode 'F'.*scale it to 8 bits"),
    "elongated": (Image.new("L", (1, 5000)), "so elongated"),
    "elongated tensor": (torch.zeros(1, 5000, 1), "so elongated"),
}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_refused(case: str) -> None:
    image, message = WRONG_IMAGES[case]
    with pytest.raises(InputError, match=message):
        Preprocess()(image)


def test_a_damaged_file_is_refused() -> None:
    file = io.BytesIO()
    photograph("chelsea").save(file, "JPEG")
    with pytest.raises(InputError, match=r"the image: cannot be read.*truncated"):
        Preprocess()(Image.open(io.BytesIO(file.getvalue()[:5000])))


def test_pil_images_with_the_wrong_bands_are_refused() -> None:
    with pytest.raises(InputError, match=r"mode 'RGB'.*the model's 4 channels"):
        Preprocess(input_size=(4, 8, 8), mean=0.5, std=0.5)(photograph("chelsea"))


def test_filters_that_torch_lacks_are_refused_for_tensors() -> None:
    with pytest.raises(InputError, match="'lanczos' is for PIL images only"):
        Preprocess(interpolation="lanczos")(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"interpolatoin": "bicubic"}, "no field 'interpolatoin'; did you mean 'interpolation'"),
        ({"interpolation": "cubic"}, r"interpolation: found 'cubic'; allowed: .*'bicubic'"),
        ({"crop_mode": "letterbox"}, "crop_mode: found 'letterbox'; allowed: 'center', 'squash', 'border'"),
        ({"crop_pct": 0}, "crop_pct: found 0; allowed"),
        ({"crop_pct": 1.5}, "crop_pct: found 1.5"),
        ({"crop_pct": float("nan")}, "crop_pct: found nan"),
        ({"input_size": 224}, "input_size: found 224"),
        ({"input_size": (224, 224)}, r"\(channels, height, width\)"),
        ({"input_size": (3, 0, 224)}, r"input_size\[1\]: found 0"),
        ({"input_size": (3, 16000, 16000)}, "product of at most"),
        ({"mean": (0.5, 0.5)}, "mean: found 2 numbers; allowed: 1, or 3"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean: found.*divided by 255"),
        ({"mean": "grey"}, "mean: found 'grey'"),
        ({"mean": ()}, "mean: found 0 numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std: found.*above 0"),
        ({"std": None}, "std: found None"),
        ({"background": (0, 0, 300)}, "background: found"),
    ],
)
def test_wrong_numbers_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocess(spec)


# where the numbers come from


class Net(nn.Module):
    """A user's own model, as far as `preprocess` looks at it."""

    def __init__(self, info: dict[str, Any], **config: Any) -> None:
        super().__init__()
        self.info, self.config = info, SimpleNamespace(**config)


def test_the_numbers_survive_json() -> None:
    prepare = Preprocess(input_size=(3, 96, 64), crop_mode="border", mean=0.5, background=(0, 0.5, 1))
    assert preprocess(json.loads(json.dumps(prepare.to_dict()))) == prepare
    assert preprocess(prepare) is prepare


def test_a_models_own_numbers_come_first() -> None:
    numbers = {"input_size": [3, 96, 128], "crop_pct": 1.0, "mean": [0.5, 0.5, 0.5], "interpolation": "bilinear"}
    prepare = preprocess(Net({"preprocessing": numbers}, img_size=32, in_chans=3))
    assert prepare == Preprocess(input_size=(3, 96, 128), crop_pct=1.0, mean=0.5, interpolation="bilinear")
    assert prepare.std == IMAGENET_STD


@pytest.mark.parametrize(("img_size", "expected"), [(64, (3, 64, 64)), ((32, 48), (3, 32, 48)), (None, (3, 224, 224))])
def test_without_numbers_the_config_gives_the_size(img_size: Any, expected: tuple[int, int, int]) -> None:
    prepare = preprocess(Net({}, img_size=img_size, in_chans=3))
    assert prepare == Preprocess(input_size=expected)
    assert (prepare.crop_pct, prepare.crop_mode, prepare.interpolation) == (0.875, "center", "bicubic")


def test_the_models_channels_decide() -> None:
    numbers = Preprocess(input_size=(3, 64, 64)).to_dict()
    grey = preprocess(Net({"preprocessing": numbers}, img_size=64, in_chans=1))
    assert grey.input_size == (1, 64, 64)
    red, green, blue = IMAGENET_MEAN
    assert grey.mean == pytest.approx((0.299 * red + 0.587 * green + 0.114 * blue,))
    assert preprocess(Net({}, img_size=64, in_chans=1)) == grey
    even = preprocess(Net({"preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3}}, img_size=64, in_chans=6))
    assert (even.input_size, even.mean, even.std) == ((6, 64, 64), (0.5,) * 6, (0.25,) * 6)
    own = {"mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": 0.3}
    assert preprocess(Net({"preprocessing": own}, in_chans=5)) == Preprocess(input_size=(5, 224, 224), **own)
    with pytest.raises(ConfigError, match="mean: found 3 numbers; allowed: 1, or 5") as caught:
        preprocess(Net({}, img_size=64, in_chans=5))
    assert "model.info['preprocessing'] = {'mean': [5 numbers]" in str(caught.value)
    for given in (own, {**numbers, **own}):  # with or beside the size that three channels had
        assert preprocess(Net({"preprocessing": given}, img_size=64, in_chans=5)).mean == tuple(own["mean"])
    with pytest.raises(ConfigError, match=r"info\['preprocessing'\]: found str"):
        preprocess(Net({"preprocessing": "squash"}, in_chans=3))


def test_a_wrapped_model_is_asked_inside() -> None:
    net = Net({"preprocessing": {"crop_pct": 0.9}}, img_size=64, in_chans=3)
    assert preprocess(nn.DataParallel(net)) == preprocess(torch.compile(net)) == preprocess(net)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), Net({}, vocab_size=5), "vit_base_patch16_224", None])
def test_what_is_no_image_model_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="preprocess: "):
        preprocess(wrong)


def test_pillow_is_not_imported_for_tensors() -> None:
    code = (
        "import sys, torch; from patchlib.preprocessing import Preprocess; Preprocess()(torch.rand(3, 9, 9)); "
        "sys.exit('PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
