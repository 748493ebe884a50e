"""From a checkpoint to a filled model: read, convert, adapt, and assign strictly."""

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, PatchlibError, WeightsError
from ..models.base import ImageModel, Model, with_input_size, with_new_head
from ..models.features import FeatureExtractor
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
# What loaded weights may have; float8 and the like come with scales that are somewhere else.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Fields in which a model may differ from its checkpoint's config, because weights are adapted to them.
_GEOMETRY = ("img_size", "patch_size", "in_chans", "patch_embed")


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
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    format: str | None = None
    model_class: Any = None
    config: Any = None
    info: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    config_only: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Reads ``hf-hub:user/name[@revision]``, ``local-dir:folder`` or the path of a file or folder; with `config_only`
    what it is, without its tensors.

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
        loaded = _read_folder(text, repo.file, config_only)
        loaded.info.setdefault("source", text)
        return loaded
    path = Path(os.path.expanduser(text.removeprefix("local-dir:")))
    if os.path.isdir(path):
        return _read_folder(text, lambda name, optional=False: _local(path, name, optional), config_only)
    if text.startswith("local-dir:"):
        raise WeightsError(f"{text}: there is no such folder; check its name")
    if not os.path.isfile(path):
        raise WeightsError(f"{text}: no such file; a source is a file, 'local-dir:folder' or 'hf-hub:user/name'")
    return Checkpoint(text, files.read_tensors(path, allow_pickle=allow_pickle))


def _local(folder: Path, name: str, optional: bool) -> Path | None:
    path = folder / name
    if os.path.isfile(path):
        return path
    if optional:
        return None
    try:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    raise WeightsError(f"{folder}: has no {name} (found: {found}); a saved model has one")


def _read_folder(source: str, get: Callable[..., Path | None], config_only: bool) -> Checkpoint:
    path = get("config.json")
    assert path is not None
    content = files.read_json(path)
    name = next((name for name, form in FORMATS.items() if form.recognises(content)), None)
    if name is None:
        raise WeightsError(
            f"{path}: not a config that patchlib knows; it looks for 'format' (patchlib), "
            "'architecture' (timm) or 'model_type' (transformers)"
        )
    model_class, config, info = _understand(path, content, FORMATS[name].to_config)
    if name == "transformers" and (extra := get("preprocessor_config.json", optional=True)):
        info["preprocessing"] = _understand(extra, files.read_json(extra), transformers.preprocessing)
    if config_only:
        return Checkpoint(source, {}, name, model_class, config, info)
    if weights := get("model.safetensors", optional=True):
        return Checkpoint(source, files.read_tensors(weights), name, model_class, config, info)
    if index := get("model.safetensors.index.json", optional=True):
        return Checkpoint(source, files.read_shards(index, get), name, model_class, config, info)
    raise WeightsError(
        f"{source}: has no model.safetensors; a pickle beside it is read only when asked, "
        "as a file: create_model(name, checkpoint='….bin', allow_pickle=True)"
    )


def _understand(path: Path, content: dict[str, Any], convert: Callable[[dict[str, Any]], Any]) -> Any:
    """What a JSON file means; an error names the file."""
    try:
        return convert(content)
    except PatchlibError as error:
        raise type(error)(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: a field does not hold what it should ({error}); correct it") from error


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
    tensors, missing, unexpected, initial = _convert(model, checkpoint, [name for name in aims if name not in head])
    if new_head:
        unexpected = [name for name in unexpected if not _is_head(model, checkpoint, name)]
    mistyped = [f"{name} is {t.dtype}" for name, t in tensors.items() if not _fits_dtype(t, aims[name])]
    if not mistyped and _may_adapt(model, checkpoint):
        modules = dict(model.named_modules())
        tensors = {n: adapt(n, t, aims[n], _owner(modules, n), checkpoint.config) for n, t in tensors.items()}
    misshapen = [
        f"{name} {tuple(t.shape)} for {tuple(aims[name].shape)}"
        for name, t in tensors.items()
        if t.shape != aims[name].shape
    ]
    like = next(iter(tensors.values()), torch.empty(0))
    tensors |= {name: like.new_full(aims[name].shape, value) for name, value in initial.items()}
    _refuse(checkpoint, model, missing, unexpected, [*misshapen, *mistyped])
    _refuse_unfilled(checkpoint, model, {*tensors, *head})
    if check_finite:
        _refuse_nan(checkpoint, tensors)
    with torch.no_grad():
        _assign(model, aims, {name: _typed(t, aims[name], dtype) for name, t in tensors.items()})
        if head:
            _draw_head(model, tensors, dtype)
            log.warning("%s: the head is new, its weights are not from the checkpoint", checkpoint.source)
    if initial:
        log.warning(
            "%s: has no classifier and no %s, which now have their initial values",
            checkpoint.source,
            ", ".join(initial),
        )
    model.info = {**model.info, **info_for(model, checkpoint, new_head)}


def _may_adapt(model: Model, checkpoint: Checkpoint) -> bool:
    """Whether the caller asked for another geometry than the checkpoint's; if not, weights must fit as they are."""
    ours, theirs = model.config, checkpoint.config
    return theirs is None or any(getattr(ours, name, None) != getattr(theirs, name, None) for name in _GEOMETRY)


def info_for(model: Model, checkpoint: Checkpoint, new_head: bool) -> dict[str, Any]:
    """A copy of what is known of the weights, without what no longer holds for this model."""
    info = copy.deepcopy(checkpoint.info)
    if new_head:
        info = with_new_head(info)
    if isinstance(model, ImageModel) and checkpoint.config is not None:
        resized = getattr(checkpoint.config, "img_size", None) != model.config.img_size
        info = with_input_size(info, model.config.img_size) if resized else info
    return info


def targets(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: parameters, a tied one once, and the buffers that are saved."""
    saved = model.state_dict(keep_vars=True).keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}


def unwrapped(model: nn.Module) -> Model:
    """The model inside of what `features_only`, `torch.compile` and data-parallel training wrap around it.

    Raises:
        InputError: it is none of patchlib's.
    """
    inner = without_wrappers(model)
    if not isinstance(inner, Model):
        raise InputError(f"model: found {type(model).__name__}; allowed: a model of patchlib, or of a subclass")
    return inner


def without_wrappers(model: nn.Module) -> Any:
    """The same for a model of anybody's."""
    inner: Any = model
    while not isinstance(inner, Model):
        if isinstance(inner, FeatureExtractor):
            inner = inner.model
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            break
    return inner


def number_of_classes(model: Model, checkpoint: Checkpoint) -> int | None:
    """How many classes the classifier in a bare file has, as `model` would name it; None if it has none."""
    table, held = _match(model, checkpoint, ["head.fc.weight"])
    tensors, *_ = table.to_ours(held, ["head.fc.weight"])
    return next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), None)


def _head_names(model: Model) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(("head.fc.", "head.fc_dist."))}


def _is_head(model: Model, checkpoint: Checkpoint, name: str) -> bool:
    """Whether a name in the file is of the classifier that is left out."""
    ours = ("head.fc.weight", "head.fc.bias", "head.fc_dist.weight", "head.fc_dist.bias")
    return any(name in table.names(head)[0] for table in _tables(model, checkpoint) for head in ours)


def _tables(model: Model, checkpoint: Checkpoint) -> list[Table]:
    formats = FORMATS.values() if checkpoint.format is None else [FORMATS[checkpoint.format]]
    return [table for form in formats for table in form.tables(model)] or [IDENTITY]


def _convert(
    model: Model, checkpoint: Checkpoint, wanted: list[str]
) -> tuple[dict[str, Tensor], list[str], list[str], dict[str, float]]:
    """The tensors under our names; missing and unexpected names; and what a file without a classifier may lack, with
    its initial values."""
    table, held = _match(model, checkpoint, wanted)

    def in_file(name: str) -> bool:
        return any(theirs in held for theirs in table.names(name)[0])

    initial = {name: value for name, value in table.initial.items() if name in wanted}
    if any(map(in_file, ("head.fc.weight", *initial))):
        initial = {}
    return *table.to_ours(held, [name for name in wanted if name not in initial]), initial


def _match(model: Model, checkpoint: Checkpoint, wanted: list[str]) -> tuple[Table, Mapping[str, Tensor]]:
    """The table that fits best, which leaves the fewest names over on both sides; and the file's tensors without the
    prefix of what wrapped the model."""
    tensors = checkpoint.tensors
    for prefix in ("module.", "_orig_mod.", "module."):  # saved from DataParallel, torch.compile, or both
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}

    def misfit(table: Table) -> int:
        names = [name for ours in wanted for name in table.names(ours)[0]]
        return sum(name not in tensors for name in names) + len(tensors.keys() - set(names))

    return min(_tables(model, checkpoint), key=misfit), tensors


def _owner(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The block that `adapt` is told of: the nearest enclosing one that knows its geometry."""
    path = name.rpartition(".")[0]
    while path and not hasattr(modules[path], "resize"):
        path = path.rpartition(".")[0]
    return modules[path]


def _refuse(
    checkpoint: Checkpoint, model: Model, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> None:
    if not (missing or unexpected or misshapen):
        return
    lists = {"missing": missing, "not used": unexpected, "of another shape or dtype": misshapen}
    shown = [
        f"{len(names)} {word}: {', '.join(name[:200] for name in names[:8])}{', …' if len(names) > 8 else ''}"
        for word, names in lists.items()
        if names
    ]
    hint = ""
    if any(name.startswith(("head.fc.", "head.fc_dist.")) for name in [*missing, *misshapen]):
        hint = "; for other classes than the checkpoint's, name num_classes= (create_model) or new_head=True"
    raise WeightsError(
        f"{checkpoint.source} does not fit {type(model).__name__} ({'; '.join(shown)}){hint}; the model is unchanged"
    )


def _refuse_unfilled(checkpoint: Checkpoint, model: Model, filled: set[str]) -> None:
    """What a constructor computes would stay on the meta device, without a value."""
    held = [*model.named_parameters(), *model.named_buffers()]
    held += [
        (f"{path}.{name}" if path else name, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    if left := [name for name, t in held if t.is_meta and name not in filled]:
        raise WeightsError(
            f"{checkpoint.source}: nothing fills {', '.join(left[:5])} of {type(model).__name__}; a block that "
            "computes tensors in its constructor must save them as persistent buffers, or compute them in forward"
        )


def _fits_dtype(tensor: Tensor, target: Tensor) -> bool:
    return tensor.dtype in FLOATS if target.is_floating_point() else tensor.dtype == target.dtype


def _refuse_nan(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{checkpoint.source}: NaN or infinity in {', '.join(bad[:8])}; the checkpoint is damaged; fetch it again"
        )


def _typed(tensor: Tensor, target: Tensor, dtype: torch.dtype | str | None) -> Tensor:
    """In the right dtype and memory format; the same tensor if it has both already."""
    if not target.is_meta:
        return tensor
    if dtype != "file" and tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype() if dtype is None else dtype)
    if tensor.stride() != target.stride():
        moved = torch.empty_strided(target.shape, target.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor = moved.copy_(tensor)
    return tensor


def _assign(model: nn.Module, aims: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Meta parameters are replaced, everywhere they are tied; real ones are overwritten."""
    names = {id(target): name for name, target in aims.items()}
    placed: dict[str, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
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


def _draw_head(model: Model, tensors: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> None:
    """A classifier on the meta device comes to life, in the dtype of the rest; a real one stays as it stands."""
    if dtype == "file":
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    for name in ("head.fc", "head.fc_dist"):
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, nn.Linear) and layer.weight.is_meta:
            layer.to_empty(device="cpu").to(dtype)
            model.init_weights(layer)
