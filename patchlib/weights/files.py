"""Reading and writing of checkpoint files. Nothing here runs code from a file, or believes its sizes."""

import contextlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import MAX_NUMBER
from ..errors import WeightsError

MAX_JSON = 4 * 2**20  # bytes; a config.json with 22,000 class names, each twice, has less than two
MAX_NESTING = 32  # levels of a config.json
MAX_BRACKETS = 50_000  # lists and objects in one; each costs a hundred times its text
MAX_TEXT = 10_000  # characters of one of its texts
MAX_HEADER = 2 * 2**20  # bytes; of 20,000 tensors


def read_tensors(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name. Those of a safetensors file are mapped, not copied.

    Args:
        path: a ``.safetensors`` file, or a ``torch.save`` file.
        allow_pickle: read the latter, with ``weights_only=True``, so that no code in it runs.

    Raises:
        WeightsError: the file is missing, truncated, foreign, or a pickle that was not allowed.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; check its name")
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
    except Exception as error:  # the library's own kind, and whatever torch says to a dtype or shape it has not
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); fetch or save it again") from error


def _check_header(path: Path) -> None:
    """Says in plain words what is wrong with a file that is none, before the library tries."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if len(start) < 9:
        raise WeightsError(f"{path}: found {size} bytes; a safetensors file has more; fetch or save it again")
    (header,) = struct.unpack("<Q", start[:8])
    if start[8:9] != b"{":
        kind = "a pickle or zip archive" if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") else "some other format"
        raise WeightsError(
            f"{path}: not a safetensors file, but {kind}; convert it to safetensors, "
            "or give a pickle its own suffix (.pt, .bin) and pass allow_pickle=True"
        )
    if header > min(MAX_HEADER, size - 8):
        raise WeightsError(
            f"{path}: its header claims {header} bytes of a file of {size}; allowed: at most {MAX_HEADER}, "
            "and no more than there are; it is truncated or damaged; fetch it again"
        )


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle makes torch raise has no nearer common base
        # torch's own text would advise to run the code in the file
        found = re.search(r"GLOBAL (\S+)", str(error))
        said = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        reason = f"it holds {found[1]!r:.100}, which is no tensor" if found else f"{said:.200}"
        raise WeightsError(
            f"{path}: not readable with weights_only=True ({reason}); save model.state_dict() instead"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):  # where training code puts the weights
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(map(_is_plain, loaded.values())):
        raise WeightsError(f"{path}: holds no plain dict of tensors; save model.state_dict() instead")
    return {str(name): tensor for name, tensor in loaded.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with numbers in memory: not on the meta device, sparse or quantised."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu and not value.is_quantized


def read_shards(index: Path, get: Callable[[str], Path | None]) -> dict[str, Tensor]:
    """The tensors of a checkpoint in several files, which a ``model.safetensors.index.json`` lists.

    Args:
        index: it says the file of each tensor.
        get: from the name of a file beside it to its path.

    Raises:
        WeightsError: the index names another folder, or a file does not hold what the index says.
    """
    shards: dict[str, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightsError(f"{index}: field 'weight_map' must say the file of each tensor; fetch or save it again")
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    for shard in shards:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
            raise WeightsError(f"{index}: weight_map names {shard!r}; allowed: a .safetensors file in the same folder")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(shards):
        path = get(shard)
        assert path is not None
        held = read_tensors(path)
        if differing := sorted(held.keys() ^ shards[shard]):
            shown = ", ".join(name[:80] for name in differing[:8])
            raise WeightsError(f"{index}: it and {shard} differ in what the file holds ({shown}); fetch both again")
        tensors |= held
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of reasonable size, without duplicate keys, NaN, infinity, or absurd numbers.

    Raises:
        WeightsError: it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = Counter(key for key, _ in pairs)
            raise ValueError(f"key {keys.most_common(1)[0][0][:80]!r} stands twice")
        return content

    def refuse(constant: str) -> Any:
        raise ValueError(f"found {constant}; allowed: finite numbers")

    try:
        if path.stat().st_size > MAX_JSON:
            raise WeightsError(f"{path}: found {path.stat().st_size} bytes; allowed: at most {MAX_JSON}; not a config")
        text = path.read_text(encoding="utf-8")
        if (brackets := text.count("[") + text.count("{")) > MAX_BRACKETS:
            raise ValueError(
                f"found {brackets} lists and objects; allowed: at most {MAX_BRACKETS}, and {MAX_NESTING} levels"
            )
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        check_plain(content)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except RecursionError as error:
        raise WeightsError(f"{path}: nested deeper than {MAX_NESTING} levels; not a config") from error
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: found {type(content).__name__}; allowed: a JSON object")
    return content


def check_plain(content: Any) -> None:
    """Refuses what a config.json does not hold: deep nests, absurd numbers, endless texts, things that are not data.

    Raises:
        ValueError: the first of them, and what is allowed.
    """
    level: list[Any] = [content]
    for _ in range(MAX_NESTING):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
                if not all(isinstance(key, str) for key in value):
                    raise ValueError(f"found keys {list(value)[:3]}; allowed: text")
            elif isinstance(value, (list, tuple)):
                inner += value
            elif isinstance(value, str):
                if len(value) > MAX_TEXT:
                    raise ValueError(f"found a text of {len(value)} characters; allowed: at most {MAX_TEXT}")
            elif isinstance(value, (int, float)):
                if not -MAX_NUMBER <= value <= MAX_NUMBER:
                    raise ValueError(f"found {str(value)[:20]}; allowed: finite numbers up to 2**53")
            elif value is not None:
                raise ValueError(f"found {type(value).__name__}; allowed: numbers, text, lists and objects of them")
        level = inner
    if level:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, see `write_files`."""
    write_files({path: tensors})


def write_text(path: Path, text: str) -> None:
    """Writes a text file, see `write_files`."""
    write_files({path: text})


def write_files(contents: Mapping[Path, str | Mapping[str, Tensor]]) -> None:
    """Writes texts and safetensors files. All are written beside the old ones before the first is renamed, so that a
    full disk, say, leaves everything as it was, and no reader sees half of a file.

    Raises:
        WeightsError: a file cannot be written.
    """
    try:
        with contextlib.ExitStack() as stack:
            for path, content in contents.items():
                temporary = stack.enter_context(_beside(path))
                if isinstance(content, str):
                    temporary.write_text(content, encoding="utf-8")
                else:
                    stored = {name: t.detach().cpu().contiguous() for name, t in content.items()}
                    save_file(stored, temporary, {"format": "pt"})
    except (OSError, ValueError, SafetensorError) as error:
        names = ", ".join(map(str, contents))
        raise WeightsError(f"{names}: cannot be written ({error}); what was there is unchanged") from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` if all goes well and removed if not."""
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
