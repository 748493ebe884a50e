"""Pooling against means, indexing, and torch's own attention."""

import pytest
import torch
from torch import nn

from patchlib import AttentionPool, AvgPool, ClassPool, ConfigError, InputError


def test_average_is_over_patches_alone():
    x = torch.randn(2, 3 + 6, 4)
    wanted = sum(x[:, i] for i in range(3, 9)) / 6
    assert torch.allclose(AvgPool()(x, 3), wanted, atol=1e-6)
    grid = torch.randn(2, 2, 3, 4)
    assert torch.allclose(AvgPool()(grid), nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), 1).flatten(1))


def test_class_is_the_first_token():
    x = torch.randn(2, 7, 4)
    assert torch.equal(ClassPool()(x, 3), x[:, 0])
    with pytest.raises(InputError, match="pool='avg'"):
        ClassPool()(x, 0)


def test_attention_pooling_is_torchs_attention_with_a_learned_query():
    pool, x = AttentionPool(8, heads=2), torch.randn(3, 5, 8)
    nn.init.normal_(pool.query)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(8), pool.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([torch.zeros(8), pool.kv.bias]))
        theirs.out_proj.load_state_dict(pool.proj.state_dict())
    wanted, _ = theirs(pool.query.expand(3, 1, 8), x, x)
    assert torch.allclose(pool(x), wanted[:, 0], atol=1e-5)


def test_attention_pooling_takes_grids_in_any_order():
    pool, grid = AttentionPool(8, heads=2), torch.randn(2, 3, 4, 8)
    assert torch.allclose(pool(grid), pool(grid.flatten(1, 2).flip(1)), atol=1e-6)


@pytest.mark.parametrize("heads", [3, 0, "2"])
def test_impossible_heads_are_refused(heads):
    with pytest.raises(ConfigError, match="heads: found"):
        AttentionPool(8, heads=heads)
