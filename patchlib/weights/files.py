"""Reading and writing of checkpoint files. Nothing here runs code from a file, or believes its sizes."""

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WeightsError

MAX_JSON = 8 * 2**20  # bytes; a config.json with 22,000 class names has less than one
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def read_tensors(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name. Those of a safetensors file are mapped, not copied.

    Args:
        path: a ``.safetensors`` file, or a ``torch.save`` file.
        allow_pickle: read the latter, with ``weights_only=True``, so that no code in it runs.

    Raises:
        WeightsError: the file is missing, truncated, foreign, or a pickle that was not allowed.
    """
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        if not allow_pickle:
            raise WeightsError(
                f"{path}: a pickle, which patchlib reads only when asked: pass allow_pickle=True "
                "(it is then read with weights_only=True), or convert it to safetensors"
            )
        return _read_pickle(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); fetch or save it again") from error


def _check_header(path: Path) -> None:
    """Says in plain words what is wrong with a file that is none, before the library tries."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(start) < 9:
        raise WeightsError(f"{path}: found {size} bytes; a safetensors file has more; fetch or save it again")
    (header,) = struct.unpack("<Q", start[:8])
    if start[8:9] != b"{":
        kind = "a pickle or zip archive" if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") else "some other format"
        raise WeightsError(f"{path}: not a safetensors file, but {kind}; a pickle keeps its own suffix (.pt, .bin)")
    if header > min(MAX_HEADER, size - 8):
        raise WeightsError(
            f"{path}: its header claims {header} bytes of a file of {size}; it is truncated or damaged; fetch it again"
        )


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: not readable with weights_only=True ({reason})") from error
    for key in ("state_dict", "model", "model_state_dict"):  # where training code puts the weights
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise WeightsError(f"{path}: holds no plain dict of tensors; save model.state_dict() instead")
    return {str(name): tensor for name, tensor in loaded.items()}


def shard_names(index: Path) -> list[str]:
    """The files of a checkpoint in several pieces, which a ``model.safetensors.index.json`` lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{index}: field 'weight_map' must say the file of each tensor")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index}: weight_map names {name!r}; allowed: a .safetensors file in the same folder")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of reasonable size, without duplicate keys, NaN or infinity.

    Raises:
        WeightsError: it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if len(keys) > len(set(keys)) and keys.count(key) > 1:
                raise ValueError(f"key {key!r} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"found {constant}; allowed: finite numbers")

    try:
        if path.stat().st_size > MAX_JSON:
            raise WeightsError(f"{path}: found {path.stat().st_size} bytes; allowed: at most {MAX_JSON}")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except RecursionError as error:
        raise WeightsError(f"{path}: nested too deep for a config") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: found {type(content).__name__}; allowed: a JSON object")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file beside `path`, then renames it, so that no reader sees half of it."""
    with _beside(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})


def write_text(path: Path, text: str) -> None:
    """Writes text beside `path`, then renames it."""
    with _beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's; the safetensors library writes files that nobody else can read
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
