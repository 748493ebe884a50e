"""The same numbers as timm, on goldens in which every parameter and buffer was redrawn (tests/goldens/make_timm.py)."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS
from safetensors.torch import load_file, save_file

import patchlib
from patchlib.registry import find_model
from patchlib.weights.formats import timm as timm_format
from patchlib.weights.load import targets

FOLDER = GOLDENS / "timm"
VITS = ["vit", "vit_registers_avg", "vit_rectangular", "vit_gap", "deit_distilled", "deit3"]
CONVMIXERS = {
    "convmixer_gelu": {"dim": 24, "depth": 2, "kernel_size": 5, "patch_size": 4, "num_classes": 7, "act": "gelu"},
    "convmixer_relu": {"dim": 24, "depth": 2, "kernel_size": 3, "patch_size": 5, "num_classes": 7, "act": "relu"},
}
CONVNEXTS = {
    "convnext": {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 7},
    "convnextv2": {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 7},
}


def load(case, **overrides):
    if case in CONVMIXERS:
        file = FOLDER / case / "model.safetensors"
        return patchlib.create_model("convmixer_16", checkpoint=file, **{**CONVMIXERS[case], **overrides})
    if case in CONVNEXTS:
        file = FOLDER / case / "model.safetensors"
        return patchlib.create_model(f"{case}_tiny", checkpoint=file, **{**CONVNEXTS[case], **overrides})
    return patchlib.create_model(f"local-dir:{FOLDER / case}", **overrides)


def error(found, wanted):
    """Largest difference over the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(params=[*VITS, *CONVMIXERS, *CONVNEXTS])
def case(request):
    return request.param


@torch.no_grad()
def test_every_output_is_timms(case):
    model, answers = load(case), load_file(FOLDER / case / "answers.safetensors")
    images = answers["images"]
    features = model.forward_features(images)
    assert error(model(images), answers["logits"]) < 1e-4
    assert error(features, answers["features"]) < 1e-4
    assert error(model.forward_head(features, pre_logits=True), answers["pre_logits"]) < 1e-4
    _, maps = model.forward_intermediates(images)
    assert len(maps) == sum(name.startswith("map") for name in answers) > 0
    for i, found in enumerate(maps):
        assert error(found, answers[f"map{i}"]) < 1e-4


def without_norm(case, folder, *also):
    """A file as masked pretraining leaves it: no classifier, no final norm."""
    gone = ("head.fc.", "head.norm.", *also)
    kept = {name: t for name, t in load_file(FOLDER / case / "model.safetensors").items() if not name.startswith(gone)}
    save_file(kept, folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


@torch.no_grad()
def test_masked_pretraining_has_no_final_norm_and_it_starts_fresh(caplog, tmp_path):
    answers = load_file(FOLDER / "convnextv2" / "answers.safetensors")
    file, sizes = without_norm("convnextv2", tmp_path), CONVNEXTS["convnextv2"]
    wanted = F.layer_norm(answers["features"].mean((2, 3)), (20,), eps=1e-6)
    with caplog.at_level("WARNING", "patchlib"):
        model = patchlib.create_model("convnextv2_tiny", checkpoint=file, **{**sizes, "num_classes": 0})
    assert ["head.norm.weight, head.norm.bias" in message for message in caplog.messages] == [True]
    assert error(model(answers["images"]), wanted) < 1e-4
    classes = patchlib.create_model("convnextv2_tiny", checkpoint=file, **{**sizes, "num_classes": 3})
    assert error(classes.forward_head(answers["features"], pre_logits=True), wanted) < 1e-4
    used = patchlib.ConvNeXtV2(**sizes)
    used.head.norm.weight.fill_(3)
    patchlib.load_pretrained(used, file, new_head=True)
    assert used.head.norm.weight.eq(1).all()
    save_file({name: t.half() for name, t in load_file(file).items()}, file)
    half = patchlib.create_model("convnextv2_tiny", checkpoint=file, dtype="file", **{**sizes, "num_classes": 0})
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_nothing_else_may_be_missing_beside_it(tmp_path):
    options = {"checkpoint": without_norm("convnextv2", tmp_path), **CONVNEXTS["convnextv2"]}
    options.pop("num_classes")
    with pytest.raises(patchlib.WeightsError, match=r"missing: head\.fc"):
        patchlib.create_model("convnextv2_tiny", **options)
    options["num_classes"] = 0
    without_norm("convnextv2", tmp_path, "stages.0.blocks.0.norm.bias")
    with pytest.raises(patchlib.WeightsError, match=r"1 missing: stages\.0\.blocks\.0\.norm\.bias"):
        patchlib.create_model("convnextv2_tiny", **options)
    whole = load_file(FOLDER / "convnextv2" / "model.safetensors")
    save_file({n: t for n, t in whole.items() if n != "head.norm.bias"}, options["checkpoint"])
    for num_classes in (7, 3, 0):  # a classifier was trained with the norm before it
        with pytest.raises(patchlib.WeightsError, match=r"1 missing: head\.norm\.bias(?!.*num_classes=)"):
            patchlib.create_model("convnextv2_tiny", **{**options, "num_classes": num_classes})
    save_file({n: t for n, t in whole.items() if not n.startswith("head.norm")}, options["checkpoint"])
    with pytest.raises(patchlib.WeightsError, match=r"2 missing: head\.norm"):
        patchlib.create_model("convnextv2_tiny", **{**options, "num_classes": 3})
    gap = FOLDER / "vit_registers_avg"
    norms = {n: t for n, t in load_file(gap / "model.safetensors").items() if not n.startswith(("fc_norm", "head"))}
    save_file(norms, options["checkpoint"])
    config = patchlib.create_model(f"local-dir:{gap}", device="meta").config
    with pytest.raises(patchlib.WeightsError, match=r"2 missing: head\.norm"):
        patchlib.load_pretrained(patchlib.ViT(config, num_classes=0), options["checkpoint"])


SABOTAGE = [
    ("vit", {"norm": {"eps": 1e-1}}),
    ("deit_distilled", {"norm": {"eps": 1e-1}}),
    ("deit3", {"norm": {"eps": 1e-1}}),
    ("convnext", {"norm": {"eps": 1e-1}}),
    ("convnextv2", {"norm": {"eps": 1e-1}}),
    ("convmixer_gelu", {"act": "relu"}),
    ("convmixer_relu", {"act": "gelu"}),
]


@pytest.mark.parametrize(("case", "change"), SABOTAGE)
@torch.no_grad()
def test_a_wrong_epsilon_or_activation_would_be_seen(case, change):
    answers = load_file(FOLDER / case / "answers.safetensors")
    assert error(load(case, **change)(answers["images"]), answers["logits"]) > 1e-3


@pytest.mark.parametrize("case", ["vit", "deit_distilled", "deit3"])
@torch.no_grad()
def test_another_activation_would_be_seen(case):
    answers = load_file(FOLDER / case / "answers.safetensors")
    model = load(case)
    for block in model.blocks:
        block.mlp.act = torch.nn.ReLU()
    assert error(model(answers["images"]), answers["logits"]) > 1e-3


@torch.no_grad()
def test_a_missing_branch_would_be_seen(case):
    answers = load_file(FOLDER / case / "answers.safetensors")
    model = load(case)
    block = model.stages[2].blocks[1] if case in CONVNEXTS else model.blocks[1]
    if case in CONVNEXTS:
        block.fc2.weight.zero_()
    elif case in CONVMIXERS:
        block.depthwise.weight.zero_()
        block.norm1.weight.zero_()
    else:
        block.attn.proj.weight.zero_()
    assert error(model(answers["images"]), answers["logits"]) > 1e-3


@pytest.mark.parametrize("case", ["vit_gap", "deit3"])
@torch.no_grad()
def test_a_missing_layer_scale_would_be_seen(case):
    answers = load_file(FOLDER / case / "answers.safetensors")
    model = load(case)
    model.blocks[0].ls2 = torch.nn.Identity()
    assert error(model(answers["images"]), answers["logits"]) > 1e-3


def test_shared_names_have_timms_keys_and_shapes():
    """For each registered name that timm has too, on the meta device."""
    digests = json.loads((FOLDER / "keys.json").read_text())
    assert len(digests) >= 65
    for name, wanted in digests.items():
        model_class, config = find_model(name)
        with torch.device("meta"):
            model = model_class(config)
        (table,) = timm_format.tables(model)
        lines = sorted(f"{key} {tuple(t.shape)}" for key, t in table.to_theirs(targets(model)).items())
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == wanted, name


@pytest.mark.parametrize("case", VITS)
def test_a_folder_saved_for_timm_holds_the_same_file(case, tmp_path):
    saved = patchlib.save_pretrained(load(case), tmp_path, format="timm")
    found, wanted = load_file(saved / "model.safetensors"), load_file(FOLDER / case / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert load(case).config == patchlib.create_model(f"local-dir:{saved}").config


_VIT = {"dim": 24, "depth": 1, "heads": 2, "patch_size": 8, "img_size": 24, "num_classes": 3}
_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "img_size": 64, "num_classes": 3}
_CONVMIXER = {"dim": 768, "depth": 32, "kernel_size": 7, "patch_size": 7, "act": "relu", "img_size": 30}
FOR_TIMM = {
    "remainder": (patchlib.ViT, {**_VIT, "img_size": (30, 24), "patch_embed": {"remainder": "drop"}}),
    "spelling": (patchlib.ViT, {**_VIT, "patch_embed": {"stride": 8, "bias": True}, "attention": {"head_dim": 12}}),
    "memory": (patchlib.ConvMixer, {**_CONVMIXER, "memory_efficient": True, "drop": 0.1}),
    "covered": (patchlib.ConvMixer, {**_CONVMIXER, "img_size": 28, "patch_embed": {"remainder": "error"}}),
    "convnext": (patchlib.ConvNeXt, {**_CONVNEXT, "kernel_size": 3, "layer_scale": 0.1}),
    "convnext_grn": (patchlib.ConvNeXt, {**_CONVNEXT, "grn": True, "layer_scale": 0.1, "norm": {"kind": "layer"}}),
    "convnext_wide": (patchlib.ConvNeXt, {**_CONVNEXT, "dims": (96, 8, 8, 8), "layer_scale": None}),
    "convnext_v2": (patchlib.ConvNeXtV2, {**_CONVNEXT, "dims": (96, 8, 8, 8), "pool": {"norm": False}}),
    "hnf": (patchlib.ConvNeXt, {"pool": {"norm": False}, "img_size": 64, "memory_efficient": True}),
}  # fmt: skip


def redrawn(case):
    model_class, options = FOR_TIMM[case]
    model = model_class(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("case", FOR_TIMM)
@torch.no_grad()
def test_what_timm_has_an_argument_for_comes_back_from_its_format(case, tmp_path):
    model = redrawn(case)
    again = patchlib.create_model(f"local-dir:{patchlib.save_pretrained(model, tmp_path, format='timm')}")
    images = torch.rand(2, 3, *patchlib.preprocess(model).input_size[1:])
    assert torch.equal(again(images), model(images))


def test_the_norms_place_is_timms_unless_the_file_says_otherwise():
    """timm writes the pooling's kind of any model, and `fc_norm` of none."""
    for name in ("convnext_tiny_hnf", "convnext_tiny", "vit_medium_patch16_gap_240", "vit_base_patch16_224"):
        pool = patchlib.create_model(name, device="meta").config.pool
        kind = {"class": "token"}.get(pool["kind"], pool["kind"])
        _, config, _ = timm_format.to_config({"architecture": name, "model_args": {"global_pool": kind}})
        assert config.pool == pool, name
    for name, kind, norm in (("vit_base_patch16_224", "avg", True), ("vit_base_patch16_224", "token", False)):
        _, config, _ = timm_format.to_config({"architecture": name, "model_args": {"global_pool": kind}})
        assert config.pool["norm"] is norm


@pytest.mark.parametrize(
    ("model_class", "options", "named"),
    [
        (patchlib.ViT, {**_VIT, "patch_embed": {"remainder": "pad"}}, "patch_embed"),
        (patchlib.ViT, {**_VIT, "patch_embed": {"bias": False}}, "patch_embed"),
        (patchlib.ViT, {**_VIT, "patch_embed": {"stride": 4}}, "patch_embed"),
        (patchlib.ViT, {**_VIT, "norm": {"eps": 1e-3}}, "norm"),
        (patchlib.ViT, {**_VIT, "attention": {"head_dim": 8}}, "attention"),
        (patchlib.ConvMixer, {**_CONVMIXER, "patch_embed": {"remainder": "pad"}}, "patch_embed"),
        (patchlib.ConvMixer, {**_CONVMIXER, "depth": 1}, "depth"),
        (patchlib.ConvNeXt, {**_CONVNEXT, "depths": (1, 1), "dims": (8, 8)}, "4 stages, this one 2"),
        (patchlib.ConvNeXt, {**_CONVNEXT, "kernel_size": 4}, "odd kernels, not 4"),
        (patchlib.ConvNeXt, {**_CONVNEXT, "patch_size": 8}, "differs in patch_size"),
        (patchlib.ConvNeXt, {**_CONVNEXT, "pool": {"norm": {"kind": "layer", "eps": 1e-12}}}, "differs in pool"),
    ],
)
def test_what_timm_has_no_argument_for_is_refused_by_name(model_class, options, named, tmp_path):
    with pytest.raises(patchlib.WeightsError, match=named):
        patchlib.save_pretrained(model_class(**options), tmp_path, format="timm")


def test_linear_patches_are_saved_for_timm_as_a_convolution(tmp_path):
    model = patchlib.create_model("vit_128_6_cifar")
    found = load_file(patchlib.save_pretrained(model, tmp_path, format="timm") / "model.safetensors")
    assert found["patch_embed.proj.weight"].shape == (128, 3, 4, 4)
    images = torch.rand(2, 3, 32, 32)
    again = patchlib.create_model(f"local-dir:{tmp_path}")
    assert torch.allclose(model.eval()(images), again(images), atol=1e-5)


@pytest.mark.parametrize("name", ["vit_early_conv_128_6", "convmixer_16", "patchnet_tiny"])
def test_what_timm_has_not_is_refused(name, tmp_path):
    with pytest.raises(patchlib.WeightsError, match="timm"):
        patchlib.save_pretrained(patchlib.create_model(name), tmp_path, format="timm")
    assert not list(tmp_path.iterdir())


needs_peers = pytest.mark.skipif(
    "PATCHLIB_PEERS" not in os.environ, reason="PATCHLIB_PEERS names no python that has timm"
)


def ask_peers(code, *arguments):
    """What the python that has timm prints, with patchlib importable beside."""
    command = [os.environ["PATCHLIB_PEERS"], "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(Path(patchlib.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


@needs_peers
@pytest.mark.parametrize("case", VITS)
def test_timm_itself_loads_what_was_saved_for_it(case, tmp_path):
    patchlib.save_pretrained(load(case), tmp_path, format="timm")
    code = (
        "import sys, timm, torch; from safetensors.torch import load_file\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "answers = load_file(sys.argv[2])\n"
        "with torch.no_grad(): print((model(answers['images']) - answers['logits']).abs().max().item())"
    )
    assert float(ask_peers(code, tmp_path, FOLDER / case / "answers.safetensors").split()[-1]) < 1e-5


@needs_peers
@pytest.mark.parametrize(
    ("name", "coarse"),
    [
        ("vit_tiny_patch16_224", False), ("deit_tiny_distilled_patch16_224", False), ("convmixer_768_32", False),
        ("convnext_tiny_hnf", False), ("convnext_tiny", True),
    ],
)  # fmt: skip
def test_timm_sorts_our_parameters_into_layers_as_its_own(name, coarse):
    code = (
        "import sys, patchlib, timm, timm.optim; from timm.models import group_parameters\n"
        "from patchlib.weights.formats.timm import tables\n"
        "ours, theirs = (lib.create_model(sys.argv[1], device='meta') for lib in (patchlib, timm))\n"
        "coarse = sys.argv[2] == 'True'\n"
        "found = group_parameters(ours, ours.group_matcher(coarse), reverse=True)\n"
        "wanted = group_parameters(theirs, theirs.group_matcher(coarse), reverse=True)\n"
        "assert {tables(ours)[0].names(name)[0][0]: i for name, i in found.items()} == wanted, (found, wanted)\n"
        "print(len(timm.optim.param_groups_layer_decay(ours)), max(wanted.values()))"
    )
    groups, layers = map(int, ask_peers(code, name, coarse).split())
    assert groups > 2
    assert layers > 2


@needs_peers
def test_timm_loads_a_file_of_masked_pretraining_alike(tmp_path):
    encoder = patchlib.create_model("convnextv2_atto", num_classes=0).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.1)
    file = patchlib.save_pretrained(encoder, tmp_path, format="timm") / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith("head.")}, file)
    model = patchlib.create_model("convnextv2_atto.fcmae", checkpoint=file)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        save_file({"images": images, "pooled": model(images)}, tmp_path / "answers.safetensors")
    code = (
        "import sys, timm, torch; from safetensors.torch import load_file\n"
        "overlay = {'file': sys.argv[1]}\n"
        "model = timm.create_model('convnextv2_atto.fcmae', pretrained=True, pretrained_cfg_overlay=overlay).eval()\n"
        "answers = load_file(sys.argv[2])\n"
        "with torch.no_grad(): print((model(answers['images']) - answers['pooled']).abs().max().item())"
    )
    assert float(ask_peers(code, file, tmp_path / "answers.safetensors").split()[-1]) < 1e-4


@needs_peers
@pytest.mark.parametrize("case", FOR_TIMM)
def test_timm_gives_the_same_numbers_from_its_arguments(case, tmp_path):
    model = redrawn(case)
    images = torch.rand(2, 3, *patchlib.preprocess(model).input_size[1:])
    with torch.no_grad():
        save_file({"images": images, "logits": model(images)}, tmp_path / "answers.safetensors")
    patchlib.save_pretrained(model, tmp_path / "saved", format="timm")
    code = (
        "import sys, timm, torch; from safetensors.torch import load_file\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "answers = load_file(sys.argv[2])\n"
        "found, wanted = model(answers['images']), answers['logits']\n"
        "print(((found - wanted).abs().max() / wanted.abs().max()).item())"
    )
    assert float(ask_peers(code, tmp_path / "saved", tmp_path / "answers.safetensors").split()[-1]) < 1e-5


@needs_peers
def test_what_timm_saved_of_its_own_loads(tmp_path):
    code = (
        "import sys, timm, torch; from timm.models._hub import save_for_hf; from safetensors.torch import save_file\n"
        "torch.manual_seed(0); model = timm.create_model('convnext_tiny_hnf', num_classes=5).eval()\n"
        "save_for_hf(model, sys.argv[1], model_args={'global_pool': 'avg'}, safe_serialization=True)\n"
        "images = torch.rand(1, 3, 64, 64); logits = model(images).detach()\n"
        "save_file({'images': images, 'logits': logits}, sys.argv[1] + '/answers.safetensors')"
    )
    ask_peers(code, tmp_path)
    answers = load_file(tmp_path / "answers.safetensors")
    with torch.no_grad():
        assert error(patchlib.create_model(f"local-dir:{tmp_path}")(answers["images"]), answers["logits"]) < 1e-4
