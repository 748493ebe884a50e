"""Views of the grid, pairs, and patches taken out."""

import pytest
import torch
from torch import nn

from patchlib import ConfigError, InputError, Patches
from patchlib.layers.grid import checked_pair, grid_to_nchw, nchw, nchw_to_grid, pair


def test_layouts_are_views():
    grid = torch.randn(2, 3, 4, 5)
    image = grid_to_nchw(grid)
    assert image.shape == (2, 5, 3, 4)
    assert image.data_ptr() == grid.data_ptr()
    assert image.is_contiguous(memory_format=torch.channels_last)
    again = nchw_to_grid(image)
    assert again.shape == grid.shape
    assert again.stride() == grid.stride()
    assert again.data_ptr() == grid.data_ptr()
    assert grid.flatten(1, 2).data_ptr() == grid.data_ptr()
    assert image[1, 2, 0, 3] == grid[1, 0, 3, 2]


def test_modules_for_images_run_on_grids():
    conv, grid = nn.Conv2d(5, 7, 3, stride=2), torch.randn(2, 7, 9, 5)
    wanted = conv(grid.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
    assert torch.allclose(nchw(conv, grid), wanted, atol=1e-5)


def test_pairs():
    assert pair(7) == (7, 7)
    assert pair((3, 4)) == (3, 4)
    assert checked_pair("side", 7) == (7, 7)
    assert checked_pair("side", [3, 4]) == (3, 4)
    for wrong in (0, -1, "7", (1, 2, 3), (2, 0), 1.5, None):
        with pytest.raises(ConfigError, match="side: found"):
            checked_pair("side", wrong)


def test_selected_patches_keep_their_order_and_prefix():
    x = torch.randn(2, 2 + 6, 4)
    keep = torch.tensor([[5, 0, 3], [1, 1, 2]])
    some = Patches(x, (2, 3), prefix=2).select(keep)
    assert some.x.shape == (2, 2 + 3, 4)
    assert some.size == (2, 3)
    assert some.prefix == 2
    assert torch.equal(some.x[:, :2], x[:, :2])
    for sample in range(2):
        for place, index in enumerate(keep[sample].tolist()):
            assert torch.equal(some.x[sample, 2 + place], x[sample, 2 + index])
    assert torch.equal(some.keep, keep)


def test_all_patches_in_order_are_what_was_there():
    x = torch.randn(2, 1 + 6, 4)
    everything = torch.arange(6).expand(2, 6)
    assert torch.equal(Patches(x, (2, 3), prefix=1).select(everything).x, x)


def test_patches_that_cannot_be_taken_out():
    keep = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(InputError, match="grid"):
        Patches(torch.randn(1, 2, 3, 4), (2, 3)).select(keep)
    with pytest.raises(InputError, match="already"):
        Patches(torch.randn(1, 6, 4), (2, 3)).select(keep).select(keep)
