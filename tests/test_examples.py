"""`examples/finetune.py`, run as a user runs it, on a folder of red and of blue pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import patchlib

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune.py"
OPTIONS = ["--model", "convmixer_256_8", "--validation", "0.25", "--mix", "0.4", "--light", "0.1", "--average", "0.5"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / name).mkdir(parents=True)
        (folder / name / ".DS_Store").write_bytes(b"no image")
        for i in range(12):
            Image.new("RGB", (40 + i, 50), tuple(c + 2 * i for c in colour)).save(folder / name / f"{i}.png")
    return folder


def finetune(*arguments):
    command = [sys.executable, str(SCRIPT), *OPTIONS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_learns_saves_and_tells_what_it_did(photos, tmp_path):
    done = finetune("--data", photos, "--out", tmp_path / "out", "--epochs", 7, "--batch", 6)
    assert done.returncode == 0, done.stderr
    assert "18 images to train, 6 kept back, 2 classes" in done.stdout
    model = patchlib.create_model(f"local-dir:{tmp_path / 'out'}")
    assert model.info["labels"] == ["blue", "red"]
    assert "--epochs 7" in model.info["command"]
    classes = model(
        patchlib.preprocess(model)([Image.open(photos / name / "5.png") for name in ("blue", "red")])
    ).argmax(1)
    assert classes.tolist() == [0, 1]
    assert model.info["validation_accuracy"] == 1.0


def test_fewer_images_than_a_batch(photos, tmp_path):
    done = finetune("--data", photos, "--out", tmp_path / "out", "--epochs", 1, "--batch", 64)
    assert done.returncode == 0, done.stderr
    assert patchlib.create_model(f"local-dir:{tmp_path / 'out'}").config.num_classes == 2


def test_one_class_and_a_broken_image_are_named(photos, tmp_path):
    done = finetune("--data", photos / "red", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "found images in 0 sub-folders" in done.stderr
    (photos / "red" / "broken.jpg").write_bytes(b"no image")
    done = finetune("--data", photos, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "broken.jpg: no image that can be read" in done.stderr
    assert not (tmp_path / "out").exists()
