"""Global response normalisation against the paper's algorithm 1, in double precision."""

import pytest
import torch

from patchlib import GRN


def papers(x, gamma, beta, eps=1e-6):
    """``gx = |x| over space; nx = gx / (mean of gx + eps); gamma * (x * nx) + beta + x``, channels last."""
    gx = (x**2).sum(dim=(1, 2), keepdim=True).sqrt()
    nx = gx / (gx.mean(dim=-1, keepdim=True) + eps)
    return gamma * (x * nx) + beta + x


def drawn(dim, **options):
    grn = GRN(dim, **options)
    torch.nn.init.normal_(grn.weight), torch.nn.init.normal_(grn.bias)
    return grn


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_it_is_the_papers(eps):
    grn, x = drawn(5, eps=eps), torch.randn(2, 3, 4, 5)
    wanted = papers(x.double(), grn.weight.double(), grn.bias.double(), eps)
    assert torch.allclose(grn(x).double(), wanted, atol=1e-5)


def test_gradients_are_the_papers():
    grn, x = drawn(5).double(), torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(grn(x).sin().sum(), [x, grn.weight, grn.bias])
    wanted = torch.autograd.grad(papers(x, grn.weight, grn.bias).sin().sum(), [x, grn.weight, grn.bias])
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_a_sequence_is_a_grid_in_reading_order():
    grn, grid = drawn(5), torch.randn(2, 3, 4, 5)
    assert torch.allclose(grn(grid).flatten(1, 2), grn(grid.flatten(1, 2)), atol=1e-6)


def test_it_starts_as_the_identity():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(GRN(5)(x), x)


def test_samples_do_not_mix():
    grn, x = drawn(5), torch.randn(2, 3, 4, 5)
    assert torch.allclose(grn(x)[1:], grn(x[1:]), atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_does_not_overflow(dtype, tolerance):
    grn, x = drawn(4).to(dtype), (300 * torch.randn(1, 16, 16, 4)).to(dtype)
    found = grn(x)
    assert found.dtype == dtype
    wanted = papers(x.double(), grn.weight.double(), grn.bias.double())
    assert (found.double() - wanted).abs().max() < tolerance * wanted.abs().max()


def test_a_channel_of_zeros_has_finite_gradients():
    x = torch.randn(1, 3, 3, 4)
    x[..., 2] = 0
    x.requires_grad_()
    drawn(4)(x).sum().backward()
    assert x.grad.isfinite().all()
