"""Positions against the papers' formulas in double precision, torch's resampling, and complex numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from patchlib import ConfigError, InputError, LearnedPE, RotaryPE, SinusoidalPE
from patchlib.layers.pos_embed import rotate, sinusoid


def formula(positions, dim, temperature=10_000.0):
    """Section 3.5 of "Attention Is All You Need", number by number."""
    rows = []
    for p in positions:
        row = [0.0] * dim
        for i in range(dim // 2):
            row[2 * i] = math.sin(p / temperature ** (2 * i / dim))
            row[2 * i + 1] = math.cos(p / temperature ** (2 * i / dim))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


# --- sinusoidal


@pytest.mark.parametrize(("dim", "temperature"), [(2, 10_000.0), (6, 10_000.0), (64, 10_000.0), (16, 100.0)])
def test_sinusoid_is_the_papers_formula(dim, temperature):
    found = sinusoid(torch.arange(300), dim, temperature)
    assert torch.allclose(found.double(), formula(range(300), dim, temperature), atol=1e-4)
    assert found[0].tolist() == [0.0, 1.0] * (dim // 2)


def test_exponential_and_power_form_of_the_frequencies_agree():
    dim = 128
    i = torch.arange(dim // 2, dtype=torch.float64)
    power = 10_000.0 ** (-2 * i / dim)
    exponential = torch.exp(-math.log(10_000.0) * 2 * i / dim)
    assert torch.allclose(power, exponential, rtol=1e-14)
    positions = torch.arange(196, dtype=torch.float64)[:, None]
    found = sinusoid(torch.arange(196), dim).double()
    for frequencies in (power, exponential):
        assert torch.allclose(found[:, 0::2], (positions * frequencies).sin(), atol=1e-4)
        assert torch.allclose(found[:, 1::2], (positions * frequencies).cos(), atol=1e-4)


def test_positions_of_patches_broadcast_against_the_dim():
    """``(patches, 1)`` against ``(dim,)`` gives ``(patches, dim)``, added to every sample of a batch."""
    patches, dim = 12, 8
    place, k = torch.arange(patches)[:, None], torch.arange(dim)
    angles = place / 10_000 ** (2 * (k // 2) / dim)
    table = torch.where(k % 2 == 0, angles.sin(), angles.cos())
    assert table.shape == (patches, dim)
    x = torch.randn(3, patches, dim)
    assert torch.allclose(SinusoidalPE(dim)(x), x + table, atol=1e-6)


def test_nearness_is_the_same_everywhere():
    """The product of two positions' vectors depends on their distance alone."""
    table = sinusoid(torch.arange(50), 32)
    products = table @ table.T
    for distance in (1, 7, 20):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)


def test_one_axis_counts_a_grid_in_reading_order():
    grid = torch.zeros(2, 3, 5, 8)
    found = SinusoidalPE(8)(grid)
    assert torch.allclose(found[1].flatten(0, 1).double(), formula(range(15), 8), atol=1e-5)
    assert torch.equal(found.flatten(1, 2), SinusoidalPE(8)(grid.flatten(1, 2)))


def test_two_axes_give_half_the_dim_to_each():
    found = SinusoidalPE(8, axes=2)(torch.zeros(1, 3, 5, 8))[0].double()
    for row in range(3):
        for column in range(5):
            wanted = torch.cat([formula([row], 4)[0], formula([column], 4)[0]])
            assert torch.allclose(found[row, column], wanted, atol=1e-6)


def test_two_axes_give_prefix_tokens_nothing():
    x = torch.randn(2, 3 + 6, 8)
    found = SinusoidalPE(8, axes=2)(x, size=(2, 3), prefix=3)
    assert torch.equal(found[:, :3], x[:, :3])
    grid = SinusoidalPE(8, axes=2)(x[:, 3:].unflatten(1, (2, 3)))
    assert torch.equal(found[:, 3:], grid.flatten(1, 2))


def test_any_length_works_and_nothing_is_stored():
    positions = SinusoidalPE(4)
    assert not list(positions.parameters())
    assert not list(positions.buffers())
    long = positions(torch.zeros(1, 20_000, 4))
    assert long.isfinite().all()
    assert torch.equal(long[:, :10], positions(torch.zeros(1, 10, 4)))


def test_the_dtype_stays():
    assert SinusoidalPE(4)(torch.zeros(1, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert LearnedPE(4, 2)(torch.zeros(1, 2, 2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dim", "axes", "message"), [(7, 1, "dim: found 7"), (6, 2, "multiple of 4"), (8, 3, "axes: found 3")]
)
def test_impossible_sinusoids_are_refused(dim, axes, message):
    with pytest.raises(ConfigError, match=message):
        SinusoidalPE(dim, axes=axes)


def test_two_axes_of_a_sequence_need_its_size():
    with pytest.raises(InputError, match="size="):
        SinusoidalPE(8, axes=2)(torch.zeros(1, 6, 8))


# --- learned


def test_the_table_is_added():
    positions = LearnedPE(4, (2, 3), prefix=1)
    x = torch.randn(2, 7, 4)
    assert positions.table.std() > 0
    assert torch.equal(positions(x), x + positions.table)
    grid = LearnedPE(4, (2, 3))
    assert torch.equal(grid(x[:, 1:].unflatten(1, (2, 3))), x[:, 1:].unflatten(1, (2, 3)) + grid.table.view(2, 3, 4))


@pytest.mark.parametrize("new", [(4, 6), (3, 3), (1, 2), (5, 2)])
def test_another_grid_gets_the_table_resampled(new):
    positions = LearnedPE(4, (2, 3), prefix=2)
    image = positions.table[:, 2:].reshape(1, 2, 3, 4).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    wanted = torch.cat([positions.table[0, :2], image[0].flatten(1).T])
    found = positions(torch.zeros(1, 2 + new[0] * new[1], 4), size=new)
    assert torch.allclose(found[0], wanted, atol=1e-6)
    positions.resize(new)
    assert positions.size == new
    assert torch.allclose(positions.table[0], wanted, atol=1e-6)


def test_a_grid_tells_its_size_itself():
    positions = LearnedPE(4, 2)
    positions.table.data.fill_(3.0)
    assert torch.allclose(positions(torch.zeros(2, 5, 4, 4)), torch.full((2, 5, 4, 4), 3.0), atol=1e-5)


def test_resizing_keeps_what_it_can():
    positions = LearnedPE(4, 2).requires_grad_(False)
    table = positions.table
    positions.resize((2, 2))
    assert positions.table is table
    positions.resize(3)
    assert not positions.table.requires_grad, "what was frozen stays frozen"


def test_gradients_reach_the_table_through_resampling():
    positions = LearnedPE(4, 2)
    positions(torch.zeros(1, 3, 5, 4)).square().sum().backward()
    assert positions.table.grad.abs().min() > 0


def test_learned_positions_say_what_they_need():
    with pytest.raises(InputError, match="found 6 patches for a table of 2 x 2"):
        LearnedPE(4, 2)(torch.zeros(1, 6, 4))
    with pytest.raises(InputError, match="1 prefix tokens"):
        LearnedPE(4, 2, prefix=1)(torch.zeros(1, 2, 2, 4))


# --- rotary


def test_rotation_is_a_complex_product():
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(5, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angles)[:, None]
    found = rotate(x, angles)
    assert torch.allclose(found, torch.cat([turned.real, turned.imag], dim=-1), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(rotate(x, torch.zeros(5, 4)), x)


def test_each_sample_may_have_angles_of_its_own():
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4)
    wanted = torch.stack([rotate(x[i : i + 1], angles[i])[0] for i in range(2)])
    assert torch.equal(rotate(x, angles), wanted)


def test_angles_are_rows_and_columns_times_the_frequencies():
    angles = RotaryPE(8, temperature=100.0)((3, 4)).double()
    assert angles.shape == (12, 4)
    for row in range(3):
        for column in range(4):
            wanted = [row, row / 10.0, column, column / 10.0]  # 100 ** (-2 * 1 / 4) is a tenth
            assert angles[row * 4 + column].tolist() == pytest.approx(wanted, rel=1e-6)


def test_products_of_queries_and_keys_depend_on_the_offset_alone():
    height, width = 5, 6
    angles = RotaryPE(16)((height, width))
    q, k = torch.randn(16), torch.randn(16)
    tokens = height * width
    queries = rotate(q.expand(1, tokens, 1, 16), angles)[0, :, 0].view(height, width, 16)
    keys = rotate(k.expand(1, tokens, 1, 16), angles)[0, :, 0].view(height, width, 16)
    for down, right in ((0, 0), (1, 0), (0, 2), (3, 1)):
        products = (queries[: height - down, : width - right] * keys[down:, right:]).sum(-1)
        assert torch.allclose(products, products[0, 0].expand_as(products), atol=1e-4)
    apart = (queries[0, 0] * keys[1, 0]).sum() - (queries[0, 0] * keys[0, 1]).sum()
    assert apart.abs() > 1e-3, "rows and columns are told apart"


def test_prefix_tokens_do_not_turn():
    angles = RotaryPE(8)((2, 2), prefix=3)
    assert angles.shape == (7, 4)
    assert not angles[:3].any()
    assert torch.equal(angles[3:], RotaryPE(8)((2, 2)))


def test_two_axes_need_a_multiple_of_four():
    with pytest.raises(ConfigError, match="head_dim: found 6"):
        RotaryPE(6)
