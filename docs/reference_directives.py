"""What the reference pages are made with: public names by where they live, config fields, the command's help."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from torch import nn

import patchlib
from patchlib.config import BaseConfig

STUB = Path(patchlib.__file__).with_suffix(".pyi")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Shape|Example|Examples|Yields):$")


class Reference(SphinxDirective):
    """Documents what `patchlib` exports from the modules in the argument, for instance ``layers``, and then the objects
    whose dotted names are the content."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(STUB))
        self.env.note_dependency(__file__)
        homes = tuple(self.arguments[0].split()) if self.arguments else ()
        paths = [f"patchlib.{name}" for name in public_names(homes)] + " ".join(self.content).split()
        page = ["```{eval-rst}", *(line for path in paths for line in _entry(path)), "```"]  # pages are Markdown
        node = nodes.Element()
        self.state.nested_parse(StringList(page, source=self.env.docname), self.content_offset, node)
        return node.children


def public_names(homes: tuple[str, ...]) -> list[str]:
    """Public names, in the stub's order, of the modules whose dotted names begin with one of `homes`."""
    listed = re.findall(r"^from \.(\S+) import (\w+) as \2$", STUB.read_text(), re.MULTILINE)
    return [name for home, name in listed if f"{home}.".startswith(tuple(f"{h}." for h in homes))]


def _entry(path: str) -> list[str]:
    """The lines that document one object."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, type):
        return [f".. autofunction:: {path}", ""]
    if not issubclass(found, BaseConfig) or found is BaseConfig:
        signature = "()" if found.__init__ is nn.Module.__init__ else ""  # type: ignore[misc]
        return [f".. autoclass:: {path}{signature}", "   :members:", ""]
    fields = {field.name: field for field in dataclasses.fields(found)}
    own = [m for m, value in vars(found).items() if m not in {*fields, "check"} and not m.startswith("_")]
    lines = [f".. autoclass:: {path}()", *([f"   :members: {', '.join(own)}"] if own else []), ""]
    lines += ["   .. list-table::", "      :header-rows: 1", ""]
    meanings = {k: text for parent in reversed(found.__mro__) for k, text in _attributes(parent).items()}
    rows = [("Field", "Type", "Default", "Meaning")]
    for name, field in fields.items():
        kind = inspect.formatannotation(field.type).replace("typing.", "")
        rows.append((f"``{name}``", f"``{kind}``", f"``{field.metadata['default']!r}``", meanings.get(name, "")))
    for row in rows:
        lines += [f"      {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


def _attributes(described: type) -> dict[str, str]:
    """What the section "Attributes" or "Args" of a class's own docstring says of each name."""
    sections = re.split(r"^(?:Attributes|Args):\n", inspect.cleandoc(described.__doc__ or ""), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", "".join(sections[1:]), re.MULTILINE):
        found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found


class CommandHelp(SphinxDirective):
    """What the command ``patchlib`` prints for ``--help``, of itself or of the subcommand that is the argument."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = command_help(*self.arguments)
        return [nodes.literal_block(text, text, language="text")]


def command_help(*arguments: str) -> str:
    """The help of ``patchlib [subcommand]``, 88 columns wide."""
    from patchlib.cli import main

    printed = io.StringIO()
    terminal = {"COLUMNS": "88", "NO_COLOR": "1"}
    with (
        mock.patch.dict(os.environ, terminal),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*arguments, "--help"])
    return printed.getvalue().rstrip()


def prepare(app: Sphinx, what: str, name: str, described: Any, options: object, lines: list[str]) -> None:
    """Docstrings in our style to what napoleon takes: a block indented after an empty line is code; names that share
    a description get it each; of configs, the table of fields has the descriptions."""
    prepared: list[str] = []
    section, in_code = "", False
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith(" "):
            in_code = False
            section = line if SECTION.match(line) else ""
        elif line and not before and not section and not in_code:
            prepared += [".. code-block:: python", ""]
            in_code = True
        if section in ("Attributes:", "Args:") and isinstance(described, type) and issubclass(described, BaseConfig):
            continue
        if section == "Attributes:" and (shared := re.match(r"    (\w+(?:, \w+)+): (.*)", line)):
            prepared += [f"    {name}: {shared[2]}" for name in shared[1].split(", ")]
            continue
        prepared.append(line)
    lines[:] = prepared


def restore(app: Sphinx, what: str, name: str, described: Any, options: object, lines: list[str]) -> None:
    """A property's docstring as it was: napoleon takes what stands before the first colon for a type."""
    if what == "property":
        lines[:] = [*inspect.cleandoc(described.__doc__ or "").splitlines(), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("reference", Reference)
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", prepare, priority=100)  # napoleon's is 500
    app.connect("autodoc-process-docstring", restore, priority=900)
    return {"parallel_read_safe": True}
