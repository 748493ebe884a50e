"""`create_model` and what tells about models."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import patchlib
from patchlib.registry import family_of, find_model

TINY = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 5}
PARAMETERS = {  # the design's table
    "convmixer_24": 2_114_050, "convmixer_16": 1_622_530, "convmixer_16_8": 2_849_282, "vit_24_linear": 13_524_482,
    "vit_24_conv": 13_524_482, "vit_16_linear": 13_073_922, "vit_16_conv": 13_073_922, "convmixer_256_12": 996_362,
    "convmixer_256_12_cifar": 961_814, "vit_128_6_cifar": 811_146, "convmixer_256_8": 594_186,
    "vit_early_conv_128_6": 7_257_138,
}  # fmt: skip


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path):
    model = patchlib.ViT(**TINY)
    model.info = {"preprocessing": {"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.9}}
    return patchlib.save_pretrained(model, tmp_path / "saved")


# names


@torch.no_grad()
def test_a_model_composed_by_arguments():
    """The example of the documentation."""
    model = patchlib.create_model("vit_16_linear", patch_embed="early_conv", pos_embed="sinusoidal", depth=6)
    assert (model.config.depth, model.config.dim, model.config.patch_size) == (6, 512, 16)
    assert model.patch_embed.kind == "early_conv"
    assert isinstance(model.pos_embed, patchlib.SinusoidalPE)
    assert model(torch.zeros(1, 3, 192, 192)).shape == (1, 2)


def test_overrides_are_those_of_the_config():
    model = patchlib.create_model(
        "vit_16_linear", **TINY | {"img_size": (8, 16), "num_classes": 7}, in_chans=1, mlp={"ratio": 2.0}, drop=0.1
    )
    wanted = find_model("vit_16_linear")[1].replace(
        **{**TINY, "img_size": (8, 16), "num_classes": 7}, in_chans=1, mlp={"kind": "gelu", "ratio": 2.0}, drop=0.1
    )
    assert model.config == wanted


def test_a_name_alone_is_a_random_model_in_training_mode():
    model = patchlib.create_model("convmixer_256_8")
    assert model.training
    assert model.info == {}
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_the_same_seed_gives_the_same_model():
    """Also with overrides, which are measured before the model is drawn."""
    torch.manual_seed(5)
    wanted = patchlib.ViT(find_model("vit_16_linear")[1], **TINY)
    torch.manual_seed(5)
    assert equal(patchlib.create_model("vit_16_linear", **TINY), wanted)
    assert not equal(patchlib.create_model("vit_16_linear", **TINY), wanted)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("convmixer_17", r"no model is named 'convmixer_17'; did you mean .*'convmixer_16'"),
        (
            "vit_base_patch16_225.augreg2_in21k_ft_in1k",
            r"named 'vit_base_patch16_225'; did you mean 'vit_base_patch16_224",
        ),
        ("vit_base_patch16_224.augreg2_in21k_ft_in2k", r"have the tag .*did you mean 'augreg2_in21k_ft_in1k'"),
        ("convmixer_16_8.in1k", r"no weights of 'convmixer_16_8' exist anywhere; the nearest .*'convmixer_"),
        ("", r"no model is named ''"),
        (None, r"no model is named 'None'"),
        ("hf_hub:timm/x", r"no model is named"),
    ],
)
def test_unknown_names_and_tags(name, named):
    with pytest.raises(patchlib.UnknownNameError, match=named):
        patchlib.create_model(name)


def test_pretrained_where_no_weights_are_names_the_nearest_that_have_some():
    with pytest.raises(
        patchlib.UnknownNameError, match=r"no weights of 'vit_16_linear' exist.*have some: 'vit_.*list_models"
    ):
        patchlib.create_model("vit_16_linear", pretrained=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_clases": 3}, "no field 'num_clases'; did you mean 'num_classes'"),
        ({"patch_embedd": "conv"}, "did you mean 'patch_embed'"),
        ({"pretrainde": True}, "no argument and ViTConfig no field 'pretrainde'; did you mean 'pretrained'"),
        ({"feature_only": True}, "did you mean 'features_only'"),
        ({"checkpont": "x.safetensors"}, "did you mean 'checkpoint'"),
        ({"patch_embed": {"remaindr": "drop"}}, "has no option 'remaindr'; did you mean 'remainder'"),
        ({"patch_embed": {"x": 1}}, "has no option 'x'; allowed: 'bias', 'remainder', 'stride'$"),
        ({"pos_embed": {"cover_prefix": False}}, "did you mean 'covers_prefix'"),
        ({"pool": {"x": 1}}, "has no option 'x'; allowed: 'norm'$"),
        ({"patch_embed": "early_konv"}, r"ViTConfig\.patch_embed\.kind: .*did you mean 'early_conv'"),
        ({"num_classes": -1}, r"ViTConfig\.num_classes: found -1; allowed: an integer from 0 to"),
        ({"in_chans": 0}, r"ViTConfig\.in_chans: found 0"),
        ({"img_size": "large"}, r"ViTConfig\.img_size: found 'large'"),
        ({"img_size": 200, "heads": 7}, r"ViTConfig\.heads: found 7; allowed: a divisor"),
        ({"patch_embed": "early_conv", "patch_size": 12}, r"vit_16_linear: early_conv: found patch_size"),
        ({"dtype": "float16"}, r"dtype: found 'float16'; allowed: None, 'file', torch\.float64"),
        ({"dtype": torch.int8}, r"dtype: found torch\.int8"),
        ({"pretrained": False, "checkpoint": "x"}, r"pretrained: found False beside checkpoint='x'"),
        ({"out_indices": [0]}, r"out_indices: found \[0\] without features_only=True"),
        ({"device": "vulkan"}, r"device: found 'vulkan', which cannot be used here .*; allowed: 'cpu'"),
        ({"device": "cud"}, r"device: found 'cud'; allowed: a torch\.device"),
    ],
)
def test_wrong_arguments_are_named(options, named):
    with pytest.raises(patchlib.ConfigError, match=named):
        patchlib.create_model("vit_16_linear", **options)


def test_a_tag_without_weights_still_tells_the_sizes():
    """As in timm: the tag's number of classes stands, or the caller's."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    assert patchlib.create_model(name, device="meta").num_classes == 21_843
    assert patchlib.create_model(name, device="meta", num_classes=3).num_classes == 3
    assert patchlib.create_model("vit_tiny_patch16_224", device="meta").num_classes == 1000


# sources


def test_a_folder_is_loaded_unless_told_otherwise(folder):
    name = f"local-dir:{folder}"
    weights = load_file(folder / "model.safetensors")
    for options in ({}, {"pretrained": None}, {"pretrained": True}):
        model = patchlib.create_model(name, **options)
        assert not model.training
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    model = patchlib.create_model(name, pretrained=False)
    assert model.training
    assert model.config == patchlib.create_model(name).config
    assert not torch.equal(model.head.fc.weight, weights["head.fc.weight"])


def test_a_random_model_needs_no_weights_in_the_folder(folder):
    (folder / "model.safetensors").unlink()
    assert patchlib.create_model(f"local-dir:{folder}", pretrained=False).config.dim == 16
    assert patchlib.create_model(f"local-dir:{folder}", device="meta").config.dim == 16


def test_weights_from_elsewhere(folder, tmp_path):
    """`checkpoint` is a file, a folder or a source; the name says the architecture."""
    wanted = patchlib.create_model(f"local-dir:{folder}")
    for checkpoint in (folder / "model.safetensors", folder, str(folder), f"local-dir:{folder}"):
        model = patchlib.create_model("vit_16_conv", checkpoint=checkpoint, attention={"qkv_bias": True}, **TINY)
        assert equal(model, wanted)
        assert not model.training
        assert (model.info == {}) == (checkpoint == folder / "model.safetensors")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((folder / "config.json").read_bytes())
    name = f"local-dir:{tmp_path / 'config'}"
    assert equal(patchlib.create_model(name, checkpoint=folder / "model.safetensors"), wanted)


@pytest.mark.parametrize("source", ["local-dir:", "local-dir:/no/such", "local-dir:no such", "local-dir:\0"])
def test_folders_that_are_none(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(patchlib.WeightsError, match=r"no such folder|no config\.json"):
        patchlib.create_model(source)


@pytest.mark.parametrize("source", ["no/such.safetensors", "x" * 5000, "\0", "convmixer_16.safetensors", ""])
def test_files_that_are_none(source):
    with pytest.raises(patchlib.PatchlibError):
        patchlib.create_model("convmixer_16", checkpoint=source)
    with pytest.raises(patchlib.PatchlibError):
        patchlib.load_pretrained(patchlib.ConvMixer(dim=8, depth=1), source)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_where_a_name_is_expected_says_how_to_write_it(kind, folder):
    with pytest.raises(patchlib.UnknownNameError, match=f"is a folder, .*: write 'local-dir:{folder}'"):
        patchlib.create_model(kind(folder))
    with pytest.raises(patchlib.UnknownNameError, match=r"is a file, .*checkpoint='.*model\.safetensors'"):
        patchlib.create_model(kind(folder / "model.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where a device is missing")
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_device_that_is_not_there_is_named(pretrained):
    with pytest.raises(patchlib.ConfigError, match=r"device: found 'cuda', which cannot be used here"):
        patchlib.create_model("convmixer_16", pretrained=pretrained, device="cuda")


@pytest.mark.parametrize("source", ["hf-hub:", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a/b@..", "hf-hub:a b"])
def test_malformed_repositories_are_refused_before_any_request(source):
    with pytest.raises(patchlib.InputError, match=r"repository|revision"):
        patchlib.create_model(source)


def test_a_file_in_the_way_of_a_name_is_taken(folder, tmp_path, monkeypatch):
    """load_pretrained takes a path that exists before a name of the catalogue."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "convmixer_16").write_bytes((folder / "model.safetensors").read_bytes())
    model = patchlib.load_pretrained(patchlib.ViT(**TINY), "convmixer_16")
    assert torch.equal(model.head.fc.weight, load_file(folder / "model.safetensors")["head.fc.weight"])


def test_other_classes_than_a_bare_files_have_to_be_named(folder, tmp_path):
    file = folder / "model.safetensors"
    options = {**TINY, "checkpoint": file, "attention": {"qkv_bias": True}}
    with pytest.raises(patchlib.WeightsError, match=r"head\.fc\.weight \(5, 16\) for \(2, 16\).*num_classes="):
        patchlib.create_model("vit_16_conv", **{key: value for key, value in options.items() if key != "num_classes"})
    assert patchlib.create_model("vit_16_conv", **{**options, "num_classes": 2}).num_classes == 2
    save_file({**load_file(file), "head.fc.weight": torch.tensor(1.0)}, tmp_path / "scalar.safetensors")
    scalar = {**options, "checkpoint": tmp_path / "scalar.safetensors"}
    assert patchlib.create_model("vit_16_conv", **scalar).head.fc.weight.shape == (5, 16)
    headless = {key: t for key, t in load_file(file).items() if not key.startswith("head.")}
    save_file(headless, tmp_path / "headless.safetensors")
    options["checkpoint"] = tmp_path / "headless.safetensors"
    assert patchlib.create_model("vit_16_conv", **options).head.fc.weight.shape == (5, 16)
    assert patchlib.create_model("vit_16_conv", **{**options, "num_classes": 0}).num_classes == 0


# device, dtype, features


def test_shapes_alone():
    model = patchlib.create_model("vit_huge_patch14_224", device="meta")
    assert all(t.is_meta for t in model.parameters())
    with torch.device("meta"):
        assert patchlib.create_model("convmixer_16").head.fc.weight.is_meta
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_weights_are_not_fetched_for_shapes_alone():
    """Nor would they be found: no request can be made here."""
    model = patchlib.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True, device="meta")
    assert model.head.fc.weight.is_meta
    assert model.num_classes == 21_843
    assert model.info["source"] == "hf-hub:timm/vit_base_patch16_224.augreg_in21k"
    assert patchlib.preprocess(model).mean == (0.5, 0.5, 0.5)


def test_shapes_alone_come_with_what_is_known_of_the_weights(folder):
    for name in ("convmixer_16", f"local-dir:{folder}"):
        for options in ({}, {"num_classes": 3}, {"img_size": 32}):
            shapes = patchlib.create_model(name, pretrained=True, device="meta", **options)
            assert shapes.info == patchlib.create_model(name, pretrained=True, **options).info != {}
    assert patchlib.create_model("convmixer_16", device="meta").info == {}


def test_torchs_default_device_counts_unless_one_is_named(folder):
    torch.set_default_device("meta")
    try:
        assert patchlib.create_model(f"local-dir:{folder}").head.fc.weight.is_meta
        model = patchlib.create_model(f"local-dir:{folder}", device="cpu", num_classes=3, img_size=32)
    finally:
        torch.set_default_device(None)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_random_model_of_another_dtype(dtype):
    assert {p.dtype for p in patchlib.create_model("vit_16_linear", dtype=dtype, **TINY).parameters()} == {dtype}


@torch.no_grad()
def test_features_only(folder):
    images = torch.randn(2, 3, 16, 16)
    whole = patchlib.create_model(f"local-dir:{folder}")
    for indices, wanted in ((None, [0, 1]), (1, [1]), ([0], [0]), ((-1, 0), [1, 0])):
        model = patchlib.create_model(f"local-dir:{folder}", features_only=True, out_indices=indices)
        maps = model(images)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * len(wanted)
        for found, i in zip(maps, wanted, strict=True):
            assert torch.equal(found, whole.forward_intermediates(images, [i], intermediates_only=True)[0])
        assert model.info == whole.info
    with pytest.raises(patchlib.InputError, match="indices: found 5"):
        patchlib.create_model(f"local-dir:{folder}", features_only=True, out_indices=[5])


def test_preprocessing_follows_the_arguments(folder):
    model = patchlib.create_model(f"local-dir:{folder}", img_size=32)
    assert model.info["preprocessing"]["input_size"] == [3, 32, 32]
    prepare = patchlib.preprocess(model)
    assert (prepare.input_size, prepare.mean, prepare.crop_pct) == ((3, 32, 32), (0.1, 0.2, 0.3), 0.9)
    assert patchlib.preprocess(patchlib.create_model("vit_16_linear", img_size=64, in_chans=1)).input_size == (
        1,
        64,
        64,
    )


# lists and facts


def test_list_models_takes_patterns():
    names = patchlib.list_models()
    assert names == sorted(names)
    assert set(PARAMETERS) <= set(names)
    for pattern in ("vit_*", "convmixer_??", "*_384", "vit_[bs]*16_224", "convmixer_16"):
        regex = re.compile(pattern.replace("*", ".*").replace("?", "."))
        wanted = [name for name in names if regex.fullmatch(name)]
        assert [name for name in patchlib.list_models(pattern) if name in wanted] == wanted
        if pattern != "convmixer_16":
            assert patchlib.list_models(pattern) == wanted
    assert patchlib.list_models("mixer_16") == ["convmixer_16", "convmixer_16_8"]  # a piece of the name
    assert patchlib.list_models("no_such") == []


def test_list_models_by_family():
    assert set(patchlib.list_models(family="convmixer")) == {
        n for n in patchlib.list_models() if n.startswith("convmixer")
    }
    assert patchlib.list_models("*_base_*", family="convmixer") == []
    with pytest.raises(patchlib.UnknownNameError, match="no family is named 'ViT'"):
        patchlib.list_models(family="ViT")


def test_list_models_with_weights():
    tagged = patchlib.list_models(pretrained=True)
    assert "vit_base_patch16_224.augreg2_in21k_ft_in1k" in tagged
    assert all(full.count(".") >= 1 and full.partition(".")[0] in patchlib.list_models() for full in tagged)
    assert patchlib.list_models("deit3_base_patch16_224", pretrained=True) == [
        "deit3_base_patch16_224.fb_in1k", "deit3_base_patch16_224.fb_in22k_ft_in1k",
    ]  # fmt: skip
    assert set(patchlib.list_models("*.fb_in1k", pretrained=True)) == {n for n in tagged if n.endswith(".fb_in1k")}
    assert all(name.startswith("convmixer") for name in patchlib.list_models(pretrained=True, family="convmixer"))
    assert patchlib.list_models("convmixer_16_8", pretrained=True) == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_design(name):
    assert patchlib.model_info(name).parameters == PARAMETERS[name]


def vit_costs(dim, depth, patch, image, hidden, classes, in_chans=3, prefix=1, inner=None):
    """Multiply-adds and activations of a ViT, by hand."""
    patches, inner = (image // patch) ** 2, inner or dim
    n = patches + prefix
    block = n * dim * 3 * inner + 2 * n * n * inner + n * inner * dim + 2 * n * dim * hidden
    products = patches * in_chans * patch**2 * dim + depth * block + dim * classes
    return products, patches * dim + depth * n * (3 * inner + dim + hidden + dim) + classes


def convmixer_costs(dim, depth, kernel, patch, image, classes):
    cells = (image // patch) ** 2
    products = cells * 3 * patch**2 * dim + depth * cells * dim * (kernel**2 + dim) + dim * classes
    return products, cells * dim * (1 + 2 * depth) + classes


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("vit_base_patch16_224", vit_costs(768, 12, 16, 224, 3072, 1000)),
        ("vit_large_patch32_384", vit_costs(1024, 24, 32, 384, 4096, 1000)),
        ("vit_16_linear", vit_costs(512, 4, 16, 192, 2048, 2)),
        ("vit_128_6_cifar", vit_costs(128, 6, 4, 32, 256, 10)),
        ("convmixer_16", convmixer_costs(512, 4, 9, 16, 192, 2)),
        ("convmixer_768_32", convmixer_costs(768, 32, 7, 7, 224, 1000)),
        ("convmixer_256_12", convmixer_costs(256, 12, 7, 7, 160, 10)),  # 160 is no multiple of 7
    ],
)
def test_costs_are_those_by_hand(name, wanted):
    info = patchlib.model_info(name)
    assert (info.multiply_adds, info.activations) == wanted


def test_vit_bases_costs_are_the_known_numbers():
    info = patchlib.model_info("vit_base_patch16_224")
    assert info.multiply_adds == 17_563_828_224
    assert info.parameters == 86_567_656
    assert (info.name, info.family, info.model, info.input_size) == (
        "vit_base_patch16_224",
        "vit",
        "ViT",
        (3, 224, 224),
    )
    assert info.config == patchlib.ViTConfig().to_dict()
    assert info.weights[0].full_name == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert info.weights[0].license == "apache-2.0"


def test_facts_of_a_tag_are_those_of_its_weights():
    info = patchlib.model_info("vit_tiny_patch16_224.augreg_in21k")
    assert info.name == "vit_tiny_patch16_224"
    more = patchlib.model_info("vit_tiny_patch16_224").parameters + (21_843 - 1000) * (192 + 1)
    assert info.parameters == more
    with pytest.raises(patchlib.UnknownNameError, match="tag 'x'"):
        patchlib.model_info("vit_tiny_patch16_224.x")
    with pytest.raises(patchlib.UnknownNameError, match="did you mean"):
        patchlib.model_info("vit_tiny_patch16_225")


@pytest.mark.parametrize("family", sorted({family_of(name) for name in patchlib.list_models()}))
def test_facts_of_every_family(family):
    """Nothing is allocated: the largest models have more than a billion parameters."""
    names = patchlib.list_models(family=family)
    for name in {names[0], names[-1], max(names, key=len)}:
        info = patchlib.model_info(name)
        assert min(info.parameters, info.multiply_adds, info.activations, *info.input_size) > 0, name
        assert info.multiply_adds < 10**13
        model_class, config = find_model(name)
        assert (info.model, info.config, info.family) == (model_class.__name__, config.to_dict(), family)


def test_facts_are_frozen():
    info = patchlib.model_info("convmixer_256_8")
    with pytest.raises(AttributeError):
        info.parameters = 1
    info.config["dim"] = 1
    assert patchlib.model_info("convmixer_256_8").config["dim"] == 256
    assert copy.copy(info) == info
    assert math.prod(info.input_size) == 3 * 32 * 32
