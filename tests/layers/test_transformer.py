"""The transformer block against torch's own layer and its equations."""

import pytest
import torch
from torch import nn

from patchlib import ConfigError, PatchNet, RotaryPE, SwiGLU, TransformerBlock


def torchs(block, dim, order):
    """torch's layer with a block's weights."""
    layer = nn.TransformerEncoderLayer(
        dim,
        block.attn.heads,
        block.mlp.fc1.out_features,
        0.0,
        "gelu",
        1e-6,
        batch_first=True,
        norm_first=order == "pre",
    )
    pairs = {
        "self_attn.in_proj_": block.attn.qkv,
        "self_attn.out_proj.": block.attn.proj,
        "linear1.": block.mlp.fc1,
        "linear2.": block.mlp.fc2,
        "norm1.": block.norm1,
        "norm2.": block.norm2,
    }
    state = {name + key: value for name, module in pairs.items() for key, value in module.state_dict().items()}
    layer.load_state_dict(state)
    return layer


def redraw(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return module


@pytest.mark.parametrize("order", ["pre", "post"])
def test_it_is_torchs_layer(order):
    block, x = redraw(TransformerBlock(16, 4, order=order)), torch.randn(2, 7, 16)
    layer = torchs(block, 16, order).train()  # its fused path is for evaluation, and has another rounding
    assert torch.allclose(block(x), layer(x), atol=1e-4)
    other = torchs(block, 16, "post" if order == "pre" else "pre")
    assert not torch.allclose(block(x), other.train()(x), atol=1e-2)


def test_grids_and_sequences_go_through_alike():
    block, grid = TransformerBlock(8, 2), torch.randn(2, 3, 4, 8)
    assert torch.allclose(block(grid).flatten(1, 2), block(grid.flatten(1, 2)), atol=1e-6)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_layer_scale_multiplies_each_branch(order):
    """The same as scaling the rows of each branch's last matrix."""
    scaled, x = redraw(TransformerBlock(8, 2, order=order, layer_scale=0.5)), torch.randn(2, 5, 8)
    plain = TransformerBlock(8, 2, order=order)
    state = {key: value.clone() for key, value in scaled.state_dict().items() if "gamma" not in key}
    for last, scale in (("attn.proj", scaled.ls1), ("mlp.fc2", scaled.ls2)):
        state[f"{last}.weight"] *= scale.gamma[:, None]
        state[f"{last}.bias"] *= scale.gamma
    plain.load_state_dict(state)
    assert torch.allclose(scaled(x), plain(x), atol=1e-5)


def test_layer_scale_starts_at_its_value():
    block = TransformerBlock(8, 2, layer_scale=1e-5)
    assert torch.equal(block.ls1.gamma, torch.full((8,), 1e-5))
    assert torch.equal(block.ls2.gamma, block.ls1.gamma)
    x = torch.randn(2, 5, 8)
    assert torch.allclose(block(x), x, atol=1e-3), "nearly the identity"


def test_dropped_paths_leave_samples_as_they_were():
    block, x = TransformerBlock(8, 2, drop_path=0.5), torch.randn(400, 3, 8)
    same = (block(x) == x).flatten(1).all(dim=1).float().mean().item()
    assert same == pytest.approx(0.25, abs=0.08), "both branches are dropped in a quarter of the samples"
    block.eval()
    assert torch.equal(block(x), block(x))
    assert not (block(x) == x).flatten(1).all(dim=1).any()


def test_angles_reach_the_attention():
    block, x = TransformerBlock(16, 2), torch.randn(2, 6, 16)
    angles = RotaryPE(8)((2, 3))
    middle = x + block.attn(block.norm1(x), angles)
    wanted = middle + block.mlp(block.norm2(middle))
    assert torch.equal(block(x, angles), wanted)
    assert not torch.allclose(block(x), wanted, atol=1e-4)


def test_parts_are_chosen_by_name():
    block = TransformerBlock(
        8, 2, attention={"qkv_bias": False, "norm": "rms"}, mlp={"kind": "swiglu", "ratio": 2.0}, norm={"kind": "rms"}
    )
    assert block.attn.qkv.bias is None
    assert isinstance(block.norm1, nn.RMSNorm)
    assert isinstance(block.attn.q_norm, nn.RMSNorm)
    assert block.mlp.fc1.out_features == 32
    assert block(torch.randn(1, 4, 8)).shape == (1, 4, 8)
    assert isinstance(TransformerBlock(8, 2, norm="rms").norm2, nn.RMSNorm)
    model = PatchNet(stages=[{"kind": "transformer", "dim": 8, "heads": 2, "mlp": "swiglu", "norm": "rms"}])
    assert isinstance(model.blocks[0][0].mlp, SwiGLU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "sandwich"}, "order: found 'sandwich'"),
        ({"mlp": {"kind": "gelu", "ration": 2.0}}, "did you mean 'ratio'"),
        ({"drop_path": 1.0}, "drop_path: found 1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TransformerBlock(8, 2, **options)
