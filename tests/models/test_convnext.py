"""ConvNeXt V1 and V2, against the papers' formulas written out in channels-first functions."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from patchlib.errors import ConfigError, InputError
from patchlib.layers.convnext import ConvNeXtBlock
from patchlib.layers.grn import GRN
from patchlib.models.convnext import VARIANTS, ConvNeXt, ConvNeXtConfig
from patchlib.models.convnextv2 import VARIANTS as VARIANTS_V2
from patchlib.models.convnextv2 import ConvNeXtV2
from patchlib.models.features import FeatureExtractor

torch.set_num_threads(1)

# counted by timm 1.0.31
PARAMETERS = {
    "convnext_atto": 3_695_520,
    "convnext_femto": 5_217_784,
    "convnext_pico": 9_045_672,
    "convnext_nano": 15_593_560,
    "convnext_tiny_hnf": 28_589_128,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_xlarge": 350_196_968,
    "convnext_xxlarge": 846_471_016,
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_small": 50_318_440,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_huge": 660_289_640,
}
SMALL = {"depths": (1, 2), "dims": (8, 12), "num_classes": 5, "img_size": 32}
KINDS = {"v1": ConvNeXt, "v2": ConvNeXtV2}


def redrawn(model, seed=0):
    """Every parameter and buffer at random: with default initialisation whole branches do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            fan = tensor[0].numel() if tensor.dim() > 1 else 4
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan**0.5)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1)
    return model.eval()


def small(kind, **options):
    return redrawn(KINDS[kind](**{**SMALL, **options}))


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def reference(model, x, *, eps=1e-6, act=F.gelu, scale=True, grn=True, head_norm=True, shortcut=True):
    """Logits by the papers' equations, on ``(batch, channels, height, width)`` throughout."""
    p = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def norm(x, name):
        mean = x.mean(1, keepdim=True)
        variance = ((x - mean) ** 2).mean(1, keepdim=True)
        shape = (-1,) + (1,) * (x.dim() - 2)
        return (x - mean) / (variance + eps) ** 0.5 * p[name + ".weight"].view(shape) + p[name + ".bias"].view(shape)

    def pointwise(x, name):
        return F.conv2d(x, p[name + ".weight"][:, :, None, None], p[name + ".bias"])

    patch = p["patch_embed.proj.weight"].shape[-1]
    x = norm(F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch), "stem_norm")
    for i, depth in enumerate(model.config.depths):
        if i:
            down = f"stages.{i}.downsample."
            x = F.conv2d(norm(x, down + "norm"), p[down + "conv.weight"], p[down + "conv.bias"], stride=2)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}."
            y = F.conv2d(x, p[block + "depthwise.weight"], p[block + "depthwise.bias"], padding=3, groups=x.shape[1])
            y = act(pointwise(norm(y, block + "norm"), block + "fc1"))
            if grn and block + "grn.weight" in p:
                strength = (y**2).sum((2, 3), keepdim=True) ** 0.5
                answer = strength / (strength.mean(1, keepdim=True) + 1e-6)
                gamma, beta = p[block + "grn.weight"].view(1, -1, 1, 1), p[block + "grn.bias"].view(1, -1, 1, 1)
                y = gamma * (y * answer) + beta + y
            y = pointwise(y, block + "fc2")
            if scale and block + "scale.gamma" in p:
                y = y * p[block + "scale.gamma"].view(1, -1, 1, 1)
            x = x + y if shortcut else y
    x = x.mean((2, 3))
    if head_norm:
        x = norm(x, "head.norm")
    return x @ p["head.fc.weight"].T + p["head.fc.bias"]


@pytest.mark.parametrize("name", [*VARIANTS, *VARIANTS_V2])
def test_counts(name):
    with torch.device("meta"):
        model = ConvNeXt(**VARIANTS[name]) if name in VARIANTS else ConvNeXtV2(**VARIANTS_V2[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == list(model.config.dims)
    assert model.feature_info.module_name() == [f"stages.{i}" for i in range(4)]
    assert model.config.grn == name.startswith("convnextv2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_logits_follow_the_paper(kind, size):
    model, x = small(kind), images(2, 3, *size)
    with torch.no_grad():
        assert relative(model(x), reference(model, x)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "sabotage"),
    [
        ("v1", {"eps": 1e-5}),
        ("v1", {"act": F.silu}),
        ("v1", {"scale": False}),
        ("v1", {"head_norm": False}),
        ("v2", {"eps": 1e-5}),
        ("v2", {"act": F.silu}),
        ("v2", {"grn": False}),
        ("v2", {"shortcut": False}),
    ],
)
def test_sabotage_shows(kind, sabotage):
    model = small(kind)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        if "eps" in sabotage:  # seen where little varies
            model.patch_embed.proj.bias.zero_()
            x = x * 2e-3
        assert relative(model(x), reference(model, x)) < 1e-4
        wrong = relative(model(x), reference(model, x, **sabotage))
    assert wrong > 1e-3, wrong


def test_v2_is_v1_with_options():
    v2 = small("v2")
    v1 = ConvNeXt(**SMALL, grn=True, layer_scale=None).eval()
    v1.load_state_dict(v2.state_dict())
    x = images(1, 3, 32, 32)
    assert torch.equal(v1(x), v2(x))
    assert ConvNeXtV2(v2.config, depths=(1, 1)).config.grn
    with pytest.raises(ConfigError, match="ConvNeXtV2Config"):
        ConvNeXtV2(ConvNeXtConfig())


def test_norm_before_or_after_pooling():
    x = images(2, 3, 32, 32)
    before = small("v1", pool={"norm": False})
    grid = before.encode(before.embed(x)).x
    raw = before.stages[1](before.stages[0](before.embed(x).x))
    expected = F.layer_norm(raw, (12,), before.norm.weight, before.norm.bias, 1e-6)
    torch.testing.assert_close(grid, expected)
    torch.testing.assert_close(before(x), before.head.fc(expected.mean((1, 2))))
    other = small("v1", pool={"kind": "avg", "norm": {"kind": "layer", "eps": 0.5}})
    pooled = other.forward_head(other.forward_features(x), pre_logits=True)
    features = other.forward_features(x).mean((2, 3))
    torch.testing.assert_close(pooled, F.layer_norm(features, (12,), other.head.norm.weight, other.head.norm.bias, 0.5))


def test_features():
    model, x = small("v2", depths=(1, 1, 1), dims=(8, 12, 16)), images(2, 3, 32, 48)
    seen = []
    handles = [s.register_forward_hook(lambda _m, _a, out: seen.append(out.permute(0, 3, 1, 2))) for s in model.stages]
    maps = FeatureExtractor(model)(x)
    for handle in handles:
        handle.remove()
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 12), (2, 12, 4, 6), (2, 16, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(maps, seen, strict=True))
    last, some = model.forward_intermediates(x, [0, -1])
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(some[0], maps[0])
    assert torch.equal(some[1], last)


def test_no_copy_changes_layout():
    """What leaves each stage is a contiguous grid: nothing between was permuted in memory."""
    model = small("v2")
    patches = model.embed(images(2, 3, 32, 32))
    assert patches.x.is_contiguous()
    for stage in model.stages:
        patches = patches._replace(x=stage(patches.x))
        assert patches.x.is_contiguous()


def test_mask_hides_patches():
    model, x = small("v2"), images(2, 3, 32, 32)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 1]]).expand(2, -1, -1)
    hidden = (1 - mask)[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    out = model.encode(model.embed(x), mask).x
    other = model.encode(model.embed(x + hidden * images(2, 3, 32, 32, seed=5)), mask).x
    assert torch.equal(out, other)
    assert (out[mask == 0] == 0).all()
    assert (out[mask == 1] != 0).any(-1).all()
    assert relative(model.encode(model.embed(x)).x, out) > 0.1
    everything = model.encode(model.embed(x), torch.ones(2, 4, 4)).x
    torch.testing.assert_close(everything, model.encode(model.embed(x)).x)


def test_masked_block_is_sparse_convolution():
    """Only seen cells exist: a loop over them, with neighbours looked up in a table."""
    block = redrawn(ConvNeXtBlock(6, 3))
    grid, mask = images(1, 4, 5, 6), torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    cells = {(r, c): grid[0, r, c] for r in range(4) for c in range(5) if mask[0, r, c]}
    rows = []
    for r, c in cells:
        mixed = block.depthwise.bias.clone()
        for i in range(3):
            for j in range(3):
                if (r + i - 1, c + j - 1) in cells:
                    mixed = mixed + block.depthwise.weight[:, 0, i, j] * cells[r + i - 1, c + j - 1]
        rows.append(mixed)
    hidden = F.gelu(block.fc1(block.norm(torch.stack(rows))))
    strength = hidden.norm(dim=0)
    hidden = hidden + block.grn.weight * hidden * strength / (strength.mean() + 1e-6) + block.grn.bias
    expected = torch.stack(list(cells.values())) + block.fc2(hidden)
    torch.testing.assert_close(block(grid, mask)[mask], expected, atol=1e-5, rtol=1e-5)


def test_mask_must_fit():
    model = small("v2")
    with pytest.raises(InputError, match="mask"):
        model.encode(model.embed(images(1, 3, 32, 32)), torch.ones(1, 3, 3))


def test_grn_in_half_precision_and_at_zero():
    grn = redrawn(GRN(16))
    x = images(2, 9, 9, 16) * 300  # squares overflow float16
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        got = copy.deepcopy(grn).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        assert relative(got.float(), grn(x)) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        assert grn(x.bfloat16()).dtype == torch.bfloat16
    zero = torch.zeros(1, 2, 2, 16, requires_grad=True)
    grn(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    model, x = small(kind).train(), images(2, 3, 32, 32)
    model(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in plain.values())
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def test_checkpointing_keeps_less():
    model, x = small("v2", depths=(6, 1)), images(2, 3, 32, 32)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(x)
        return sum(sizes)

    whole = kept()
    model.set_grad_checkpointing()
    assert kept() < whole / 3
    model.set_grad_checkpointing(False)
    assert kept() == whole


def test_fresh_weights():
    torch.manual_seed(0)
    model = ConvNeXt(depths=(2,), dims=(64,))
    first, second = model.stages[0].blocks
    assert first.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (first.fc1.bias == 0).all()
    assert (first.scale.gamma == 1e-6).all()
    assert not torch.equal(first.fc1.weight, second.fc1.weight)
    assert (ConvNeXtV2(depths=(1,), dims=(8,)).stages[0].blocks[0].grn.weight == 0).all()


def test_drop_path_grows_linearly():
    model = ConvNeXt(depths=(2, 3), dims=(8, 8), drop_path=0.4)
    rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_new_classes_keep_the_norm():
    model, x = small("v1"), images(1, 3, 32, 32)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(9, "avg")
    assert model(x).shape == (1, 9)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), before)
    model.reset_classifier(0)
    assert torch.equal(model(x), before)
    assert small("v1", num_classes=0)(x).shape == (1, 12)


def test_layers_are_told_apart():
    import re

    model = small("v1")
    matcher = model.group_matcher()
    assert re.compile(matcher["stem"]).groups == 0  # what a group captures, timm takes for depth
    patterns = [matcher["stem"], *[pattern for pattern, _ in matcher["blocks"]], r"^head"]
    for name, _ in model.named_parameters():
        assert sum(bool(re.match(pattern, name)) for pattern in patterns) == 1, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": (1, 2, 3)}, ["dims", "depths"]),
        ({"depths": (200, 100), "dims": (8, 8)}, ["300", "256"]),
        ({"dim": 8}, ["'dim'", "'dims'"]),
        ({"depths": ()}, ["depths"]),
        ({"dims": (8, 100_000)}, ["dims[1]", "100000"]),
        ({"pool": {"norm": "batch"}}, ["pool.norm"]),
        ({"pool": {"norm": 3}}, ["pool.norm"]),
        ({"layer_scale": True}, ["layer_scale"]),
    ],
)
def test_bad_configs(options, words):
    with pytest.raises(ConfigError) as error:
        ConvNeXt(**{**SMALL, **options})
    assert all(word in str(error.value) for word in words), error.value


def test_any_size_that_leaves_a_patch():
    model = small("v1")
    x = images(1, 3, 37, 45)
    assert torch.equal(model(x), model(x[:, :, :36, :44]))
    with pytest.raises(InputError, match="larger"):
        model(images(1, 3, 6, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_export(kind):
    model, x = small(kind), images(2, 3, 32, 32)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes={"images": {0: batch}}).module()
    more = images(5, 3, 32, 32)
    torch.testing.assert_close(exported(more), model(more))


def test_copies_dtypes_and_config():
    model, x = small("v2"), images(1, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    rebuilt = ConvNeXtV2(type(model.config).from_dict(model.config.to_dict())).eval()
    rebuilt.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), rebuilt):
        assert torch.equal(other(x), model(x))
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert relative(half(x.bfloat16()).float(), model(x)) < 0.1
    with torch.device("meta"):
        assert ConvNeXt(**SMALL)(x.to("meta")).shape == (1, 5)
