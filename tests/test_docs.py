"""The documentation is true: its snippets run, its commands work, it builds without warnings, and lists every name."""

import contextlib
import io
import re
import shlex
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import skimage.data
import torch
from PIL import Image

import patchlib
from patchlib import registry
from patchlib.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]

FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]+) -->\n\n?)?"
    r"^```(?P<language>python|console)\n(?P<code>.*?)^```\n"
    r"(?:\n?^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


class Snippet(NamedTuple):
    """A fenced block; `needs` is what the page says it needs beyond the package, `output` the block right below."""

    language: str
    code: str
    output: str | None
    needs: str | None
    line: int


def snippets(page, language):
    text = page.read_text()
    found = [
        Snippet(
            m["language"], m["code"], m["output"], m["needs"], text[: m.start("code")].count("\n")
        )
        for m in FENCE.finditer(text)
    ]  # fmt: skip
    return [snippet for snippet in found if snippet.language == language]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a photograph in it, without network, and without names that others registered."""

    def refuse(*_):
        raise OSError("the documentation's tests have no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(registry, "_user_blocks", {})
    monkeypatch.setattr(registry, "_user_models", {})
    cat = Image.fromarray(skimage.data.chelsea())
    for file in ("cat.png", "cat.jpg"):
        cat.save(tmp_path / file)
    return tmp_path


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=name)
def test_python_snippets_run_and_print_what_the_page_says(page, folder):
    namespace = {"__name__": "__main__"}
    for snippet in snippets(page, "python"):
        code = compile("\n" * snippet.line + snippet.code, str(page), "exec")
        if snippet.needs:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if snippet.output is not None:
            assert printed.getvalue().strip() == snippet.output.strip(), f"{name(page)}, line {snippet.line}"


def commands(snippet):
    """The `patchlib` commands of a console block; without prompts, each line is a command."""
    lines = snippet.code.splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")] or lines
    return [line for line in typed if line.startswith("patchlib ")]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "console")], ids=name)
def test_patchlib_commands_exit_with_0_and_print_what_the_page_says(page, folder):
    for snippet in snippets(page, "console"):
        printed = io.StringIO()
        for command in commands(snippet) if not snippet.needs else ():
            with contextlib.redirect_stdout(printed):
                assert main(shlex.split(command)[1:]) == 0, f"{name(page)}, line {snippet.line}: {command}"
        if snippet.output is not None and not snippet.needs:
            assert printed.getvalue().strip() == snippet.output.strip(), f"{name(page)}, line {snippet.line}"


def test_the_page_of_the_command_line_has_every_command():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["--help"])
    offered = re.findall(r"^    (\w+) ", printed.getvalue(), re.MULTILINE)
    shown = re.findall(r"```{command-help} (\w+)", (DOCS / "command_line.md").read_text())
    assert offered == shown != []


def test_every_block_of_code_is_one_that_these_tests_read():
    """A fence in another spelling would silently not run."""
    for page in PAGES:
        fences = re.findall(r"^ *(?:```|~~~|:::)(.*)$", page.read_text(), re.MULTILINE)
        for opening in fences[::2]:
            assert re.fullmatch(r"python|console|text|\{[\w-]+\}.*", opening), f"{name(page)}: ```{opening}"
        assert len(snippets(page, "python")) == fences.count("python")
        assert len(snippets(page, "console")) == fences.count("console")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", out / "doctrees"]
    result = subprocess.run([*command, DOCS, out / "html"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out / "html"


def test_the_documentation_builds_without_warnings(built):
    assert (built / "index.html").is_file()


def test_the_reference_has_every_public_name(built):
    listing = zlib.decompress((built / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split(" ", 1)[0] for line in listing.splitlines()}
    missing = {public for public in patchlib.__all__ if f"patchlib.{public}" not in documented} - {"__version__"}
    assert not missing, "name the module they live in on a page of docs/reference"


def test_every_picture_is_drawn_by_the_script():
    script = (DOCS / "make_figures.py").read_text()
    (listed,) = re.findall(r"^FIGURES = \[(.*?)\]", script, re.MULTILINE | re.DOTALL)
    figures = re.findall(r"\w+", listed)
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(figures)
    used = {Path(image).stem for page in PAGES for image in re.findall(r"images/[\w.]+", page.read_text())}
    assert used == set(figures)
