"""Linear layers by oneDNN, where they are, against torch's in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from patchlib.layers.linear import Linear
from patchlib.ops import linear as ops

ROWS, INPUTS, OUTPUTS = 48, 40, 56


@pytest.fixture(autouse=True)
def _all_sizes(monkeypatch):
    monkeypatch.setattr(ops, "LEAST", 0)


@pytest.fixture(params=["here", "elsewhere"])
def machine(request, monkeypatch):
    """This one, and one of the kind that was measured: oneDNN computes on any processor with torch's build for x86."""
    if request.param == "elsewhere":
        try:
            ops._product(torch.ones(1, 1), torch.ones(1, 1))
        except (RuntimeError, AttributeError):
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(ops, "FASTER", True)
    return request.param


def layouts(rows, columns):
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).T
    yield torch.randn(rows, 2 * columns)[:, ::2]
    yield torch.randn(rows, columns + 8)[:, 3 : columns + 3]
    yield torch.randn(rows, 1).expand(rows, columns)
    yield torch.randn(1).expand(rows, columns)
    yield torch.randn(rows * columns + 1)[1:].view(rows, columns)


def close(found, wanted, tolerance=2e-6):
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def test_any_layout_forward_and_backward(machine):
    biases = [None, torch.randn(OUTPUTS), torch.randn(2 * OUTPUTS)[::2], torch.randn(1).expand(OUTPUTS)]
    for x, weight, bias in itertools.product(layouts(ROWS, INPUTS), layouts(OUTPUTS, INPUTS), biases):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        found, wanted = ops.linear(*inputs), F.linear(*exact)
        close(found, wanted)
        for grad in (torch.randn(OUTPUTS, ROWS).T, torch.randn(1).expand(ROWS, OUTPUTS)):
            ours = torch.autograd.grad(found, inputs, grad, retain_graph=True)
            theirs = torch.autograd.grad(wanted, exact, grad.double(), retain_graph=True)
            for a, b in zip(ours, theirs, strict=True):
                close(a, b)


@pytest.mark.parametrize("outputs", [INPUTS - 8, INPUTS + 8])
def test_more_dimensions_and_both_orders_of_the_weight_gradient(machine, outputs):
    layer, x = Linear(INPUTS, outputs), torch.randn(3, 4, 5, INPUTS, requires_grad=True)
    exact = copy.deepcopy(layer).double()
    layer(x).square().sum().backward()
    double = x.detach().double().requires_grad_()
    F.linear(double, exact.weight, exact.bias).square().sum().backward()
    for mine, theirs in ((x, double), (layer.weight, exact.weight), (layer.bias, exact.bias)):
        close(mine.grad, theirs.grad)
        assert mine.grad.stride() == mine.stride()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(machine, wanted):
    tensors = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    inputs = [t.requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    ops.linear(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == list(wanted)


def test_it_is_differentiated_again_and_in_batches(machine):
    x, weight = torch.randn(ROWS, INPUTS, requires_grad=True), torch.randn(OUTPUTS, INPUTS, requires_grad=True)

    def penalty(function):
        (into_x,) = torch.autograd.grad(function(x, weight).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(into_x.square().sum(), (x, weight))

    for a, b in zip(penalty(ops.linear), penalty(F.linear), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    grads = torch.randn(3, ROWS, OUTPUTS)
    ours, theirs = (
        torch.autograd.grad(function(x, weight), (x, weight), grads, is_grads_batched=True)
        for function in (ops.linear, F.linear)
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_transforms_compilers_autocast_and_counters_see_a_linear_layer(machine):
    layer, x = Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS)
    wanted = F.linear(x, layer.weight, layer.bias)
    same = {
        "vmap": torch.vmap(layer)(x[:, None])[:, 0],
        "jvp": torch.func.jvp(layer, (x,), (x,))[0],
        "trace": torch.jit.trace(layer, (x,))(x),
        "export": torch.export.export(layer, (x,)).module()(x),
        "compile": torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
    }
    for name, found in same.items():
        assert torch.allclose(found, wanted, atol=1e-5), name
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        layer(x.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * ROWS * INPUTS * OUTPUTS


def test_compiles_to_one_graph_for_any_batch(machine):
    layer, x = Linear(INPUTS, OUTPUTS), torch.randn(3, ROWS, INPUTS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 1, 2):
        entry = x[:batch].clone().requires_grad_()
        found = compiled(entry)
        wanted = layer(entry)
        assert torch.allclose(found, wanted, atol=1e-5)
        inputs = [entry, layer.weight, layer.bias]
        ours, theirs = (torch.autograd.grad(y.sin().sum(), inputs) for y in (found, wanted))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_the_operator_is_registered_as_torch_wants_it():
    try:
        args = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS), torch.randn(OUTPUTS)
        ops._product(*args)
    except (RuntimeError, AttributeError):
        pytest.skip("this torch has no oneDNN")
    torch.library.opcheck(torch.ops.patchlib.linear, args)


def test_torchs_own_errors(machine):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS + 1))
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS).double())


def test_small_products_stay_torchs(monkeypatch):
    monkeypatch.setattr(ops, "FASTER", True)
    monkeypatch.setattr(ops, "_product", lambda *_: pytest.fail("one token is not for oneDNN"))
    ops.linear(torch.randn(1, 4096), torch.randn(4096, 4096))
