"""From a checkpoint to a filled model: read, convert, adapt, and assign strictly."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, PatchlibError, WeightsError
from ..models.base import Model
from . import files
from .adapt import adapt
from .formats import original, patchlib, timm, transformers
from .formats.table import IDENTITY, Table
from .hub import HubRepo

log = logging.getLogger("patchlib")

FORMATS: dict[str, ModuleType] = {
    "patchlib": patchlib,
    "timm": timm,
    "transformers": transformers,
    "original": original,
}


@dataclass
class Checkpoint:
    """What was read from a source: tensors under the source's names, and what its config says.

    Attributes:
        source: as the user named it, for messages.
        tensors: by the source's names.
        format: which tables to try; None for all of them.
        model_class, config: None for a bare file.
        info: labels, preprocessing, licence.
    """

    source: str
    tensors: Mapping[str, Tensor]
    format: str | None = None
    model_class: Any = None
    config: Any = None
    info: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Reads ``hf-hub:user/name[@revision]``, ``local-dir:folder`` or the path of a file or folder.

    Raises:
        WeightsError: what is there cannot be read.
        HubError: the Hub does not have it, or does not answer.
    """
    text = str(source)
    if text.startswith("hf-hub:"):
        repo = HubRepo.parse(
            text.removeprefix("hf-hub:"),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        return _read_folder(text, repo.file)
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return _read_folder(text, lambda name, optional=False: _local(path, name, optional))
    if text.startswith("local-dir:"):
        raise WeightsError(f"{text}: there is no folder {path}")
    if not path.exists():
        raise WeightsError(f"{text}: no such file; a source is a file, 'local-dir:folder' or 'hf-hub:user/name'")
    return Checkpoint(text, files.read_tensors(path, allow_pickle=allow_pickle))


def _local(folder: Path, name: str, optional: bool) -> Path | None:
    path = folder / name
    if path.is_file():
        return path
    if optional:
        return None
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise WeightsError(f"{folder}: has no {name} (found: {found})")


def _read_folder(source: str, get: Callable[..., Path | None]) -> Checkpoint:
    path = get("config.json")
    assert path is not None
    content = files.read_json(path)
    name = next((name for name, form in FORMATS.items() if form.recognises(content)), None)
    if name is None:
        raise WeightsError(
            f"{path}: not a config that patchlib knows; it looks for 'format' (patchlib), "
            "'architecture' (timm) or 'model_type' (transformers)"
        )
    try:
        model_class, config, info = FORMATS[name].to_config(content)
    except (WeightsError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from error
    except (PatchlibError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: a field is not what a {name} config has there ({error})") from error
    if name == "transformers" and (extra := get("preprocessor_config.json", optional=True)):
        info["preprocessing"] = transformers.preprocessing(files.read_json(extra))
    info.setdefault("source", source)
    if weights := get("model.safetensors", optional=True):
        return Checkpoint(source, files.read_tensors(weights), name, model_class, config, info)
    if index := get("model.safetensors.index.json", optional=True):
        return Checkpoint(source, _read_shards(index, get), name, model_class, config, info)
    raise WeightsError(
        f"{source}: has no model.safetensors; a pickle beside it is read only when asked, "
        "as a file: create_model(name, checkpoint='….bin', allow_pickle=True)"
    )


def _read_shards(index: Path, get: Callable[..., Path | None]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in files.shard_names(index):
        shard = get(name)
        assert shard is not None
        tensors.update(files.read_tensors(shard))
    return tensors


def fill(
    model: Model,
    checkpoint: Checkpoint,
    *,
    new_head: bool = False,
    dtype: torch.dtype | str | None = None,
    check_finite: bool = False,
) -> None:
    """Puts a checkpoint's weights into a model; all of them, or none.

    Parameters on the meta device are replaced by the checkpoint's tensors, without a copy where dtype and shape
    allow; others are overwritten in place, so that optimisers and other holders keep seeing them.

    Args:
        model: its config may differ from the checkpoint's in image size, patch size, channels, and the form of the
            patches; those weights are adapted.
        new_head: leave the checkpoint's classifier out; one on the meta device is drawn, a real one stays.
        dtype: of floating weights; None for torch's default, ``"file"`` to keep the file's. For parameters that are
            overwritten in place it is theirs that stands.
        check_finite: refuse NaN and infinity.

    Raises:
        WeightsError: a key is missing, unexpected or misshapen; both sides are listed, and the model is unchanged.
    """
    aims = targets(model)
    head = _head_names(model) if new_head else set()
    wanted = [name for name in aims if name not in head]
    tensors, missing, unexpected = _convert(model, checkpoint, wanted)
    if new_head:
        unexpected = [name for name in unexpected if not _is_head(model, checkpoint, name)]
    owners = {name: _owner(model, name) for name in tensors}
    tensors = {n: adapt(n, t, aims[n], owners[n], checkpoint.config) for n, t in tensors.items()}
    misshapen = [
        f"{name} {tuple(t.shape)} for {tuple(aims[name].shape)}"
        for name, t in tensors.items()
        if t.shape != aims[name].shape
    ]
    _refuse(checkpoint, model, missing, unexpected, misshapen)
    if check_finite:
        _refuse_nan(checkpoint, tensors)
    with torch.no_grad():
        tensors = {name: _typed(t, aims[name], dtype) for name, t in tensors.items()}
        _assign(model, tensors)
        if head:
            _draw_head(model, tensors)
            log.warning("%s: new head for %d classes, not from the checkpoint", checkpoint.source, model.num_classes)
    if left := [name for name, t in _all_tensors(model) if t.is_meta]:
        raise WeightsError(
            f"{checkpoint.source}: nothing fills {', '.join(left[:5])}; a block that computes buffers "
            "in its constructor must save them (persistent=True) or compute them in forward"
        )
    model.info = {**checkpoint.info, **model.info}
    if head:
        model.info.pop("labels", None)


def targets(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: parameters, a tied one once, and the buffers that are saved."""
    saved = model.state_dict(keep_vars=True).keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}


def _all_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _head_names(model: Model) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(("head.fc.", "head.fc_dist."))}


def _is_head(model: Model, checkpoint: Checkpoint, name: str) -> bool:
    """Whether a name in the file is of the classifier that is left out."""
    ours = ("head.fc.weight", "head.fc.bias", "head.fc_dist.weight", "head.fc_dist.bias")
    return any(name in table.names(head)[0] for table in _tables(model, checkpoint) for head in ours)


def _tables(model: Model, checkpoint: Checkpoint) -> list[Table]:
    formats = FORMATS.values() if checkpoint.format is None else [FORMATS[checkpoint.format]]
    return [table for form in formats for table in form.tables(model)] or [IDENTITY]


def _convert(model: Model, checkpoint: Checkpoint, wanted: list[str]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """By the table that fits best: the one that leaves the fewest names over on both sides."""
    tensors = checkpoint.tensors
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from DataParallel
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}

    def misfit(table: Table) -> int:
        names = [name for ours in wanted for name in table.names(ours)[0]]
        return sum(name not in tensors for name in names) + len(tensors.keys() - set(names))

    return min(_tables(model, checkpoint), key=misfit).to_ours(tensors, wanted)


def _owner(model: nn.Module, name: str) -> Any:
    """The block that `adapt` is told of: the nearest enclosing one that knows its geometry."""
    parts = name.split(".")[:-1]
    module = model.get_submodule(".".join(parts))
    while parts and not hasattr(module, "resize"):
        parts = parts[:-1]
        module = model.get_submodule(".".join(parts))
    return module


def _refuse(
    checkpoint: Checkpoint, model: Model, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> None:
    if not (missing or unexpected or misshapen):
        return
    lists = {"missing": missing, "not used": unexpected, "of another shape": misshapen}
    shown = [
        f"{len(names)} {word}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for word, names in lists.items()
        if names
    ]
    hint = ""
    if any(name.startswith("head.") for name in [*missing, *misshapen]):
        hint = "; for other classes than the checkpoint's, name num_classes= (create_model) or new_head=True"
    raise WeightsError(
        f"{checkpoint.source} does not fit {type(model).__name__} ({'; '.join(shown)}){hint}; the model is unchanged"
    )


def _refuse_nan(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise WeightsError(f"{checkpoint.source}: NaN or infinity in {', '.join(bad[:8])}; the checkpoint is damaged")


def _typed(tensor: Tensor, target: Tensor, dtype: torch.dtype | str | None) -> Tensor:
    """In the right dtype and memory format; the same tensor if it has both already."""
    if not target.is_meta:
        return tensor
    if dtype != "file" and tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype() if dtype is None else dtype)  # type: ignore[arg-type]
    if tensor.stride() != target.stride():
        moved = torch.empty_strided(target.shape, target.stride(), dtype=tensor.dtype)
        tensor = moved.copy_(tensor)
    return tensor


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Meta parameters are replaced, everywhere they are tied; real ones are overwritten."""
    aims = targets(model)
    names = {id(target): name for name, target in aims.items()}
    placed: dict[str, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, old in held.items():
                name = names.get(id(old))
                if old is None or name is None or name not in tensors:
                    continue
                if not old.is_meta:
                    old.copy_(tensors[name])
                    continue
                if name not in placed:
                    new = tensors[name]
                    placed[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                held[key] = placed[name]


def _draw_head(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """A classifier on the meta device comes to life, in the dtype of the rest; a real one stays as it stands."""
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    for name in ("head.fc", "head.fc_dist"):
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, nn.Linear) and layer.weight.is_meta:
            layer.to_empty(device="cpu").to(dtype)
            model.init_weights(layer)
