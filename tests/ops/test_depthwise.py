"""The depthwise convolution against torch's own, in float64 where rounding matters."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from patchlib.errors import InputError
from patchlib.ops import depthwise as ops

LAST = torch.channels_last
FLIP = ops.Route(input_grad="flip")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def made(*shape: int, kernel: tuple[int, int] = (5, 5), last: bool = True, dtype: torch.dtype = torch.float32):
    """An input, kernels and a bias, as leaves."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST if last else torch.contiguous_format)
    weight = (torch.randn(shape[1], 1, *kernel) / kernel[0]).to(dtype)
    return [t.requires_grad_() for t in (x, weight, torch.randn(shape[1]).to(dtype))]


def gradients(function, inputs, grad=None):
    """The result, and the gradients for all inputs, from one gradient for the result."""
    y = function(*inputs)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, inputs, grad)


# --- the numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "padding", "last"),
    [((3, 3), "same", True), ((2, 4), "same", False), ((3, 2), (0, 1), True), ((1, 5), (0, 2), False)],
)
def test_gradcheck_first_and_second_order(kernel, padding, last):
    inputs = made(2, 2, 3, 4, kernel=kernel, last=last, dtype=torch.float64)
    function = functools.partial(ops.depthwise_conv2d, padding=padding, route=ops.BATCH)
    assert function(*inputs).grad_fn.name() == "_DepthwiseBackward"
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@st.composite
def layers(draw):
    kernel = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    stride = draw(st.sampled_from([1, 1, 1, 2, (1, 3)]))
    dilation = draw(st.sampled_from([1, 1, 1, 2, (2, 1)]))
    same = stride == 1 and draw(st.booleans())
    padding = "same" if same else draw(st.tuples(st.integers(0, kernel[0]), st.integers(0, kernel[1])))
    side = st.integers(11, 14)
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 16, 33])), draw(side), draw(side))
    plain = stride == 1 and dilation == 1 and (same or (padding[0] < kernel[0] and padding[1] < kernel[1]))
    route = draw(st.sampled_from([None, ops.BATCH, FLIP])) if plain else None
    return shape, kernel, draw(st.booleans()), (stride, padding, dilation), route


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_equals_the_reference_on_any_shape(layer):
    shape, kernel, last, options, route = layer
    inputs = made(*shape, kernel=kernel, last=last)
    ours = gradients(lambda *a: ops.depthwise_conv2d(*a, *options, route=route), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = gradients(lambda *a: ops.depthwise_conv2d_reference(*a, *options), exact)
    for got, true in zip(ours, want, strict=True):
        assert got.shape == true.shape
        assert relative(got, true) < 1e-5


@pytest.mark.parametrize(("shape", "kernel"), [((32, 32, 12, 12), 9), ((18, 64, 32, 32), 5), ((1, 64, 40, 40), 7)])
@pytest.mark.parametrize("last", [True, False])
def test_rules_take_the_fast_gradients_and_they_are_accurate(shape, kernel, last):
    torch.set_num_threads(2)  # so the second shape takes two chunks, and the last has fewer samples than threads
    inputs = made(*shape, kernel=(kernel, kernel), last=last)
    assert ops.depthwise_conv2d(*inputs).grad_fn.name() == "_DepthwiseBackward"
    ours = gradients(ops.depthwise_conv2d, inputs)
    want = gradients(ops.depthwise_conv2d_reference, [t.detach().double().requires_grad_() for t in inputs])
    assert [relative(a, b) < 1e-5 for a, b in zip(ours, want, strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [True, False])
def test_half_precision_is_no_worse_than_torch(dtype, last):
    inputs = made(6, 32, 14, 14, kernel=(7, 7), last=last, dtype=dtype)
    ours = gradients(ops.depthwise_conv2d, inputs)
    torch_s = gradients(ops.depthwise_conv2d_reference, inputs)
    want = gradients(ops.depthwise_conv2d_reference, [t.detach().double().requires_grad_() for t in inputs])
    for got, theirs, true in zip(ours, torch_s, want, strict=True):
        assert got.dtype == dtype
        assert relative(got, true) <= 1.05 * relative(theirs, true)


def test_borders_too_wide_for_the_direct_kernel():
    inputs = made(2, 8, 9, 20, kernel=(13, 21))
    ours = gradients(functools.partial(ops.depthwise_conv2d, route=ops.BATCH), inputs)
    want = gradients(ops.depthwise_conv2d_reference, [t.detach().double().requires_grad_() for t in inputs])
    assert max(relative(a, b) for a, b in zip(ours, want, strict=True)) < 1e-5


@pytest.mark.parametrize("padding", [(1, 2), (0, 0), (2, 3)])
def test_pieces_equal_autograd(padding):
    x, weight, _ = made(3, 16, 9, 8, kernel=(3, 5))
    y = ops.depthwise_conv2d_reference(x, weight, None, 1, padding)
    grad = torch.randn_like(y)
    into_x, into_weight = torch.autograd.grad(y, (x, weight), grad)
    for route in (ops.TORCH, FLIP, ops.BATCH, None):
        with torch.no_grad():
            assert relative(ops.depthwise_input_grad(grad, weight, padding, route=route), into_x) < 1e-5
            assert relative(ops.depthwise_weight_grad(grad, x, (3, 5), padding, route=route), into_weight) < 1e-5


def test_gelu_affine_is_its_equation():
    x, weight, bias = (t.detach() for t in made(2, 8, 6, 6, kernel=(3, 3)))
    scale, shift = torch.randn(8), torch.randn(8)
    want = F.gelu(F.conv2d(x, weight, bias, 1, 1, 1, 8)) * scale.view(8, 1, 1) + shift.view(8, 1, 1)
    torch.testing.assert_close(ops.depthwise_gelu_affine(x, weight, bias, scale, shift, 1), want)


# --- layouts and corners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_keeps_the_memory_format(layout):
    inputs = made(4, 32, 16, 16, last=layout == LAST)
    y = ops.depthwise_conv2d(*inputs)
    (into_x,) = torch.autograd.grad(y.mean(), inputs[:1])  # an expanded gradient, without a format of its own
    assert y.is_contiguous(memory_format=layout)
    assert into_x.is_contiguous(memory_format=layout)


def test_views_without_either_format():
    inputs = made(4, 32, 16, 32)
    inputs[0] = inputs[0].detach()[:, :, :, ::2].requires_grad_()
    ours = gradients(functools.partial(ops.depthwise_conv2d, route=ops.BATCH), inputs)
    want = gradients(ops.depthwise_conv2d_reference, inputs)
    assert max(relative(a, b) for a, b in zip(ours, want, strict=True)) < 1e-5


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(wanted):
    inputs = [t.detach().requires_grad_(want) for t, want in zip(made(4, 32, 16, 16), wanted, strict=True)]
    ops.depthwise_conv2d(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == list(wanted)


def test_empty_batch_and_meta():
    _, weight, bias = made(1, 4, 8, 8)
    empty = ops.depthwise_conv2d(torch.zeros(0, 4, 8, 8), weight, bias)
    empty.sum().backward()
    assert empty.shape == (0, 4, 8, 8)
    assert not weight.grad.any()
    assert ops.depthwise_conv2d(torch.empty(2, 4, 8, 8, device="meta"), weight.to("meta")).shape == (2, 4, 8, 8)


def test_nothing_of_ours_without_gradients():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ops.depthwise_conv2d(*made(4, 32, 16, 16))
    assert counter.get_total_flops() == 2 * 25 * 4 * 32 * 16 * 16


def test_torch_computes_where_no_rule_fits():
    x, weight, _ = made(4, 32, 16, 16)
    assert ops.choose_route(x, weight, padding=2) == ops.BATCH
    assert ops.choose_route(x, weight[:, :, :3, :3]) == ops.TORCH
    assert ops.choose_route(x, weight, stride=2) == ops.TORCH
    assert ops.choose_route(x, weight, dilation=2) == ops.TORCH
    assert ops.choose_route(x, weight, padding=5) == ops.TORCH
    assert ops.choose_route(x[:1, :, :4, :4], weight) == ops.TORCH
    assert ops.choose_route(x.double(), weight.double()) == ops.TORCH
    assert ops.choose_route(x.bfloat16(), weight) == ops.TORCH
    assert ops.choose_route(x.to("meta"), weight.to("meta")) == ops.TORCH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (4, 8, 8)}, r"x has shape \(4, 8, 8\); it must be \(batch, channels, height, width\)"),
        ({"weight": (3, 1, 3, 3)}, r"weight has shape \(3, 1, 3, 3\); for 4 channels it must be \(4, 1,"),
        ({"weight": (4, 4, 3, 3)}, r"for 4 channels it must be \(4, 1, kernel height, kernel width\)"),
        ({"bias": (3,)}, r"bias has shape \(3,\); it must be \(4,\)"),
        ({"stride": 2}, r"padding='same' needs stride 1, found \(2, 2\); give the padding as numbers"),
        ({"padding": "valid"}, r"padding='valid'; it must be a number or a pair \(down, across\), or 'same'"),
        ({"dilation": (1, 2, 3)}, r"dilation=\(1, 2, 3\); it must be a number or a pair"),
    ],
)
def test_bad_arguments(arguments, message):
    shapes = {"x": (2, 4, 8, 8), "weight": (4, 1, 3, 3), "bias": (4,)}
    tensors = {name: torch.zeros(arguments.get(name, shape)) for name, shape in shapes.items()}
    others = {name: value for name, value in arguments.items() if name not in shapes}
    with pytest.raises(InputError, match=message):
        ops.depthwise_conv2d(**tensors, **others)


# --- everything that torch does with a convolution -------------------------------------------------------------


def squares(function, x, weight, bias):
    return function(x, weight, bias).square().mean()


def test_function_transforms():
    x, weight, bias = (t.detach() for t in made(4, 32, 16, 16))
    ours, theirs = (functools.partial(squares, f) for f in (ops.depthwise_conv2d, ops.depthwise_conv2d_reference))

    def close(transform):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-4, atol=1e-6)

    close(lambda f: torch.func.grad(f, (0, 1, 2))(x, weight, bias))
    close(lambda f: torch.func.jvp(f, (x, weight, bias), (x, weight, bias)))
    close(lambda f: torch.func.hessian(f, 2)(x, weight, bias).diagonal())
    each = (0, None, None)
    close(lambda f: torch.vmap(lambda x, *p: f(x[None], *p), each)(x, weight, bias))
    close(lambda f: torch.vmap(torch.func.grad(lambda x, *p: f(x[None], *p), (1, 2)), each)(x, weight, bias))


def test_vmap_under_autograd_and_over_kernels():
    x, weight, bias = made(4, 32, 16, 16)
    kernels = torch.stack([weight, 2 * weight])
    y = torch.vmap(ops.depthwise_conv2d, (None, 0, None))(x, kernels, bias)
    torch.testing.assert_close(y[1], ops.depthwise_conv2d_reference(x, 2 * weight, bias))
    y.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_forward_mode():
    x, weight, bias = made(4, 32, 16, 16)
    with forward_ad.dual_level():
        y = ops.depthwise_conv2d(forward_ad.make_dual(x, x), weight, bias)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, ops.depthwise_conv2d_reference(x, weight))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("route", [None, ops.TORCH, ops.BATCH])
def test_batched_gradients(route, last):
    inputs = made(4, 32, 16, 16, last=last)
    y = ops.depthwise_conv2d(*inputs, route=route)
    grads = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for a, b in zip(found, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True):
            assert relative(a[i], b) < 1e-5


@pytest.mark.parametrize("steps", [{"stride": 2, "padding": 2}, {"dilation": 2}])
def test_a_route_for_strides_and_dilations_is_torchs(steps):
    inputs = made(4, 32, 16, 16)
    found = ops.depthwise_conv2d(*inputs, route=ops.BATCH, **steps)
    assert torch.equal(found, ops.depthwise_conv2d_reference(*inputs, **steps))


def test_gradient_penalty():
    inputs = made(4, 32, 16, 16)

    def penalty(function):
        (into_x,) = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(into_x.square().sum(), inputs)

    for got, want in zip(penalty(ops.depthwise_conv2d), penalty(ops.depthwise_conv2d_reference), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, inside):
    inputs = made(4, 32, 16, 16)

    def step(function):
        with torch.autocast("cpu", dtype):
            y = function(*inputs)
            loss = y.float().square().sum()
            if inside:
                return y, *torch.autograd.grad(loss, inputs)
        return y, *torch.autograd.grad(loss, inputs)

    for got, want in zip(step(ops.depthwise_conv2d), step(ops.depthwise_conv2d_reference), strict=True):
        assert got.dtype == want.dtype
        assert relative(got, want) < 3e-3


def captured(function, *inputs):
    """What the function gives compiled as one graph, with the operators of its forward and backward."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch._dynamo.reset()
    results = gradients(torch.compile(function, backend=backend, fullgraph=True), inputs)
    return results, graphs


def test_compiles_to_one_graph():
    inputs = made(4, 32, 16, 16)
    results, (forward, backward) = captured(ops.depthwise_conv2d, *inputs)
    assert [name for name in forward if "conv" in name] == ["aten.convolution.default"]
    assert "patchlib.depthwise_weight_grad.default" in backward
    for got, want in zip(results, gradients(ops.depthwise_conv2d, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_with_any_batch_under_autocast():
    torch._dynamo.reset()
    _, weight, bias = made(1, 32, 16, 16)
    compiled = torch.compile(ops.depthwise_conv2d, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 5, 8):
        x = torch.randn(batch, 32, 16, 16).contiguous(memory_format=LAST)
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x, weight, bias)
        (into_weight,) = torch.autograd.grad(y.float().square().sum(), (weight,))
        assert y.dtype == torch.bfloat16
        assert into_weight.dtype == torch.float32


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_compiles_inside_transforms(transform):
    torch._dynamo.reset()
    x, weight, bias = made(4, 32, 16, 16)
    x = x.detach()[:, None]
    function = transform(lambda x: ops.depthwise_conv2d(x.view(-1, 32, 16, 16), weight, bias))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, bias = made(1, 32, 8, 8)
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, x):
        return ops.depthwise_conv2d(x, self.weight, self.bias)


@pytest.mark.parametrize("strict", [True, False])
def test_exports_a_convolution(strict):
    layer, x = Layer(), torch.randn(4, 32, 16, 16)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.conv2d.default"]
    x = torch.randn(7, 32, 16, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_traces_a_convolution():
    layer, x = Layer(), torch.randn(4, 32, 16, 16)
    traced = torch.jit.trace(layer, (x,))
    assert "aten::_convolution" in str(traced.inlined_graph) or "aten::conv2d" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x))


def test_counts_operations():
    inputs = made(4, 32, 16, 16)
    one = 2 * 25 * inputs[0].numel()
    with FlopCounterMode(display=False) as counter:
        gradients(ops.depthwise_conv2d, inputs)
    assert counter.get_total_flops() == 3 * one
    x = inputs[0].detach()
    with FlopCounterMode(display=False) as counter:
        torch.ops.patchlib.depthwise_weight_grad(x, x, (5, 5), (2, 2))
    assert counter.get_total_flops() == one
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, weight, _ = made(4, 32, 16, 16)
        torch.ops.patchlib.depthwise_conv2d(x, weight, None, (2, 2))
    assert counter.get_total_flops() == one


def test_operator_is_registered_as_torch_wants_it():
    x = made(2, 4, 8, 8)[0].detach()
    torch.library.opcheck(torch.ops.patchlib.depthwise_weight_grad, (x, x, (3, 3), (1, 1)))
