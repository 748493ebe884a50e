"""What every model of images owes its user: names and sizes, timm's methods, layout, gradients, copies, compilers."""

import copy
import pickle
import re
import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import patchlib
from patchlib import ConfigError, ConvMixer, InputError, PatchNet, UnknownNameError, ViT

_COMMON = {"patch_size": 4, "img_size": 16, "num_classes": 5}
_VIT = {"dim": 16, "depth": 2, "heads": 2, **_COMMON}
_MIXER = {"dim": 8, "depth": 2, "kernel_size": 3, **_COMMON}
_STAGES = (
    {"kind": "convmixer", "depth": 2, "dim": 8, "kernel_size": 3},
    {"kind": "transformer", "depth": 2, "dim": 16, "downsample": 2, "heads": 2},
)
_AVERAGE = {"tokens": {"class": 0}, "pool": {"kind": "avg", "norm": True}}
TINY = {
    "convmixer": (ConvMixer, _MIXER),
    "rezero": (ConvMixer, {**_MIXER, "rezero": True, "patch_size": 2, "patch_embed": {"kind": "conv", "stride": 1}}),
    "learned": (ViT, _VIT),
    "sinusoidal": (ViT, {**_VIT, "pos_embed": "sinusoidal", "patch_embed": "linear", "attention": {"qkv_bias": False}}),
    "rotary": (ViT, {**_VIT, "pos_embed": "rotary", "mlp": "swiglu", "norm": "rms", "attention": {"norm": "rms"}}),
    "early_conv": (ViT, {**_VIT, "patch_embed": "early_conv", **_AVERAGE}),
    "deit3": (ViT, {**_VIT, "pos_embed": {"covers_prefix": False}, "layer_scale": 1e-6, "tokens": {"register": 2}}),
    "distilled": (ViT, {**_VIT, "tokens": {"distill": 1}, "block": "post"}),
    "patchnet": (PatchNet, {**_COMMON, "stages": _STAGES, "pos_embed": "learned"}),
    "patchnet_attention": (PatchNet, {**_COMMON, "stages": _STAGES, "pool": "attention"}),
}  # fmt: skip
COMPILED = ["convmixer", "rezero", "learned", "sinusoidal", "rotary", "early_conv", "patchnet"]


def tiny(kind, **overrides):
    model_class, options = TINY[kind]
    return model_class(**{**options, **overrides})


def shallow(kind):
    """One block of each sort, for compilers, which are slow; every number redrawn."""
    stages = [{**stage, "depth": 1} for stage in _STAGES]
    return redraw(tiny(kind, **({"stages": stages} if kind.startswith("patchnet") else {"depth": 1})))


def redraw(model):
    """Every parameter and statistic at random, so that nothing hides behind a zero."""
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5 if t.dim() == 1 else torch.randn_like(t) * 0.3)
    return model


@pytest.fixture(params=TINY)
def kind(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16)


# --- names

PARAMETERS = {
    "convmixer_24": 2_114_050,
    "convmixer_16": 1_622_530,
    "convmixer_16_8": 2_849_282,
    "vit_24_linear": 13_524_482,
    "vit_24_conv": 13_524_482,
    "vit_16_linear": 13_073_922,
    "vit_16_conv": 13_073_922,
    "convmixer_256_12": 996_362,
    "convmixer_256_12_cifar": 961_814,
    "vit_128_6_cifar": 811_146,
    "convmixer_256_8": 594_186,
    "vit_early_conv_128_6": 7_257_138,
    # published with timm
    "vit_tiny_patch16_224": 5_717_416,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "deit_small_distilled_patch16_224": 22_436_432,
    "convmixer_768_32": 21_110_248,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_named_models_have_their_number_of_parameters(name, count):
    assert sum(p.numel() for p in patchlib.create_model(name, device="meta").parameters()) == count


@pytest.mark.parametrize("family", ["convmixer", "vit", "patchnet"])
@torch.no_grad()
def test_every_registered_model_runs_on_meta(family):
    """At its own image size: the shapes of logits and of each step's features."""
    for name in patchlib.list_models(family=family):
        model = patchlib.create_model(name, device="meta").eval()
        config = model.config
        side = config.img_size
        inputs = torch.empty(2, 3, side, side, device="meta")
        features, maps = model.forward_intermediates(inputs)
        assert model.forward_head(features).shape == (2, config.num_classes), name
        info = model.feature_info
        assert len(maps) == len(info), name
        for found, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
            cells = (side - model.patch_embed.patch_size[0]) // model.patch_embed.stride[0] + 1
            cells = cells * model.patch_embed.stride[0] // reduction
            assert found.shape == (2, channels, cells, cells), name
        assert all(t.is_meta for t in model.state_dict().values()), name


def test_every_variant_is_in_the_index():
    for module in (patchlib.models.convmixer, patchlib.models.vit, patchlib.models.patchnet):
        names = patchlib.list_models(family=module.__name__.rpartition(".")[2])
        assert sorted(module.VARIANTS) == names


# --- timm's methods


@torch.no_grad()
def test_features_then_head_are_the_whole(kind, images):
    model = redraw(tiny(kind)).eval()
    features = model.forward_features(images)
    prefix = getattr(model.config, "prefix", None)
    if prefix is None:
        assert features.shape[:2] == (4, model.num_features)
        assert features.dim() == 4
    else:
        assert features.shape == (4, prefix + 16, model.num_features)
    assert torch.equal(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (4, model.num_features) == (4, model.head_hidden_size)
    if kind != "distilled":
        assert torch.allclose(model.get_classifier()(pooled), model(images), atol=1e-5)


@torch.no_grad()
def test_intermediates_are_the_outputs_of_steps(kind, images):
    """As forward hooks see them."""
    model = redraw(tiny(kind)).eval()
    seen = []
    modules = dict(model.named_modules())
    names = model.feature_info.module_name()
    handles = [modules[n].register_forward_hook(lambda m, i, o: seen.append(o)) for n in names]
    features, maps = model.forward_intermediates(images)
    for handle in handles:
        handle.remove()
    assert torch.equal(features, model.forward_features(images))
    prefix = getattr(model.config, "prefix", 0)
    assert len(maps) == len(seen) == 2
    for found, raw in zip(maps, seen, strict=True):
        grid = raw if raw.dim() == 4 else raw[:, prefix:].reshape(4, 4, 4, -1)
        assert torch.equal(found, grid.permute(0, 3, 1, 2))


@torch.no_grad()
def test_intermediates_come_in_the_order_and_format_asked_for(kind, images):
    model = redraw(tiny(kind)).eval()
    take = lambda indices, **options: model.forward_intermediates(images, indices, intermediates_only=True, **options)  # noqa: E731
    first, last = take(None)
    for indices, wanted in ((1, [last]), (2, [first, last]), ([-1], [last]), ([1, 0], [last, first]), ((0,), [first])):
        found = take(indices)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), indices
    assert torch.equal(take(1, output_fmt="NHWC")[0], last.permute(0, 2, 3, 1))
    assert torch.equal(take(1, output_fmt="NLC")[0], last.flatten(2).transpose(1, 2))
    shape = last.permute(0, 2, 3, 1)
    assert torch.allclose(take(1, output_fmt="NHWC", norm=True)[0], model.norm(shape), atol=1e-5)
    if hasattr(model.config, "prefix"):
        (pair,) = take(1, return_prefix_tokens=True)
        assert torch.equal(pair[0], last)
        assert pair[1].shape == (4, model.config.prefix, 16)
    for wrong in (0, 3, [2], [-3], []):
        with pytest.raises(InputError, match="indices: found"):
            take(wrong, stop_early=True)
    with pytest.raises(InputError, match="output_fmt: found 'NCWH'"):
        take(1, output_fmt="NCWH")


@torch.no_grad()
def test_stopping_early_runs_no_later_step(kind, images):
    model = redraw(tiny(kind)).eval()
    second = model.steps[1]
    ran = []
    second.register_forward_hook(lambda *_: ran.append(1))
    (early,) = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert not ran
    (full,) = model.forward_intermediates(images, [0], intermediates_only=True)
    assert ran
    assert torch.equal(early, full)


def test_the_final_norm_fits_only_steps_of_its_width(images):
    with pytest.raises(InputError, match="norm=True"):
        tiny("patchnet").forward_intermediates(images, [0], norm=True)


@pytest.fixture
def registered(kind):
    """A name for the tiny model, while the test runs."""
    model_class, options = TINY[kind]
    patchlib.register_model(f"tiny_{kind}", model_class, model_class.Config(**options))
    yield f"tiny_{kind}"
    del patchlib.registry._user_models[f"tiny_{kind}"]


@torch.no_grad()
def test_features_only_models_give_maps_as_their_info_says(kind, registered, images):
    for out_indices, steps in ((None, [0, 1]), (1, [1]), ([0], [0]), ([-1, -2], [1, 0])):
        model = patchlib.create_model(registered, features_only=True, out_indices=out_indices).eval()
        maps = model(images)
        assert len(maps) == len(steps) == len(model.feature_info)
        whole = model.model.forward_intermediates(images, intermediates_only=True)
        for found, step, info in zip(maps, steps, model.feature_info, strict=True):
            assert torch.equal(found, whole[step])
            cells = 15 if kind == "rezero" else 16 // info["reduction"]
            assert found.shape == (4, info["num_chs"], cells, cells)


def test_feature_info_answers_for_all_for_some_and_for_one():
    """The calls of timm's FeatureInfo."""
    info = tiny("patchnet").feature_info
    assert (info.channels(), info.channels(0), info.channels([1])) == ([8, 16], 8, [16])
    assert (info.reduction(), info.reduction(-1), info.reduction((1, 0))) == ([4, 8], 8, [8, 4])
    assert (info.module_name(), info.module_name(1)) == (["blocks.0", "blocks.1"], "blocks.1")
    assert info.get_dicts() == list(info)
    assert info.get_dicts(["num_chs"]) == [{"num_chs": 8}, {"num_chs": 16}]
    assert info.get_dicts(["reduction"], 1) == {"reduction": 8}


@pytest.mark.parametrize("indices", ["a", [1.5], 1.5, ["0"], [None], [], 0, 3, [2], [-3]])
def test_indices_of_steps_that_there_are_not(indices, images):
    with pytest.raises(InputError, match=r"indices: found .*; allowed: .*1"):
        tiny("convmixer").forward_intermediates(images, indices)


def test_features_only_models_train_what_they_run(registered, images):
    model = redraw(patchlib.create_model(registered, features_only=True, out_indices=[0]))
    model(images)[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(re.match(r"model\.(head|norm|blocks\.1)\b", name) for name in trained)
    assert any(name.startswith("model.blocks.0") for name in trained)


def test_a_new_classifier_is_drawn_alone(kind, images):
    model = redraw(tiny(kind)).eval().double()
    kept = {"preprocessing": {"crop_pct": 1.0}, "license": "mit", "terms": "none", "source": "hf-hub:user/name"}
    model.info = {"labels": ["a"] * 5, "score": "0.9", "test_accuracy": 0.9, "date": "2026-11-21", **kept}
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("head.")}
    model.reset_classifier(7)
    assert model(images.double()).shape == (4, 7)
    assert model.num_classes == model.config.num_classes == 7
    assert model.info == kept
    assert not model.head.training
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert head.weight.dtype == torch.float64
        assert 0 < head.weight.abs().max() < 0.5, "fresh, not redrawn"
    model.reset_classifier(0)
    assert model(images.double()).shape == (4, model.num_features)
    assert isinstance(heads, tuple) or isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("kind", ["convmixer", "learned", "early_conv", "patchnet"])
def test_a_new_pooling_comes_with_a_config_that_rebuilds_it(kind, images):
    model = redraw(tiny(kind)).eval()
    for pool in ("attention", "avg"):
        model.reset_classifier(3, pool)
        assert model.config.pool["kind"] == pool
        again = type(model)(model.config).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(images), model(images))


def test_a_pooling_that_does_not_fit_changes_nothing():
    model = tiny("convmixer")
    config, head = model.config, model.head
    with pytest.raises(ConfigError, match="pool"):
        model.reset_classifier(3, "class")
    assert model.config is config
    assert model.head is head


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_no_number(kind, images, training):
    """Neither outputs nor gradients nor batch norms' statistics."""
    plain = redraw(tiny(kind)).train(training)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(m.track_running_stats for m in saving.modules() if isinstance(m, nn.BatchNorm2d))


def test_checkpointing_keeps_fewer_tensors_for_the_backward_pass(kind, images):
    model = tiny(kind)
    kept = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images)
        kept.append(count)
    assert kept[1] < 0.6 * kept[0]


def test_weight_decay_spares_positions_and_tokens(kind):
    model = tiny(kind)
    wanted = {
        "convmixer": set(),
        "rezero": set(),
        "learned": {"cls_token", "pos_embed.table"},
        "sinusoidal": {"cls_token"},
        "rotary": {"cls_token"},
        "early_conv": {"pos_embed.table"},
        "deit3": {"cls_token", "reg_token", "pos_embed.table"},
        "distilled": {"cls_token", "dist_token", "pos_embed.table"},
        "patchnet": {"pos_embed.table"},
        "patchnet_attention": {"head.pool.query"},
    }
    assert model.no_weight_decay() == wanted[kind]


@pytest.mark.parametrize("coarse", [False, True])
def test_the_group_matcher_sorts_parameters_by_depth(kind, coarse):
    """Read as timm reads it: a string or a list of (string, value) for each group, first match first."""
    model = tiny(kind)
    matcher = model.group_matcher(coarse=coarse)
    patterns = []
    for group in ("stem", "blocks"):
        specs = matcher[group] if isinstance(matcher[group], list) else [(matcher[group], None)]
        patterns += [(group, re.compile(spec[0])) for spec in specs]
    assert all(p.groups == 0 for group, p in patterns if group == "stem")  # what a group captures, timm takes for depth
    for name, _ in model.named_parameters():
        found = next(((group, p.match(name)) for group, p in patterns if p.match(name)), None)
        if name.startswith("blocks."):
            assert found[0] == "blocks"
            assert found[1].group(1) == name.split(".")[1]
        elif name.startswith("head.") or (coarse and name.startswith("norm.")):
            assert found is None
        elif name.startswith("norm."):
            assert found[0] == "blocks"
        else:
            assert found[0] == "stem", name


# --- sizes


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (8, 32)])
@torch.no_grad()
def test_any_image_size_works_at_call_time(kind, size):
    model = tiny(kind).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    for found, info in zip(maps, model.feature_info, strict=True):
        wanted = [n - 1 if kind == "rezero" else n // info["reduction"] for n in size]
        assert list(found.shape) == [1, info["num_chs"], *wanted]


@torch.no_grad()
def test_set_input_size_resizes_positions_and_kernels(kind):
    model = redraw(tiny(kind)).eval().requires_grad_(False)
    if kind in ("rezero", "early_conv"):
        config, state = model.config, copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError, match="patch_size"):
            model.set_input_size(img_size=32, patch_size=8)
        assert model.config is config, "nothing is changed"
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        return
    small = torch.randn(2, 3, 16, 16)
    large = nn.functional.interpolate(small, scale_factor=2, mode="bicubic", antialias=True)
    before = model(small)
    model.set_input_size(img_size=(32, 32), patch_size=8)
    assert (model.config.img_size, model.config.patch_size) == ((32, 32), 8)
    assert not any(p.requires_grad for p in model.parameters()), "what was frozen stays frozen"
    assert (model(large) - before).abs().max() < 0.3 * before.abs().max(), "nearly the same of an enlarged image"
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(large), model(large))
    with pytest.raises(InputError, match="smaller than one patch"):
        model.set_input_size(patch_size=64)
    assert model.config.patch_size == 8
    assert model.patch_embed.patch_size == (8, 8)


def test_a_config_whose_own_images_do_not_run_is_refused(monkeypatch):
    monkeypatch.setattr(patchlib.registry, "_user_models", {})
    merging = [{**_STAGES[0], "downsample": 2}, {**_STAGES[1], "downsample": 4}]
    cases = [
        ("learned", {"img_size": 18}, "ViTConfig.img_size: image height 18: not covered exactly"),
        ("rotary", {"img_size": (16, 2)}, "image width 2: smaller than one patch"),
        ("rezero", {"img_size": 1}, "ConvMixerConfig.img_size: image height 1"),
        ("patchnet", {"stages": merging}, "PatchNetConfig.img_size: found 16, which gives 4 x 4 .* at least 8"),
    ]
    for kind, options, named in cases:
        with pytest.raises(InputError, match=named):
            tiny(kind, **options)
    tiny("patchnet", stages=merging, img_size=32)
    tiny("learned", img_size=18, patch_embed={"remainder": "pad"})
    with pytest.raises(InputError, match="allowed: at least 4 along"):
        patchlib.ConvNeXt(depths=(1, 1, 1), dims=(4, 4, 4), img_size=(64, 12))
    patchlib.register_model("uncovered", ViT, ViT.Config(**{**_VIT, "img_size": 18}))
    with pytest.raises(InputError, match=r"uncovered: ViTConfig\.img_size"):
        patchlib.create_model("uncovered")


@pytest.mark.parametrize("kind", ["learned", "patchnet"])
def test_an_input_size_that_does_not_run_changes_nothing(kind):
    model = tiny(kind)
    model.info = {"preprocessing": {"input_size": [3, 16, 16]}}
    config, info, state = model.config, copy.deepcopy(model.info), copy.deepcopy(model.state_dict())
    for options in ({"img_size": 18}, {"img_size": (16, 6)}, {"patch_size": 5}, {"img_size": 8, "patch_size": 3}):
        with pytest.raises(InputError, match=r"img_size: image (height|width)"):
            model.set_input_size(**options)
        assert model.config is config
        assert model.info == info
        assert model.patch_embed.patch_size == (4, 4)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_stride_as_large_as_the_patch_follows_it():
    model = tiny("learned", patch_embed={"kind": "conv", "stride": 4})
    model.set_input_size(patch_size=8)
    again = ViT(model.config)
    again.load_state_dict(model.state_dict())
    assert again.patch_embed.stride == model.patch_embed.stride == (8, 8)


def test_positions_of_an_unchanged_grid_stay_the_same_parameter():
    model = tiny("learned")
    table = model.pos_embed.table
    model.set_input_size(img_size=32, patch_size=8)
    assert model.pos_embed.table is table


# --- freezing and initialising


@pytest.mark.parametrize("upto", [None, 0, 1, 2])
def test_frozen_parts_learn_nothing_and_keep_their_statistics(kind, images, upto):
    model = redraw(tiny(kind, drop_path=0.2))
    model.freeze(upto)
    frozen = ("patch_embed", "stem_norm", "pos_embed", "cls_token", "dist_token", "reg_token")
    frozen += ("blocks", "norm") if upto is None else tuple(f"blocks.{i}." for i in range(upto))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    assert model.training
    model(images).square().mean().backward()
    optimizer.step()
    for name, after in model.state_dict().items():
        if name.startswith(frozen):
            assert torch.equal(after, before[name]), name
        else:
            assert not torch.equal(after, before[name]), name
    assert all(p.requires_grad != name.startswith(frozen) for name, p in model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != f"{name}.".startswith(frozen), name
    model.eval()
    assert not any(m.training for m in model.modules())

    model.unfreeze()
    model.train()
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_more_than_there_is_is_refused(kind):
    for upto in (-1, 3):
        with pytest.raises(ConfigError, match=f"freeze: found upto={upto}; allowed: 0 to 2"):
            tiny(kind).freeze(upto)


def test_initialising_a_part_changes_that_part_alone(kind):
    model = redraw(tiny(kind))
    for part in ("blocks.1", "head", "patch_embed"):
        before = copy.deepcopy(model.state_dict())
        if part == "head":
            model.init_weights(model.head)
        else:
            model.init_weights(part)
        changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        inside = {name for name in before if name.startswith(part + ".") and "num_batches" not in name}
        assert changed == inside
    with pytest.raises(UnknownNameError, match=re.escape("no submodule is named 'blocks.l'; did you mean")):
        model.init_weights("blocks.l")


def test_initialising_all_is_building_anew(kind):
    """The same draws, or at least the same scale of every tensor, as a fresh model has."""
    fresh, model = tiny(kind), redraw(tiny(kind))
    model.init_weights()
    for (name, wanted), found in zip(fresh.state_dict().items(), model.state_dict().values(), strict=True):
        if wanted.is_floating_point() and wanted.numel() > 60:
            assert found.std().item() == pytest.approx(wanted.std().item(), rel=0.6, abs=1e-12), name
        elif not wanted.is_floating_point() or wanted.unique().numel() == 1:
            assert torch.equal(found, wanted), name


def test_two_blocks_of_a_fresh_model_differ(kind):
    model = tiny(kind)
    stages = model.blocks if kind.startswith("patchnet") else [model.blocks]
    for blocks in stages:
        *_, first, second = blocks
        assert type(first) is type(second)
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
            if a.dim() > 1:
                assert not torch.equal(a, b), name


# --- gradients and layout


def test_every_parameter_has_a_gradient(kind, images):
    model = redraw(tiny(kind))
    logits = model(images)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["convmixer", "rezero", "patchnet", "patchnet_attention"])
def test_grids_stay_contiguous(kind, dtype, training):
    """So does what each convolution and batch norm reads and writes, in torch's channels_last; forward and backward."""
    model = redraw(tiny(kind)).to(dtype).train(training)
    contiguous = {}

    def look(name, layout):
        def hook(_module, inputs, output):
            tensors = [t for t in (*inputs, output) if t.dim() == 4]
            contiguous[name] = all(t.is_contiguous(memory_format=layout) for t in tensors)

        return hook

    for name, module in model.named_modules():
        if re.fullmatch(r"blocks\.\d(\.\d)?", name) or name.endswith((".depthwise", ".pointwise")):
            module.register_forward_hook(look(name, torch.contiguous_format))
        elif isinstance(module, nn.BatchNorm2d) or name.endswith(".conv"):
            module.register_forward_hook(look(name, torch.channels_last))
    images = torch.randn(2, 3, 16, 16, dtype=dtype)
    output = model(images)
    assert len(contiguous) >= 6
    assert all(contiguous.values()), contiguous
    output.float().square().sum().backward()
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


class Copies(TorchDispatchMode):
    """Counts copies of whole grids."""

    def __init__(self, cells):
        super().__init__()
        self.cells, self.found = cells, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func.overloadpacket.__name__ in ("clone", "copy_", "contiguous", "_to_copy")
            and args[0].numel() >= self.cells
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["convmixer", "rezero", "patchnet", "learned", "rotary"])
def test_no_grid_is_copied_to_change_its_layout(kind, training):
    model = tiny(kind).train(training)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model(images)
        with Copies(cells=2 * 4 * 16) as copies:
            model(images)
    assert not copies.found


def is_last(model):
    return model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["learned"])
def test_conv_patches_stay_channels_last_wherever_they_go(registered, tmp_path):
    """Created, copied, cast, pickled, saved and loaded in every way."""
    model = patchlib.create_model(registered)
    assert is_last(model)
    assert is_last(copy.deepcopy(model))
    assert is_last(pickle.loads(pickle.dumps(model)))
    assert is_last(tiny("learned").bfloat16())
    folder = patchlib.save_pretrained(model, tmp_path)
    loaded = patchlib.create_model(f"local-dir:{folder}")
    assert is_last(loaded)
    assert is_last(patchlib.create_model(f"local-dir:{folder}", dtype=torch.bfloat16))
    assert is_last(patchlib.create_model(f"local-dir:{folder}", dtype="file"))
    assert is_last(patchlib.create_model(registered, checkpoint=folder / "model.safetensors"))
    assert is_last(patchlib.load_pretrained(tiny("learned"), f"local-dir:{folder}"))
    other = tiny("learned")
    other.load_state_dict(model.state_dict())
    assert is_last(other)
    assert torch.equal(loaded.patch_embed.proj.weight, model.patch_embed.proj.weight)
    model.set_input_size(patch_size=8)
    assert is_last(model)


# --- copies, dtypes, devices


@torch.no_grad()
def test_copies_and_pickles_give_the_same_answers(kind, images):
    model = redraw(tiny(kind)).eval()
    model.info["labels"] = ["cat", "dog"]
    wanted = model(images)
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), rebuilt):
        assert torch.equal(other(images), wanted)
        assert other.config == model.config
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.info == model.info
        other.info["labels"].append("bird")
        assert model.info["labels"] == ["cat", "dog"]


def test_half_precision_is_near_full(kind, images):
    model = redraw(tiny(kind)).eval()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        wanted, found = model(images), half(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    half.train()(images.bfloat16()).float().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())


def test_autocast_trains(kind, images):
    model = tiny(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_meta_models_tell_shapes_and_come_to_life(kind):
    with torch.device("meta"):
        model = tiny(kind)
        assert model(torch.empty(4, 3, 16, 16)).shape == (4, 5)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu").init_weights()
    assert model(torch.randn(4, 3, 16, 16)).isfinite().all()


@torch.no_grad()
def test_synchronised_batch_norms_evaluate_alike(kind, images):
    model = redraw(tiny(kind)).eval()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in other.modules()) == norms
    assert torch.equal(other(images), model(images))


@torch.no_grad()
def test_samples_do_not_mix_in_evaluation(kind, images):
    model = redraw(tiny(kind)).eval()
    assert torch.allclose(model(images)[2:3], model(images[2:3]), atol=1e-5)
    assert model(images[:0]).shape == (0, 5)


# --- compilers


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.usefixtures("one_thread")
def test_models_compile_as_one_graph(kind, training, images):
    model = shallow(kind).train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    if not training:
        with torch.no_grad():
            assert torch.allclose(compiled(images), model(images), atol=1e-5)
        return
    for run in (model, compiled):
        run(images).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("kind", ["convmixer", "rotary"])
@pytest.mark.usefixtures("one_thread")
def test_dropping_and_checkpointing_models_compile_too(kind, images):
    model = tiny(kind, drop=0.1, drop_path=0.1)
    model.set_grad_checkpointing()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    counts = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counts) <= {1}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.usefixtures("one_thread")
def test_models_are_exported_for_any_batch(kind, images):
    model = shallow(kind).eval()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    with torch.no_grad():
        for batch in (1, 4, 7):
            inputs = torch.randn(batch, 3, 16, 16)
            assert torch.allclose(program.module()(inputs), model(inputs), atol=1e-5)


@pytest.mark.parametrize("kind", ["rezero", "early_conv"])
@pytest.mark.usefixtures("one_thread")
def test_models_are_exported_in_training_mode(kind, images):
    model = shallow(kind)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    inputs = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        found = program.module()(inputs)
        assert torch.allclose(found, model(inputs), atol=1e-4)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
@pytest.mark.usefixtures("one_thread")
def test_inductor_compiles_a_hybrid(images):
    model = shallow("patchnet").eval()
    with torch.no_grad():
        wanted = model(images)
        assert torch.allclose(torch.compile(model, fullgraph=True)(images), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["convmixer", "learned"])
@pytest.mark.usefixtures("one_thread")
def test_onnx_gives_the_same_answers(kind, images, tmp_path):
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = shallow(kind).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    for batch in (1, 5):
        inputs = torch.randn(batch, 3, 16, 16)
        (found,) = session.run(None, {name: inputs.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), model(inputs), atol=1e-4)
