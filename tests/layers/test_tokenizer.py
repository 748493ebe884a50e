"""Images to tokens: each step with torch's own functions."""

import pytest
import torch
import torch.nn.functional as F

from patchlib import ConfigError, ImageTokenizer, InputError


def positions(count, dim):
    place, k = torch.arange(count)[:, None], torch.arange(dim)
    angles = place / 10_000 ** (2 * (k // 2) / dim)
    return torch.where(k % 2 == 0, angles.sin(), angles.cos())


def test_tokens_are_class_token_then_patches_all_with_positions():
    tokenizer = ImageTokenizer((4, 2), 3, 10)
    images = torch.randn(2, 3, 8, 6)
    linear = tokenizer.patch_embed.proj
    patches = F.linear(F.unfold(images, (4, 2), stride=(4, 2)).transpose(1, 2), linear.weight, linear.bias)
    wanted = torch.cat([tokenizer.cls_token.expand(2, 1, 10), patches], dim=1) + positions(7, 10)
    assert tokenizer(images).shape == (2, 1 + 6, 10)
    assert torch.allclose(tokenizer(images), wanted, atol=1e-5)


def test_what_is_learned_is_the_matrix_and_the_class_token():
    tokenizer = ImageTokenizer(4, 3, 10)
    assert sum(p.numel() for p in tokenizer.parameters()) == 48 * 10 + 10 + 10
    tokenizer(torch.rand(1, 3, 8, 8)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in tokenizer.parameters())


def test_a_remainder_is_handled_as_asked():
    images = torch.rand(1, 3, 9, 9)
    assert ImageTokenizer(4, 3, 10, remainder="drop")(images).shape == (1, 5, 10)
    assert ImageTokenizer(4, 3, 10, remainder="pad")(images).shape == (1, 10, 10)
    with pytest.raises(InputError, match="height 9"):
        ImageTokenizer(4, 3, 10)(images)


def test_an_odd_dim_is_refused():
    with pytest.raises(ConfigError, match="dim: found 9"):
        ImageTokenizer(4, 3, 9)
