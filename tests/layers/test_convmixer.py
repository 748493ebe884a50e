"""The ConvMixer block against the paper's own form, with convolutions on channels-first images."""

import copy

import pytest
import torch
from torch import nn

from patchlib import ConfigError, ConvMixerBlock, PatchNet

DIM = 6


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def papers(kernel_size, act=nn.GELU):
    """Figure 3 of the paper, one block."""
    return nn.Sequential(
        Residual(
            nn.Sequential(nn.Conv2d(DIM, DIM, kernel_size, groups=DIM, padding="same"), act(), nn.BatchNorm2d(DIM))
        ),
        nn.Conv2d(DIM, DIM, kernel_size=1),
        act(),
        nn.BatchNorm2d(DIM),
    )


def pair_of_blocks(kernel_size=5, act="gelu"):
    """Ours and the paper's with the same random weights and statistics."""
    theirs = papers(kernel_size, {"gelu": nn.GELU, "relu": nn.ReLU}[act])
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1 if tensor.dim() == 1 else torch.randn_like(tensor)
    ours = ConvMixerBlock(DIM, kernel_size, act=act)
    depthwise, _, norm1 = theirs[0].fn
    state = {f"depthwise.{k}": v for k, v in depthwise.state_dict().items()}
    state |= {f"norm1.{k}": v for k, v in norm1.state_dict().items()}
    state |= {"pointwise.weight": theirs[1].weight[:, :, 0, 0], "pointwise.bias": theirs[1].bias}
    state |= {f"norm2.{k}": v for k, v in theirs[3].state_dict().items()}
    ours.load_state_dict(state)
    return ours, theirs


def on_grid(module, grid):
    return module(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("kernel_size", [1, 4, 5, 9])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_evaluation_is_the_papers(kernel_size, act):
    ours, theirs = pair_of_blocks(kernel_size, act)
    grid = torch.randn(2, 4, 7, DIM)
    assert torch.allclose(ours.eval()(grid), on_grid(theirs.eval(), grid), atol=1e-4)


def test_a_training_step_is_the_papers():
    """Outputs, gradients, and batch norms' statistics after it."""
    ours, theirs = pair_of_blocks()
    grid = torch.randn(3, 4, 7, DIM)
    weight = torch.randn(3, 4, 7, DIM)
    found, wanted = ours(grid), on_grid(theirs, grid)
    assert torch.allclose(found, wanted, atol=1e-4)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other_grad = other.grad.reshape(mine.shape)
        assert torch.allclose(mine.grad, other_grad, atol=1e-4 * max(1, other_grad.abs().max()))
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4)
    assert ours.norm1.num_batches_tracked == theirs[0].fn[2].num_batches_tracked


def test_an_updated_block_is_still_the_papers():
    ours, theirs = pair_of_blocks()
    grid = torch.randn(3, 5, 5, DIM)
    for block in (ours, theirs):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
        for _ in range(2):
            output = ours(grid) if block is ours else on_grid(theirs, grid)
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
    assert torch.allclose(ours.eval()(grid), on_grid(theirs.eval(), grid), atol=1e-3)


def test_rezero_starts_without_the_depthwise_branch():
    block, grid = ConvMixerBlock(DIM, 3, rezero=True).eval(), torch.randn(2, 4, 4, DIM)
    assert block.scale.gamma.shape == (1,)
    assert block.scale.gamma.item() == 0.0
    pointwise = nn.Sequential(nn.Conv2d(DIM, DIM, 1), nn.GELU(), nn.BatchNorm2d(DIM)).eval()
    with torch.no_grad():
        pointwise[0].weight.copy_(block.pointwise.weight[:, :, None, None])
        pointwise[0].bias.copy_(block.pointwise.bias)
    assert torch.allclose(block(grid), on_grid(pointwise, grid), atol=1e-5)


def test_rezero_scales_the_branch_by_its_number():
    block = ConvMixerBlock(DIM, 3, rezero=True).eval()
    plain, grid = ConvMixerBlock(DIM, 3).eval(), torch.randn(2, 4, 4, DIM)
    state = {key: value.clone() for key, value in block.state_dict().items() if key != "scale.gamma"}
    state["norm1.weight"] *= 0.7
    state["norm1.bias"] += 0.1 * 0.7
    plain.load_state_dict(state)
    with torch.no_grad():
        block.norm1.bias.add_(0.1)
        block.scale.gamma.fill_(0.7)
    assert torch.allclose(block(grid), plain(grid), atol=1e-5)


def test_dropped_paths_skip_the_depthwise_branch():
    block = ConvMixerBlock(DIM, 3, drop_path=0.5)
    block.norm2 = nn.Identity()  # what remains is one sample's own
    skipping = copy.deepcopy(block)
    skipping.norm1.weight.data.zero_(), skipping.norm1.bias.data.zero_()
    grid = torch.randn(300, 2, 2, DIM)
    skipped = torch.isclose(block(grid), skipping(grid), atol=1e-6).flatten(1).all(dim=1).float().mean().item()
    assert skipped == pytest.approx(0.5, abs=0.1)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="act: found 'tanh'"):
        ConvMixerBlock(DIM, act="tanh")
    with pytest.raises(ConfigError, match="did you mean 'kernel_size'"):
        PatchNet(stages=[{"kind": "convmixer", "dim": DIM, "kernel": 3}])


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_hooks_see_what_modules_gave(act):
    """And full backward hooks, which refuse outputs that are written to, run."""
    block, seen, passed = ConvMixerBlock(8, 3, act=act), [], []
    for module in block.modules():
        module.register_forward_hook(lambda _m, _i, output: seen.append((output, output.detach().clone())))
        module.register_full_backward_hook(lambda module, *_: passed.append(module))
    x = torch.randn(2, 4, 4, 8)
    with torch.no_grad():
        block(x)
    block(x.requires_grad_()).sum().backward()
    assert all(torch.equal(kept, then) for kept, then in seen)
    assert set(passed) == set(block.modules())


def test_nothing_is_written_to_that_others_hold():
    """The input, where modules hand it through, and outputs that global hooks keep."""
    block, seen = ConvMixerBlock(8, 3).eval(), []
    block.depthwise = block.act = block.norm1 = nn.Identity()
    x = torch.randn(2, 4, 4, 8)
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)
    block = ConvMixerBlock(8, 3).eval()
    keep = lambda _m, _i, output: seen.append((output, output.clone()))  # noqa: E731
    with torch.no_grad(), torch.nn.modules.module.register_module_forward_hook(keep):
        block(x)
    assert all(torch.equal(kept, then) for kept, then in seen)
    with torch.no_grad():
        assert torch.equal(block(x), block(x.requires_grad_()))
