"""Writes preprocessing/timm.safetensors: photographs as timm's evaluation transform prepares them.

Needs timm, torchvision and Pillow, not scikit-image, whose photographs it reads by path:

    python tests/goldens/make_preprocessing.py FOLDER_OF_SCIKIT_IMAGE/data
    python tests/goldens/make_preprocessing.py --check FOLDER_OF_PHOTOGRAPHS

The second form writes nothing: it prints how far patchlib is from timm on up to 50 photographs, each whole and cut to
other shapes, and fails above 1e-5.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

HERE = Path(__file__).parent
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

# name: photograph, box (left, top, right, bottom) cut out of it or None, mode, numbers
CASES = {
    "center": ("chelsea", None, "RGB", {"input_size": [3, 48, 48]}),
    "center_bilinear": ("coffee", None, "RGB", {"input_size": [3, 48, 48], "interpolation": "bilinear"}),
    "center_whole": ("astronaut", None, "RGB", {"input_size": [3, 40, 40], "crop_pct": 1.0, **HALF}),
    "center_tall_target": ("coffee", None, "RGB", {"input_size": [3, 56, 32], "crop_pct": 0.95}),
    "center_wide_target": ("chelsea", None, "RGB", {"input_size": [3, 31, 53]}),
    "center_tall_image": ("chelsea", (120, 5, 233, 298), "RGB", {"input_size": [3, 41, 41], "crop_pct": 0.96}),
    "center_upscaled": ("astronaut", (200, 90, 217, 113), "RGB", {"input_size": [3, 48, 48], "crop_pct": 0.9}),
    "center_grey": ("chelsea", None, "L", {"input_size": [1, 48, 48], "mean": [0.45], "std": [0.25]}),
    "center_nearest": ("coffee", None, "RGB", {"input_size": [3, 32, 32], "interpolation": "nearest"}),
    "center_box": ("coffee", None, "RGB", {"input_size": [3, 32, 32], "interpolation": "box"}),
    "center_hamming": ("coffee", None, "RGB", {"input_size": [3, 32, 32], "interpolation": "hamming"}),
    "center_lanczos": ("coffee", None, "RGB", {"input_size": [3, 32, 32], "interpolation": "lanczos"}),
    "squash": ("coffee", None, "RGB", {"input_size": [3, 40, 40], "crop_pct": 1.0, "crop_mode": "squash", **HALF}),
    "squash_cropped": ("chelsea", None, "RGB", {"input_size": [3, 33, 50], "crop_pct": 0.95, "crop_mode": "squash"}),
    "border": ("chelsea", None, "RGB", {"input_size": [3, 48, 48], "crop_pct": 1.0, "crop_mode": "border"}),
    "border_cropped": ("coffee", None, "RGB", {"input_size": [3, 40, 40], "crop_pct": 0.8, "crop_mode": "border"}),
    "border_tall_image": (
        "chelsea", (120, 5, 233, 298), "RGB", {"input_size": [3, 40, 51], "crop_pct": 0.9, "crop_mode": "border"},
    ),
    "border_upscaled": (
        "astronaut", (200, 90, 217, 113), "RGB", {"input_size": [3, 45, 45], "crop_pct": 1.0, "crop_mode": "border"},
    ),
}  # fmt: skip


def expected(image: Image.Image, numbers: dict) -> torch.Tensor:
    return create_transform(**resolve_data_config({}, pretrained_cfg=numbers))(image)


def write(photographs: Path) -> None:
    tensors, cases = {}, {}
    for name, (photograph, box, mode, numbers) in CASES.items():
        image = Image.open(photographs / f"{photograph}.png").crop(box).convert(mode)
        tensors[name] = expected(image, numbers)
        cases[name] = {"photograph": photograph, "box": box, "mode": mode, "numbers": numbers}
    target = HERE / "preprocessing" / "timm.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file(tensors, target, {"timm": timm.__version__, "cases": json.dumps(cases)})
    print(f"{target}: {len(cases)} cases, {target.stat().st_size} bytes")


def check(folder: Path) -> None:
    sys.path.insert(0, str(HERE.parents[1]))
    from patchlib.preprocessing import Preprocess

    photographs = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    photographs = photographs[:: max(1, len(photographs) // 50)][:50]
    sizes = ([3, 224, 224], [3, 160, 160], [3, 192, 128], [3, 97, 133])
    options = list(
        itertools.product(sizes, (0.875, 0.9, 1.0), ("center", "squash", "border"), ("bicubic", "bilinear", "nearest"))
    )
    images = 0
    worst: dict[str, float] = {}

    def note(what: str, value: torch.Tensor) -> None:
        worst[what] = max(worst.get(what, 0.0), float(value))

    for i, path in enumerate(photographs):
        whole = Image.open(path).convert("RGB")
        width, height = whole.size
        for image in (whole, whole.crop((0, 0, width, height // 2 + i)), whole.crop((i, 3, i + 60 + i, height))):
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)
            for size, crop_pct, crop_mode, interpolation in options[i % 4 :: 4]:
                numbers = {"input_size": size, "crop_pct": crop_pct, "crop_mode": crop_mode}
                prepare = Preprocess(**numbers, interpolation=interpolation)
                wanted = expected(image, {**numbers, "interpolation": interpolation})
                images += 1
                note("PIL image", (prepare(image)[0] - wanted).abs().max())
                levels = 255 * torch.tensor(prepare.std)[:, None, None]
                for kind, tensor in (("uint8", pixels), ("float", pixels / 255)):
                    off = ((prepare(tensor)[0] - wanted) * levels).abs()
                    note(f"{kind} {interpolation}, grey levels", off.max())
                    note(f"{kind} {interpolation}, grey levels, mean of an image", off.mean())
    print(f"{len(photographs)} photographs as {images} inputs; largest differences from timm {timm.__version__}:")
    for what, value in worst.items():
        print(f"    {what}: {value:.2g}")
    if not photographs or worst["PIL image"] > 1e-5:
        sys.exit("no photographs found" if not photographs else "patchlib differs from timm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with patchlib on the folder's photographs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (check if arguments.check else write)(arguments.folder)
