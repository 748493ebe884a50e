"""Gradient checkpointing against plain backpropagation."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from patchlib.layers.convmixer import ConvMixerBlock
from patchlib.layers.convnext import ConvNeXtBlock
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


@pytest.mark.parametrize("block", [
    lambda **o: ConvMixerBlock(8, 5, act="relu", drop_path=0.3, **o),
    lambda **o: ConvMixerBlock(8, 5, act="gelu", rezero=True, **o),
    lambda **o: ConvNeXtBlock(8, 5, drop_path=0.3, **o),
    lambda **o: ConvNeXtBlock(8, 5, grn=False, layer_scale=0.1, **o),
])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_memory_efficient_blocks_have_the_plain_gradients_and_statistics(block, autocast):
    plain, saving = block().train(), block(memory_efficient=True).train()
    for value in plain.parameters():
        nn.init.normal_(value, std=0.3)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6, 6, 8)
    gradients = []
    for module in (plain, saving):
        torch.manual_seed(0)
        entry = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            module(entry).float().sin().sum().backward()
        gradients.append([entry.grad, *(p.grad for p in module.parameters())])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b)


def pairs(**options):
    return nn.Sequential(*(ConvMixerBlock(8, 5, drop_path=0.3, **options) for _ in range(3)))


@pytest.mark.parametrize("between", [
    lambda x: x,
    lambda x: x.mul_(2),
    lambda x: 2 * x,
    lambda x: x.permute(0, 3, 1, 2).add_(1).permute(0, 2, 3, 1),
])  # fmt: skip
def test_blocks_that_follow_each_other_make_their_inputs_again(between):
    plain, saving = pairs().train(), pairs(memory_efficient=True).train()
    saving.load_state_dict(plain.state_dict())
    x, gradients = torch.randn(4, 6, 6, 8), []
    for model in (plain, saving):
        torch.manual_seed(0)
        entry = x.clone().requires_grad_()
        loss = model[2](between(model[1](model[0](entry)))).sin().sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
        gradients.append([entry.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", [ConvMixerBlock, ConvNeXtBlock])
def test_a_recompute_around_memory_efficient_blocks(block):
    plain = nn.ModuleList(block(8, 5, drop_path=0.3) for _ in range(3))
    saving = nn.ModuleList(block(8, 5, drop_path=0.3, memory_efficient=True) for _ in range(3))
    saving.load_state_dict(plain.state_dict())
    x, gradients = torch.randn(4, 6, 6, 8), []
    for blocks, call in ((plain, nn.Module.__call__), (saving, recompute)):
        torch.manual_seed(0)
        entry = y = x.clone().requires_grad_()
        for one in blocks:
            y = call(one, y)
        y.sin().sum().backward()
        gradients.append([entry.grad, *(p.grad for p in blocks.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", [ConvMixerBlock, ConvNeXtBlock])
@pytest.mark.parametrize(
    "way",
    [
        lambda block, x: torch.jit.trace(block, (x,))(x),
        lambda block, x: torch.export.export(block, (x,), strict=True).module()(x),
        lambda block, x: torch.func.vjp(block, x)[0],
    ],
)
def test_memory_efficient_blocks_where_python_is_not_run_again(block, way):
    block, x = block(8, 5, memory_efficient=True).eval(), torch.randn(2, 6, 6, 8)
    assert torch.allclose(way(block, x), block(x), atol=1e-6)


def test_frozen_blocks_before_trained_ones():
    plain, saving = pairs().train(), pairs(memory_efficient=True).train()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6, 6, 8)
    for model in (plain, saving):
        model[:2].requires_grad_(False)
        torch.manual_seed(0)
        model(x).sin().sum().backward()
    for a, b in zip(plain[2].parameters(), saving[2].parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 3])
def test_memory_efficient_blocks_compute_no_product_twice(blocks):
    """The count of multiply-adds grows by the depthwise convolutions' forward, and by nothing else."""
    dim, kernel, x = 8, 3, torch.randn(2, 6, 6, 8)
    counts = []
    for saving in (False, True):
        model = nn.Sequential(*(ConvMixerBlock(dim, kernel, memory_efficient=saving) for _ in range(blocks)))
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == blocks * 2 * x.numel() * kernel**2


@pytest.mark.parametrize(
    ("block", "count", "most"), [(ConvMixerBlock, 1, 2), (ConvMixerBlock, 4, 5), (ConvNeXtBlock, 1, 5)]
)
def test_memory_efficient_blocks_keep_little(block, count, most):
    """What is alive after the forward, in multiples of the input: itself, and a product a block (four times as wide in
    ConvNeXt's)."""
    x, alive = torch.randn(2, 16, 16, 32).requires_grad_(), {}

    class Kept(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    alive[tensor.untyped_storage().data_ptr()] = weakref.ref(tensor.untyped_storage())
            return result

    def kept(**options):
        alive.clear()
        module = nn.Sequential(*(block(32, 7, **options) for _ in range(count)))
        with Kept():
            output = module(x)
        storages = [s for s in (reference() for reference in alive.values()) if s is not None]
        own = {p.untyped_storage().data_ptr() for p in module.parameters()} | {output.untyped_storage().data_ptr()}
        return sum(s.nbytes() for s in storages if s.data_ptr() not in own) / x.untyped_storage().nbytes()

    assert kept(memory_efficient=True) < most + 0.5 < kept()
