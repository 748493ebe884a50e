"""ViT against torch's own transformer; its tokens, positions, poolings and masked training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchlib
from patchlib import ConfigError, InputError, SinusoidalPE, TransformerBlock, ViT, ViTConfig

TINY = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 5}
AVERAGE = {"tokens": {"class": 0}, "pool": "avg"}


def redraw(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def torchs_blocks(model):
    """The blocks as torch's own layers, with the same weights."""
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            model.config.dim,
            model.config.heads,
            block.mlp.fc1.out_features,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=model.config.block == "pre",
        )
        pairs = {
            "self_attn.in_proj_": block.attn.qkv,
            "self_attn.out_proj.": block.attn.proj,
            "linear1.": block.mlp.fc1,
            "linear2.": block.mlp.fc2,
            "norm1.": block.norm1,
            "norm2.": block.norm2,
        }
        layer.load_state_dict({n + k: v for n, m in pairs.items() for k, v in m.state_dict().items()})
        layers.append(layer)
    return nn.Sequential(*layers).train()


def close(found, wanted):
    return (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("block", ["pre", "post"])
@torch.no_grad()
def test_it_is_torchs_transformer_on_patches(block):
    model = redraw(ViT(**TINY, block=block)).eval()
    images = torch.randn(2, 3, 16, 16)
    conv = model.patch_embed.proj
    x = F.conv2d(images, conv.weight, conv.bias, stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(2, 1, 16), x], dim=1) + model.pos_embed.table
    x = F.layer_norm(torchs_blocks(model)(x), (16,), model.norm.weight, model.norm.bias, 1e-6)
    assert close(model.forward_features(images), x)
    assert close(model(images), x[:, 0] @ model.head.fc.weight.T + model.head.fc.bias)


@torch.no_grad()
def test_tokens_stand_in_order_class_distillation_register():
    tokens = {"class": 1, "distill": 1, "register": 3}
    model = redraw(ViT(**TINY, tokens=tokens, pos_embed=None)).eval()
    patches = model.embed(torch.randn(2, 3, 16, 16))
    assert (patches.prefix, patches.size) == (5, (4, 4))
    wanted = torch.cat([model.cls_token, model.dist_token, model.reg_token], dim=1)
    assert torch.equal(patches.x[:, :5], wanted.expand(2, 5, 16))


@torch.no_grad()
def test_positions_cover_the_prefix_only_if_asked():
    images = torch.randn(2, 3, 16, 16)
    covered, bare = (redraw(ViT(**TINY, pos_embed={"covers_prefix": flag})).eval() for flag in (True, False))
    assert covered.pos_embed.table.shape == (1, 17, 16)
    assert bare.pos_embed.table.shape == (1, 16, 16)
    assert torch.equal(bare.embed(images).x[:, 0], bare.cls_token[0].expand(2, 16))
    assert torch.allclose(covered.embed(images).x[:, :1], covered.cls_token + covered.pos_embed.table[:, :1])
    patches = bare.patch_embed(images).flatten(1, 2)
    assert torch.allclose(bare.embed(images).x[:, 1:], patches + bare.pos_embed.table, atol=1e-6)


@torch.no_grad()
def test_sinusoidal_positions_count_the_class_token_as_the_first():
    model = ViT(**TINY, pos_embed="sinusoidal").eval()
    images = torch.randn(2, 3, 16, 16)
    place, k = torch.arange(17)[:, None], torch.arange(16)
    angles = place / 10_000 ** (2 * (k // 2) / 16)
    table = torch.where(k % 2 == 0, angles.sin(), angles.cos())
    patches = model.patch_embed(images).flatten(1, 2)
    wanted = torch.cat([model.cls_token.expand(2, 1, 16), patches], dim=1) + table
    assert torch.allclose(model.embed(images).x, wanted, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_average_pooling_leaves_prefix_tokens_out(norm):
    tokens = {"class": 0, "register": 2}
    model = redraw(ViT(**TINY, tokens=tokens, pool={"kind": "avg", "norm": norm})).eval()
    images = torch.randn(2, 3, 16, 16)
    x = model.embed(images).x
    for block in model.blocks:
        x = block(x)
    after = [model.head.norm if norm else model.norm][0]

    def normed(t):
        return F.layer_norm(t, (16,), after.weight, after.bias, 1e-6)

    pooled = normed(x[:, 2:].mean(1)) if norm else normed(x)[:, 2:].mean(1)
    assert close(model.forward_head(model.forward_features(images), pre_logits=True), pooled)
    assert close(model(images), model.head.fc(pooled))


@torch.no_grad()
def test_distillation_averages_two_classifiers_or_gives_both():
    model = redraw(ViT(**TINY, tokens={"distill": 1}))
    images = torch.randn(2, 3, 16, 16)
    features = model.forward_features(images)
    first, second = model.head.fc(features[:, 0]), model.head.fc_dist(features[:, 1])
    assert torch.allclose(model(images), (first + second) / 2, atol=1e-5)
    pooled = (features[:, 0] + features[:, 1]) / 2
    assert torch.allclose(model.forward_head(features, pre_logits=True), pooled, atol=1e-6)
    model.head.separate = True
    assert torch.allclose(torch.stack(model(images)), torch.stack([first, second]), atol=1e-5)
    assert model.eval()(images).shape == (2, 5), "both are for training alone"
    assert model.get_classifier() == (model.head.fc, model.head.fc_dist)


def test_initialisation_is_deits():
    model = ViT(**{**TINY, "dim": 64}, tokens={"register": 4})
    for name, p in model.named_parameters():
        if name.startswith("blocks") and p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
            assert p.abs().max() < 0.1
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not p.any(), name
    assert model.reg_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.patch_embed.proj.weight.abs().max() <= 48**-0.5, "patches keep torch's own"


# --- image sizes

SIZES = [(16, 16), (8, 24), (20, 12)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed": {"covers_prefix": True}},
        {"pos_embed": {"covers_prefix": False}},
        {"pos_embed": "sinusoidal"},
        {"pos_embed": {"kind": "sinusoidal", "axes": 2}},
        {"pos_embed": "rotary"},
        {"pos_embed": None},
        {**AVERAGE, "patch_embed": "early_conv"},
        {**AVERAGE, "patch_size": (4, 2)},
    ],
    ids=str,
)
@torch.no_grad()
def test_any_image_that_patches_cover_works(options, size):
    """A model set to the size in advance, whose table is resampled for good, gives the same."""
    model = redraw(ViT(**{**TINY, **options})).eval()
    images = torch.randn(2, 3, *size)
    found = model(images)
    assert found.shape == (2, 5)
    model.set_input_size(size)
    assert model.config.img_size == size
    assert torch.allclose(model(images), found, atol=1e-5)
    again = ViT(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.allclose(again(images), found, atol=1e-5)


@torch.no_grad()
def test_remainders_are_an_error_or_handled():
    images = torch.randn(2, 3, 18, 16)
    with pytest.raises(InputError, match="height 18"):
        ViT(**TINY)(images)
    model = ViT(**TINY, patch_embed={"remainder": "drop"}).eval()
    assert torch.allclose(model(images), model(images[:, :, :16]), atol=1e-6)
    model = ViT(**TINY, patch_embed={"remainder": "pad"}).eval()
    assert torch.allclose(model(images), model(F.pad(images, (0, 0, 0, 2))), atol=1e-6)


@torch.no_grad()
def test_a_rotary_model_sees_only_offsets():
    """Content moved by whole patches, without other positions and with average pooling, gives the same answer."""
    model = redraw(ViT(**TINY, **AVERAGE, pos_embed="rotary")).eval()
    model.patch_embed.proj.bias.zero_()
    small = torch.randn(1, 3, 12, 12)
    keep = torch.tensor([[0, 1, 2, 4, 5, 6, 8, 9, 10]])  # the top left 3 x 3 of 4 x 4 patches
    for down, right in ((0, 0), (1, 0), (1, 1)):
        images = torch.zeros(1, 3, 16, 16)
        images[:, :, 4 * down : 4 * down + 12, 4 * right : 4 * right + 12] = small
        some = model.encode(model.embed(images).select(keep + 4 * down + right))
        assert torch.allclose(model.head(some.x), model(small), atol=1e-4)


# --- masked training

POSITIONS = ["learned", "sinusoidal", "rotary"]


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_all_patches_in_order_are_no_selection(positions):
    model = redraw(ViT(**TINY, pos_embed=positions)).eval()
    patches = model.embed(torch.randn(2, 3, 16, 16))
    everything = torch.arange(16).expand(2, 16)
    assert torch.allclose(model.encode(patches.select(everything)).x, model.encode(patches).x, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_patches_in_another_order_give_the_same_each(positions):
    """Positions belong to patches, not to places in the sequence."""
    model = redraw(ViT(**TINY, pos_embed=positions)).eval()
    patches = model.embed(torch.randn(2, 3, 16, 16))
    keep = torch.stack([torch.randperm(16) for _ in range(2)])
    some, full = model.encode(patches.select(keep)).x, model.encode(patches).x
    wanted = full[:, 1:].gather(1, keep[..., None].expand(-1, -1, 16))
    assert torch.allclose(some[:, 1:], wanted, atol=1e-4)
    assert torch.allclose(some[:, 0], full[:, 0], atol=1e-4)


@torch.no_grad()
def test_selected_patches_attend_as_if_the_others_were_masked():
    """Rotary: the full sequence, with the missing patches shut out of every softmax by a mask."""
    model = redraw(ViT(**{**TINY, "depth": 1}, pos_embed="rotary")).eval()
    patches = model.embed(torch.randn(2, 3, 16, 16))
    keep = torch.tensor([[3, 7, 12], [0, 15, 4]])
    seen = torch.zeros(2, 17, dtype=torch.bool)
    seen[:, 0] = True
    seen.scatter_(1, keep + 1, True)

    (block,), x = model.blocks, patches.x
    angles = model.pos_embed((4, 4), prefix=1)
    q, k, v = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 2, 8).unbind(2)

    def turned(t):
        first, second = t.chunk(2, -1)
        z = torch.complex(first, second) * torch.polar(torch.ones(17, 1, 4), angles[:, None])
        return torch.cat([z.real, z.imag], -1)

    scores = torch.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / 8**0.5
    maps = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    x = x + block.attn.proj(torch.einsum("bhqk,bkhd->bqhd", maps, v).flatten(2))
    x = model.norm(x + block.mlp(block.norm2(x)))
    wanted = torch.stack([x[i, [0, *(keep[i] + 1)]] for i in range(2)])
    assert torch.allclose(model.encode(patches.select(keep)).x, wanted, atol=1e-4)


@torch.no_grad()
def test_to_grid_gives_the_grid_back_and_raises_while_patches_are_missing():
    model = ViT(**TINY, tokens={"register": 2}).eval()
    patches = model.embed(torch.randn(2, 3, 8, 16))
    grid = model.to_grid(patches)
    assert grid.shape == (2, 2, 4, 16)
    assert torch.equal(grid.flatten(1, 2), patches.x[:, 3:])
    missing = patches.select(torch.tensor([[0, 1], [2, 3]]))
    for some in (missing, model.encode(missing)):
        with pytest.raises(InputError, match="missing"):
            model.to_grid(some)
    assert model.to_grid(model.encode(patches)).shape == grid.shape


@pytest.mark.parametrize("positions", POSITIONS)
def test_masked_image_training(positions):
    """A masked autoencoder of two dozen lines: a third of the patches is read, the others' pixels are predicted."""
    encoder = ViT(**{**TINY, "num_classes": 0}, pos_embed=positions)
    decoder = nn.Sequential(SinusoidalPE(16, axes=2), TransformerBlock(16, 2), nn.Linear(16, 48))
    mask_token = nn.Parameter(torch.zeros(1, 16, 16))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters(), mask_token], lr=1e-2)
    waves = torch.linspace(0, 6, 16)
    images = torch.stack([(waves[:, None] * a + waves * b).sin().expand(3, 16, 16) for a in (1, 2) for b in (0, 1, 3)])
    pixels = F.unfold(images, 4, stride=4).transpose(1, 2)
    losses = []
    for _ in range(60):
        keep = torch.rand(6, 16).argsort(1)[:, :5]
        patches = encoder.encode(encoder.embed(images).select(keep))
        full = mask_token.expand(6, -1, -1).scatter(1, keep[..., None].expand(-1, -1, 16), patches.x[:, 1:])
        grid = encoder.to_grid(patches._replace(x=full, prefix=0, keep=None))
        hidden = torch.ones(6, 16).scatter(1, keep, 0.0)
        error = (decoder(grid).flatten(1, 2) - pixels).square().mean(-1)
        loss = (error * hidden).sum() / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    blind = (pixels - pixels.mean((0, 1))).square().mean().item()  # the best answer that reads nothing
    assert sum(losses[-5:]) / 5 < 0.85 * blind < sum(losses[:5]) / 5
    assert encoder.blocks[0].attn.qkv.weight.grad.any()


# --- config


def test_three_ways_to_build_one():
    config = ViTConfig(dim=16, heads=2, depth=1, patch_size=4, img_size=16)
    assert ViT(dim=16, heads=2, depth=1, patch_size=4, img_size=16).config == config
    assert ViT(config).config == config
    deeper = ViT(config, depth=3)
    assert (len(deeper.blocks), deeper.config.depth, config.depth) == (3, 3, 1)
    with pytest.raises(ConfigError, match="config: found"):
        ViT(patchlib.ConvMixerConfig())
    with pytest.raises(ConfigError, match="config: found"):
        ViT("vit_tiny_patch16_224")


def test_a_dict_updates_and_a_kind_replaces():
    config = ViTConfig(mlp={"ratio": 2.0}, attention={"qkv_bias": False})
    assert config.mlp == {"kind": "gelu", "ratio": 2.0}
    assert config.attention == {"qkv_bias": False, "head_dim": None, "norm": None}
    assert config.replace(mlp={"approximate": "tanh"}).mlp == {"kind": "gelu", "ratio": 2.0, "approximate": "tanh"}
    assert config.replace(mlp="swiglu").mlp == {"kind": "swiglu"}
    assert config.replace(mlp={"kind": "swiglu", "ratio": 3.0}).mlp == {"kind": "swiglu", "ratio": 3.0}
    assert config.replace(attention={"head_dim": 32}).attention["qkv_bias"] is False
    assert config.replace(tokens={"register": 4}).tokens == {"class": 1, "register": 4, "distill": 0}
    assert ViTConfig().mlp == {"kind": "gelu", "ratio": 4.0}, "the defaults stand"


def test_json_lists_become_tuples():
    config = ViTConfig.from_dict(
        {"img_size": [224, 192], "patch_embed": {"kind": "early_conv", "widths": [1, 2, 3, 4]}}
    )
    assert config.img_size == (224, 192)
    assert config.patch_embed["widths"] == (1, 2, 3, 4)
    assert ViTConfig.from_dict(config.to_dict()) == config


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        ViTConfig().dim = 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"deph": 3}, "ViTConfig has no field 'deph'; did you mean 'depth'"),
        ({"dim": 0}, "ViTConfig.dim: found 0; allowed: an integer from 1 to 32768"),
        ({"dim": 10**9}, "ViTConfig.dim: found 1000000000"),
        ({"dim": 768.0}, "ViTConfig.dim: found 768.0"),
        ({"dim": True}, "ViTConfig.dim: found True"),
        ({"dim": None}, "ViTConfig.dim: found None"),
        ({"depth": 257}, "ViTConfig.depth: found 257"),
        ({"heads": 5}, "ViTConfig.heads: found 5; allowed: a divisor of dim=768"),
        ({"drop": float("nan")}, "ViTConfig.drop: found nan"),
        ({"drop": 1.0}, "ViTConfig.drop: found 1.0"),
        ({"img_size": (1, 2, 3)}, "ViTConfig.img_size: found"),
        ({"img_size": (16, "16")}, "ViTConfig.img_size.width: found '16'"),
        ({"block": "sandwich"}, "ViTConfig.block: found 'sandwich'; allowed: 'pre', 'post'"),
        ({"tokens": {"clas": 1}}, "ViTConfig.tokens has no option 'clas'; did you mean 'class'"),
        ({"tokens": {"class": 2}}, "ViTConfig.tokens.class: found 2"),
        ({"tokens": {"class": 0}}, "ViTConfig.pool: found 'class' without a class token"),
        ({"tokens": {"distill": 1}, "pool": "avg"}, "ViTConfig.pool: found 'avg' with a distillation token"),
        ({"attention": {"qkv_bias": 1}}, "ViTConfig.attention.qkv_bias: found 1; allowed: true or false"),
        ({"attention": False}, "ViTConfig.attention: found False"),
        ({"patch_embed": "earlyconv"}, "did you mean 'early_conv'"),
        ({"patch_embed": {"width": (1, 2)}, "norm": "rms"}, "no option 'width'"),
        ({"patch_embed": "os:system"}, "no patch_embed block is named 'os:system'"),
        ({"mlp": {"kind": "gelu", "ratio": float("inf")}}, "ViTConfig.mlp.ratio: found inf"),
        ({"mlp": {"kind": "gelu", "ratio": object()}}, "ViTConfig.mlp.ratio: found .*a plain value"),
        ({"mlp": 4}, "ViTConfig.mlp: found 4"),
        ({"mlp": {"kind": ["gelu"]}}, "ViTConfig.mlp: found"),
        ({"norm": None}, "ViTConfig.norm: found None"),
        ({"pool": {"kind": "avg", "norm": "rms"}}, "ViTConfig.pool.norm: found .*rms.*; allowed: true or false"),
    ],
)
def test_impossible_configs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        ViTConfig(**{}).replace(**overrides)


def test_positions_are_refused_where_they_cannot_be():
    with pytest.raises(ConfigError, match="head_dim: found 2"):
        ViT(**{**TINY, "heads": 8}, pos_embed="rotary")
    with pytest.raises(ConfigError, match="dim: found 15"):
        ViT(**{**TINY, "dim": 15, "heads": 1}, pos_embed="sinusoidal")
