"""Importing has no side effects and costs little; names come from one file."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import patchlib
from patchlib import errors

PROBE = """
import io, json, os, random, sys, contextlib
import torch, einops, safetensors.torch

before, events, reads = set(sys.modules), [], []
package = sys.argv[1]


def watch(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http", "subprocess") or event in ("os.system", "os.exec"):
        events.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append(f"open {arguments[0]}")


def recorded(method):
    def read(self, key, *rest):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.strip("<>").endswith(("os", "os.py", "_abc", "_abc.py")):
            frame = frame.f_back
        if frame and frame.f_code.co_filename.startswith(package):
            reads.append(f"{key} in {frame.f_code.co_filename}")
        return method(self, key, *rest)

    return read


sys.dont_write_bytecode = True
sys.addaudithook(watch)
for name in ("__getitem__", "__contains__"):
    setattr(type(os.environ), name, recorded(getattr(type(os.environ), name, None) or type(os.environ).get))
state, numbers = torch.get_rng_state(), random.getstate()
answer, out, err = {}, io.StringIO(), io.StringIO()


def added():
    global before
    new, before = set(sys.modules) - before, set(sys.modules)
    return sorted(new)


with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    import patchlib
    answer["import"] = added()
    patchlib.create_model("convmixer_16", device="meta")
    answer["create"] = added()
    patchlib.model_info("vit_16_linear")
    answer["info"] = added()
    import importlib, pkgutil
    events.clear()
    for module in pkgutil.walk_packages(patchlib.__path__, "patchlib."):
        if not module.name.endswith(("__main__", "_triton")):  # the command itself; what needs another package
            importlib.import_module(module.name)
    for name in patchlib.__all__:
        getattr(patchlib, name)
answer["all"] = added()
import logging
answer |= {"events": events, "reads": reads, "out": out.getvalue(), "err": err.getvalue()}
answer["random"] = torch.equal(torch.get_rng_state(), state) and random.getstate() == numbers
answer["handlers"] = [str(h) for h in (*logging.getLogger().handlers, *logging.getLogger("patchlib").handlers)]
answer["settings"] = [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()]
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answer():
    package = str(Path(patchlib.__file__).parent)
    run = subprocess.run([sys.executable, "-c", PROBE, package], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_importing_imports_one_file(answer):
    assert answer["import"] == ["patchlib"]


def test_a_model_takes_its_own_file_and_no_others(answer):
    models = {name for name in answer["create"] if name.startswith("patchlib.models.")}
    assert models == {"patchlib.models.base", "patchlib.models.convmixer", "patchlib.models.features"}
    layers = {name for name in answer["create"] if name.startswith("patchlib.layers.")}
    assert not layers & {f"patchlib.layers.{name}" for name in ("attention", "transformer", "convnext", "token_image")}
    assert "patchlib.models.vit" in answer["info"]


def test_what_is_not_needed_is_not_imported(answer):
    """Nothing of the Hub's client, of pictures or of numbers beside torch's."""
    roots = {name.partition(".")[0] for name in answer["create"]}
    assert not roots & {
        "huggingface_hub", "httpx", "requests", "PIL", "numpy", "torchvision", "tokenizers", "lightning", "kornia",
        "datasets", "matplotlib", "onnx", "argparse", "timm", "transformers", "tqdm",
    }  # fmt: skip
    assert len([name for name in answer["create"] if not name.startswith("patchlib")]) < 25


def test_no_module_does_anything_when_it_is_imported(answer):
    assert answer["events"] == []  # no sockets, no processes, no files written
    assert answer["reads"] == []  # no environment
    assert (answer["out"], answer["err"]) == ("", "")
    assert answer["random"] is True
    assert answer["handlers"] == []
    assert answer["settings"] == ["torch.float32", "cpu", True]


def test_optional_packages_are_not_needed_to_import_any_module(answer):
    roots = {name.partition(".")[0] for name in answer["all"]}
    assert not roots & {"PIL", "tokenizers", "lightning", "kornia", "datasets", "matplotlib", "onnx", "torchvision"}


# names


@pytest.mark.parametrize("name", patchlib.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(patchlib, name)
    assert name in dir(patchlib)
    if name == "__version__":
        return
    home = patchlib._HOMES[name]
    assert getattr(sys.modules[f"patchlib.{home}"], name) is value
    assert value.__module__ == f"patchlib.{home}"
    assert len(inspect.getdoc(value) or "") > 20
    if inspect.isclass(value) and not issubclass(value, Exception):
        own = {member for member, one in vars(value).items() if inspect.isfunction(one)}
        for member in own - {"reset_parameters"}:  # whose meaning is torch's
            if not member.startswith("_"):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member} has no docstring"


def test_the_names_of_the_design_are_there():
    names = [
        "create_model", "list_models", "model_info", "register_model", "register_block", "load_pretrained",
        "save_pretrained", "push_to_hub", "preprocess", "PatchEmbed", "SinusoidalPE", "LearnedPE", "RotaryPE",
        "ImageTokenizer", "Attention", "MLP", "TransformerBlock", "ConvMixerBlock", "DepthwiseConv", "Downsample",
        "GRN", "DropPath", "AvgPool", "ClassPool", "AttentionPool", "ViT", "ConvMixer", "PatchNet", "Patches",
        "PatchlibError", "ConfigError", "InputError", "UnknownNameError", "WeightsError", "HubError",
        "MissingExtraError",
    ]  # fmt: skip
    assert set(names) <= set(patchlib.__all__)


def test_the_stub_lists_each_name_once():
    lines = Path(patchlib.__file__).with_suffix(".pyi").read_text().splitlines()
    listed = [line for line in lines if line.startswith("from ")]
    assert len(listed) == len(set(listed)) == len(patchlib.__all__) - 1
    assert listed == sorted(listed, key=lambda line: line.split()[1])


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(
        AttributeError, match="module 'patchlib' has no attribute 'create_modell'; did you mean 'create_model'"
    ):
        patchlib.create_modell  # noqa: B018
    assert not hasattr(patchlib, "zzz")


def test_errors_are_of_ours_and_of_the_kind_that_fits():
    kinds = {
        errors.ConfigError: ValueError, errors.InputError: ValueError, errors.UnknownNameError: LookupError,
        errors.WeightsError: RuntimeError, errors.HubError: OSError, errors.MissingExtraError: ImportError,
    }  # fmt: skip
    for kind, base in kinds.items():
        assert issubclass(kind, errors.PatchlibError)
        assert issubclass(kind, base)
        assert str(kind("one sentence")) == "one sentence"


def test_a_missing_package_names_its_extra():
    with pytest.raises(errors.MissingExtraError, match=r"'no_such_package' is not installed; .*'patchlib\[vision\]'"):
        errors.require("no_such_package", "vision")
    assert errors.require("json", "vision") is json
