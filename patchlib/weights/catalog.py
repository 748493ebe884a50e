"""Which weights there are: `name.tag` to where they lie, in which form, under which licence."""

import difflib
import json
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UnknownNameError, nearest
from ..registry import model_names

SOURCES = ("hf-hub:", "local-dir:")  # how something else begins than a name of the catalogue
BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Weights:
    """One entry of the catalogue.

    Attributes:
        name, tag: ``create_model("name.tag", pretrained=True)``; the first tag of a name is its default.
        source: ``hf-hub:user/name``, or ``bundled`` for what the package brings along.
        format: whose key names the file has.
        license: as its publisher states it.
        overrides: what differs from the registered config, for instance the number of classes.
        info: labels and preprocessing.
        sha256: of the file, where it is known.
    """

    name: str
    tag: str
    source: str
    format: str
    license: str
    overrides: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def full_name(self) -> str:
        return f"{self.name}.{self.tag}"

    @property
    def bundled_folder(self) -> Path | None:
        """Where it lies inside the package, None if it does not."""
        return BUNDLED / self.full_name if self.source == "bundled" else None


def weights_of(name: str) -> list[Weights]:
    """The entries of one architecture, the default first; an empty list if it has none."""
    return [Weights(name, tag, **entry) for tag, entry in _catalog().get(name, {}).items()]


def list_models(pattern: str = "*", *, pretrained: bool = False, family: str | None = None) -> list[str]:
    """Registered names, sorted.

    Args:
        pattern: with ``*`` and ``?``, or a plain piece of the name.
        pretrained: instead the ``name.tag`` of all weights.
        family: only this family, for instance ``"vit"``.

    Raises:
        UnknownNameError: there is no such family.
    """
    wildcard = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = [name for name in model_names(family) if fnmatchcase(name, wildcard) or pretrained]
    if not pretrained:
        return names
    tagged = [entry.full_name for name in names for entry in weights_of(name)]
    return [full for full in tagged if fnmatchcase(full, wildcard) or fnmatchcase(full.partition(".")[0], wildcard)]


def names_with_weights() -> list[str]:
    """The architectures for which there is any entry."""
    return sorted(_catalog())


def find_weights(name: str, tag: str | None) -> Weights:
    """The entry of a name and a tag, the default if no tag is given.

    Raises:
        UnknownNameError: the architecture has no weights, or none of this tag; the nearest that exist are listed.
    """
    entries = {entry.tag: entry for entry in weights_of(name)}
    if not entries:
        near = difflib.get_close_matches(name, names_with_weights(), n=3, cutoff=0)
        raise UnknownNameError(
            f"no weights of {name!r} exist anywhere; the nearest names that have some: {', '.join(map(repr, near))} "
            "(patchlib.list_models(pretrained=True) lists all; pretrained=False gives a random model)"
        )
    if tag is None:
        return next(iter(entries.values()))
    if tag not in entries:
        raise UnknownNameError(f"no weights of {name!r} have the tag {tag!r}{nearest(tag, entries)}")
    return entries[tag]


@cache
def _catalog() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads((Path(__file__).parent / "catalog.json").read_text())
