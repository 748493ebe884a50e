"""`patchlib.optimize`: the same answers, a copy, and a check that can fail."""

import importlib.util
import shutil
from inspect import signature

import pytest
import torch
from PIL import Image
from torch import nn

import patchlib
from patchlib.errors import InputError, MissingExtraError
from patchlib.optimization import TOLERANCES, OptimizationError

ALL_OFF = {"dtype": None, "compile": False, "fuse": False}
IMAGES = {"img_size": 32, "num_classes": 10}
MODELS = {
    "convmixer": lambda: patchlib.ConvMixer(dim=48, depth=3, kernel_size=5, patch_size=4, **IMAGES),
    "convmixer_rezero": lambda: patchlib.ConvMixer(dim=32, depth=2, patch_size=4, rezero=True, act="relu", **IMAGES),
    "early_conv": lambda: patchlib.ViT(dim=64, depth=2, heads=4, patch_size=8, patch_embed="early_conv", **IMAGES),
    "distilled": lambda: patchlib.ViT(
        dim=64, depth=2, heads=4, patch_size=8, tokens={"class": 1, "distill": 1}, **IMAGES
    ),
    "convnextv2": lambda: patchlib.ConvNeXtV2(depths=(1, 1), dims=(32, 64), **IMAGES),
    "patchnet": lambda: patchlib.PatchNet(
        patch_size=4,
        stages=[
            {"kind": "convmixer", "depth": 2, "dim": 32},
            {"kind": "transformer", "depth": 1, "dim": 64, "downsample": 2, "heads": 4},
        ],
        **IMAGES,
    ),
    "gpt": lambda: patchlib.GPT(vocab_size=101, context=32, dim=64, depth=2, heads=4),
    "causal_conv_lm": lambda: patchlib.CausalConvLM(vocab_size=101, context=32, dim=64, depth=2),
    "convnextv2_lm": lambda: patchlib.ConvNeXtV2LM(
        vocab_size=101, num_tokens=16, patch_size=8, trunk={"kind": "convmixer", "dim": 32, "depth": 2, "patch_size": 8}
    ),
}


def make(name):
    """A model whose norms, scales and biases are drawn, as after training."""
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.normal_(module.weight, mean=1, std=0.5)  # some scales are negative
            nn.init.normal_(module.bias, std=0.5)
        if isinstance(module, patchlib.LayerScale):
            nn.init.normal_(module.gamma)
    return model


def inputs(model, batch=3):
    if isinstance(model, patchlib.models.base.LanguageModel):
        return torch.randint(101, (batch, 16))
    return torch.randn(batch, 3, 32, 32)


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fusing_changes_rounding_alone(name):
    model = make(name).eval()
    x = inputs(model)
    fused = patchlib.optimize(model, dtype=None, compile=False)
    assert difference(fused(x), model(x)) < 1e-5


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_takes_and_returns_float32(name, fuse):
    model = make(name).eval()
    x = inputs(model)
    optimized = patchlib.optimize(model, compile=False, fuse=fuse)
    found = optimized(x)
    assert found.dtype == torch.float32
    assert 0 < difference(found, model(x)) < TOLERANCES["bf16"]  # above 0: it did compute in bfloat16
    assert {p.dtype for p in optimized.parameters()} >= {torch.bfloat16}


def test_fusing_leaves_no_norm_of_a_convmixer_or_an_early_conv():
    for name in ("convmixer", "early_conv"):
        fused = patchlib.optimize(make(name), dtype=None, compile=False)
        assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["convmixer", "early_conv", "gpt"])
def test_the_given_model_stays_as_it_is(name):
    model = make(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    optimized = patchlib.optimize(model, compile=False)
    assert type(optimized) is type(model)
    assert not optimized.training
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == modules
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)
    assert all(p.requires_grad for p in model.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in optimized.parameters()}
    assert not shared


@torch.no_grad()
def test_the_other_methods_work_in_bfloat16():
    model = make("convmixer").eval()
    optimized = patchlib.optimize(model, compile=False)
    x = inputs(model)
    features = optimized.forward_features(x)
    assert features.dtype == torch.bfloat16
    assert difference(features.float(), model.forward_features(x)) < TOLERANCES["bf16"]
    assert torch.equal(optimized.forward_head(features), optimized(x))
    language = patchlib.optimize(make("gpt"), compile=False)
    assert len(patchlib.generate(language, [1, 2, 3], 5, seed=0)) == 8


def test_weights_that_bfloat16_cannot_hold_raise():
    """Three large weights that cancel in float32: bfloat16 keeps 8 bits of each."""
    model = make("convmixer")
    with torch.no_grad():
        pointwise = model.blocks[-1].pointwise
        pointwise.bias += 1000  # what follows loses all digits below 4
        model.blocks[-1].norm2.running_mean += 1000
    patchlib.optimize(model, dtype=None, compile=False)
    with pytest.raises(OptimizationError, match=r"bf16.*differ.*allowed: 0\.05; use dtype=None"):
        patchlib.optimize(model, compile=False)


def test_answers_that_are_no_numbers_raise():
    model = make("convmixer")
    nn.init.constant_(model.head.fc.weight, torch.inf)
    with pytest.raises(OptimizationError, match="differ from the plain model's by nan"):
        patchlib.optimize(model, **ALL_OFF)


def test_the_comparison_is_on_the_sample():
    model = make("convmixer")
    model.optimize_seen = []
    model.register_forward_pre_hook(lambda module, args: module.optimize_seen.append(args[0]))
    sample = torch.randn(5, 3, 32, 32)
    optimized = patchlib.optimize(model, **ALL_OFF, sample=sample)
    assert [tuple(x.shape) for x in optimized.optimize_seen] == [(5, 3, 32, 32)] * 2
    with pytest.raises(InputError, match="1 channels"):
        patchlib.optimize(model, **ALL_OFF, sample=torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"dtype": "fp16"}, "dtype: found 'fp16'"), ({"quantize": "int4"}, "quantize: found 'int4'")],
)
def test_unknown_choices_raise(arguments, match):
    with pytest.raises(InputError, match=match):
        patchlib.optimize(make("convmixer"), **arguments)


def test_a_foreign_module_raises():
    with pytest.raises(InputError, match="found Linear"):
        patchlib.optimize(nn.Linear(2, 2))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_the_error_names_the_extra():
    with pytest.raises(MissingExtraError, match=r"patchlib\[quantize\]"):
        patchlib.optimize(make("gpt"), compile=False, quantize="int8")


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("name", ["distilled", "convnextv2", "gpt"])
@torch.no_grad()
def test_int8_stays_near(name, dtype):
    pytest.importorskip("torchao")
    model = make(name).eval()
    x = inputs(model)
    found = patchlib.optimize(model, dtype=dtype, compile=False, quantize="int8")(x)
    assert found.dtype == torch.float32
    assert 1e-4 < difference(found, model(x)) < TOLERANCES["int8"]


def test_a_convmixer_has_nothing_to_quantise():
    pytest.importorskip("torchao")
    with pytest.raises(InputError, match="no linear layers"):
        patchlib.optimize(make("convmixer"), compile=False, quantize="int8")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_compiled_it_gives_the_same():
    model = patchlib.ConvMixer(dim=16, depth=1, kernel_size=3, patch_size=8, **IMAGES).eval()
    x = inputs(model)
    optimized = patchlib.optimize(model, dtype=None, sample=x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert difference(optimized(-x), model(-x)) < 1e-5


@pytest.mark.skipif("isolate_recompiles" not in signature(torch.compile).parameters, reason="torch is too old")
@torch._dynamo.config.patch(recompile_limit=3)
@torch.no_grad()
def test_many_models_of_many_batch_sizes_can_be_compiled_in_one_process(monkeypatch):
    """Torch allows so many recompilations of one place in the code. Without Inductor, to be quick."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compile_module(self, backend="eager", **given))
    for i in range(4):
        model = patchlib.ConvMixer(dim=8 + i, depth=1, kernel_size=3, patch_size=16, **IMAGES).eval()
        optimized = patchlib.optimize(model)
        for batch in (3, 5):
            x = inputs(model, batch)
            assert difference(optimized(x), model(x)) < TOLERANCES["bf16"]


def test_a_missing_compiler_is_named(tmp_path):
    from torch._inductor import config

    model = patchlib.ConvMixer(dim=8, depth=1, kernel_size=3, patch_size=16, **IMAGES)
    without = config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)})
    with without, pytest.raises(OptimizationError, match="use compile=False"):
        patchlib.optimize(model)


def test_on_photographs_the_classes_stay(shared):
    model = patchlib.create_model("convmixer_16", pretrained=True).eval()
    prepare = patchlib.preprocess(model)
    folder = shared / "cats_dogs_192" / "test"
    files = [path for kind in ("cat", "dog") for path in sorted((folder / kind).iterdir())[:250]]
    assert len(files) == 500
    optimized = patchlib.optimize(model, compile=False, sample=prepare([Image.open(path) for path in files[:2]]))
    same = 0
    for start in range(0, len(files), 50):
        x = prepare([Image.open(path) for path in files[start : start + 50]])
        with torch.no_grad():
            same += int((optimized(x).argmax(1) == model(x).argmax(1)).sum())
    assert same >= 0.99 * len(files)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_compared_as_one(dtype):
    model = make("convmixer").to(dtype)
    sample = inputs(model).to(dtype)
    optimized = patchlib.optimize(model, dtype=None, compile=False, sample=sample)
    found, plain = optimized(sample), model.eval()(sample)
    assert found.dtype == dtype
    assert 1e-4 < (found - plain).std() / plain.std() < TOLERANCES["bf16"]  # more than float32 is allowed


@pytest.mark.parametrize("options", [{"sample": [1]}, {"sample": torch.zeros(0, 3, 32, 32)}])
def test_a_sample_that_is_none(options):
    with pytest.raises(InputError, match="sample: found"):
        patchlib.optimize(make("convmixer"), compile=False, **options)


def test_models_without_weights_or_optimised_already():
    with pytest.raises(InputError, match="meta device"):
        patchlib.optimize(make("convnextv2").to("meta"), compile=False)
    with pytest.raises(InputError, match="folded already"):
        patchlib.optimize(patchlib.optimize(make("convmixer"), compile=False), compile=False)
