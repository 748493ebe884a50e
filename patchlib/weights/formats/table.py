"""Key tables: which of our parameters is which of another library's, with both directions in one place.

A table is a tuple of rules, tried in order. A rule's left side is a pattern over our names: ``{i}`` stands for one
dot-free piece of the name, and the right side repeats it. Where the tensors differ in form, an `Op` says how.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Op(NamedTuple):
    """How tensors change form between the libraries; the two functions are each other's inverse."""

    to_ours: Callable[[Sequence[Tensor]], Tensor]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]


SAME = Op(lambda theirs: theirs[0], lambda ours: (ours,))
TRANSPOSE = Op(lambda theirs: theirs[0].T, lambda ours: (ours.T,))
MATRIX = Op(lambda theirs: theirs[0].flatten(1), lambda ours: (ours,))  # there it may be a 1x1 convolution
CONV_1X1 = Op(lambda theirs: theirs[0].flatten(1), lambda ours: (ours[:, :, None, None],))
VECTOR = Op(lambda theirs: theirs[0].flatten(), lambda ours: (ours[None, None, None],))
CONCAT_3 = Op(lambda theirs: torch.cat(tuple(theirs)), lambda ours: ours.chunk(3))


class Rule(NamedTuple):
    """Our name, their name or names, and what happens on the way."""

    ours: str
    theirs: str | tuple[str, ...]
    op: Op = SAME


class Table(NamedTuple):
    """The rules of one model family in one library, and what that library saves beside.

    Attributes:
        rules: tried in order; the first whose pattern fits counts.
        ignored: a regular expression for names in a file that hold nothing this model uses.
        initial: our names that files of pretraining without classes do not have, and the value that each then has.
    """

    rules: tuple[Rule, ...]
    ignored: str = r"(?!)"
    initial: Mapping[str, float] = MappingProxyType({})

    def names(self, ours: str) -> tuple[tuple[str, ...], Op]:
        """Their names for one of our names, and the op. A name that no rule knows stays as it is."""
        for rule in self.rules:
            if match := _pattern(rule.ours).fullmatch(ours):
                theirs = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
                return tuple(name.format(**match.groupdict()) for name in theirs), rule.op
        return (ours,), SAME

    def to_ours(
        self, tensors: Mapping[str, Tensor], wanted: Iterable[str]
    ) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Their tensors under our names.

        Returns:
            the tensors; which of the `wanted` names are missing (with theirs); which names in the file are not used.
        """
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        used: set[str] = set()
        for ours in wanted:
            names, op = self.names(ours)
            used.update(names)
            if absent := [name for name in names if name not in tensors]:
                missing.append(ours if absent == [ours] else f"{ours} (there: {', '.join(absent)})")
                continue
            theirs = [tensors[name] for name in names]
            try:
                found[ours] = op.to_ours(theirs)
            except (RuntimeError, IndexError):  # their shapes do not go together
                shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(names, theirs, strict=True))
                missing.append(f"{ours} (there: {shapes})")
        unexpected = [name for name in tensors if name not in used and not re.fullmatch(self.ignored, name)]
        return found, missing, unexpected

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names."""
        answer: dict[str, Tensor] = {}
        for ours, tensor in tensors.items():
            names, op = self.names(ours)
            answer.update(zip(names, op.to_theirs(tensor), strict=True))
        return answer


@cache
def _pattern(ours: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", ours)
    return re.compile("".join(f"(?P<{p[1:-1]}>[^.]+)" if p.startswith("{") else re.escape(p) for p in pieces))


IDENTITY = Table(())
# ConvNeXt V2's masked pretraining (FCMAE) has no final norm; timm starts it so too
FRESH_NORM = {"head.norm.weight": 1.0, "head.norm.bias": 0.0}
