"""Strangers' files and wrong images: one error that says which file or argument, what was found and what to do;
nothing half loaded, nothing run, nothing read elsewhere, no memory taken for what a file merely claims."""

import contextlib
import json
import math
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import patchlib

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = {
    "patchlib": FIXTURES / "saved_v1",
    "timm": GOLDENS / "timm" / "vit_registers_avg",
    "transformers": GOLDENS / "transformers" / "vit",
    "shards": GOLDENS / "transformers" / "vit_tanh",
}
NET = {
    "patch_size": 4, "img_size": 8, "num_classes": 3,
    "stages": [{"kind": "convmixer", "dim": 8}, {"kind": "transformer", "dim": 8, "heads": 2}],
}  # fmt: skip
VIT = {"dim": 8, "depth": 1, "heads": 2, "patch_size": 4, "img_size": 8, "num_classes": 3}
CONVMIXER = {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 4, "img_size": 8, "num_classes": 3}
MODELS = {
    "net": lambda: patchlib.PatchNet(**NET),
    "vit": lambda: patchlib.ViT(**VIT),
    "convmixer": lambda: patchlib.ConvMixer(**CONVMIXER),
}

opened: list[str] | None = None


def _watch(event, arguments):
    if event == "open" and opened is not None:
        opened.append(os.fspath(arguments[0]) if not isinstance(arguments[0], int) else "")


sys.addaudithook(_watch)


@contextlib.contextmanager
def only_reads(folder):
    """Whatever Python opens meanwhile lies in the folder (or is code of an installed package)."""
    global opened
    opened = []
    try:
        yield
    finally:
        found, opened = opened, None
    code = tuple({sys.prefix, sys.base_prefix, str(Path(patchlib.__file__).parent), "/dev/", "/proc/"})
    assert [path for path in found if not os.path.abspath(path).startswith((str(folder), *code))] == []


@contextlib.contextmanager
def takes_no_memory(most=300 * 2**20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most


@pytest.fixture
def folder(request, tmp_path):
    return patchlib.save_pretrained(MODELS[getattr(request, "param", "net")](), tmp_path / "model")


def refuse(folder, *named, model="net", config_is_valid=False):
    """All ways to load it are refused, with the path and the words, and a model that stood is unchanged.

    A config that is valid by itself may be built without weights, or not be needed by a model that stands.
    """
    standing = MODELS[model]()
    before = {name: t.clone() for name, t in standing.state_dict().items()}
    calls = [
        lambda: patchlib.create_model(f"local-dir:{folder}"),
        lambda: patchlib.create_model(f"local-dir:{folder}", pretrained=False),
        lambda: patchlib.create_model(f"local-dir:{folder}", device="meta"),
        lambda: patchlib.load_pretrained(standing, folder),
    ]
    for call in calls[:1] if config_is_valid else calls:
        with takes_no_memory(), only_reads(folder), pytest.raises(patchlib.PatchlibError) as caught:
            call()
        message = str(caught.value)
        assert len(message) < 1200 + 2 * len(str(folder))
        for words in (str(folder), *named):
            assert words in message
        assert "\n" not in message
    assert all(torch.equal(before[name], t) for name, t in standing.state_dict().items())


def edit(folder, *path, value=None, remove=False):
    content = json.loads((folder / "config.json").read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(content))


# config.json


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not valid JSON"),
        ("{}", "not a config that patchlib knows"),
        ("[]", "allowed: a JSON object"),
        ('{"format": "patchlib"}', "format_version"),
        ('{"format": "patchlib", "format_version": 99, "model": "ViT", "config": {}}', "newer patchlib"),
        ('{"format": "patchlib", "format_version": 1, "config": {}}', "field 'model' is missing"),
        ('{"format": "patchlib", "format_version": 1, "model": "ViT"}', "field 'config' is missing"),
        ('{"format": "patchlib", "format_version": 1, "model": "ViT", "config": []}', "ViTConfig"),
        ('{"format": "patchlib", "format_version": 1, "model": "ViT", "config": {}, "info": 1}', "field 'info'"),
        (
            '{"format": "patchlib", "format_version": 1, "model": "ViT", "config": {}, "code": ""}',
            "unknown field 'code'",
        ),
        ('{"format": "patchlib", "format_version": 1, "model": "ViT", "model": "GPT"}', "'model' stands twice"),
        ('{"format": "patchlib", "format_version": 1, "model": "ViT", "config": {"drop": NaN}}', "NaN"),
        ('{"format": "patchlib", "format_version": 1, "model": "ViT", "config": {"drop": 1e999}}', "inf"),
        ('{"a":' * 2_000_000, "not a config"),  # 10 MB
        ('{"a":' + "[" * (20 * 2**20), "not a config"),
        ('{"format": "patchlib", "info":' + '{"a":' * 500_000, "500001 lists and objects"),
        ('{"' + "a" * 3_000_000 + '": 1}', "text of 3000000"),
        ('{"format": "patchlib", "format_version": 1, "model": "' + "a" * 9000 + '", "config": {}}', "field 'model'"),
        ("\0" * 100, "not valid JSON"),
    ],
    ids=range(19),
)
def test_config_json_of_another_form(text, named, folder):
    (folder / "config.json").write_text(text)
    refuse(folder, named, "config.json")


@pytest.mark.parametrize(
    "value", ["os.system", "patchlib.models.vit:ViT", "torch.nn.Linear", "__import__", "vit", "", 1, []]
)
def test_a_class_path_where_a_class_name_is_expected(value, folder):
    edit(folder, "model", value=value)
    refuse(folder, "config.json", "field 'model'")


@pytest.mark.parametrize(
    "value",
    ["os.system", "patchlib.layers.mlp:MLP", "torch.nn.Linear", "layer", "", None, 1, [], {"kind": "os.system"},
     {"kind": None}, {"kind": {}}, {"kind": ["linear"]}, {"kind": "conv", "bias": "os.system"}, {"bias": True}],
)  # fmt: skip
def test_a_class_path_where_a_kind_is_expected(value, folder):
    edit(folder, "config", "patch_embed", value=value)
    if value == {"bias": True}:  # an update of the default kind
        assert patchlib.create_model(f"local-dir:{folder}").patch_embed.kind == "conv"
        return
    refuse(folder, "config.json", "PatchNetConfig.patch_embed")


BOMBS = {
    "img_size": 10**9, "patch_size": 10**9, "in_chans": 10**9, "num_classes": 10**9, "drop": 10**9,
    "drop_path": -1, "stages": [], "unknown": 1, "norm": 5, "pool": "class",
}  # fmt: skip


@pytest.mark.parametrize("field", BOMBS)
def test_a_field_out_of_range_is_named(field, folder):
    edit(folder, "config", field, value=BOMBS[field])
    refuse(folder, "config.json", field, "PatchNetConfig")


@pytest.mark.parametrize("value", [10**6, 10**9, 10**15, 0, -1, 1.5, "8", True, None, [8], math.pi])
@pytest.mark.parametrize("key", ["dim", "depth", "downsample"])
def test_a_stage_out_of_range_is_named(key, value, folder):
    edit(folder, "config", "stages", 0, key, value=value)
    refuse(folder, "config.json", f"PatchNetConfig.stages[0].{key}", "allowed: ")


def test_stages_are_limited_together(folder):
    edit(folder, "config", "stages", value=[{"kind": "convmixer", "dim": 8, "depth": 200}] * 2)
    refuse(folder, "PatchNetConfig.stages", "400 blocks")
    edit(folder, "config", "stages", value=[{"kind": "convmixer", "dim": 8}] * 65)
    refuse(folder, "PatchNetConfig.stages", "64 stages")


OPTIONS = {
    "stages[0].ratio": [
        {"kind": "convnext", "dim": 8, "ratio": ratio} for ratio in (10**6, 10**15, 0, -1, "4", None, True)
    ],
    "stages[0].mlp.ratio": [{"kind": "transformer", "dim": 8, "mlp": {"kind": "gelu", "ratio": 10**6}}],
    "stages[0].mlp.approximate": [{"kind": "transformer", "dim": 8, "mlp": {"kind": "gelu", "approximate": "sin"}}],
    "stages[0].heads": [{"kind": "transformer", "dim": 8, "heads": heads} for heads in (10**6, 0, -1, 1.5, None)],
    "stages[0].attention.head_dim": [{"kind": "transformer", "dim": 8, "attention": {"head_dim": 10**6}}],
    "stages[0].kernel_size": [
        {"kind": "convmixer", "dim": 8, "kernel_size": size} for size in (10**6, 10**15, 0, -3, "3", [3], [3, 3, 3])
    ],
    "stages[0].kernel_size.height": [{"kind": "convnext", "dim": 8, "kernel_size": [10**6, 10**6]}],
    "patch_embed.stride": [{"kind": "conv", "stride": stride} for stride in (10**6, 0, -4, "4", [4], 1.5)],
    "patch_embed.stride.height": [{"kind": "conv", "stride": [-4, 4]}],
    "patch_embed.remainder": [{"kind": "conv", "remainder": "wrap"}],
    "patch_embed.widths": [
        {"kind": "early_conv", "widths": widths}
        for widths in ([10**6] * 2, [10**15] * 2, [8] * 10**5, "88", [], [0, 0])
    ],
    "'bias'": [{"kind": "conv", "bias": bias} for bias in ("false", 0, None)],
    "norm.eps": [{"kind": "layer", "eps": eps} for eps in ("small", -1, 10**6)],
    "'device'": [{"kind": "layer", "device": "meta"}],
    "pos_embed.axes": [{"kind": "sinusoidal", "axes": axes} for axes in (0, 3, "2")],
    "pos_embed.temperature": [{"kind": "sinusoidal", "temperature": 0}],
    "pool.a": [{"kind": "avg", "a": [[[[[[[[1]]]]]]]]}],
    "pool": [[1, 2], 5, "max"],
    "'dim' is set by the model": [{"kind": "conv", "dim": 8}],
    "'normalized_shape' is set by the model": [{"kind": "layer", "normalized_shape": 8}],
    "'size' is set by the model": [{"kind": "learned", "size": 8}],
}


FIELDS = {
    "bias": "patch_embed",
    "device": "norm",
    "dim": "patch_embed",
    "normalized_shape": "norm",
    "size": "pos_embed",
}


@pytest.mark.parametrize(("named", "value"), [(named, value) for named in OPTIONS for value in OPTIONS[named]])
def test_options_of_blocks_out_of_range(named, value, folder):
    field = named.partition("[")[0].partition(".")[0]
    field = FIELDS.get(field.split("'")[1], field) if "'" in field else field
    edit(folder, "config", field, value=[value] if field == "stages" else value)
    refuse(folder, "config.json", f"PatchNetConfig.{field}", named)


def test_tensors_with_endless_names(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "x" * 300_000: torch.zeros(1)}, folder / "model.safetensors")
    refuse(folder, "1 not used: xxx", config_is_valid=True)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("stages", [{"kind": "transformer", "dim": 8, "attention": {"code": "os.system"}}], "'code'"),
        ("stages", [{"kind": "transformer", "dim": 8, "heads": 3}], "heads"),
        ("stages", [{"kind": "transformer", "dim": 8, "norm": {"eps": 1e-6}}], "norm"),
        ("pos_embed", "rotary", "rotary"),
        ("pool", {"kind": "attention", "heads": 3}, "heads"),
        ("patch_size", 9, "smaller than one patch"),
        ("patch_embed", {"kind": "early_conv", "widths": [8] * 64}, "widths"),
        ("patch_embed", {"kind": "early_conv", "widths": [8, 8]}, "patch_embed.proj.0.weight"),
        ("stages", [{"kind": "convmixer", "dim": 8, "kernel_size": 255}], "depthwise.weight"),
    ],
)
def test_options_that_do_not_go_together(field, value, named, folder):
    if field == "patch_size":
        edit(folder, "config", "pos_embed", value="learned")
    edit(folder, "config", field, value=value)
    refuse(folder, named, config_is_valid=True)


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 10**6), ("depth", 10**6), ("heads", 10**6), ("heads", 3), ("attention", {"head_dim": 10**6}),
        ("attention", {"qkv_bias": "no"}), ("attention", {"norm": "os.system"}), ("attention", []),
        ("mlp", {"kind": "gelu", "ratio": 10**6}), ("mlp", {"kind": "gelu", "ratio": -1}), ("mlp", "torch.nn.Linear"),
        ("tokens", {"class": 10**6}), ("tokens", {"register": 10**6}), ("tokens", {"cls": 1}), ("tokens", None),
        ("layer_scale", 10**6), ("block", "middle"), ("pos_embed", {"covers_prefix": "yes"}), ("pool", "max"),
        ("img_size", [8, 10**9]), ("img_size", [8]), ("img_size", [8, 8, 8]), ("norm", None),
    ],
)  # fmt: skip
def test_fields_of_vit_out_of_range(field, value, folder):
    edit(folder, "config", field, value=value)
    refuse(folder, "config.json", f"ViTConfig.{field}", model="vit")


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
def test_an_image_smaller_than_a_patch_is_no_size_for_a_vit(folder):
    edit(folder, "config", "img_size", value=2)
    refuse(folder, "smaller than one patch", config_is_valid=True)


def test_sizes_that_are_fine_alone_and_too_much_together_take_no_memory(folder):
    """32,768 channels in 256 blocks are a terabyte, which nobody has to have."""
    edit(folder, "config", "stages", value=[{"kind": "transformer", "dim": 32_768, "depth": 256}])
    refuse(folder, "missing: blocks.0", config_is_valid=True)
    with takes_no_memory(), pytest.raises(patchlib.ConfigError, match=r"model: its config makes \d.* parameters"):
        patchlib.create_model(f"local-dir:{folder}", pretrained=False)
    with takes_no_memory(), pytest.raises(patchlib.ConfigError, match=r"parameters, .* of them in .*allowed: at most"):
        patchlib.create_model("vit_base_patch16_224", dim=32_768, depth=256, heads=8)


@pytest.mark.parametrize(
    "overrides",
    [
        {"dim": 10**6}, {"depth": 10**6}, {"num_classes": 10**9}, {"img_size": 10**9}, {"in_chans": 10**6},
        {"mlp": {"kind": "gelu", "ratio": 10**6}}, {"mlp": {"ratio": 1e300}}, {"attention": {"head_dim": 10**6}},
        {"patch_embed": {"kind": "conv", "stride": 10**9}}, {"dim": 10**400}, {"drop": float("nan")},
    ],
)  # fmt: skip
def test_absurd_arguments_take_no_memory(overrides):
    with takes_no_memory(), pytest.raises(patchlib.ConfigError, match=next(iter(overrides))):
        patchlib.create_model("vit_base_patch16_224", **overrides)


@pytest.mark.parametrize("preprocessing", [1, [], "x", None])
def test_preprocessing_of_another_kind(preprocessing, folder):
    edit(folder, "info", value={"preprocessing": preprocessing})
    refuse(folder, "config.json", "info.preprocessing")


@pytest.mark.parametrize(
    "spec",
    [
        {"size": {"height": "a", "width": 3}, "do_center_crop": True, "crop_size": {"height": "a", "width": 3}},
        {"size": 0, "crop_size": 0, "do_center_crop": True},
        {"size": {"shortest_edge": []}},
        {"resample": []},
    ],
)
def test_a_preprocessor_config_of_another_form(spec, tmp_path):
    folder = Path(shutil.copytree(FOLDERS["transformers"], tmp_path / "model"))
    (folder / "preprocessor_config.json").write_text(json.dumps(spec))
    with pytest.raises(patchlib.WeightsError, match=r"preprocessor_config\.json: "):
        patchlib.create_model(f"local-dir:{folder}")


# model.safetensors


@pytest.mark.parametrize("folder", MODELS, indirect=True)
@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04" + bytes(99), b"x" * 99, b"\xff" * 99, bytes(99)])
def test_weights_of_another_form(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    for options in ({}, {"num_classes": 7}):
        with pytest.raises(patchlib.WeightsError, match=r"model\.safetensors"):
            patchlib.create_model(f"local-dir:{folder}", **options)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_by_another_name_is_not_run(folder, tmp_path):
    for name in ("model.safetensors", "config.json", "pytorch_model.bin"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).write_bytes(pickle.dumps({"a": Evil(tmp_path / "executed")}))
        if name == "pytorch_model.bin":
            (tmp_path / name / "model.safetensors").unlink()
        for options in ({}, {"allow_pickle": True}):
            with pytest.raises(patchlib.WeightsError, match="model" if "model" in name else name):
                patchlib.create_model(f"local-dir:{tmp_path / name}", **options)
    assert not (tmp_path / "executed").exists()


def test_a_standing_model_is_not_changed_by_damaged_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    standing = patchlib.create_model("patchnet_tiny", **NET)
    before = {name: t.clone() for name, t in standing.state_dict().items()}
    for keep in (0, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:keep])
        with pytest.raises(patchlib.WeightsError, match=r"model\.safetensors.*again"):
            patchlib.load_pretrained(standing, folder)
        assert all(torch.equal(before[name], t) for name, t in standing.state_dict().items())


def test_weights_that_claim_a_config_of_their_own_are_measured_against_ours(folder):
    """A file with huge tensors is only as large as it is; a config with small ones refuses it."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1000, 1000)}, folder / "model.safetensors")
    with pytest.raises(patchlib.WeightsError, match="not used: extra"):
        patchlib.create_model(f"local-dir:{folder}")


# flipped bytes of real files


def flips(path):
    size = len(path.read_bytes())
    header = min(size, 4000)  # what is parsed stands at the front
    place = st.one_of(st.integers(0, header - 1), st.integers(0, size - 1))
    return st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=4)


def spoil(path, changes):
    data = bytearray(path.read_bytes())
    for place, byte in changes:
        data[place] = byte
    path.write_bytes(bytes(data))


def finite_or_refused(folder):
    try:
        model = patchlib.create_model(f"local-dir:{folder}", check_finite=True)
    except patchlib.PatchlibError:
        return
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_give_an_error_or_a_finite_model(kind, name, tmp_path_factory, data):
    source = FOLDERS[kind]
    if not (source / name).exists():
        name = data.draw(st.sampled_from(sorted(p.name for p in source.iterdir() if p.name.startswith("model"))))
    folder = tmp_path_factory.mktemp("flips") / "model"
    shutil.copytree(source, folder)
    spoil(folder / name, data.draw(flips(source / name)))
    finite_or_refused(folder)


def mutants(value):
    """A JSON document with one of its values replaced by something else."""
    strange = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 40), st.sampled_from([10**6, 10**12, 1.5, "", "conv", "x", [], {}]),
        st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.sampled_from(["kind", "a"]), st.just("avg")),
    )  # fmt: skip
    if isinstance(value, dict) and value:
        inner = st.sampled_from(sorted(value)).flatmap(lambda k: mutants(value[k]).map(lambda v: {**value, k: v}))
        return st.one_of(inner, inner, inner, strange)
    if isinstance(value, list) and value:
        place = st.integers(0, len(value) - 1)
        inner = place.flatmap(lambda i: mutants(value[i]).map(lambda v: [*value[:i], v, *value[i + 1 :]]))
        return st.one_of(inner, inner, strange)
    return strange


@pytest.mark.parametrize("kind", FOLDERS)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_replaced_fields_give_an_error_or_a_finite_model(kind, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fields") / "model"
    shutil.copytree(FOLDERS[kind], folder)
    names = sorted(path.name for path in folder.glob("*.json"))
    path = folder / data.draw(st.sampled_from(names))
    content = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        content = data.draw(mutants(content))
    path.write_text(json.dumps(content))
    finite_or_refused(folder)


# images


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((3, 8, 8), "found 3 dimensions"),
        ((8, 8), "found 2 dimensions"),
        ((1, 1, 3, 8, 8), "found 5 dimensions"),
        ((1, 1, 8, 8), "found 1 channels; this model takes 3"),
        ((1, 8, 8, 3), "channels-last"),
        ((1, 3, 2, 8), "height 2"),
        ((1, 3, 8, 0), "width 0"),
    ],
)
def test_images_of_another_shape(shape, named, name):
    with pytest.raises(patchlib.InputError, match=named):
        MODELS[name]()(torch.zeros(shape))


@pytest.mark.parametrize("images", [np.zeros((1, 3, 8, 8), "float32"), [[0.0]], None])
def test_images_that_are_no_tensor(images):
    with pytest.raises(patchlib.InputError, match=rf"images: found {type(images).__name__}; .*patchlib\.preprocess"):
        MODELS["vit"]()(images)


@pytest.mark.parametrize("name", ["net", "vit"])
def test_an_image_that_patches_do_not_cover(name):
    with pytest.raises(patchlib.InputError, match=r"image width 9: not covered exactly .* 8\); .*remainder='pad'"):
        MODELS[name]()(torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_of_another_dtype(dtype):
    with pytest.raises(patchlib.InputError, match="allowed: floats"):
        MODELS["vit"]()(torch.zeros(1, 3, 8, 8).to(dtype))
