"""Key tables and configs of patchlib's, timm's, transformers' and the papers' own formats."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from torch import nn

import patchlib
from patchlib.weights.formats import original, table, timm, transformers
from patchlib.weights.formats import patchlib as own
from patchlib.weights.load import FORMATS, targets

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = GOLDENS / "transformers"
TOLERANCE = 5e-6  # 1e-4 would be enough, but not show which form of GELU it is
CASES = ["vit", "vit_tanh", "vit_headless", "deit"]
TINY_VIT = {"dim": 8, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 8, "num_classes": 3}
TINY_CONVMIXER = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4, "img_size": 16, "num_classes": 3}


def error(found, wanted):
    """Largest difference over the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def load(case, **overrides):
    return patchlib.create_model(f"local-dir:{FOLDER / case}", **overrides)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_are_those_of_transformers(case):
    """`vit_tanh` lies in two shards, as transformers splits them; `vit_headless` has no classifier."""
    model, answers = load(case), load_file(FOLDER / case / "answers.safetensors")
    assert error(model.forward_features(answers["images"]), answers["features"]) < TOLERANCE
    if case == "vit_headless":
        assert model.num_classes == 0
        assert error(model(answers["images"]), answers["features"][:, 0]) < TOLERANCE
    else:
        assert error(model(answers["images"]), answers["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", ["convnext", "convnextv2", "gpt2"])
@torch.no_grad()
def test_convnext_and_gpt_give_the_logits_of_transformers(case):
    answers = load_file(FOLDER / case / "answers.safetensors")
    assert error(load(case)(answers["inputs"]), answers["logits"]) < TOLERANCE
    wrong = {"norm": {"kind": "layer", "eps": 0.2}}
    if case != "gpt2":
        wrong["pool"] = {"kind": "avg", "norm": True}
    assert error(load(case, **wrong)(answers["inputs"]), answers["logits"]) > 1e-3


@torch.no_grad()
def test_gpts_other_key_layout_loads_too(tmp_path):
    """Bare names, with the masks that older files carry and without the head, which is the embedding."""
    tensors = load_file(FOLDER / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    shutil.copy(FOLDER / "gpt2" / "config.json", tmp_path)
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 16, 16)}, tmp_path / "model.safetensors")
    answers = load_file(FOLDER / "gpt2" / "answers.safetensors")
    model = patchlib.create_model(f"local-dir:{tmp_path}")
    assert error(model(answers["inputs"]), answers["logits"]) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("vit", {"norm": {"eps": 1e-1}}),
        ("vit_tanh", {"norm": {"eps": 1e-6}}),
        ("vit_tanh", {"mlp": {"approximate": "none"}}),
        ("deit", {"norm": {"eps": 1e-1}}),
        ("vit", {"heads": 4}),
    ],
)
@torch.no_grad()
def test_a_wrong_epsilon_activation_or_number_of_heads_would_be_seen(case, change):
    answers = load_file(FOLDER / case / "answers.safetensors")
    assert error(load(case, **change)(answers["images"]), answers["logits"]) > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["vit", "vit_tanh", "deit"])
@torch.no_grad()
def test_a_missing_branch_would_be_seen(case):
    model, answers = load(case), load_file(FOLDER / case / "answers.safetensors")
    model.blocks[1].attn.proj.weight.zero_()
    assert error(model(answers["images"]), answers["logits"]) > 10 * TOLERANCE


@torch.no_grad()
def test_one_of_deits_two_classifiers_missing_would_be_seen():
    model, answers = load("deit"), load_file(FOLDER / "deit" / "answers.safetensors")
    model.head.fc_dist.weight.zero_()
    assert error(model(answers["images"]), answers["logits"]) > 10 * TOLERANCE


@torch.no_grad()
def test_the_names_that_transformers_has_in_memory_are_known_too():
    model, answers = load("deit"), load_file(FOLDER / "deit" / "answers.safetensors")
    again = patchlib.ViT(model.config)
    patchlib.load_pretrained(again, FOLDER / "deit" / "state.safetensors")
    assert error(again.eval()(answers["images"]), answers["logits"]) < TOLERANCE


def test_transformers_config_carries_labels_and_preprocessing():
    info = load("vit").info
    assert info["labels"] == ["cat", "dog", "eel", "fox", "gnu"]
    assert info["preprocessing"] == {
        "mean": [0.4] * 3, "std": [0.3] * 3, "input_size": [3, 24, 24], "crop_pct": 1.0, "crop_mode": "squash",
        "interpolation": "bilinear",
    }  # fmt: skip
    assert "labels" not in load("deit").info  # LABEL_0, LABEL_1, … say nothing


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            {"input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center"},
        ),
        (
            {"size": 384, "resample": 3, "image_mean": [0.5], "image_std": [0.5]},
            {"mean": [0.5], "std": [0.5], "input_size": [1, 384, 384], "crop_pct": 1.0, "crop_mode": "squash",
             "interpolation": "bicubic"},
        ),
        ({}, {}),
    ],
)  # fmt: skip
def test_preprocessing_of_transformers(spec, wanted):
    assert transformers.preprocessing(spec) == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "vitt"}, "model_type.*'vit'"),
        ({"model_type": "bert"}, "model_type"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_attention_heads": 3}, "heads"),
        ({"num_hidden_layers": 10**6}, "depth"),
        ({"intermediate_size": "wide"}, "config.json"),
        ({"model_type": "deit"}, "architectures"),
    ],
)
def test_what_patchlib_cannot_read_of_transformers_is_refused_by_field(change, named, tmp_path):
    content = json.loads((FOLDER / "vit" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    shutil.copy(FOLDER / "vit" / "model.safetensors", tmp_path)
    with pytest.raises(patchlib.PatchlibError, match=named) as caught:
        patchlib.create_model(f"local-dir:{tmp_path}")
    assert str(tmp_path / "config.json") in str(caught.value)


# ConvMixer's authors wrote one Sequential of a dozen lines (section 3 of the paper); its keys are numbers.


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def papers_convmixer(dim=8, depth=2, kernel_size=3, patch_size=4, classes=3):
    def mixed(*layers):
        return nn.Sequential(*layers, nn.GELU(), nn.BatchNorm2d(dim))

    return nn.Sequential(
        nn.Conv2d(3, dim, patch_size, stride=patch_size),
        nn.GELU(),
        nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(mixed(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"))),
                *mixed(nn.Conv2d(dim, dim, 1)),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(dim, classes),
    )


@torch.no_grad()
def test_a_bare_file_of_convmixers_authors_gives_the_same_numbers(tmp_path):
    reference = papers_convmixer().eval()
    for name, tensor in reference.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_().mul_(0.5)
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    save_file(reference.state_dict(), tmp_path / "w.safetensors")
    model = patchlib.create_model("convmixer_16", checkpoint=tmp_path / "w.safetensors", **TINY_CONVMIXER)
    images = torch.randn(2, 3, 16, 16)
    assert error(model(images), reference(images)) < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        patchlib.ViT(**TINY_VIT),
        patchlib.ViT(**TINY_VIT, tokens={"distill": 1, "register": 2}, layer_scale=0.1),
        patchlib.ViT(**TINY_VIT, tokens={"class": 0}, pool={"kind": "avg", "norm": True}, attention={"norm": "layer"}),
        patchlib.ConvMixer(**TINY_CONVMIXER),
        patchlib.ConvMixer(**TINY_CONVMIXER, rezero=True),
        patchlib.PatchNet(stages=[{"kind": "convmixer", "depth": 2, "dim": 8}], num_classes=3),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_table_has_an_inverse(model):
    """To their names and back gives each tensor again, and no two of ours share one of theirs."""
    tensors = {name: torch.randn(t.shape) for name, t in targets(model).items()}
    tables = [one for form in FORMATS.values() for one in form.tables(model)]
    assert tables
    for one in tables:
        theirs = one.to_theirs(tensors)
        assert len(theirs) == sum(len(one.names(name)[0]) for name in tensors)
        again, missing, unexpected = one.to_ours(theirs, list(tensors))
        assert (missing, unexpected) == ([], [])
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("op", [table.SAME, table.TRANSPOSE, table.CONV_1X1, table.VECTOR, table.CONCAT_3])
def test_every_op_has_an_inverse(op):
    ours = torch.randn(6) if op is table.VECTOR else torch.randn(6, 4)
    assert torch.equal(op.to_ours(op.to_theirs(ours)), ours)


def test_a_table_lists_what_does_not_go_together_as_missing():
    one = table.Table((table.Rule("qkv", ("q", "k", "v"), table.CONCAT_3),))
    found, missing, unexpected = one.to_ours(
        {"q": torch.ones(2, 2), "k": torch.ones(2, 3), "v": torch.ones(2, 2), "w": torch.ones(1)}, ["qkv", "bias"]
    )
    assert not found
    assert missing == ["qkv (there: q (2, 2), k (2, 3), v (2, 2))", "bias"]
    assert unexpected == ["w"]


def test_a_rules_names_have_no_dot_in_a_piece():
    one = table.Table((table.Rule("blocks.{i}.{p}", "layers.{i}.x.{p}"),))
    assert one.names("blocks.3.bias") == (("layers.3.x.bias",), table.SAME)
    assert one.names("blocks.3.mlp.bias") == (("blocks.3.mlp.bias",), table.SAME)
    assert one.names("blocksX3.bias") == (("blocksX3.bias",), table.SAME)


def test_formats_are_told_apart_by_their_config():
    contents = {
        "patchlib": {"format": "patchlib", "format_version": 1, "model": "ViT", "config": {}},
        "timm": {"architecture": "vit_base_patch16_224", "num_classes": 3},
        "transformers": {"model_type": "vit"},
    }
    for name, content in contents.items():
        assert [n for n, form in FORMATS.items() if form.recognises(content)] == [name]
    assert not any(form.recognises({"hello": 1}) for form in FORMATS.values())
    assert not original.recognises(contents["timm"])


# patchlib's own format


@torch.no_grad()
def test_a_folder_of_the_first_release_still_gives_its_numbers():
    """Made by tests/fixtures/make_saved.py of that release."""
    folder = FIXTURES / "saved_v1"
    model, answers = patchlib.create_model(f"local-dir:{folder}"), load_file(folder / "answers.safetensors")
    assert error(model(answers["images"]), answers["logits"]) < 1e-5
    assert model.info["labels"] == ["cat", "dog", "eel"]
    model.blocks[1][1].attn.proj.weight.zero_()
    assert error(model(answers["images"]), answers["logits"]) > 1e-3


def test_every_older_version_has_a_migration():
    assert set(own.MIGRATIONS) >= set(range(1, own.VERSION))
    assert own.migrate({"format_version": own.VERSION, "x": 1}) == {"format_version": own.VERSION, "x": 1}


def test_migrations_run_in_order(monkeypatch):
    monkeypatch.setattr(own, "VERSION", 3)
    monkeypatch.setitem(own.MIGRATIONS, 1, lambda content: {**content, "steps": "1"})
    monkeypatch.setitem(own.MIGRATIONS, 2, lambda content: {**content, "steps": content["steps"] + "2"})
    assert own.migrate({"format_version": 1})["steps"] == "12"


@pytest.mark.parametrize("version", [0, 2, -1, "1", 1.0, True, None, [1], "1" * 9999])
def test_another_version_is_refused(version):
    with pytest.raises(patchlib.WeightsError, match=r"format_version.*newer patchlib") as caught:
        own.migrate({"format_version": version})
    assert len(str(caught.value)) < 200


def test_own_config_json_is_what_was_promised():
    model = patchlib.ViT(**TINY_VIT)
    model.info = {"labels": ["a", "b", "c"]}
    content = json.loads(json.dumps(own.from_model(model)))
    assert set(content) == {"format", "format_version", "model", "config", "info"}
    model_class, config, info = own.to_config(content)
    assert (model_class, config, info) == (patchlib.ViT, model.config, model.info)


# timm's format, beside tests/models/test_timm_parity.py


def timm_config(**change):
    content = {"architecture": "vit_base_patch16_224", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    return timm.to_config({**content, **change})


def test_timms_arguments_become_fields():
    arguments = {
        "img_size": [32, 64], "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 2.5,
        "qkv_bias": False, "init_values": 0.1, "class_token": False, "reg_tokens": 2, "no_embed_class": True,
        "global_pool": "avg", "fc_norm": False, "drop_rate": 0.1, "drop_path_rate": 0.2, "in_chans": 4,
    }  # fmt: skip
    _, config, _ = timm_config(model_args=arguments)
    wanted = patchlib.ViTConfig(
        img_size=(32, 64), patch_size=8, dim=24, depth=3, heads=4, mlp={"kind": "gelu", "ratio": 2.5},
        attention={"qkv_bias": False}, layer_scale=0.1, tokens={"class": 0, "register": 2},
        pos_embed={"kind": "learned", "covers_prefix": False}, pool={"kind": "avg", "norm": False},
        drop=0.1, drop_path=0.2, in_chans=4, num_classes=10,
    )  # fmt: skip
    assert config == wanted


def test_timms_numbers_become_info():
    cfg = {"input_size": [1, 32, 48], "mean": [0.5], "std": [0.2], "crop_pct": 0.9, "license": "mit", "tag": "x"}
    _, config, info = timm_config(pretrained_cfg=cfg, label_names=[*"abcdefghij"])
    assert (config.in_chans, config.img_size) == (1, (32, 48))
    assert info == {
        "preprocessing": {"input_size": [1, 32, 48], "mean": [0.5], "std": [0.2], "crop_pct": 0.9},
        "license": "mit", "labels": [*"abcdefghij"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "vit_base_patch16_225"}, "architecture.*vit_base_patch16_224"),
        ({"architecture": "resnet50"}, "architecture"),
        ({"model_args": {"embed_dims": 3}}, "model_args.embed_dims.*embed_dim"),
        ({"model_args": {"global_pool": "map"}}, "model_args.global_pool.*map"),
        ({"model_args": {"class_token": "yes"}}, "model_args.class_token"),
        ({"model_args": {"global_pool": ["avg"]}}, "model_args.global_pool"),
        ({"model_args": {"embed_dim": 10**6}}, "dim.*32768"),
        ({"model_args": [1]}, "model_args"),
        ({"pretrained_cfg": [1]}, "pretrained_cfg"),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "img_size"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": "ten"}, "num_classes"),
    ],
)
def test_what_patchlib_cannot_read_of_timm_is_refused_by_field(change, named):
    with pytest.raises(patchlib.PatchlibError, match=named):
        timm_config(**change)
