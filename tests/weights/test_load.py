"""Filling models: strictly, all or nothing, without copies where none are needed."""

import copy
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from torch import nn

import patchlib
from patchlib import registry
from patchlib.config import BaseConfig, integer
from patchlib.models.base import Model
from patchlib.weights.load import targets

VIT = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "img_size": 16, "num_classes": 5}
CONVMIXER = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4, "img_size": 16, "num_classes": 5}
NET = {"stages": ({"kind": "convmixer", "depth": 1, "dim": 8},), "patch_size": 4, "img_size": 16, "num_classes": 5}
MODELS = {"vit": lambda: patchlib.ViT(**VIT), "convmixer": lambda: patchlib.ConvMixer(**CONVMIXER)}
MODELS["net"] = lambda: patchlib.PatchNet(**NET, pos_embed="learned")


def redrawn(model):
    """Every floating parameter and buffer at random."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if name.endswith("var") else torch.randn_like(tensor) * 0.3)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=MODELS)
def model(request):
    return redrawn(MODELS[request.param]()).eval()


@pytest.fixture
def folder(model, tmp_path):
    return patchlib.save_pretrained(model, tmp_path / "saved")


def load(folder, **options):
    return patchlib.create_model(f"local-dir:{folder}", **options)


def test_a_saved_model_is_the_same_again(model, folder):
    again = load(folder)
    assert type(again) is type(model)
    assert again.config == model.config
    assert equal(state(again), state(model))
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), model(images))


def test_it_trains_and_the_file_stays(model, folder):
    before = (folder / "model.safetensors").read_bytes()
    again = load(folder).train()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    assert not equal(state(again), state(model))
    assert (folder / "model.safetensors").read_bytes() == before


def test_all_ways_to_name_a_source_lead_to_the_same(model, folder):
    wanted = state(model)
    file = folder / "model.safetensors"
    for source in (f"local-dir:{folder}", folder, str(folder), file, str(file)):
        assert equal(state(patchlib.load_pretrained(type(model)(model.config), source)), wanted)


def test_the_home_folder_may_be_a_tilde(model, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert equal(state(load("~/saved")), state(model))
    with pytest.raises(patchlib.WeightsError, match="no such folder"):
        load("~nobody_has_this_name/saved")


# strictness


def changed(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


SPOILT = {
    "one is missing": (lambda t: t.pop("head.fc.bias"), ["1 missing: head.fc.bias", "num_classes="]),
    "one is over": (lambda t: t.update(extra=torch.ones(1)), ["1 not used: extra"]),
    "one has another name": (rename("head.fc.bias", "head.bias"), ["missing: head.fc.bias", "not used: head.bias"]),
    "one has another shape": (
        lambda t: t.update({"head.fc.weight": torch.ones(5, 9)}),
        ["of another shape or dtype: head.fc.weight (5, 9) for (5, "],
    ),
    "one holds integers": (
        lambda t: t.update({"head.fc.bias": torch.ones(5, dtype=torch.int8)}),
        ["head.fc.bias is torch.int8"],
    ),
    "one holds float8": (
        lambda t: t.update({"head.fc.bias": torch.ones(5).to(torch.float8_e4m3fn)}),
        ["head.fc.bias is torch.float8_e4m3fn"],
    ),
    "one is scalar": (lambda t: t.update({"head.fc.bias": torch.tensor(1.0)}), ["head.fc.bias () for (5,)"]),
    "one is empty": (lambda t: t.update({"head.fc.bias": torch.ones(0)}), ["head.fc.bias (0,) for (5,)"]),
    "patches of rank 0": (lambda t: t.update({"patch_embed.proj.weight": torch.tensor(1.0)}), ["patch_embed.proj"]),
    "patches without channels": (
        lambda t: t.update({"patch_embed.proj.weight": t["patch_embed.proj.weight"][:, :0]}),
        ["patch_embed.proj.weight"],
    ),
    "patches too large to resize": (
        lambda t: t.update({"patch_embed.proj.weight": torch.ones(len(t["patch_embed.proj.bias"]), 1, 300, 300)}),
        ["patch_embed.proj.weight"],
    ),
    "all are over": (lambda t: t.update({f"x{i}": torch.ones(1) for i in range(20)}), ["20 not used: x0, ", ", …"]),
    "nothing is left": (lambda t: t.clear(), ["missing: "]),
    "all is in parts": (lambda t: t.clear() or t.update(a=torch.ones(1)), ["missing: ", "not used: a"]),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("bare", [False, True], ids=["folder", "file"])
def test_what_does_not_fit_is_refused_and_changes_nothing(case, bare, model, folder):
    change, named = SPOILT[case]
    changed(folder / "model.safetensors", change)
    source = folder / "model.safetensors" if bare else folder
    standing = redrawn(type(model)(model.config)).train()
    before, parameters, info = state(standing), list(standing.parameters()), dict(standing.info)
    with pytest.raises(patchlib.WeightsError) as caught:
        patchlib.load_pretrained(standing, source)
    for words in [*named, str(source), type(model).__name__]:
        assert words in str(caught.value)
    assert equal(state(standing), before)
    assert all(a is b for a, b in zip(standing.parameters(), parameters, strict=True))
    assert (standing.info, standing.training) == (info, True)
    with pytest.raises(patchlib.WeightsError):
        load(folder)


def test_both_sides_are_listed_together(model, folder):
    def change(tensors):
        del tensors["head.fc.bias"]
        tensors |= {"extra": torch.ones(1), "head.fc.weight": torch.ones(2, 2)}

    changed(folder / "model.safetensors", change)
    with pytest.raises(
        patchlib.WeightsError, match=r"1 missing: head\.fc\.bias; 1 not used: extra; 1 of another shape"
    ):
        load(folder)


def test_weights_of_another_class_are_refused(tmp_path):
    folder = patchlib.save_pretrained(patchlib.ViT(**VIT), tmp_path)
    for call in (
        lambda: patchlib.load_pretrained(patchlib.ConvMixer(**CONVMIXER), folder),
        lambda: patchlib.create_model("convmixer_16", checkpoint=folder),
    ):
        with pytest.raises(patchlib.WeightsError, match=r"holds a ViT; this model is a ConvMixer"):
            call()


def test_a_config_that_does_not_fit_its_own_weights_is_not_adapted_to(folder, model):
    """Weights are resized where the caller asks for another size, not where a file contradicts itself."""
    content = json.loads((folder / "config.json").read_text())
    content["config"]["patch_size"] = 8
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(patchlib.WeightsError, match=r"patch_embed\.proj\.weight \(\d+, 3, 4, 4\) for \(\d+, 3, 8, 8\)"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_check_finite_names_the_tensor(value, dtype, tmp_path):
    model = redrawn(patchlib.ConvMixer(**CONVMIXER)).to(dtype)
    model.state_dict()["blocks.1.norm2.running_mean"][3] = value
    folder = patchlib.save_pretrained(model, tmp_path)
    assert not load(folder).blocks[1].norm2.running_mean.isfinite().all()
    with pytest.raises(patchlib.WeightsError, match=r"NaN or infinity in blocks\.1\.norm2\.running_mean"):
        load(folder, check_finite=True)
    standing = redrawn(patchlib.ConvMixer(**CONVMIXER))
    before = state(standing)
    with pytest.raises(patchlib.WeightsError, match="NaN or infinity"):
        patchlib.load_pretrained(standing, folder, check_finite=True)
    assert equal(state(standing), before)


# a model that stands


def test_a_standing_model_is_filled_in_place(model, folder):
    standing = type(model)(model.config).double().train()
    parameters = list(standing.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    assert patchlib.load_pretrained(standing, folder) is standing
    assert all(a is b for a, b in zip(standing.parameters(), parameters, strict=True))
    assert {p.dtype for p in parameters} == {torch.float64}
    assert equal({k: t.to(model.state_dict()[k].dtype) for k, t in standing.state_dict().items()}, state(model))
    assert standing.training
    standing(torch.randn(3, 3, 16, 16).double()).sum().backward()
    optimizer.step()
    assert not torch.equal(standing.head.fc.weight.float(), model.head.fc.weight)


def test_frozen_parameters_are_filled_and_stay_frozen(model, folder):
    standing = type(model)(model.config)
    standing.freeze()
    patchlib.load_pretrained(standing, folder)
    assert equal(state(standing), state(model))
    assert [p.requires_grad for p in standing.parameters()].count(True) == 2


def test_a_standing_model_keeps_its_own_head_if_asked(model, folder):
    model.info = {"labels": [*"abcde"], "license": "mit"}
    patchlib.save_pretrained(model, folder)
    standing = redrawn(type(model)(model.config, num_classes=3))
    standing.info = {"labels": [*"xyz"]}
    head = standing.head.fc.weight.clone()
    with pytest.raises(patchlib.WeightsError, match=r"of another shape.*head\.fc.*new_head=True"):
        patchlib.load_pretrained(standing, folder)
    patchlib.load_pretrained(standing, folder, new_head=True)
    assert torch.equal(standing.head.fc.weight, head)
    assert torch.equal(standing.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert standing.info == {"labels": [*"xyz"], "license": "mit"}


def test_info_of_the_weights_replaces_info_of_older_weights(model, folder):
    model.info = {"labels": [*"abcde"], "license": "mit"}
    patchlib.save_pretrained(model, folder)
    standing = type(model)(model.config)
    standing.info = {"labels": [*"vwxyz"], "data": "mine"}
    assert patchlib.load_pretrained(standing, folder).info == {"labels": [*"abcde"], "license": "mit", "data": "mine"}


def test_a_wrapped_model_is_filled_too(tmp_path):
    model = redrawn(MODELS["net"]())
    folder = patchlib.save_pretrained(model, tmp_path)
    for wrap in (nn.DataParallel, torch.compile, lambda inner: nn.DataParallel(torch.compile(inner))):
        standing = patchlib.PatchNet(model.config)
        wrapped = wrap(standing)
        assert patchlib.load_pretrained(wrapped, folder) is wrapped
        assert equal(state(standing), state(model))
    extractor = patchlib.create_model("patchnet_tiny", features_only=True, **model.config.to_dict())
    patchlib.load_pretrained(extractor, folder)
    assert equal(state(extractor.model), state(model))


def test_what_is_no_model_of_patchlib_is_refused(folder):
    with pytest.raises(patchlib.InputError, match="found Linear; allowed: a model of patchlib"):
        patchlib.load_pretrained(nn.Linear(2, 2), folder)


def test_another_architecture_that_fits_in_shape_is_pointed_out(caplog, tmp_path):
    folder = patchlib.save_pretrained(patchlib.ViT(**VIT), tmp_path)
    with caplog.at_level("WARNING", "patchlib"):
        patchlib.load_pretrained(patchlib.ViT(**{**VIT, "drop": 0.2, "img_size": 32}), folder)
        assert not caplog.messages
        patchlib.load_pretrained(patchlib.ViT(**{**VIT, "heads": 4}), folder)
    (message,) = caplog.messages
    assert "heads=2; this model has 4" in message


# mapping and dtypes


@pytest.fixture
def maps():
    def ranges(path):
        with open("/proc/self/maps") as lines:
            spans = [line.split()[0].split("-") for line in lines if line.rstrip().endswith(str(path))]
        return [(int(low, 16), int(high, 16)) for low, high in spans]

    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists what is mapped")
    return ranges


@pytest.mark.parametrize("dtype", [None, "file", torch.float32])
def test_weights_are_mapped_where_dtype_and_layout_allow(dtype, tmp_path, maps):
    folder = patchlib.save_pretrained(redrawn(patchlib.ViT(**VIT)), tmp_path)
    again = load(folder, dtype=dtype)
    spans = maps(folder / "model.safetensors")
    copied = [n for n, t in again.state_dict().items() if not any(a <= t.data_ptr() < b for a, b in spans)]
    assert copied == ["patch_embed.proj.weight"]  # which is turned into channels_last


def test_the_files_dtype_is_kept_and_mapped_if_asked(tmp_path, maps):
    model = redrawn(patchlib.ConvMixer(**CONVMIXER))
    folder = patchlib.save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    again = load(folder, dtype="file")
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, tensor in again.state_dict().items():
        exact = name.rpartition(".")[0] in norms
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))
    spans = maps(folder / "model.safetensors")
    assert any(a <= again.blocks[0].depthwise.weight.data_ptr() < b for a, b in spans)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = again(images.bfloat16()).float()
    assert torch.allclose(found, model.eval()(images), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_are_cast_if_asked(dtype, model, folder):
    again = load(folder, dtype=dtype)
    for name, tensor in again.state_dict().items():
        wanted = model.state_dict()[name]
        assert torch.equal(tensor, wanted.to(dtype) if wanted.is_floating_point() else wanted), name


def test_without_a_dtype_torchs_default_counts(model, tmp_path):
    folder = patchlib.save_pretrained(model, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load(folder).parameters()} == {torch.float32}
    torch.set_default_dtype(torch.float64)
    try:
        assert {t.dtype for t in load(folder).parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_memory_formats_are_those_of_a_built_model(kind, tmp_path):
    model = patchlib.ViT(**VIT, patch_embed=kind)
    again = load(patchlib.save_pretrained(model, tmp_path))
    for name, parameter in model.named_parameters():
        assert again.get_parameter(name).stride() == parameter.stride(), name


# tied weights, and what stays on the meta device


@dataclass(frozen=True, kw_only=True)
class TiedConfig(BaseConfig):
    dim: int = integer(4, 1, 64)


class Tied(Model):
    Config = TiedConfig

    def __init__(self, config=None, **overrides):
        super().__init__()
        self.config = TiedConfig.of(config, overrides)
        self.encode = nn.Embedding(7, self.config.dim)
        self.norm = nn.LayerNorm(self.config.dim)
        self.decode = nn.Linear(self.config.dim, 7, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, ids):
        return self.decode(self.norm(self.encode(ids)))


class Computing(Tied):
    """Computes a tensor in its constructor, as a buffer or as a plain attribute."""

    how = "buffer"

    def __init__(self, config=None, **overrides):
        super().__init__(config, **overrides)
        if self.how == "attribute":
            self.norm.steps = torch.arange(3.0)
        else:
            self.norm.register_buffer("steps", torch.arange(3.0), persistent=self.how == "saved")


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_user_models", {})
    patchlib.register_model("tied", Tied, TiedConfig())
    patchlib.register_model("computing", Computing, TiedConfig())


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", [None, "file", torch.bfloat16])
def test_tied_weights_are_one_key_and_one_parameter(dtype, tmp_path):
    model = redrawn(patchlib.create_model("tied"))
    folder = patchlib.save_pretrained(model, tmp_path)
    assert list(load_file(folder / "model.safetensors")) == ["encode.weight", "norm.bias", "norm.weight"]
    again = load(folder, dtype=dtype)
    assert again.decode.weight is again.encode.weight
    assert len(list(again.parameters())) == 3
    assert torch.equal(again.decode.weight, model.decode.weight.to(again.decode.weight.dtype))
    for copied in (copy.deepcopy(again), pickle.loads(pickle.dumps(again)), again.double()):
        assert copied.decode.weight is copied.encode.weight
    standing = Tied()
    weight = standing.decode.weight
    patchlib.load_pretrained(standing, folder)
    assert standing.decode.weight is standing.encode.weight is weight
    assert torch.equal(weight, model.decode.weight)


@pytest.mark.usefixtures("registered")
def test_what_a_constructor_computes_is_not_left_without_a_value(tmp_path, monkeypatch):
    for how, name in (("buffer", "norm.steps"), ("attribute", "norm.steps")):
        monkeypatch.setattr(Computing, "how", how)
        folder = patchlib.save_pretrained(patchlib.create_model("computing"), tmp_path / how)
        with pytest.raises(patchlib.WeightsError, match=rf"nothing fills {name} of Computing; .*persistent"):
            load(folder)
        standing = Computing()
        assert torch.equal(patchlib.load_pretrained(standing, folder).norm.steps, torch.arange(3.0))
    monkeypatch.setattr(Computing, "how", "saved")
    folder = patchlib.save_pretrained(patchlib.create_model("computing"), tmp_path / "saved")
    assert torch.equal(load(folder).norm.steps, torch.arange(3.0))


def test_nothing_stays_on_the_meta_device(model, folder):
    for options in ({}, {"num_classes": 3}, {"num_classes": 0}, {"features_only": True}):
        again = load(folder, **options)
        assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])


# another head


@pytest.mark.parametrize("bare", [False, True], ids=["folder", "file"])
def test_other_classes_mean_a_new_head_and_only_that(bare, model, folder, caplog):
    model.info = {"labels": [*"abcde"], "license": "mit", "score": "0.9 of 5 classes", "data": "letters", "date": "now"}
    patchlib.save_pretrained(model, folder)

    def make(**options):
        if not bare:
            return load(folder, **options)
        name = {"ViT": "vit_16_linear", "ConvMixer": "convmixer_16", "PatchNet": "patchnet_tiny"}[type(model).__name__]
        config = {**model.config.to_dict(), **options}
        return patchlib.create_model(name, checkpoint=folder / "model.safetensors", **config)

    with caplog.at_level("WARNING", "patchlib"):
        same = make(num_classes=5)
        assert equal(state(same), state(model))
        assert not caplog.messages
        again = make(num_classes=3)
    assert ["head is new" in message for message in caplog.messages] == [True]
    assert again.num_classes == again.config.num_classes == 3
    assert again.head.fc.weight.shape[0] == 3
    assert again.head.fc.weight.isfinite().all()
    assert again.head.fc.weight.std() > 0
    new = {"head.fc.weight", "head.fc.bias"}
    old = {name: t for name, t in state(model).items() if name not in new}
    assert equal({name: t for name, t in state(again).items() if name not in new}, old)
    assert again.info == ({} if bare else {"license": "mit"})
    without = make(num_classes=0)
    assert equal(state(without), old)
    images = torch.randn(2, 3, 16, 16)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(without(images), pooled)


def test_a_new_head_has_the_dtype_of_the_rest(model, folder):
    for dtype in (None, "file", torch.bfloat16):
        again = load(folder, num_classes=3, dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {dtype if isinstance(dtype, torch.dtype) else torch.float32}
    patchlib.save_pretrained(model, folder, dtype=torch.float16)
    assert load(folder, num_classes=3, dtype="file").head.fc.weight.dtype == torch.float16


def test_a_new_head_is_drawn_as_a_fresh_models(tmp_path):
    """ViT's classifier: a truncated normal of 0.02, no bias."""
    folder = patchlib.save_pretrained(redrawn(patchlib.ViT(**VIT)), tmp_path)
    again = load(folder, num_classes=2000)
    assert again.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert again.head.fc.bias.eq(0).all()


def test_both_of_deits_classifiers_are_new():
    again = patchlib.create_model(f"local-dir:{GOLDENS / 'timm' / 'deit_distilled'}", num_classes=3)
    assert again.head.fc.weight.shape == again.head.fc_dist.weight.shape == (3, 24)
    assert again(torch.randn(2, 3, 24, 24)).shape == (2, 3)


def test_a_head_can_be_added_to_a_headless_checkpoint(caplog):
    with caplog.at_level("WARNING", "patchlib"):
        again = patchlib.create_model(f"local-dir:{GOLDENS / 'transformers' / 'vit_headless'}", num_classes=3)
    assert ["head is new" in message for message in caplog.messages] == [True]
    assert again(torch.randn(2, 3, 24, 24)).shape == (2, 3)


# bare files, pickles, prefixes


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_files_of_training_code_are_read(prefix, wrapper, model, tmp_path):
    tensors = {prefix + name: t for name, t in model.state_dict().items()}
    torch.save({wrapper: tensors, "epoch": 1} if wrapper else tensors, tmp_path / "w.pth")
    again = type(model)(model.config)
    with pytest.raises(patchlib.WeightsError, match="allow_pickle=True"):
        patchlib.load_pretrained(again, tmp_path / "w.pth")
    patchlib.load_pretrained(again, tmp_path / "w.pth", allow_pickle=True)
    assert equal(state(again), state(model))


def test_create_model_takes_a_bare_file(tmp_path):
    model = redrawn(patchlib.create_model("convmixer_256_8", depth=1)).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = patchlib.create_model("convmixer_256_8", depth=1, checkpoint=tmp_path / "w.pt", allow_pickle=True)
    assert equal(state(again), state(model))
    assert not again.training


def test_timms_files_are_recognised_by_their_keys():
    case = GOLDENS / "timm" / "vit"
    wanted = patchlib.create_model(f"local-dir:{case}")
    again = patchlib.load_pretrained(patchlib.ViT(wanted.config), case / "model.safetensors")
    assert equal(state(again), state(wanted))


def test_a_sharded_folder_is_one_checkpoint(model, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({name: t for name, t in tensors.items() if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert equal(state(load(folder)), state(model))
    (folder / shard).unlink()
    with pytest.raises(patchlib.WeightsError, match=f"has no {shard}"):
        load(folder)


# info


def test_info_is_a_copy_in_each_model(folder, model):
    model.info = {"labels": [*"abcde"], "preprocessing": {"mean": [0.5]}}
    patchlib.save_pretrained(model, folder)
    one, other = load(folder), load(folder)
    one.info["preprocessing"]["mean"].append(1)
    assert other.info == model.info
    assert "source" not in one.info  # a path on this machine would be published with the model


def test_the_size_that_preprocessing_makes_follows_the_models(tmp_path):
    model = patchlib.ViT(**VIT)
    model.info = {"preprocessing": {"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.9}}
    folder = patchlib.save_pretrained(model, tmp_path)
    for size, wanted in ((32, [3, 32, 32]), ((8, 24), [3, 8, 24]), (16, [3, 16, 16])):
        again = load(folder, img_size=size)
        assert again.info["preprocessing"] == {**model.info["preprocessing"], "input_size": wanted}
        assert tuple(patchlib.preprocess(again).input_size) == tuple(wanted)
    assert patchlib.preprocess(load(folder, in_chans=1, img_size=32)).input_size == (1, 32, 32)
    again = load(folder)
    again.set_input_size((24, 8))
    assert again.info["preprocessing"]["input_size"] == [3, 24, 8]
    assert model.info["preprocessing"]["input_size"] == [3, 16, 16]


def test_weights_without_preprocessing_get_none(folder):
    assert load(folder, img_size=32).info == {}


def test_a_folder_without_weights_is_refused(folder):
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(patchlib.WeightsError, match=r"has no model\.safetensors; a pickle .*allow_pickle=True"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(patchlib.WeightsError, match=r"has no config\.json \(found: pytorch_model\.bin\)"):
        load(folder)


def test_targets_are_what_is_saved(model):
    names = set(targets(model))
    assert names == set(model.state_dict())
