"""Time and memory of inference against the size of the image, the batch, the depth and the context.

Memory is what the steps add to that of the weights, with large tensors given back at once (see `memory`).
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from .runner import Job, Options, Piece, Row, in_turn

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "100000"}
SIDES, BATCHES, DEPTHS, CONTEXTS = (
    (64, 128, 256, 512, 1024),
    (1, 2, 4, 8, 16),
    (4, 8, 16, 32),
    (64, 128, 256, 512, 1024),
)
LANGUAGE = {"vocab_size": 1024, "dim": 192, "depth": 6}
CONVMIXER = {"dim": 256, "kernel_size": 7, "patch_size": 8, "num_classes": 1000}


def image_piece(model: str, batch: int, side: int, depth: int) -> Piece:
    """A small model of `depth` blocks; ConvNeXt's are spread evenly over its four stages."""
    options: dict[str, dict[str, Any]] = {
        "vit_tiny_patch16_224": {"img_size": side, "depth": depth},
        "convnextv2_atto": {"depths": (depth // 4, depth // 4, depth // 4, depth // 4)},
        "ConvMixer": {**CONVMIXER, "depth": depth},
    }
    return Piece(model, options[model], "inference", "fp32", batch, side)


def text_piece(model: str, context: int) -> Piece:
    options = {**LANGUAGE, "context": context, **({"heads": 6} if model == "GPT" else {})}
    return Piece(model, options, "inference", "fp32", 1, 0, context)


def exponent(x: Sequence[float], y: Sequence[float], last: int = 3) -> float:
    """The slope of log y over log x, by least squares over the `last` points, where constant costs matter least."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x[-last:], y[-last:], strict=True)]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def run(name: str, contenders: Sequence[str], x: Sequence[int], pieces: list[Piece], options: Options) -> Row:
    quick = options._replace(rounds=min(2, options.rounds), seconds=options.seconds / 20)
    times: dict[str, list[list[float]]] = {}
    rates: list[float] = []
    versions: dict[str, str] = {}
    for contender, answer in in_turn(contenders, pieces, quick):
        seconds = times.setdefault(contender, [[] for _ in pieces])
        for so_far, found in zip(seconds, answer["pieces"], strict=True):
            so_far += found["seconds"]
        rates.append(answer["gflops"])
        versions |= answer["versions"]
    curves = {
        contender: {"x": list(map(float, x)), "s": [statistics.median(piece) for piece in pieces_of]}
        for contender, pieces_of in times.items()
    }
    for contender, answer in in_turn(contenders, pieces, quick._replace(rounds=1, seconds=0), **GIVE_BACK):
        curves[contender]["MB"] = [max(found["added"], 4096) / 1e6 for found in answer["pieces"]]  # a page at least
    values = {contender: curve["s"][-1] for contender, curve in curves.items()}
    return Row(name, "s", values, gflops=statistics.median(rates), versions=versions, curves=curves)


SETTING = (
    "Where it is not what grows: one sample, 224 pixels, 8 blocks (language models have 6). Tokens grow with the "
    "square of the image's side, so an exponent in tokens is half of one in the side. Exponents are those of the last "
    "three sizes; memory is what a step adds to the weights."
)


def jobs() -> list[Job]:
    axes = {
        "image side": (SIDES, lambda model, x: image_piece(model, 1, x, 8)),
        "batch": (BATCHES, lambda model, x: image_piece(model, x, 224, 8)),
        "depth": (DEPTHS, lambda model, x: image_piece(model, 1, 224, x)),
    }
    found = []
    for axis, (sizes, piece) in axes.items():
        for model in ("vit_tiny_patch16_224", "convnextv2_atto", "ConvMixer"):
            name = f"{model}, {axis}"
            pieces = [piece(model, x) for x in sizes]
            found.append(Job(name, partial(run, name, ("patchlib", "timm"), sizes, pieces)))
    for model, contenders in {"GPT": ("patchlib", "transformers"), "CausalConvLM": ("patchlib",)}.items():
        name = f"{model}, context"
        pieces = [text_piece(model, x) for x in CONTEXTS]
        found.append(Job(name, partial(run, name, contenders, CONTEXTS, pieces)))
    return found
