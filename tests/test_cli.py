"""The command line. Answers are compared with what the library gives for the same input, or with timm's goldens."""

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDENS
from hub_server import HubServer, run_client
from PIL import Image
from safetensors.torch import load_file

import patchlib
from patchlib.cli import main
from patchlib.labels import class_names
from patchlib.models.gpt import GPT, GPTConfig
from patchlib.weights.verify import read_reference, write_reference

LABELS = ["cat", "cup", "person", "rocket", "coin"]
TINY = {"dim": 16, "depth": 1, "kernel_size": 3, "patch_size": 8, "img_size": 32, "num_classes": len(LABELS)}
SKIMAGE = Path(str(importlib.util.find_spec("skimage").origin)).parent / "data"  # type: ignore[union-attr]
CAT, COFFEE, COINS, ROCKET = (
    str(SKIMAGE / name) for name in ("chelsea.png", "coffee.png", "coins.png", "rocket.jpg")
)  # colour, colour, grey, JPEG


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with labels and a reference output; its head is drawn wide, so that classes differ clearly."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    model = patchlib.ConvMixer(**TINY)
    with torch.no_grad():
        model.head.fc.weight.normal_()
    model.info |= {"labels": LABELS, "preprocessing": {"crop_pct": 1.0}, "license": "mit"}
    patchlib.save_pretrained(model, folder)
    write_reference(model, folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; answers exit code, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ask(run: Any) -> Any:
    """Runs a command line with ``--json``, which has to go well; answers what it printed."""

    def ask(*argv: object) -> Any:
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        return json.loads(out)

    return ask


def copied(folder: Path, to: Path, change: Any = None) -> Path:
    """A copy of a model's folder; `change` may alter the content of its config.json."""
    shutil.copytree(folder, to)
    if change is not None:
        config = json.loads((to / "config.json").read_text())
        change(config)
        (to / "config.json").write_text(json.dumps(config))
    return to


def expected(folder: Path, *images: Image.Image) -> torch.Tensor:
    model = patchlib.create_model(f"local-dir:{folder}")
    prepare = patchlib.preprocess(model)
    with torch.no_grad():
        return torch.cat([model(prepare(image)).softmax(1) for image in images])


# The command itself


def started(*argv: str, **options: Any) -> "subprocess.CompletedProcess[Any]":
    return subprocess.run([sys.executable, "-m", "patchlib", *argv], capture_output=True, timeout=200, **options)


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("patchlib")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"patchlib {patchlib.__version__}\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from patchlib.cli import main
for argv in (["--help"], ["predict", "--help"], ["lst"], ["list"]):
    try:
        main(argv)
    except SystemExit:
        pass
assert not {"torch", "numpy", "PIL", "huggingface_hub"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["predct", "x"], "did you mean 'predict'"),
        ([], "COMMAND"),
        (["predict", "convmixer_16"], "IMAGE"),
        (["predict", "convmixer_16", "a.png", "--top", "0"], "found '0'; allowed: an integer from 1"),
        (["predict", "convmixer_16", "a.png", "--to", "3"], "--to"),
        (["convert", "a", "b", "--dtype", "int8"], "float16"),
        (["convert", "a", "b", "--set", "depth"], "FIELD=VALUE"),
        (["list", "--familly", "vit"], "--familly"),
    ],
)
def test_usage_errors(run: Any, argv: list[str], said: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert "--help" in err


def test_errors_are_one_line(run: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt").write_bytes(b"")
    for argv, said in {
        ("list", "--family", "vitt"): "did you mean 'vit'",
        ("info", "convmixer_61"): "did you mean 'convmixer_16'",
        ("info", f"local-dir:{folder}"): "registered name",
        ("predict", "vit_16_linear", CAT): "no weights of 'vit_16_linear'",
        ("predict", "timm/convmixer_768_32", CAT): "hf-hub:timm/convmixer_768_32",
        ("predict", tmp_path / "none", CAT): "there is no such folder\n",
        ("predict", tmp_path / "empty", CAT): "config.json",
        ("predict", tmp_path / "model.pt", CAT): "patchlib convert",
        ("convert", tmp_path / "model.pt", tmp_path / "out"): "--model",
        ("convert", tmp_path / "model.pt", tmp_path / "out", "--model", "convmixer_16"): "pickle",
        ("convert", folder, tmp_path / "out", "--model", "convmixer_16"): "--model",
        ("convert", folder, tmp_path / "out", "--set", "device=meta"): "device",
        ("convert", folder, tmp_path / "out", "--set", "deph=3"): "did you mean 'depth'",
        ("convert", folder, tmp_path / "model.pt" / "out"): "model.pt",
        ("verify", "convmixer_768_32.in2k"): "did you mean 'in1k'",
        ("push", folder, "user/../x"): "repository",
        ("generate", folder, "--prompt", "a"): "ConvMixer",
    }.items():
        code, out, err = run(*argv)
        assert (code, out if argv[0] != "verify" else "") == (1, ""), argv
        assert said in err, argv
        assert err.count("\n") == 1, argv
        assert err.startswith("patchlib: error: "), argv


def test_errors_keep_control_characters_from_the_terminal(run: Any, folder: Path, tmp_path: Path) -> None:
    wild = copied(folder, tmp_path / "wild", lambda content: content.update({"model": "\x1b[31mred\x9b\x07"}))
    code, _, err = run("verify", wild)
    assert code == 1
    assert "red" in err
    (tmp_path / "\x1b[2Jclear").mkdir()
    (tmp_path / "\x1b[2Jclear" / "config.json").write_text("{}")
    assert run("predict", tmp_path / "\x1b[2Jclear", CAT)[2].count("\\x1b[2Jclear") == 1
    for argv in (["predict", tmp_path / "\x1b[2Jclear", CAT], ["predict", folder, "\x1b[2J.png"], ["\x1b[2J"]):
        assert all(c.isprintable() for c in run(*argv)[2].rstrip("\n")), argv
    assert all(c.isprintable() for c in err.rstrip("\n"))


def test_errors_in_json(run: Any) -> None:
    code, out, err = run("info", "convmixer_61", "--json")
    error = json.loads(out)["error"]
    assert (code, error["kind"]) == (1, "UnknownNameError")
    assert err == f"patchlib: error: {error['message']}\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_interrupted(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.png")
    command = [sys.executable, "-m", "patchlib", "predict", str(folder), str(tmp_path / "photo.png")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process, open(tmp_path / "photo.png", "wb"):  # waits until the command reads from it
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert (process.returncode, out, err) == (130, "", "patchlib: interrupted\n")


BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}  # as it is for most: the error comes at the end


@pytest.mark.skipif(os.name != "posix", reason="closed pipes differ elsewhere")
def test_nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "patchlib", "list", "convmixer"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=BUFFERED, timeout=200)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk() -> None:
    command = [sys.executable, "-m", "patchlib", "list", "convmixer", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=BUFFERED, timeout=200)
    assert done.returncode == 1
    assert done.stderr == b"patchlib: error: the output cannot be written: No space left on device\n"


# list and info


@pytest.mark.parametrize(
    ("argv", "arguments"),
    [
        ([], {}),
        (["convmixer"], {"pattern": "convmixer"}),
        (["*_16_*"], {"pattern": "*_16_*"}),
        (["--family", "vit", "deit"], {"pattern": "deit", "family": "vit"}),
        (["--pretrained"], {"pretrained": True}),
        (["vit_*", "--pretrained"], {"pattern": "vit_*", "pretrained": True}),
        (["in21k", "--pretrained"], {"pattern": "in21k", "pretrained": True}),
    ],
)
def test_list(run: Any, ask: Any, argv: list[str], arguments: dict[str, Any]) -> None:
    names = patchlib.list_models(**arguments)
    assert names
    assert [row["name"] for row in ask("list", *argv)] == names
    code, out, err = run("list", *argv)
    header, *lines = out.splitlines()
    assert (code, err, header.split()[0]) == (0, "", "NAME")
    assert [line.split()[0] for line in lines] == names


def test_list_tells_weights(ask: Any) -> None:
    (row,) = ask("list", "convmixer_768_32")
    assert row == {"name": "convmixer_768_32", "family": "convmixer", "weights": ["in1k"]}
    (row,) = ask("list", "convmixer_768_32", "--pretrained")
    assert row["license"] == "mit"
    assert row["source"] == "hf-hub:timm/convmixer_768_32.in1k"


def test_list_of_nothing(run: Any) -> None:
    code, out, err = run("list", "convmixer_999*")
    assert (code, out) == (1, "")
    assert "nothing matches" in err


def test_info(run: Any, ask: Any) -> None:
    facts = patchlib.model_info("convmixer_768_32")
    assert ask("info", "convmixer_768_32") == json.loads(json.dumps(dataclasses.asdict(facts)))
    code, out, _ = run("info", "convmixer_256_8")
    assert code == 0
    assert "594,186" in out  # as the paper's authors have it
    assert "3 x 32 x 32" in out


# predict


def test_predict(ask: Any, folder: Path) -> None:
    answer = ask("predict", folder, CAT, COFFEE)
    probabilities = expected(folder, Image.open(CAT), Image.open(COFFEE))
    assert answer["model"] == str(folder)
    assert [one["image"] for one in answer["images"]] == [CAT, COFFEE]
    for one, row in zip(answer["images"], probabilities, strict=True):
        assert [entry["index"] for entry in one["classes"]] == row.argsort(descending=True).tolist()
        assert [entry["label"] for entry in one["classes"]] == [LABELS[i] for i in row.argsort(descending=True)]
        shown = torch.tensor([entry["probability"] for entry in one["classes"]])
        assert torch.allclose(shown, row.sort(descending=True).values, atol=1e-5)


def test_predict_in_words(run: Any, folder: Path) -> None:
    code, out, err = run("predict", folder, CAT, "--top", 2)
    values, indices = expected(folder, Image.open(CAT))[0].topk(2)
    assert (code, err) == (0, "")
    first, *rest = out.splitlines()
    assert first == CAT
    assert [line.split() for line in rest] == [
        [f"{value:.2%}", LABELS[i]] for value, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def test_predict_many(ask: Any, folder: Path) -> None:
    images = [CAT, COFFEE, COINS, ROCKET] * 5  # more than one batch, of different sizes and modes
    answer = ask("predict", f"local-dir:{folder}", *images, "--top", "1")
    alone = expected(folder, *map(Image.open, images[:4]))
    assert len(answer["images"]) == 20
    for i, one in enumerate(answer["images"]):
        (entry,) = one["classes"]
        assert one["image"] == images[i]
        assert entry["index"] == int(alone[i % 4].argmax())
        assert entry["probability"] == pytest.approx(float(alone[i % 4].max()), abs=1e-5)


def test_predict_turns_photographs_upright(ask: Any, folder: Path, tmp_path: Path) -> None:
    upright = Image.open(CAT)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that a quarter turn clockwise makes the picture upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "plain.png")
    turned, straight, plain = ask("predict", folder, tmp_path / "turned.png", CAT, tmp_path / "plain.png")["images"]
    assert turned["classes"] == straight["classes"]
    assert plain["classes"] != straight["classes"]


def test_predict_from_stdin(folder: Path) -> None:
    done = started("predict", str(folder), "-", "--json", input=Path(ROCKET).read_bytes())
    assert (done.returncode, done.stderr) == (0, b"")
    (one,) = json.loads(done.stdout)["images"]
    assert one["image"] == "-"
    assert one["classes"][0]["index"] == int(expected(folder, Image.open(ROCKET)).argmax())


def test_predict_goes_on_after_a_wrong_image(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "half.jpg").write_bytes(Path(ROCKET).read_bytes()[:20_000])
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (1, 30_000)).save(tmp_path / "line.png")
    bad = {
        "missing.png": "No such file",
        "text.png": "not an image",
        "empty.jpg": "not an image",
        "half.jpg": "damaged",
        "folder.png": "directory",
    }
    images = [CAT, *(str(tmp_path / name) for name in bad), COFFEE]
    code, out, err = run("predict", folder, *images, "--json")
    answers = json.loads(out)["images"]
    assert code == 1
    assert ["classes" in answer for answer in answers] == [True, *[False] * len(bad), True]
    assert answers[-1]["classes"][0]["index"] == int(expected(folder, Image.open(COFFEE)).argmax())
    for line, (name, said), answer in zip(err.splitlines(), bad.items(), answers[1:-1], strict=True):
        assert line == f"patchlib: error: {tmp_path / name}: {answer['error']}"
        assert said in line

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _, _, err = run("predict", folder, CAT)
    assert "too large an image" in err
    assert "scale it down" in err
    monkeypatch.undo()

    code, out, err = run("predict", folder, tmp_path / "missing.png")  # and no good one
    assert (code, out, err.count("\n")) == (1, "", 1)
    code, out, err = run("predict", folder, CAT, tmp_path / "missing.png", "--top", 1)
    assert (code, len(out.splitlines()), err.count("\n")) == (1, 2, 1)


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ("imagenet-1k", class_names("imagenet-1k")),
        (None, [f"class {i}" for i in range(1000)]),
        ([f"\x1b[31m{i}" for i in range(1000)], [f"\\x1b[31m{i}" for i in range(1000)]),
    ],
    ids=["a set's name", "none", "with a terminal's commands"],
)
def test_predict_names_classes(run: Any, tmp_path: Path, labels: Any, shown: Sequence[str]) -> None:
    model = patchlib.ConvMixer(**{**TINY, "num_classes": 1000})
    if labels:
        model.info["labels"] = labels
    patchlib.save_pretrained(model, tmp_path)
    code, out, _ = run("predict", tmp_path, CAT)
    words = [line.split(maxsplit=1)[1] for line in out.splitlines()[1:]]
    assert code == 0
    assert words == [shown[i] for i in expected(tmp_path, Image.open(CAT))[0].topk(5).indices]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config["info"].update(labels=["cat"]), "1 names; allowed: 5"),
        (lambda config: config["info"].update(labels="imagenet-23k"), "imagenet-22k"),
        (lambda config: config["info"].update(preprocessing={"std": [0]}), "std"),
    ],
)
def test_predict_with_wrong_info(run: Any, folder: Path, tmp_path: Path, change: Any, said: str) -> None:
    code, out, err = run("predict", copied(folder, tmp_path / "model", change), CAT)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err


def test_predict_with_nan(run: Any, folder: Path, tmp_path: Path) -> None:
    model = patchlib.create_model(f"local-dir:{folder}")
    torch.nn.init.constant_(model.head.fc.bias, float("nan"))
    patchlib.save_pretrained(model, tmp_path)
    code, out, err = run("predict", tmp_path, CAT, "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (1, "WeightsError")
    assert "patchlib verify" in err


def test_bundled_weights_tell_a_cat(ask: Any) -> None:
    if "convmixer_16.cats_dogs" not in patchlib.list_models(pretrained=True):
        pytest.skip("convmixer_16.cats_dogs is not bundled yet")
    (one,) = ask("predict", "convmixer_16.cats_dogs", CAT)["images"]
    assert "cat" in one["classes"][0]["label"].lower()
    assert one["classes"][0]["probability"] > 0.5


# convert


def timm_logits(folder: Path, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a folder's model makes of the golden images of a case, and what timm made of them."""
    answers = load_file(GOLDENS / "timm" / case / "answers.safetensors")
    with torch.no_grad():
        return patchlib.create_model(f"local-dir:{folder}")(answers["images"]), answers["logits"]


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_convert_a_folder(run: Any, ask: Any, tmp_path: Path) -> None:
    answer = ask("convert", GOLDENS / "timm" / "vit", tmp_path / "ours")
    assert answer["passed"]
    assert [(check["name"], check["passed"]) for check in answer["checks"]] == [("finite", True), ("reference", True)]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["format"] == "patchlib"
    assert_near(*timm_logits(tmp_path / "ours", "vit"))

    code, out, err = run("convert", tmp_path / "ours", tmp_path / "timm", "--format", "timm")
    assert (code, err) == (0, "")
    assert "ok" in out
    original = load_file(GOLDENS / "timm" / "vit" / "model.safetensors")
    back = load_file(tmp_path / "timm" / "model.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in original.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_to_half(ask: Any, folder: Path, tmp_path: Path, dtype: str) -> None:
    assert ask("convert", folder, tmp_path / "half", "--dtype", dtype)["passed"]
    kinds = {t.dtype for n, t in load_file(tmp_path / "half" / "model.safetensors").items() if "norm" not in n}
    assert kinds == {getattr(torch, dtype)}
    (verified,) = ask("verify", tmp_path / "half")
    assert all(check["passed"] for check in verified["checks"])


def test_convert_keeps_the_reference(ask: Any, tmp_path: Path) -> None:
    source = copied(GOLDENS / "timm" / "deit3", tmp_path / "source")
    output = [-1.90392756, -2.62172842, 3.67881584, 3.37620354, -2.75758505, 0.116480976, -0.113371164]
    model = patchlib.create_model(f"local-dir:{source}")
    write_reference(model, source, output=torch.tensor(output), made_by="timm 1.0.31")  # which computed it
    answer = ask("convert", source, tmp_path / "ours", "--dtype", "float16")
    assert "timm 1.0.31" in answer["checks"][1]["detail"]
    kept = read_reference(tmp_path / "ours" / "reference.json")
    assert torch.equal(kept.output, torch.tensor(output))


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_convert_a_bare_file(ask: Any, tmp_path: Path, act: str) -> None:
    config = {
        "gelu": {"kernel_size": 5, "patch_size": 4, "act": "gelu"},
        "relu": {"kernel_size": 3, "patch_size": 5, "act": "relu"},
    }[act]
    fields = {"dim": 24, "depth": 2, "img_size": 24, "num_classes": 7, **config}
    options = [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
    file = GOLDENS / "timm" / f"convmixer_{act}" / "model.safetensors"
    assert ask("convert", file, tmp_path, "--model", "convmixer_768_32", *options)["passed"]
    assert_near(*timm_logits(tmp_path, f"convmixer_{act}"))


def test_convert_a_pickle(run: Any, folder: Path, tmp_path: Path) -> None:
    model = patchlib.create_model(f"local-dir:{folder}")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    options = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    line = ["convert", tmp_path / "model.pt", tmp_path / "out", "--model", "convmixer_16", *options]
    code, _, err = run(*line)
    assert (code, err.count("\n"), (tmp_path / "out").exists()) == (1, 1, False)
    code, _, err = run(*line, "--allow-pickle")
    assert (code, err) == (0, "")
    converted = patchlib.create_model(f"local-dir:{tmp_path / 'out'}")
    assert all(torch.equal(t, converted.state_dict()[name]) for name, t in model.state_dict().items())


def test_convert_says_when_half_is_too_small(run: Any, folder: Path, tmp_path: Path) -> None:
    model = patchlib.create_model(f"local-dir:{folder}")
    torch.nn.init.constant_(model.head.fc.bias, 1e6)
    patchlib.save_pretrained(model, tmp_path / "large")
    code, out, err = run("convert", tmp_path / "large", tmp_path / "half", "--dtype", "float16", "--json")
    assert (code, err.count("\n")) == (1, 1)
    assert json.loads(out)["passed"] is False
    assert "do not use it" in err


@pytest.mark.parametrize("bare", [False, True])
def test_convert_of_damaged_weights_writes_nothing(run: Any, folder: Path, tmp_path: Path, bare: bool) -> None:
    model = patchlib.create_model(f"local-dir:{folder}")
    torch.nn.init.constant_(model.head.fc.bias, float("nan"))
    source = patchlib.save_pretrained(model, tmp_path / "nan")
    options = [source / "model.safetensors", "--model", "convmixer_16"] if bare else [source]
    fields = [f"--set={key}={value}" for key, value in TINY.items()] if bare else []
    code, out, err = run("convert", *options[:1], tmp_path / "out", *options[1:], *fields)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert str(source) in err
    assert "NaN or infinity in head.fc.bias" in err
    assert "fetch it again" in err
    torch.nn.init.constant_(model.head.fc.bias, 3e38)
    torch.nn.init.constant_(model.blocks[0].norm2.bias, 3e38)  # finite, and too much
    patchlib.save_pretrained(model, source)
    code, out, err = run("convert", source, tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{source}: answers with NaN or infinity" in err
    assert not (tmp_path / "out").exists()


# verify


def test_verify(run: Any, ask: Any, folder: Path) -> None:
    (answer,) = ask("verify", folder)
    assert (answer["name"], answer["passed"]) == (str(folder), True)
    assert {check["name"]: check["passed"] for check in answer["checks"]} == {
        "hash": True, "finite": True, "reference": True,
    }  # fmt: skip
    code, out, err = run("verify", folder)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["ok", "hash"], ["ok", "finite"], ["ok", "reference"],
    ]  # fmt: skip


def test_verify_says_what_is_unknown(run: Any, ask: Any) -> None:
    (answer,) = ask("verify", GOLDENS / "timm" / "vit")
    assert answer["passed"]
    assert [check["passed"] for check in answer["checks"]] == [None, True, None]
    code, out, _ = run("verify", GOLDENS / "timm" / "vit")
    assert code == 0
    assert "no reference output" in out


def test_verify_goes_on_after_a_failure(run: Any, folder: Path, tmp_path: Path) -> None:
    flipped = copied(folder, tmp_path / "flipped")
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-3] ^= 0x40
    (flipped / "model.safetensors").write_bytes(data)
    changed = copied(folder, tmp_path / "changed", lambda config: config["config"].update(act="relu"))
    code, out, err = run("verify", flipped, tmp_path / "none", changed, folder, "--json")
    first, second, third, last = json.loads(out)
    assert code == 1
    assert [check["passed"] for check in first["checks"]] == [False]
    assert "error" in second
    assert {check["name"]: check["passed"] for check in third["checks"]} == {
        "hash": True, "finite": True, "reference": False,
    }  # fmt: skip
    assert last["passed"]
    lines = err.splitlines()
    assert len(lines) == 3
    assert all(name in line for name, line in zip(("flipped", "none", "changed"), lines, strict=True))


# The Hub


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def on_hub(hub: HubServer, home: Path, lines: Sequence[Sequence[object]], token: str = "") -> list[dict[str, Any]]:
    """Runs command lines in one process whose Hub is `hub`; answers exit code, stdout and stderr of each."""
    code = f"""
import contextlib, io, json
from patchlib.cli import main
answers = []
for argv in json.loads({json.dumps([[str(arg) for arg in argv] for argv in lines])!r}):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    answers.append({{"code": code, "out": out.getvalue(), "err": err.getvalue()}})
print(json.dumps(answers))
"""
    done = run_client(hub, code, home, {"HF_TOKEN": token} if token else {}, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_push_predict_verify(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    pushed, to_branch, named = on_hub(
        hub,
        tmp_path / "home",
        [
            ["push", folder, "user/tiny", "--private", "--json"],
            ["push", folder, "user/tiny", "--revision", "timm-names"],
            ["push", tmp_path / "none", "user/tiny"],
        ],
        token="writing",
    )
    assert pushed["code"] == 0, pushed["err"]
    commit = json.loads(pushed["out"])["commit"]
    assert commit.startswith(f"{hub.url}/user/tiny/commit/")
    assert hub.repos["user/tiny"].private
    assert (to_branch["code"], to_branch["out"].strip()[-40:]) == (0, hub.repos["user/tiny"].branches["timm-names"])
    assert (named["code"], named["err"].count("\n")) == (1, 1)
    there = hub.files("user/tiny")
    assert there["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"config.json", "reference.json", "README.md"} <= there.keys()
    assert b"license: mit" in there["README.md"]

    verified, predicted, unknown = on_hub(
        hub,
        tmp_path / "other",
        [
            ["verify", "hf-hub:user/tiny", f"hf-hub:user/tiny@{commit[-40:]}", "--json"],
            ["predict", "hf-hub:user/tiny@timm-names", CAT, "--json"],
            ["predict", "hf-hub:user/tiny2", CAT, "--json"],
        ],
        token="reading",
    )
    assert verified["code"] == 0, verified["err"]
    for answer in json.loads(verified["out"]):
        assert [check["passed"] for check in answer["checks"]] == [True, True, True]
        assert commit[-40:] in answer["checks"][0]["detail"]
    (one,) = json.loads(predicted["out"])["images"]
    assert one["classes"][0]["index"] == int(expected(folder, Image.open(CAT)).argmax())
    assert (unknown["code"], json.loads(unknown["out"])["error"]["kind"]) == (1, "HubError")

    (link,) = (tmp_path / "other").glob(f"hub/models--*/snapshots/{commit[-40:]}/model.safetensors")
    blob = link.resolve()
    stat, data = blob.stat(), bytearray(blob.read_bytes())
    data[-3] ^= 0x40
    blob.write_bytes(data)
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as on a failing disk: size and time are the same
    (damaged,) = on_hub(hub, tmp_path / "other", [["verify", "hf-hub:user/tiny", "--json"]], token="reading")
    (answer,) = json.loads(damaged["out"])
    assert (damaged["code"], answer["passed"]) == (1, False)
    assert "sha256" in answer["checks"][0]["detail"]


# generate


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved language model on bytes, with its tokenizer."""
    from patchlib.text.tokenizer import ByteTokenizer

    folder = tmp_path_factory.mktemp("models") / "writer"
    config = GPTConfig(vocab_size=256, context=64, dim=16, depth=1, heads=2)
    patchlib.register_model("writer_of_tests", GPT, config)
    torch.manual_seed(2)
    patchlib.save_pretrained(GPT(config), folder)
    ByteTokenizer().save(folder)
    return folder


def test_generate(run: Any, ask: Any, writer: Path) -> None:
    from patchlib.generation import generate
    from patchlib.text.tokenizer import load_tokenizer

    options = ["--max-new-tokens", 20, "--top-k", 5, "--seed", 7]
    answer = ask("generate", writer, "--prompt", "O Romeo", *options)
    tokenizer = load_tokenizer(writer)
    model = patchlib.create_model(f"local-dir:{writer}")
    whole = generate(model, tokenizer.encode("O Romeo"), 20, top_k=5, seed=7)
    text = tokenizer.decode(whole[len(b"O Romeo") :])
    assert answer == {"model": str(writer), "prompt": "O Romeo", "text": text}
    code, out, err = run("generate", writer, "--prompt", "O Romeo", *options)
    assert (code, err) == (0, "")
    assert out.startswith("O Romeo")
    assert ask("generate", writer, "--prompt", "O Romeo", *options[:-1], 8) != answer


def test_generate_from_stdin(ask: Any, run: Any, writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--temperature", 0, "--max-new-tokens", 3]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où ".encode())))
    assert ask("generate", writer, "--prompt", "-", *options) == ask("generate", writer, "--prompt", "Où ", *options)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"O\xff")))
    code, out, err = run("generate", writer, "--prompt", "-", *options)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "surrogate" in err


def test_generate_after_convert(ask: Any, writer: Path, tmp_path: Path) -> None:
    assert ask("convert", writer, tmp_path / "copy")["passed"]
    line = ["--prompt", "O Romeo", "--temperature", 0, "--max-new-tokens", 5]
    assert ask("generate", tmp_path / "copy", *line)["text"] == ask("generate", writer, *line)["text"]


def test_generate_with_wrong_options(run: Any, writer: Path, tmp_path: Path) -> None:
    for options, said in {
        ("--prompt", ""): "prompt",
        ("--prompt", "a", "--temperature", "-1"): "temperature",
        ("--prompt", "a", "--top-p", "2"): "top_p",
        ("--prompt", "a", "--tokenizer", tmp_path): "tokenizer.json",
        ("--prompt", "a", "--seed", "99999999999999999999999"): "seed",
        ("--prompt", "a", "--temperature", "1e-40"): "temperature",
        ("--prompt", "a", "--repetition-penalty", "1e-45"): "repetition_penalty",
    }.items():
        code, out, err = run("generate", writer, *options)
        assert (code, out, err.count("\n")) == (1, "", 1), options
        assert said in err


def test_generate_with_a_padded_vocabulary(ask: Any, run: Any, tmp_path: Path) -> None:
    from patchlib.text.tokenizer import ByteTokenizer

    model = GPT(GPTConfig(vocab_size=300, context=64, dim=16, depth=1, heads=2))
    patchlib.save_pretrained(model, tmp_path / "padded")
    ByteTokenizer().save(tmp_path / "padded")
    drawn = patchlib.generate(model, b"O", 200, seed=0)
    assert max(drawn) > 255
    options = ["--prompt", "O", "--max-new-tokens", 200, "--seed", 0]
    answer = ask("generate", tmp_path / "padded", *options)
    drawn = patchlib.generate(model, b"O", 200, seed=0, suppress=range(256, 300))
    assert answer["text"] == ByteTokenizer().decode(drawn[1:])

    model = GPT(GPTConfig(vocab_size=200, context=64, dim=16, depth=1, heads=2))
    patchlib.save_pretrained(model, tmp_path / "small")
    ByteTokenizer().save(tmp_path / "small")
    code, out, err = run("generate", tmp_path / "small", *options)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "has 200 tokens, and the tokenizer 256; give the one" in err


def test_predict_is_not_for_text(run: Any, writer: Path) -> None:
    code, _, err = run("predict", writer, CAT)
    assert code == 1
    assert "GPT" in err
    assert "found GPT without classes of images" in run("predict", "gpt2", CAT)[2], "said before weights are asked for"
