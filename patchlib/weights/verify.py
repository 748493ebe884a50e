"""Whether weights are still what they were: their hash, finite values, and the model's output for one fixed input.

Beside weights may lie a `reference.json`: the output for `reference_input`, as the library that the weights come from
computed it, or the run that trained them; and the sha256 of the weights. `write_reference` makes it.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..models.base import LanguageModel, Model
from . import files
from .catalog import SOURCES, find_weights
from .hub import HubRepo, sha256_of

REFERENCE = "reference.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# How far an output may be from the reference, as a part of the reference's largest value, by the dtype of the weights.
# In float32 it is what models are held to against their source libraries. Of the others it is a few times what
# rounding the weights changes (ConvMixers, ViTs and DeiTs of all sizes: up to 1.5e-3 in float16, 6e-3 in bfloat16).
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: ``"hash"``, ``"finite"`` or ``"reference"``.
        passed: None where there is nothing to compare with.
        detail: what was compared, in a sentence.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Reference:
    """The content of a `reference.json`.

    Attributes:
        output: ``(classes,)``, or ``(vocab_size,)`` of a language model, in float32.
        made_by: the library, with its version, or the run that computed it.
        input_shape: of the `reference_input` that it belongs to.
        sha256: of weight files, by name.
    """

    output: Tensor
    made_by: str
    input_shape: tuple[int, ...]
    sha256: dict[str, str] = field(default_factory=dict)


def reference_input(model: Model) -> Tensor:
    """The input whose output is compared: from integers, not random numbers, so that any library makes the same bits.

    With ``i`` counting the elements in row-major order from 0: images are ``(i * i % 1009) / 504 - 1`` rounded to
    float32, of the shape ``(1, in_chans, height, width)`` that the config says; token ids are
    ``i * i % vocab_size``, as many as the model can read, ``(1, context)``.
    """
    if isinstance(model, LanguageModel):
        i = torch.arange(model.context)
        return (i * i % model.config.vocab_size)[None]
    side = model.config.img_size
    shape = (1, model.config.in_chans, *((side, side) if isinstance(side, int) else side))
    i = torch.arange(math.prod(shape))
    return ((i * i % 1009).double() / 504 - 1).float().reshape(shape)


def reference_output(model: Model) -> Tensor:
    """What a model makes of `reference_input`: logits ``(classes,)``, or of the next token ``(vocab_size,)``.

    Computed by a copy of the model in float32, on the CPU, in evaluation mode.
    """
    model = copy.deepcopy(model).float().cpu().eval()
    inputs = reference_input(model)
    with torch.no_grad():
        output = model.next_logits(inputs) if isinstance(model, LanguageModel) else model(inputs)
    return output[0]


def write_reference(
    model: Model, folder: str | Path, *, output: Tensor | None = None, made_by: str | None = None
) -> Path:
    """Writes `reference.json` into a folder that `save_pretrained` wrote.

    Args:
        model: the one that was saved, best in the precision that it had before.
        folder: where its weights lie; their sha256 is noted with the output.
        output: what the weights' own library computes for `reference_input`, ``(classes,)`` or ``(1, classes)``; left
            out, it is `reference_output` of this model.
        made_by: what computed it, for instance ``"timm 1.0.31"``; left out, this patchlib.

    Returns:
        the file's path.

    Raises:
        WeightsError: the output is not finite, or is none of this model's.
    """
    from patchlib import __version__

    own = reference_output(model) if output is None else None
    values = (own if output is None else output.detach().float().cpu()).flatten()  # type: ignore[union-attr]
    if not bool(values.isfinite().all()):
        raise WeightsError(f"{type(model).__name__}: its reference output has NaN or infinity; the weights are damaged")
    folder = Path(folder)
    weights = folder / WEIGHTS
    content = {
        "made_by": made_by or f"patchlib {__version__}",
        "input_shape": list(reference_input(model).shape),
        "sha256": {WEIGHTS: sha256_of(weights)} if weights.is_file() else {},
        "output": [float(f"{value:.9g}") for value in values.tolist()],  # nine digits give a float32 back exactly
    }
    files.write_text(folder / REFERENCE, json.dumps(content, allow_nan=False) + "\n")
    return folder / REFERENCE


def read_reference(path: Path) -> Reference:
    """Reads a `reference.json`.

    Raises:
        WeightsError: it is damaged or something else.
    """
    content = files.read_json(path)
    sha256 = content.get("sha256", {})
    fields = {
        "made_by": isinstance(content.get("made_by"), str),
        "input_shape": _is_list(content.get("input_shape"), int),
        "output": _is_list(content.get("output"), int, float),
        "sha256": isinstance(sha256, Mapping) and all(isinstance(value, str) for value in sha256.values()),
    }
    if wrong := [name for name, right in fields.items() if not right]:
        raise WeightsError(f"{path}: field {wrong[0]!r} is missing or foreign; fetch it again, or write_reference anew")
    output = torch.tensor(content["output"], dtype=torch.float32)
    return Reference(output, content["made_by"], tuple(content["input_shape"]), dict(sha256))


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and value != [] and all(type(v) in kinds for v in value)


def locate(name: str) -> tuple[str, str | None]:
    """Where the files of ``name.tag``, ``hf-hub:…`` or ``local-dir:…`` are: a source of the last two kinds, and the
    sha256 that the catalogue knows its weights by.

    Raises:
        UnknownNameError: no weights have the name.
    """
    if name.startswith(SOURCES):
        return name, None
    architecture, _, tag = name.partition(".")
    entry = find_weights(architecture, tag or None)
    return entry.source if entry.bundled_folder is None else f"local-dir:{entry.bundled_folder}", entry.sha256


def find_reference(name: str) -> Reference | None:
    """The reference that some weights carry, None if they carry none.

    Args:
        name: ``name.tag``, ``hf-hub:user/name[@revision]`` or ``local-dir:folder``.

    Raises:
        UnknownNameError, HubError: there are no such weights.
        WeightsError: the file is damaged.
    """
    path = find_file(name, REFERENCE)
    return None if path is None else read_reference(path)


def find_file(name: str, file: str) -> Path | None:
    """The path of a file that lies beside some weights, None if there is none.

    Args:
        name: as in `find_reference`.
        file: its name.

    Raises:
        UnknownNameError, HubError: there are no such weights.
    """
    return _find(_place(locate(name)[0]), file)


def check_hash(name: str) -> Check:
    """Hashes the weight files again, and compares: with what the Hub calls them, with the catalogue, and in a folder
    with its `reference.json`.

    Args:
        name: as in `find_reference`.

    Raises:
        UnknownNameError, HubError: there are no such weights.
    """
    source, known = locate(name)
    place = _place(source)
    try:
        hashes = _hashes(place, known)
        if isinstance(place, HubRepo):
            where, noted = f"on the Hub at {place.commit}", hashes
        elif known:
            where, noted = "in the catalogue", {WEIGHTS: known}
        else:
            reference = find_reference(source)
            where, noted = f"in {REFERENCE}", reference.sha256 if reference else {}
    except WeightsError as error:
        return Check("hash", False, str(error))
    if differing := [file for file, sha256 in hashes.items() if noted.get(file, sha256) != sha256]:
        file = differing[0]
        return Check("hash", False, f"{file} has sha256 {hashes[file]}, but {noted[file]} {where}")
    found = ", ".join(f"{file} has sha256 {sha256}" for file, sha256 in hashes.items())
    if not noted:
        return Check("hash", None, f"{found}; no other is on record to compare with")
    return Check("hash", True, f"{found}, as {where}")


def check_finite(model: Model) -> Check:
    """Looks for NaN and infinity in parameters and buffers."""
    state = model.state_dict()
    bad = [name for name, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        return Check("finite", False, f"NaN or infinity in {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}")
    return Check("finite", True, f"all {sum(t.numel() for t in state.values()):,} values in {len(state)} tensors")


def check_reference(model: Model, reference: Reference | None) -> Check:
    """Computes the reference output again, and compares.

    Args:
        model: with weights in the dtype that they have on disk (``dtype="file"``), which sets the tolerance.
        reference: as `find_reference` gives it.
    """
    if reference is None:
        return Check("reference", None, f"the weights carry no reference output ({REFERENCE})")
    shape = tuple(reference_input(model).shape)
    if shape != reference.input_shape:
        return Check("reference", False, f"made for an input of {reference.input_shape}; this model takes {shape}")
    output, expected = reference_output(model), reference.output
    if output.shape != expected.shape:
        return Check("reference", False, f"has {len(expected)} numbers; this model gives {len(output)}")
    tolerance = max(TOLERANCES.get(t.dtype, 0.0) for t in model.state_dict().values())
    largest = float(expected.abs().max())
    difference = float((output - expected).abs().max()) / largest if largest else float(output.abs().max())
    detail = (
        f"differs by {difference:.1e} of the largest value from the output of {reference.made_by} "
        f"(allowed: {tolerance:.0e})"
    )
    return Check("reference", difference <= tolerance, detail)


def _place(source: str) -> HubRepo | Path:
    if source.startswith("hf-hub:"):
        return HubRepo.parse(source.removeprefix("hf-hub:"))
    return Path(source.removeprefix("local-dir:")).expanduser()


def _hashes(place: HubRepo | Path, known: str | None) -> dict[str, str]:
    """The sha256 of each weight file by its name; on the Hub's files compared at once."""
    hashes: dict[str, str] = {}

    def note(file: str) -> Path:
        if isinstance(place, HubRepo):
            hashes[file] = place.verify(file, known)
            return place.file(file)
        if not (place / file).is_file():
            raise WeightsError(f"{place}: has no {file}; give a folder that holds a model")
        hashes[file] = sha256_of(place / file)
        return place / file

    index = None if _find(place, WEIGHTS, known) else _find(place, INDEX)
    if index is None:
        note(WEIGHTS)
    else:
        files.read_shards(index, note)
    return hashes


def _find(place: HubRepo | Path, file: str, sha256: str | None = None) -> Path | None:
    if isinstance(place, HubRepo):
        return place.file(file, sha256, optional=True)
    return place / file if (place / file).is_file() else None
