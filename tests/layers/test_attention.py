"""Attention against torch's own module and against the formula written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchlib import Attention, ConfigError, RotaryPE


def torchs(attention, dim):
    theirs = nn.MultiheadAttention(dim, attention.heads, bias=True, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.qkv.weight)
        theirs.in_proj_bias.copy_(attention.qkv.bias if attention.qkv.bias is not None else torch.zeros(3 * dim))
        theirs.out_proj.weight.copy_(attention.proj.weight)
        theirs.out_proj.bias.copy_(attention.proj.bias)
    return theirs


def written_out(attention, x, turn=lambda t: t, norm=lambda t: t):
    """softmax(q k / sqrt(d)) v, head by head, for ``(batch, tokens, dim)``."""
    inner, d = attention.heads * attention.head_dim, attention.head_dim
    q, k, v = attention.qkv(x).split(inner, dim=-1)
    outputs = []
    for h in range(attention.heads):
        part = slice(h * d, (h + 1) * d)
        scores = turn(norm(q[..., part])) @ turn(norm(k[..., part])).transpose(1, 2) / d**0.5
        outputs.append(scores.softmax(-1) @ v[..., part])
    return attention.proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_torchs_attention(qkv_bias, heads):
    attention, x = Attention(16, heads, qkv_bias=qkv_bias), torch.randn(2, 7, 16)
    if qkv_bias:
        nn.init.normal_(attention.qkv.bias)
    output, maps = torchs(attention, 16)(x, x, x, average_attn_weights=False)
    assert torch.allclose(attention(x), output, atol=1e-5)
    assert torch.allclose(attention.maps(x), maps, atol=1e-5)


def test_gradients_are_torchs():
    attention, x = Attention(8, 2), torch.randn(2, 5, 8)
    theirs = torchs(attention, 8).train()
    attention(x).square().sum().backward()
    theirs(x, x, x, need_weights=False)[0].square().sum().backward()
    assert torch.allclose(attention.qkv.weight.grad, theirs.in_proj_weight.grad, atol=1e-4)
    assert torch.allclose(attention.proj.bias.grad, theirs.out_proj.bias.grad, atol=1e-4)


@pytest.mark.parametrize("norm", [None, "layer", {"kind": "rms", "eps": 1e-3}])
@pytest.mark.parametrize("rotary", [False, True])
def test_maps_times_values_are_the_output(norm, rotary):
    attention, x = Attention(12, 3, head_dim=8, norm=norm), torch.randn(2, 6, 12)
    angles = RotaryPE(8)((2, 3)) if rotary else None
    maps = attention.maps(x, angles)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 6), atol=1e-5)
    values = attention.qkv(x)[..., 48:].reshape(2, 6, 3, 8).transpose(1, 2)
    mixed = (maps @ values).transpose(1, 2).reshape(2, 6, 24)
    assert torch.allclose(attention(x, angles), attention.proj(mixed), atol=1e-5)


def test_a_head_may_be_longer_or_shorter_than_its_share():
    attention, x = Attention(10, 3, head_dim=4), torch.randn(2, 5, 10)
    assert attention.qkv.weight.shape == (36, 10)
    assert torch.allclose(attention(x), written_out(attention, x), atol=1e-5)


def test_norms_are_of_each_heads_queries_and_keys():
    attention, x = Attention(8, 2, norm={"kind": "layer", "eps": 1e-2}), 3 * torch.randn(2, 5, 8)
    found = attention(x)
    assert torch.allclose(found, written_out(attention, x, norm=lambda t: F.layer_norm(t, (4,), eps=1e-2)), atol=1e-5)
    assert not torch.allclose(found, written_out(attention, x), atol=1e-3)


def test_angles_turn_queries_and_keys_but_not_values():
    attention, x, angles = Attention(16, 2), torch.randn(2, 6, 16), RotaryPE(8)((2, 3))

    def turn(t):
        turned = torch.complex(t[..., :4], t[..., 4:]) * torch.polar(torch.ones(6, 4), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    assert torch.allclose(attention(x, angles), written_out(attention, x, turn=turn), atol=1e-5)


def test_grids_and_sequences_go_through_alike():
    attention, grid = Attention(8, 2), torch.randn(2, 3, 4, 8)
    found = attention(grid)
    assert found.shape == grid.shape
    assert torch.equal(found.flatten(1, 2), attention(grid.flatten(1, 2)))
    assert attention.maps(grid).shape == (2, 2, 12, 12)


def test_without_positions_order_does_not_matter():
    attention, x, order = Attention(8, 2), torch.randn(2, 6, 8), torch.randperm(6)
    assert torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-6)


def test_dropout_is_of_the_output_and_in_training_only():
    attention, x = Attention(8, 2, drop=0.5), torch.randn(4, 50, 8)
    share = (attention(x) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.06)
    assert torch.allclose(attention.eval()(x), written_out(attention, x), atol=1e-5)


@pytest.mark.parametrize("heads", [3, 0, -2, "4"])
def test_impossible_heads_are_refused(heads):
    with pytest.raises(ConfigError, match="heads: found"):
        Attention(8, heads)
