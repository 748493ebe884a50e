"""Merged patches against torch's norm and convolution."""

import pytest
import torch
from torch import nn

from patchlib import Downsample, InputError


def torchs(block, grid):
    norm = nn.functional.layer_norm(grid, grid.shape[-1:], block.norm.weight, block.norm.bias, 1e-6)
    conv = nn.Conv2d(block.conv.in_channels, block.conv.out_channels, block.scale, stride=block.scale)
    conv.load_state_dict(block.conv.state_dict())
    return conv(norm.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("scale", "size"), [(1, (3, 5)), (2, (4, 6)), (3, (3, 9)), (2, (5, 7))])
def test_it_is_a_norm_and_a_strided_convolution(scale, size):
    block, grid = Downsample(4, 6, scale), torch.randn(2, *size, 4)
    nn.init.normal_(block.norm.weight), nn.init.normal_(block.norm.bias)
    found = block(grid)
    assert found.shape == (2, size[0] // scale, size[1] // scale, 6)
    assert torch.allclose(found, torchs(block, grid), atol=1e-5)
    assert found.is_contiguous()


def test_a_merged_patch_is_a_linear_map_of_its_four():
    block, grid = Downsample(4, 6).double(), torch.randn(1, 2, 2, 4, dtype=torch.float64)
    normed = (grid - grid.mean(-1, keepdim=True)) / (grid.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    wanted = torch.einsum("bhwc,ochw->bo", normed, block.conv.weight) + block.conv.bias
    assert torch.allclose(block(grid)[:, 0, 0], wanted, atol=1e-9)


def test_the_norm_is_chosen_by_name():
    assert isinstance(Downsample(4, 6, norm={"kind": "rms"}).norm, nn.RMSNorm)


def test_a_grid_too_small_to_merge_is_refused():
    with pytest.raises(InputError, match=r"grid 1 x 4: too small to merge 2 x 2"):
        Downsample(4, 6)(torch.randn(1, 1, 4, 4))
