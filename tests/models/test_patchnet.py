"""Models given as data: what a list of stages becomes, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchlib import (
    ConfigError,
    ConvMixerBlock,
    Downsample,
    InputError,
    PatchNet,
    PatchNetConfig,
    TransformerBlock,
    register_block,
)

HYBRID = {
    "patch_size": 4,
    "img_size": 16,
    "num_classes": 5,
    "stages": [
        {"kind": "convmixer", "depth": 2, "dim": 8, "kernel_size": 3},
        {"kind": "transformer", "depth": 1, "dim": 12, "downsample": 2, "heads": 3},
    ],
}


def redraw(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


@torch.no_grad()
def test_a_hybrid_is_its_blocks_in_turn():
    model = redraw(PatchNet(**HYBRID)).eval()
    blocks = [ConvMixerBlock(8, 3), ConvMixerBlock(8, 3), Downsample(8, 12, 2), TransformerBlock(12, 3)]
    states = [m.state_dict() for stage in model.blocks for m in stage]
    for block, state in zip(blocks, states, strict=True):
        block.eval().load_state_dict(state)
    images = torch.randn(2, 3, 16, 24)
    conv = model.patch_embed.proj
    grid = F.conv2d(images, conv.weight, conv.bias, stride=4).permute(0, 2, 3, 1)
    for block in blocks:
        grid = block(grid)
    grid = F.layer_norm(grid, (12,), model.norm.weight, model.norm.bias, 1e-6)
    assert torch.allclose(model.forward_features(images), grid.permute(0, 3, 1, 2), atol=1e-4)
    assert torch.allclose(model(images), model.head.fc(grid.mean((1, 2))), atol=1e-4)


def test_a_stage_begins_with_a_downsample_only_where_something_changes():
    stages = [
        {"kind": "convmixer", "dim": 8},
        {"kind": "transformer", "dim": 8, "heads": 2},
        {"kind": "convmixer", "dim": 12},
        {"kind": "convnext", "dim": 12, "downsample": 2},
    ]
    model = PatchNet(stages=stages, patch_size=2, img_size=16)
    assert [isinstance(stage[0], Downsample) for stage in model.blocks] == [False, False, True, True]
    assert [stage[0].scale for stage in model.blocks[2:]] == [1, 2]
    assert model.feature_info.channels() == [8, 8, 12, 12]
    assert model.feature_info.reduction() == [2, 2, 2, 4]
    maps = model.forward_intermediates(torch.randn(1, 3, 16, 16), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 8, 8), (8, 8, 8), (12, 8, 8), (12, 4, 4)]


def test_the_first_stage_may_merge_patches_too():
    model = PatchNet(stages=[{"kind": "convmixer", "dim": 8, "downsample": 2}], patch_size=2)
    assert model.reductions == [4]
    assert model.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 8, 4, 4)


def test_drop_path_grows_over_all_stages():
    stages = [{"kind": "convmixer", "depth": 2, "dim": 8}, {"kind": "transformer", "depth": 3, "dim": 8, "heads": 2}]
    model = PatchNet(stages=stages, drop_path=0.4)
    assert [block.drop_path.p for stage in model.blocks for block in stage] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@torch.no_grad()
def test_positions_are_added_to_the_first_grid(kind):
    plain, placed = PatchNet(**HYBRID).eval(), PatchNet(**HYBRID, pos_embed=kind).eval()
    images = torch.randn(2, 3, 16, 16)
    state = {**placed.state_dict(), **plain.state_dict()}
    placed.load_state_dict(state)
    wanted = placed.pos_embed(plain.embed(images).x)
    assert torch.equal(placed.embed(images).x, wanted)
    assert not torch.equal(wanted, plain.embed(images).x)
    assert placed(torch.randn(1, 3, 24, 16)).shape == (1, 5), "another grid"


class Doubling(nn.Module):
    """A user's block, without drop path."""

    def __init__(self, dim, factor=2.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), factor))

    def forward(self, grid):
        return grid * self.gain


@torch.no_grad()
def test_a_users_block_is_a_stage():
    register_block("doubling", Doubling, role="stage")
    model = PatchNet(
        stages=[{"kind": "doubling", "dim": 8, "depth": 3, "factor": 3.0}], norm=None, drop_path=0.2
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.forward_features(images), 27 * model.patch_embed(images).permute(0, 3, 1, 2), atol=1e-4)


def test_attention_pooling_and_no_norm():
    model = PatchNet(**HYBRID, norm=None, pool={"kind": "attention", "heads": 2}, drop=0.1)
    assert isinstance(model.norm, nn.Identity)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stages": []}, "PatchNetConfig.stages: found"),
        ({"stages": {"kind": "convmixer", "dim": 8}}, "a list of 1 to 64 stages"),
        ({"stages": [{"kind": "convmixer"}]}, r"stages\[0\].dim: found None"),
        ({"stages": [{"dim": 8}]}, r"stages\[0\]: found .*the name of a kind"),
        ({"stages": [{"kind": "convmixr", "dim": 8}]}, "did you mean 'convmixer'"),
        ({"stages": [{"kind": "convmixer", "dim": 8, "kernel": 3}]}, "did you mean 'kernel_size'"),
        ({"stages": [{"kind": "convmixer", "dim": 8, "depth": 0}]}, r"stages\[0\].depth: found 0"),
        ({"stages": [{"kind": "convmixer", "dim": 8, "downsample": 0}]}, "downsample: found 0"),
        ({"stages": [{"kind": "convmixer", "dim": 8, "depth": 200}] * 2}, "400 blocks in all"),
        ({"stages": [{"kind": "torch.nn:Linear", "dim": 8}]}, "no stage block is named"),
        ({"pos_embed": "rotary"}, "PatchNetConfig.pos_embed: found 'rotary'"),
        ({"pool": "class"}, "PatchNetConfig.pool: found 'class'"),
    ],
)
def test_impossible_configs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        PatchNetConfig(**overrides)


@pytest.mark.parametrize("heads", [0, -2, 5, "8"])
def test_impossible_options_of_a_block_are_refused(heads):
    with pytest.raises(ConfigError, match=r"stages\[1\].*heads"):
        PatchNet(stages=[{"kind": "convmixer", "dim": 8}, {"kind": "transformer", "dim": 8, "heads": heads}])


def test_the_model_sets_dim_and_drop_path():
    with pytest.raises(ConfigError, match="set by the model"):
        PatchNet(stages=[{"kind": "convmixer", "dim": 8, "drop_path": 0.1}])


def test_an_image_too_small_for_the_stages_is_refused():
    with pytest.raises(InputError, match="too small to merge"):
        PatchNet(**HYBRID).eval()(torch.randn(1, 3, 4, 4))


def test_a_grid_loses_no_patches():
    with pytest.raises(InputError, match="grid"):
        PatchNet(**HYBRID).embed(torch.randn(1, 3, 16, 16)).select(torch.tensor([[0]]))
