"""The wheel and the sdist are built, the wheel is installed into an environment of its own, and works there."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"patchlib"}
    for needed in ("patchlib/py.typed", "patchlib/__init__.pyi", "patchlib/models/index.json"):
        assert needed in names
    for needed in (
        "patchlib/weights/catalog.json",
        "patchlib/weights/bundled/convmixer_16.cats_dogs/model.safetensors",
    ):
        assert needed in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_the_sdist_builds_the_same_wheel(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    (wheel,) = built.glob("*.whl")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("patchlib/")}
    assert packaged <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names


def test_the_installed_wheel_classifies_offline(built, tmp_path):
    """In a new environment that has the wheel and, from here, only what the wheel depends on."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import patchlib, skimage.data, torch\n"
        f"assert patchlib.__file__.startswith({str(tmp_path)!r}), patchlib.__file__\n"
        "model = patchlib.create_model('convmixer_16', pretrained=True)\n"
        "image = patchlib.preprocess(model)(skimage.data.chelsea())\n"
        "print(model.info['labels'][int(model(image).argmax())])\n"
    )
    # HOME is empty and the Hub unreachable, so whatever loads lies in the wheel
    environment = {"HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "PATH": ""}
    result = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "cat"
    command = [tmp_path / "env" / "bin" / "patchlib", "info", "convmixer_16"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert "1,622,530" in answer.stdout, answer.stderr
