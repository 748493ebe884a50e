"""Global response normalisation with a backward of its own, against autograd's."""

import pytest
import torch

from patchlib.ops.grn import global_response_norm, global_response_norm_reference


def drawn(*shape, dtype=torch.float64, channels=5):
    x, weight, bias = torch.randn(*shape, channels), torch.randn(channels), torch.randn(channels)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def gradients(function, inputs):
    y = function(*inputs)
    return [y, *torch.autograd.grad(y.sin().sum(), [t for t in inputs if t.requires_grad])]


def close(function, other, inputs, tolerance=1e-12):
    for mine, theirs in zip(gradients(function, inputs), gradients(other, inputs), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 7), (3, 1, 1)])
def test_it_is_differentiated_once_and_twice(shape):
    inputs = drawn(*shape)
    torch.autograd.gradcheck(global_response_norm, inputs)
    torch.autograd.gradgradcheck(global_response_norm, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_it_is_the_reference_in_every_dtype(dtype, tolerance):
    close(global_response_norm, global_response_norm_reference, drawn(2, 6, 6, dtype=dtype, channels=32), tolerance)


def test_its_own_gradient_is_used():
    names = [t.grad_fn.name() for t in (global_response_norm(*drawn(2, 3, 4)),)]
    assert names == ["_GRNBackward"]


@pytest.mark.parametrize("frozen", [1, 2])
def test_what_is_frozen_has_no_gradient(frozen):
    inputs = drawn(2, 3, 4)
    inputs[frozen].requires_grad_(False)
    close(global_response_norm, global_response_norm_reference, inputs)


def test_channels_of_zeros():
    inputs = drawn(2, 3, 4)
    with torch.no_grad():
        inputs[0][0, ..., 2] = 0
        inputs[0][1] = 0
    close(global_response_norm, global_response_norm_reference, inputs)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, w, b: torch.func.grad(lambda *t: f(*t).sin().sum(), (0, 1, 2))(x, w, b)[0],
        lambda f, x, w, b: torch.func.jvp(f, (x, w, b), (x, w, b))[1],
        lambda f, x, w, b: torch.vmap(lambda t: f(t[None], w, b))(x),
        lambda f, x, w, b: torch.func.jacrev(f, 1)(x, w, b),
    ],
)
def test_function_transforms(transform):
    x, weight, bias = drawn(2, 3, 4)
    found, wanted = (transform(f, x, weight, bias) for f in (global_response_norm, global_response_norm_reference))
    assert torch.allclose(found, wanted)


def test_compiles_to_one_graph():
    compiled = torch.compile(global_response_norm, fullgraph=True, backend="aot_eager")
    close(compiled, global_response_norm_reference, drawn(2, 3, 4))


def test_batched_gradients():
    inputs = drawn(2, 3, 4)
    torch.autograd.gradcheck(global_response_norm, inputs, check_batched_grad=True)


def test_traces():
    x, weight, bias = drawn(2, 3, 4)
    traced = torch.jit.trace(global_response_norm, (x, weight, bias))
    assert torch.equal(traced(x, weight, bias), global_response_norm(x, weight, bias))
    assert "PythonOp" not in str(traced.graph)
