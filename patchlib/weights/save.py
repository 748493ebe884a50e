"""From a model to a folder, a file, or the Hub."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, WeightsError, nearest
from ..models.base import Model
from . import files, hub
from .card import model_card
from .formats import patchlib, timm
from .load import FLOATS, targets, unwrapped

SAVED_FORMATS = {"patchlib": patchlib, "timm": timm}


def save_pretrained(
    model: Model, folder: str | Path, *, format: str = "patchlib", dtype: torch.dtype | None = None
) -> Path:
    """Writes ``config.json`` and ``model.safetensors``, from which the model is rebuilt without code.

    Both files are written beside the old ones, then renamed: what fails leaves the old ones as they were.

    Args:
        model: any model of patchlib; of what `features_only`, `torch.compile` or data-parallel training wrap around
            one, the inside is saved.
        folder: created if need be.
        format: ``"patchlib"``, or ``"timm"`` for a folder that timm itself loads.
        dtype: of floating weights on disk, the model's own if left out; batch norms stay in float32.

    Returns:
        the folder.

    Raises:
        WeightsError: the format cannot express this model, weights are missing (meta device) or are not those that the
            config builds (a copy from `optimize`), `model.info` holds what JSON does not, or the folder cannot be
            written.
        InputError: it is no model of patchlib.
    """
    model = unwrapped(model)
    if format not in SAVED_FORMATS:
        raise WeightsError(f"format: found {format!r}{nearest(format, SAVED_FORMATS)}")
    form = SAVED_FORMATS[format]
    tensors = targets(model)
    if meta := [name for name, t in tensors.items() if t.is_meta]:
        raise WeightsError(f"{type(model).__name__} has no weights yet (meta device): {', '.join(meta[:3])}, …")
    _check_loadable(model, tensors)
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: found {dtype!r}; allowed: None, {', '.join(map(str, FLOATS))}")
    content = form.from_model(model)
    try:
        files.check_plain(content)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        if len(text) > files.MAX_JSON:
            raise ValueError(f"found {len(text)} characters; allowed: at most {files.MAX_JSON}")
    except ValueError as error:
        raise WeightsError(f"model.info or model.config cannot be saved as JSON: {error}") from error
    exact = _batch_norm_names(model)
    tensors = {name: _stored(t, None if name in exact else dtype, name in exact) for name, t in tensors.items()}
    if format == "timm":
        tensors = timm.tables(model)[0].to_theirs(timm.conv_patches(model, tensors))
    folder = Path(folder)
    files.write_files({folder / "model.safetensors": tensors, folder / "config.json": text})
    return folder


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    format: str = "patchlib",
    dtype: torch.dtype | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a patchlib model",
) -> str:
    """Uploads a model with a card to a Hub repository, which is created if it does not exist.

    Returns:
        the address of the commit.

    Raises:
        HubError: the Hub refuses or does not answer.
    """
    model = unwrapped(model)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, format=format, dtype=dtype)
        files.write_text(Path(folder) / "README.md", model_card(model, repo_id))
        return hub.push_folder(folder, repo_id, token=token, private=private, revision=revision, message=message)


def _check_loadable(model: Model, tensors: dict[str, Tensor]) -> None:
    model_class: Any = type(model)
    with torch.device("meta"):
        built = targets(model_class(model.config))
    found, wanted = ({(name, *t.shape) for name, t in weights.items()} for weights in (tensors, built))
    if differing := sorted({name for name, *_ in found ^ wanted}):
        raise WeightsError(
            f"{type(model).__name__} could not be loaded again: its config builds other weights than it has, "
            f"{len(differing)} of them: {', '.join(differing[:3])}, …; save the model from before `optimize`, or "
            "before your code changed its parts"
        )


def _stored(tensor: Tensor, dtype: torch.dtype | None, exact: bool) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach()
    if exact:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype or tensor.dtype)


def _batch_norm_names(model: nn.Module) -> set[str]:
    """Weights and statistics of batch norms: few, and half precision would shift every output."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name in module.state_dict()
    }
