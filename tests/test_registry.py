"""Names of blocks and models."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import patchlib
from patchlib import registry
from patchlib.errors import ConfigError, UnknownNameError

sys.path.insert(0, str(Path(__file__).parent / "goldens"))

from make_index import build_index

ROLES = ["patch_embed", "pos_embed", "stage", "mlp", "norm", "pool"]


class Scale(nn.Module):
    """A block of the user's: fits as a stage, an MLP or a norm."""

    def __init__(self, dim: int, *, by: float = 2.0, name: str = "x", sizes: tuple[int, ...] = ()):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), float(by)))

    def forward(self, x):
        return x * self.weight


class Words(nn.Module):
    """A patch embedding of the user's."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images):
        return self.conv(images).permute(0, 2, 3, 1)


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(registry, "_user_blocks", {})
    monkeypatch.setattr(registry, "_user_models", {})


# models


def test_index_json_is_what_the_model_files_say():
    """Else run: python tests/goldens/make_index.py"""
    index = json.loads((Path(patchlib.__file__).parent / "models" / "index.json").read_text())
    assert index == build_index()


def test_every_name_leads_to_its_class_and_config():
    names = registry.model_names()
    assert len(names) == len(set(names)) >= 55
    for name in names:
        model_class, config = registry.find_model(name)
        assert isinstance(config, model_class.Config)
        assert registry.find_model_class(model_class.__name__) is model_class
        assert name in registry.model_names(registry.family_of(name))


def test_the_names_of_the_design_are_there():
    assert {
        "convmixer_24", "convmixer_16", "convmixer_16_8", "vit_24_linear", "vit_24_conv", "vit_16_linear",
        "vit_16_conv",
        "convmixer_256_12", "convmixer_256_12_cifar", "vit_128_6_cifar", "convmixer_256_8", "vit_early_conv_128_6",
        "convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_1536_20", "vit_tiny_patch16_224",
        "vit_small_patch32_384", "vit_large_patch16_384", "deit3_huge_patch14_224", "deit_tiny_distilled_patch16_224",
    } <= set(registry.model_names())  # fmt: skip


def test_a_registered_model_has_all_that_a_built_in_one_has():
    config = patchlib.ViTConfig(dim=16, depth=1, heads=2, patch_size=4, img_size=8, num_classes=3)
    patchlib.register_model("my_net", patchlib.ViT, config)
    assert patchlib.create_model("my_net", depth=2).config == config.replace(depth=2)
    assert patchlib.list_models("my_*") == ["my_net"]
    assert patchlib.list_models(family="user") == ["my_net"]
    info = patchlib.model_info("my_net")
    assert (info.family, info.model, info.weights) == ("user", "ViT", ())
    patchlib.register_model("my_net", patchlib.ViT, config)  # as a notebook does that runs a cell again
    patchlib.register_model("other-net", patchlib.ViT, config, family="mine")
    assert patchlib.list_models(family="mine") == ["other-net"]


@pytest.mark.parametrize("name", ["", "a.b", "a b", "hf-hub:x", "a/b", None, 1, "a\n"])
def test_names_of_models_have_no_dots_or_blanks(name):
    with pytest.raises(ConfigError, match=r"name of a model: found .*allowed: letters"):
        patchlib.register_model(name, patchlib.ViT, patchlib.ViTConfig())


def test_taken_names_are_refused():
    with pytest.raises(ConfigError, match="'convmixer_16' is built in"):
        patchlib.register_model("convmixer_16", patchlib.ViT, patchlib.ViTConfig())
    patchlib.register_model("mine", patchlib.ViT, patchlib.ViTConfig())
    with pytest.raises(ConfigError, match="already registered with another config"):
        patchlib.register_model("mine", patchlib.ViT, patchlib.ViTConfig(depth=3))


@pytest.mark.parametrize("config", [None, {}, patchlib.ConvMixerConfig(), patchlib.ViT])
def test_another_config_is_refused(config):
    with pytest.raises(ConfigError, match=r"config of 'mine': found .*; allowed: ViT\.Config"):
        patchlib.register_model("mine", patchlib.ViT, config)


def test_a_class_with_the_name_of_a_built_in_one_is_refused():
    """A saved folder says "ViT": it would be read as the other."""
    mine = type("ViT", (patchlib.ViT,), {})
    with pytest.raises(ConfigError, match=r"class 'ViT': patchlib has one of this name.*rename"):
        patchlib.register_model("mine", mine, mine.Config())


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no model is named 'convmixer16'; did you mean .*'convmixer_16'"):
        registry.find_model("convmixer16")
    with pytest.raises(UnknownNameError, match=r"no model is named 'zzz'; see patchlib\.list_models"):
        registry.find_model("zzz")
    with pytest.raises(UnknownNameError, match="no family is named 'vits'; did you mean 'vit'"):
        registry.model_names("vits")
    with pytest.raises(UnknownNameError, match="no model class is named 'Vit'; did you mean 'ViT'"):
        registry.find_model_class("Vit")
    for name in (None, 5, [], {}):
        with pytest.raises(UnknownNameError):
            registry.find_model_class(name)


# blocks


@pytest.mark.parametrize("role", ROLES)
def test_every_kind_leads_to_a_block_with_known_options(role):
    kinds = registry.block_names(role)
    assert kinds
    for name in kinds:
        block = registry.find_block(role, name)
        assert issubclass(block, nn.Module)
        assert registry._options(block) is not None
        assert registry.is_built_in(name)
        with pytest.raises(ConfigError, match=f"{role} '{name}' has no option 'no_such'"):
            registry.check_options(role, name, {"no_such": 1})


def test_a_registered_block_is_a_kind_where_its_role_allows():
    patchlib.register_block("scale", Scale, role="stage")
    patchlib.register_block("words", Words)
    net = patchlib.PatchNet(
        stages=[{"kind": "scale", "dim": 8, "by": 3.0}], patch_embed="words", patch_size=4, img_size=8, num_classes=2
    )
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert net.blocks[0][0].weight.eq(3).all()
    assert isinstance(net.patch_embed.proj, Words)
    assert "scale" in registry.block_names("stage")
    assert "scale" not in registry.block_names("mlp")
    assert all("words" in registry.block_names(role) for role in ROLES)
    with pytest.raises(ConfigError, match=r"ViTConfig\.mlp\.kind: no mlp block is named 'scale'.*registered first"):
        patchlib.ViT(mlp="scale")


def test_options_of_a_block_are_checked_against_its_annotations():
    patchlib.register_block("scale", Scale)
    for options, named in (
        ({"by": "3"}, "option 'by': found '3'; allowed: float"),
        ({"by": True}, "option 'by': found True; allowed: float"),
        ({"name": 3}, "option 'name': found 3; allowed: str"),
        ({"sizes": [1, "a"]}, "option 'sizes': found .*; allowed: tuple"),
        ({"buy": 3}, "has no option 'buy'; did you mean 'by'"),
    ):
        with pytest.raises(ConfigError, match=f"stage 'scale'.*{named}"):
            patchlib.PatchNet(stages=[{"kind": "scale", "dim": 8, **options}])
    assert patchlib.PatchNet(stages=[{"kind": "scale", "dim": 8, "by": 3, "sizes": [1, 2]}]).config.stages[0]["by"] == 3


def test_the_options_of_a_stage_and_those_of_its_block_are_named_together():
    for key, named in (
        ("dept", "did you mean 'depth'"),
        ("downsampel", "'downsample'"),
        ("drop_pathh", "has no option"),
    ):
        with pytest.raises(ConfigError, match=named) as caught:
            patchlib.PatchNet(stages=[{"kind": "convmixer", "dim": 8, key: 2}])
        assert "'drop_path'" not in str(caught.value), "the model sets it"


def test_options_of_built_in_names_mean_what_the_users_block_says():
    class Wide(nn.Module):
        def __init__(self, dim: int, ratio: float = 1.0, heads: str = "many"):
            super().__init__()
            self.ratio = ratio

        def forward(self, x):
            return x

    patchlib.register_block("wide", Wide)
    net = patchlib.PatchNet(stages=[{"kind": "wide", "dim": 8, "ratio": -9000.0, "heads": "few"}])
    assert net.blocks[0][0].ratio == -9000


@pytest.mark.parametrize(
    ("block", "takes"),
    [
        (Scale, {"dim", "by", "name", "sizes"}),
        (lambda dim, drop_path=0.0: nn.Identity(), {"dim", "drop_path"}),
        (functools.partial(Scale, by=1.0), {"dim", "by", "name", "sizes"}),
        (lambda dim, **options: nn.Identity(), None),
        (nn.Identity, None),
        (nn.LayerNorm, {"normalized_shape", "eps", "elementwise_affine", "bias"}),
    ],
)
def test_a_block_is_a_class_a_function_or_anything_callable(block, takes):
    found = registry._options(block)
    assert takes == (None if found is None else set(found))
    patchlib.register_block("mine", block)
    assert isinstance(
        registry.build_block("stage", "mine", dim=4) if block is not nn.LayerNorm else nn.Module(), nn.Module
    )


def test_a_block_gets_what_it_has_parameters_for():
    seen = {}

    def block(dim, drop_path=1.0):
        seen.update(dim=dim, drop_path=drop_path)
        return nn.Identity()

    patchlib.register_block("mine", block)
    registry.build_block("stage", {"kind": "mine"}, dim=3, drop_path=0.5, unknown=1)
    assert seen == {"dim": 3, "drop_path": 0.5}


@pytest.mark.parametrize("name", ["", None, 1, []])
def test_names_of_blocks_are_text(name):
    with pytest.raises(ConfigError, match=r"name of a block: found .*allowed: a non-empty string"):
        patchlib.register_block(name, Scale)


def test_what_cannot_be_registered_is_refused():
    with pytest.raises(ConfigError, match="role: found 'stages'; did you mean 'stage'"):
        patchlib.register_block("mine", Scale, role="stages")
    with pytest.raises(ConfigError, match="found int; allowed: a class or a function"):
        patchlib.register_block("mine", 3)
    for name in ("gelu", "conv", "layer"):
        with pytest.raises(ConfigError, match=f"{name}' is built in"):
            patchlib.register_block(name, Scale)
    patchlib.register_block("gelu", Scale, role="stage")  # free there
    patchlib.register_block("mine", Scale)
    patchlib.register_block("mine", Scale)
    with pytest.raises(ConfigError, match="already registered with another class"):
        patchlib.register_block("mine", Words)


def test_a_cell_that_runs_again_replaces_what_it_registered():
    def cell(bias, depth):
        class Block(nn.Linear):
            def __init__(self, dim: int):
                super().__init__(dim, dim, bias=bias)

        class Net(patchlib.ViT):
            pass

        def norm(dim):
            return nn.LayerNorm(dim, bias=bias)

        patchlib.register_block("block", Block)
        patchlib.register_block("own_norm", norm, role="norm")
        patchlib.register_model("net", Net, patchlib.ViTConfig(depth=depth))
        return Net

    cell(True, 1)
    net = cell(False, 2)
    model = patchlib.PatchNet(stages=[{"kind": "block", "dim": 8}], norm="own_norm")
    assert model.blocks[0][0].bias is None
    assert model.norm.bias is None
    assert registry.find_model("net") == (net, patchlib.ViTConfig(depth=2))
    assert registry.find_model_class("Net") is net
    with pytest.raises(ConfigError, match="'block' is already registered with another class"):
        patchlib.register_block("block", functools.partial(Scale))
    with pytest.raises(ConfigError, match="'net' is already registered"):
        patchlib.register_model("net", patchlib.ViT, patchlib.ViTConfig(depth=2))


def test_a_block_that_raises_is_an_error_of_the_config():
    class Broken(nn.Module):
        def __init__(self, dim: int, *, n: int = 1):
            super().__init__()
            self.fc = nn.Linear(dim, dim // n)

    patchlib.register_block("broken", Broken)
    with pytest.raises(
        ConfigError, match=r"stage 'broken' cannot be built with the options \{'n': 0\} .*zero"
    ) as caught:
        patchlib.PatchNet(stages=[{"kind": "broken", "dim": 8, "n": 0}])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("spec", [None, 1, [], {}, {"kind": 1}, {"eps": 1e-6}])
def test_a_spec_without_a_kind_is_refused(spec):
    with pytest.raises(ConfigError, match=r"norm: found .*allowed: the name of a kind"):
        registry.build_block("norm", spec, 8)


@pytest.mark.parametrize(
    ("role", "kind", "option"),
    [("stage", "convmixer", "dim"), ("patch_embed", "conv", "in_chans"), ("pos_embed", "learned", "size"),
     ("mlp", "gelu", "drop"), ("norm", "layer", "normalized_shape"), ("pool", "attention", "dim")],
)  # fmt: skip
def test_what_the_model_sets_is_no_option(role, kind, option):
    named = f"{role} '{kind}': option '{option}' is set by the model; leave it out"
    with pytest.raises(ConfigError, match=named):
        registry.check_options(role, kind, {option: 8})
    with pytest.raises(ConfigError, match=named):
        registry.build_block(role, {"kind": kind, option: 8})
    patchlib.register_block("anything", lambda **options: nn.Identity(), role="stage")
    with pytest.raises(ConfigError, match="stage 'anything': option 'extra' is set by the model"):
        registry.build_block("stage", {"kind": "anything", "extra": 1}, extra=2)
