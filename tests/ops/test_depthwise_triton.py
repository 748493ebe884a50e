"""The Triton kernels against torch in float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before the kernels are imported, so this file is also the program that runs them in a
process of their own and prints what it found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# batch, channels, height, width, kernel height and width, padding down and across
SHAPES = {
    "square": (2, 16, 5, 5, 3, 3, 1, 1),
    "channels that no block divides": (1, 21, 4, 6, 3, 3, 1, 1),
    "several strips and blocks": (1, 48, 3, 19, 3, 3, 1, 1),
    "larger than the image": (2, 16, 3, 2, 5, 5, 2, 2),
    "even, no border": (1, 16, 6, 5, 4, 2, 0, 0),
    "tall, wide border": (2, 16, 4, 3, 5, 1, 4, 0),
    "seven": (1, 16, 3, 4, 7, 7, 3, 3),
}
HALF = {"square bfloat16": torch.bfloat16, "square float16": torch.float16}
PARTS = ("forward", "input_grad", "weight_grad", "bias_grad", "fused")


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def errors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    from patchlib.ops import depthwise as ops

    batch, channels, height, width, *kernel, down, across = shape
    x = torch.randn((batch, channels, height, width), device=device).to(dtype)
    weight = (torch.randn((channels, 1, *kernel), device=device) / kernel[0]).to(dtype)
    bias, scale, shift = (torch.randn(channels, device=device).to(dtype) for _ in range(3))
    size = (batch, channels, height + 2 * down - kernel[0] + 1, width + 2 * across - kernel[1] + 1)
    grad = torch.randn(size, device=device).to(dtype)
    found = []
    for route, to in ((ops.TRITON, dtype), (ops.TORCH, torch.float64)):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight, bias)]
        y = ops.depthwise_conv2d(*leaves, 1, (down, across), route=route)
        into = torch.autograd.grad(y, leaves, grad.to(to))
        with torch.no_grad():
            affine = scale.to(to), shift.to(to)
            fused = ops.depthwise_gelu_affine(*leaves, *affine, (down, across), route=route)
        found.append((y.detach(), *into, fused))
    return {part: relative(got, want) for part, got, want in zip(PARTS, *found, strict=True)}


def compiled(device: str) -> dict[str, float]:
    """Differences between eager and compiled, through the registered operators."""
    from patchlib.ops import depthwise as ops

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return ops.depthwise_conv2d(x, weight, None, 1, 1, route=ops.TRITON)

    leaves = [torch.randn(2, 16, 4, 4, device=device), torch.randn(16, 1, 3, 3, device=device)]
    leaves = [t.requires_grad_() for t in leaves]
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    return {part: relative(a, b.double()) for part, a, b in zip(PARTS, *results, strict=False)}


def checked(device: str) -> dict[str, bool]:
    """torch's own checks of a registered operator, and the same bits twice."""
    from patchlib.ops import depthwise as ops

    x = torch.randn(2, 16, 4, 4, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 1, 3, 3, device=device)
    operator = torch.ops.patchlib.depthwise_conv2d
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    passed = torch.library.opcheck(operator, (x.requires_grad_(), weight, None, (1, 1)), test_utils=utils)
    x = x.detach()
    twice = [ops.depthwise_weight_grad(x, x, 3, 1, route=ops.TRITON) for _ in range(2)]
    return {
        **{name: state == "SUCCESS" for name, state in passed.items()},
        "same bits": torch.equal(*twice),
        "channels_last": operator(x, weight, None, (1, 1)).is_contiguous(memory_format=torch.channels_last),
    }


def main(device: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = {name: (shape, torch.float32) for name, shape in SHAPES.items()}
    cases.update({name: (SHAPES["square"], dtype) for name, dtype in HALF.items()})
    found = {name: errors(*case, device) for name, case in cases.items()}
    print(json.dumps({"errors": found, "compiled": compiled(device), "checked": checked(device)}))


@pytest.fixture(scope="module")
def found() -> dict:
    pytest.importorskip("triton", reason="triton is not installed; it comes with torch's CUDA builds")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run([sys.executable, __file__, device], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {"device": device, **json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.parametrize("name", [*SHAPES, *HALF])
def test_equals_float64(found, name):
    # the interpreter cuts bfloat16 off where hardware rounds it
    bounds = {"square bfloat16": 3e-3 if found["device"] == "cuda" else 8e-3, "square float16": 1e-3}
    for part, error in found["errors"][name].items():
        assert error < bounds.get(name, 1e-6), part


def test_compiles_to_one_graph(found):
    assert all(error < 1e-6 for error in found["compiled"].values())


def test_operators_are_registered_as_torch_wants_them(found):
    assert found["checked"] == dict.fromkeys(found["checked"], True)


def test_tiles_fit_the_shape():
    pytest.importorskip("triton", reason="triton is not installed; it comes with torch's CUDA builds")
    from patchlib.ops.depthwise_triton import Tile, _fitted

    tile = Tile(8, 64, 8, 4)
    assert _fitted(tile, 768, 32, 7) == tile
    assert _fitted(tile, 96, 14, 7) == Tile(7, 32, 8, 2)
    assert _fitted(tile, 512, 12, 9).cols == 6
    assert _fitted(tile, 40, 1, 3) == Tile(1, 16, 8, 1)


if __name__ == "__main__":
    main(sys.argv[1])
