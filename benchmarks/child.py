"""One contender at its work, in a process of its own: ``python child.py TASK``, with the python of its library.

It imports torch and that library alone. TASK is JSON: ``{"contender", "pieces", "seconds", "threads"}``. A contender
is a library and a way to use it, as in ``timm channels_last``. The answer, the last line printed, has each piece's
times in seconds and its peak memory, and the rate of this machine's matrix products.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

Piece = dict[str, Any]  # `runner.Piece`, which this file does not import, to run where only torch is


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x) + x


def plain_convmixer(
    dim: int = 512, depth: int = 4, kernel_size: int = 9, patch_size: int = 16, num_classes: int = 2
) -> nn.Module:
    """ConvMixer as its paper writes it: one `nn.Sequential` of torch's own modules."""

    def mix(*conv: Any, **options: Any) -> list[nn.Module]:
        return [nn.Conv2d(*conv, **options), nn.GELU(), nn.BatchNorm2d(dim)]

    return nn.Sequential(
        *mix(3, dim, patch_size, stride=patch_size),
        *(
            nn.Sequential(
                Residual(nn.Sequential(*mix(dim, dim, kernel_size, groups=dim, padding="same"))), *mix(dim, dim, 1)
            )
            for _ in range(depth)
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(dim, num_classes),
    )


def create(library: str, way: str, model: str, options: dict[str, Any]) -> Any:
    if library == "plain":
        return plain_convmixer(**options)
    if library == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        names = {"context": "n_positions", "dim": "n_embd", "depth": "n_layer", "heads": "n_head"}
        sizes = {names.get(key, key): value for key, value in options.items()}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None))
    home = importlib.import_module(library)
    if way == "memory_efficient":
        options = {**options, "memory_efficient": True}
    if model[0].islower():
        return home.create_model(model, **options)
    if library == "timm":
        home = importlib.import_module("timm.models.convmixer")
    return getattr(home, model)(**options)


def step_of(contender: str, piece: Piece) -> Callable[[], object]:
    """A function that does the work once."""
    library, _, way = contender.partition(" ")
    half, batch, side, tokens = piece["dtype"] == "bf16", piece["batch"], piece["side"], piece["tokens"]
    model = create(library, way, piece["model"], piece["options"]).train(piece["what"] == "training")
    inputs = torch.randn(batch, 3, side, side) if side else torch.randint(piece["options"]["vocab_size"], (batch, 16))
    if way == "channels_last":
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    if way == "cast":
        model, inputs = model.bfloat16(), inputs.bfloat16()
    if way == "optimize":
        model = importlib.import_module("patchlib").optimize(model, dtype="bf16" if half else None, sample=inputs)
    autocast = half and way not in ("cast", "optimize")
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def train() -> None:
        with cast:
            loss = model(inputs).float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    def infer() -> object:
        with torch.inference_mode(), cast:
            return model(inputs)

    def generate() -> object:
        if library == "patchlib":
            return importlib.import_module("patchlib.generation").generate(model, inputs, tokens, temperature=0)
        mask = torch.ones_like(inputs)
        return model.generate(
            inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0
        )

    if piece["what"] == "inference" and not side:
        inputs = torch.randint(piece["options"]["vocab_size"], (batch, tokens))
    return {"training": train, "inference": infer, "generate": generate}[piece["what"]]


def memory(field: str) -> int:
    """Bytes of resident memory: now, "VmRSS", or at most since the last `forget_peak`, "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(contender: str, piece: Piece, seconds: float) -> dict[str, Any]:
    """Times after a first step that warms up; memory: the peak so far, and what a step adds while it runs."""
    torch.manual_seed(0)
    step = step_of(contender, piece)
    step()
    first, before = memory("VmHWM"), memory("VmRSS")
    forget_peak()
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = memory("VmHWM")
    return {"seconds": times, "peak": max(first, peak), "added": peak - before}


def matrix_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of matrix products, the best of a few."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    contender, pieces = task["contender"], task["pieces"]
    answer: dict[str, Any] = {"pieces": [measure(contender, piece, task["seconds"]) for piece in pieces]}
    half = bool(pieces) and pieces[0]["dtype"] == "bf16"
    answer["gflops"] = matrix_rate(torch.bfloat16 if half else torch.float32)
    library = contender.partition(" ")[0]
    answer["versions"] = {name: version(name) for name in ("torch", library) if name != "plain"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
