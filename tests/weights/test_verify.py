"""Checks of weights. The reference output is timm's own, for the timm model in `goldens`, computed by timm 1.0.31 from
the formula that `reference_input` states."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file, save_file

import patchlib
from patchlib.errors import InputError, UnknownNameError, WeightsError
from patchlib.models.gpt import GPT
from patchlib.weights.verify import (
    check_finite,
    check_hash,
    check_reference,
    find_reference,
    locate,
    read_reference,
    reference_input,
    reference_output,
    write_reference,
)

TIMM = {
    "vit": [-2.31327868, -0.100765795, -0.983505487, 1.44158387, -2.51064467, 1.97268319, -1.78625762],
    "deit3": [-1.90392756, -2.62172842, 3.67881584, 3.37620354, -2.75758505, 0.116480976, -0.113371164],
}
CONVMIXER = {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 4, "img_size": 16, "num_classes": 3}


def load(folder: Path, **overrides: Any) -> Any:
    return patchlib.create_model(f"local-dir:{folder}", dtype="file", **overrides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """timm's tiny ViT with timm's own output for the reference input."""
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / "timm" / "vit" / name, folder / name)
    write_reference(load(folder), folder, output=torch.tensor([TIMM["vit"]]), made_by="timm 1.0.31")
    return folder


# The input


def test_images_follow_the_formula() -> None:
    model = patchlib.ViT(dim=8, depth=1, heads=1, img_size=(16, 32), patch_size=8, in_chans=2)
    expected = np.array([(i * i % 1009) / 504 - 1 for i in range(2 * 16 * 32)], dtype=np.float32)
    assert np.array_equal(reference_input(model).numpy(), expected.reshape(1, 2, 16, 32))


def test_tokens_follow_the_formula() -> None:
    model = GPT(vocab_size=50, context=20, dim=8, depth=1, heads=2).eval()
    ids = reference_input(model)
    assert ids.tolist() == [[i * i % 50 for i in range(20)]]
    assert torch.allclose(reference_output(model), model(ids)[0, -1], atol=1e-6)


def test_output_leaves_the_model_alone() -> None:
    model = patchlib.ConvMixer(**CONVMIXER).to(torch.bfloat16).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    output = reference_output(model)
    assert (output.dtype, output.shape) == (torch.float32, (3,))
    assert torch.equal(output, reference_output(model))  # no dropout, no batch statistics
    assert model.training
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in model.state_dict().items())


# The reference output


@pytest.mark.parametrize("case", TIMM)
def test_output_is_timms(case: str) -> None:
    expected = torch.tensor(TIMM[case])
    difference = (reference_output(load(GOLDENS / "timm" / case)) - expected).abs().max()
    assert difference < 1e-5 * expected.abs().max()


def test_reference_passes(folder: Path) -> None:
    check = check_reference(load(folder), find_reference(f"local-dir:{folder}"))
    assert check.passed
    assert "timm 1.0.31" in check.detail


@pytest.mark.parametrize(
    "overrides",
    [{"norm": {"kind": "layer", "eps": 1e-2}}, {"pool": {"kind": "avg"}}, {"heads": 6}],
    ids=["epsilon", "pooling", "heads"],
)
def test_another_model_fails(folder: Path, overrides: dict[str, Any]) -> None:
    model = load(folder)
    other = patchlib.ViT(model.config.replace(**overrides))
    other.load_state_dict(model.state_dict())
    assert check_reference(other, find_reference(f"local-dir:{folder}")).passed is False


def test_one_wrong_weight_fails(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] += 0.5
    assert check_reference(model, find_reference(f"local-dir:{folder}")).passed is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tolerance_goes_with_the_dtype(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    reference = find_reference(f"local-dir:{folder}")
    patchlib.save_pretrained(load(folder), tmp_path / "half", dtype=dtype)
    half = load(tmp_path / "half")
    assert check_reference(half, reference).passed
    assert check_reference(half.float(), reference).passed is False  # as weights of full precision they are wrong
    with torch.no_grad():
        half.to(dtype).blocks[0].attn.proj.weight.mul_(1.3)
    assert check_reference(half, reference).passed is False


def test_nan_fails(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.norm.bias[2] = torch.nan
    assert check_reference(model, find_reference(f"local-dir:{folder}")).passed is False
    check = check_finite(model)
    assert check.passed is False
    assert "norm.bias" in check.detail


def test_finite() -> None:
    model = patchlib.ConvMixer(**CONVMIXER)
    check = check_finite(model)
    assert check.passed
    assert f"{sum(t.numel() for t in model.state_dict().values()):,} values" in check.detail


@pytest.mark.parametrize("overrides", [{"num_classes": 5}, {"img_size": 32}])
def test_other_shapes_fail(folder: Path, overrides: dict[str, Any]) -> None:
    assert check_reference(load(folder, **overrides), find_reference(f"local-dir:{folder}")).passed is False


def test_no_reference_is_unknown() -> None:
    check = check_reference(load(GOLDENS / "timm" / "vit"), find_reference(f"local-dir:{GOLDENS / 'timm' / 'vit'}"))
    assert check.passed is None
    assert "no reference" in check.detail


# The file


def test_file_gives_the_same_bits(tmp_path: Path) -> None:
    model = patchlib.save_pretrained(patchlib.ConvMixer(**CONVMIXER), tmp_path)
    path = write_reference(load(model), tmp_path)
    reference = read_reference(path)
    assert torch.equal(reference.output, reference_output(load(model)))
    assert (reference.made_by, reference.input_shape) == (f"patchlib {patchlib.__version__}", (1, 3, 16, 16))


def test_nan_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="NaN"):
        write_reference(patchlib.ConvMixer(**CONVMIXER), tmp_path, output=torch.tensor([0.0, float("nan"), 1.0]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": "many"}, "output"),
        ({"output": []}, "output"),
        ({"output": [1.0, True]}, "output"),
        ({"output": [[1.0]]}, "output"),
        ({"made_by": None}, "made_by"),
        ({"input_shape": [1, 3, 2.5]}, "input_shape"),
        ({"sha256": {"model.safetensors": 5}}, "sha256"),
    ],
)
def test_damaged_file(folder: Path, change: dict[str, Any], said: str) -> None:
    path = folder / "reference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=rf"reference\.json.*{said}"):
        find_reference(f"local-dir:{folder}")


# The hash


def test_hash(folder: Path) -> None:
    check = check_hash(f"local-dir:{folder}")
    assert check.passed
    assert "reference.json" in check.detail


def test_hash_notices_one_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    check = check_hash(f"local-dir:{folder}")
    assert check.passed is False
    assert "model.safetensors" in check.detail


def test_hash_without_a_record(folder: Path) -> None:
    (folder / "reference.json").unlink()
    assert check_hash(f"local-dir:{folder}").passed is None


def test_hash_of_several_files(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_reference(load(folder), folder)
    assert check_hash(f"local-dir:{folder}").passed is None
    assert all(file in check_hash(f"local-dir:{folder}").detail for file in parts)
    (folder / "b.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"{}")
    assert check_hash(f"local-dir:{folder}").passed is False


def test_hash_of_nothing(tmp_path: Path) -> None:
    check = check_hash(f"local-dir:{tmp_path}")
    assert check.passed is False
    assert str(tmp_path) in check.detail


# Names


def test_locate() -> None:
    assert locate("local-dir:some/where") == ("local-dir:some/where", None)
    assert locate("hf-hub:user/name@v1") == ("hf-hub:user/name@v1", None)
    assert locate("convmixer_768_32")[0] == "hf-hub:timm/convmixer_768_32.in1k"
    with pytest.raises(UnknownNameError, match="in1k"):
        locate("convmixer_768_32.in1")
    with pytest.raises(InputError, match="repository"):
        check_hash("hf-hub:user/../name")


def test_every_bundled_model_verifies() -> None:
    bundled = [name for name in patchlib.list_models(pretrained=True) if locate(name)[0].startswith("local-dir:")]
    if not bundled:
        pytest.skip("no weights are bundled yet")
    for name in bundled:
        model = patchlib.create_model(name, pretrained=True, dtype="file")
        checks = [check_hash(name), check_finite(model), check_reference(model, find_reference(name))]
        assert all(check.passed for check in checks), (name, checks)
