"""Saving: a folder from which any model is rebuilt, written whole or not at all."""

import copy
import json
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import patchlib
from patchlib import registry
from patchlib.weights.files import MAX_JSON, MAX_TEXT

VIT = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 5}
CONVMIXER = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4, "img_size": 16, "num_classes": 5}
HYBRID = {
    "patch_size": 4,
    "img_size": 16,
    "num_classes": 3,
    "patch_embed": {"kind": "early_conv", "norm": False, "act": False},
    "pos_embed": {"kind": "sinusoidal", "axes": 2, "temperature": 100},
    "norm": "rms",
    "pool": {"kind": "attention", "heads": 4},
    "stages": [
        {"kind": "convmixer", "dim": 8, "depth": 2, "kernel_size": 3, "rezero": True},
        {"kind": "convnext", "dim": 8, "ratio": 2, "grn": False, "layer_scale": 0.1},
        {
            "kind": "transformer", "dim": 12, "heads": 3, "downsample": 2, "attention": {"qkv_bias": False},
            "mlp": {"kind": "swiglu", "ratio": 2.0}, "norm": {"kind": "rms"}, "order": "post",
        },
    ],
}  # fmt: skip
INFO = {"labels": ["a", "b", "c"], "license": "mit", "preprocessing": {"input_size": [3, 16, 16], "crop_pct": 0.9}}


def redrawn(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if name.endswith("var") else torch.randn_like(tensor) * 0.3)
    return model


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(folder, **options):
    return patchlib.create_model(f"local-dir:{folder}", **options)


def test_the_folder_is_returned_and_holds_two_files(tmp_path):
    folder = patchlib.save_pretrained(patchlib.ConvMixer(**CONVMIXER), str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_the_weights_are_a_plain_safetensors_file(tmp_path):
    """Anybody's reader finds what `state_dict` has."""
    model = redrawn(patchlib.ConvMixer(**CONVMIXER))
    found = load_file(patchlib.save_pretrained(model, tmp_path) / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_composed_model_reloads_in_a_process_without_the_users_code(tmp_path):
    model = redrawn(patchlib.PatchNet(**HYBRID)).eval()
    model.info = INFO
    patchlib.save_pretrained(model, tmp_path / "model")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        save_file({"images": images, "logits": model(images)}, tmp_path / "answers.safetensors")
    code = (
        "import os, sys, patchlib, torch; from safetensors.torch import load_file\n"
        "os.chdir(sys.argv[1])\n"
        "model, answers = patchlib.create_model('local-dir:model'), load_file('answers.safetensors')\n"
        "with torch.no_grad(): assert torch.allclose(model(answers['images']), answers['logits'], atol=1e-6)\n"
        "print(repr(model.info))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == repr(INFO)


def test_every_registered_model_has_a_config_that_json_keeps():
    for name in patchlib.list_models():
        model_class, config = registry.find_model(name)
        assert model_class.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name


def test_info_survives_copying_pickling_and_saving(tmp_path):
    model = patchlib.ConvMixer(**CONVMIXER)
    model.info = {**INFO, "note": "größer \U0001f431", "nested": {"n": [1, 2.5, None, True]}}
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load(patchlib.save_pretrained(model, tmp_path)),
    ):
        assert again.info == model.info
        assert again.config == model.config
        assert equal(again, model)


def test_saving_again_what_was_loaded_changes_nothing(tmp_path):
    model = redrawn(patchlib.PatchNet(**HYBRID))
    model.info = INFO
    patchlib.save_pretrained(model, tmp_path / "a")
    patchlib.save_pretrained(load(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(tmp_path):
    folder = patchlib.save_pretrained(redrawn(patchlib.ViT(**VIT)), tmp_path)
    model = load(folder, dtype="file")
    wanted = copy.deepcopy(model)
    for _ in range(2):
        patchlib.save_pretrained(model, folder)
        assert equal(model, wanted)
        assert equal(load(folder), wanted)
    with torch.no_grad():
        model.head.fc.bias.fill_(7)
    patchlib.save_pretrained(model, folder)
    assert load(folder).head.fc.bias.eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norms_stay_in_float32_on_disk(dtype, tmp_path):
    """Half precision of a running mean of 1000 is off by up to half a unit, for every image."""
    model = redrawn(patchlib.ConvMixer(**CONVMIXER))
    model.stem_norm.running_mean.fill_(1000.3)
    found = load_file(patchlib.save_pretrained(model, tmp_path, dtype=dtype) / "model.safetensors")
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 5
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if name.rpartition(".")[0] in norms else dtype), name
    assert torch.equal(load(tmp_path).stem_norm.running_mean, model.stem_norm.running_mean)
    assert load(tmp_path).stem_norm.num_batches_tracked.dtype == torch.int64
    found = load_file(patchlib.save_pretrained(model.to(dtype), tmp_path) / "model.safetensors")
    assert (found["stem_norm.running_mean"].dtype, found["head.fc.weight"].dtype) == (torch.float32, dtype)


def test_double_precision_is_kept(tmp_path):
    model = redrawn(patchlib.ConvMixer(**CONVMIXER).double())
    model.stem_norm.running_mean.fill_(1 / 3)
    assert equal(load(patchlib.save_pretrained(model, tmp_path), dtype="file"), model)


@pytest.mark.parametrize("dtype", [torch.int8, "float16", torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_loaded_is_refused(dtype, tmp_path):
    with pytest.raises(patchlib.ConfigError, match=r"dtype: found .*float16"):
        patchlib.save_pretrained(patchlib.ConvMixer(**CONVMIXER), tmp_path / "x", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_what_wraps_a_model_is_not_saved(tmp_path):
    model = redrawn(patchlib.create_model("patchnet_tiny", **HYBRID))
    wrapped = [nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))]
    wrapped.append(patchlib.models.features.FeatureExtractor(model, 1))
    for one in wrapped:
        again = load(patchlib.save_pretrained(one, tmp_path))
        assert type(again) is patchlib.PatchNet
        assert equal(again, model)


def test_what_is_no_model_of_patchlib_is_refused(tmp_path):
    class Wrapper(nn.Module):
        """Has layers of its own, which would be lost."""

        def __init__(self):
            super().__init__()
            self.model, self.extra = patchlib.ConvMixer(**CONVMIXER), nn.Linear(2, 2)

    for one in (nn.Linear(2, 2), Wrapper()):
        with pytest.raises(patchlib.InputError, match=f"found {type(one).__name__}; allowed: a model of patchlib"):
            patchlib.save_pretrained(one, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_submodule_named_model_is_no_wrapper(tmp_path, monkeypatch):
    class Inside(patchlib.ConvMixer):
        def __init__(self, config=None, **overrides):
            super().__init__(config, **overrides)
            self.model = nn.Linear(2, 2)

    monkeypatch.setattr(registry, "_user_models", {})
    patchlib.register_model("inside", Inside, Inside.Config())
    model = redrawn(Inside(**CONVMIXER))
    assert equal(load(patchlib.save_pretrained(model, tmp_path)), model)


def test_a_model_without_weights_is_refused(tmp_path):
    with pytest.raises(patchlib.WeightsError, match="no weights yet"):
        patchlib.save_pretrained(patchlib.create_model("convmixer_16", device="meta"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["Timm", "pytorch", "", None])
def test_an_unknown_format_is_refused(format, tmp_path):
    with pytest.raises(patchlib.WeightsError, match=r"format: found .*'patchlib'|format: found .*'timm'"):
        patchlib.save_pretrained(patchlib.ConvMixer(**CONVMIXER), tmp_path / "x", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "info",
    [
        {"labels": {0: "a"}},
        {"score": float("nan")},
        {"score": torch.tensor(0.5)},
        {"data": b"x"},
        {"data": "x" * (MAX_TEXT + 1)},
        {"seed": 2**60},
        {"tags": {"a", "b"}},
    ],
    ids=range(7),
)
def test_info_that_would_not_come_back_is_refused(info, tmp_path):
    model = patchlib.ConvMixer(**CONVMIXER)
    model.info = info
    with pytest.raises(patchlib.WeightsError, match=r"model\.info .*found .*allowed"):
        patchlib.save_pretrained(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_config_too_large_to_be_read_is_not_written(tmp_path):
    model = patchlib.ConvMixer(**CONVMIXER)
    model.info = {"labels": ["x" * 9000] * (MAX_JSON // 9000 + 1)}
    with pytest.raises(patchlib.WeightsError, match=r"model\.info .*allowed"):
        patchlib.save_pretrained(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_model_loadable(tmp_path):
    """The new weights fit and the new config does not; the old folder is one model still."""
    old = redrawn(patchlib.ConvMixer(**CONVMIXER))
    patchlib.save_pretrained(old, tmp_path)
    new = redrawn(patchlib.ConvMixer(**{**CONVMIXER, "num_classes": 3}))
    new.info = {"labels": ["x" * 9000] * 20}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(patchlib.WeightsError, match=r"cannot be written .*unchanged"):
            patchlib.save_pretrained(new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert equal(load(tmp_path), old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    patchlib.save_pretrained(new, tmp_path)
    assert equal(load(tmp_path), new)


# blocks and classes of the user


class Shift(nn.Module):
    def __init__(self, dim, *, by=1.0):
        super().__init__()
        self.bias = nn.Parameter(torch.full((dim,), by))

    def forward(self, grid):
        return grid + self.bias


class MyConvMixer(patchlib.ConvMixer):
    pass


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_user_blocks", {})
    monkeypatch.setattr(registry, "_user_models", {})


@pytest.mark.usefixtures("empty_registry")
def test_a_block_of_the_users_is_named_if_it_is_missing(tmp_path):
    patchlib.register_block("shift", Shift, role="stage")
    net = {**HYBRID, "stages": [{"kind": "shift", "dim": 8, "depth": 2, "by": 0.5}]}
    model = redrawn(patchlib.PatchNet(**net))
    patchlib.save_pretrained(model, tmp_path)
    assert equal(load(tmp_path), model)
    registry._user_blocks.clear()
    with pytest.raises(
        patchlib.ConfigError, match=r"stages\[0\].kind: no stage block is named 'shift'.*register_block"
    ) as e:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(e.value)


@pytest.mark.usefixtures("empty_registry")
def test_a_class_of_the_users_is_named_if_it_is_missing(tmp_path):
    model = redrawn(MyConvMixer(**CONVMIXER))
    patchlib.save_pretrained(model, tmp_path)
    with pytest.raises(patchlib.ConfigError, match=r"field 'model': no model class is named 'MyConvMixer'.*register"):
        load(tmp_path)
    patchlib.register_model("mine", MyConvMixer, MyConvMixer.Config())
    assert type(load(tmp_path)) is MyConvMixer
    assert equal(load(tmp_path), model)


def test_a_model_that_its_config_does_not_build_is_not_saved(tmp_path):
    model = patchlib.ConvMixer(**CONVMIXER)
    with pytest.raises(
        patchlib.WeightsError, match=r"ConvMixer could not be loaded again: .* before `optimize`"
    ) as caught:
        patchlib.save_pretrained(patchlib.optimize(model, compile=False, dtype=None), tmp_path)
    assert "blocks.0.norm1.bias" in str(caught.value)
    model.head = nn.Linear(8, 7)
    with pytest.raises(patchlib.WeightsError, match="its config builds other weights than it has"):
        patchlib.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
