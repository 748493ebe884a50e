"""The documentation is true: its snippets run, its commands work, it builds without warnings, and lists every name."""

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

import patchlib
from patchlib import registry

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
    skimage = importlib.util.find_spec("skimage")
    if skimage is not None and skimage.origin is not None:
        shutil.copy(Path(skimage.origin).parent / "data" / "chelsea.png", tmp_path / "cat.png")
    return tmp_path


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


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "console")], ids=name)
def test_patchlib_commands_exit_with_0(page, folder, monkeypatch):
    for snippet in snippets(page, "console"):
        commands = [line.removeprefix("$ ") for line in snippet.code.splitlines() if line.startswith("$ patchlib ")]
        for command in commands if not snippet.needs else ():
            from patchlib.cli import main

            monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                try:
                    code = main()
                except SystemExit as exit:
                    code = exit.code
            assert code in (0, None), f"{name(page)}, line {snippet.line}: {command}"
            if snippet.output is not None:
                assert printed.getvalue().strip() == snippet.output.strip(), f"{name(page)}, line {snippet.line}"


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
    from importlib.machinery import SourceFileLoader

    pytest.importorskip("skimage")
    figures = SourceFileLoader("make_figures", str(DOCS / "make_figures.py")).load_module().FIGURES
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(figures)
    used = {Path(image).stem for page in PAGES for image in re.findall(r"images/[\w.]+", page.read_text())}
    assert used == set(figures)
