"""Gradient checkpointing against plain backpropagation."""

import copy

import pytest
import torch
from torch import nn

from patchlib.layers.recompute import recompute


@pytest.mark.parametrize("momentum", [0.1, None])
def test_outputs_gradients_and_statistics_are_the_plain_ones(momentum):
    plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=momentum), nn.GELU(), nn.BatchNorm1d(8))
    saving, x = copy.deepcopy(plain), torch.randn(6, 4)
    for _ in range(2):
        found, wanted = recompute(saving, x), plain(x)
        assert torch.equal(found, wanted)
        for output in (found, wanted):
            output.square().mean().backward(retain_graph=True)
            output.sin().mean().backward()
    for a, b in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    for a, b in zip(saving.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)
    assert saving[1].num_batches_tracked == 2
    assert saving[1].momentum == momentum


def test_norms_without_statistics_and_further_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x, scale):
            return self.norm(x) * scale

    module, x, scale = Scaled(), torch.randn(6, 4), torch.randn(6, 1, requires_grad=True)
    recompute(module, x, scale).square().sum().backward()
    wanted = torch.autograd.grad(module(x, scale).square().sum(), scale)
    assert torch.allclose(scale.grad, wanted[0], atol=1e-5)


def test_dropout_is_drawn_once():
    """The second run repeats the first one's draws, so the gradient is the mask that was seen."""
    x = torch.ones(1000, requires_grad=True)
    output = recompute(nn.Sequential(nn.Identity(), nn.Dropout(0.5)), x)
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())
