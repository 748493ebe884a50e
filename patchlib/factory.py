"""`create_model` and what tells about models: the only place where architecture meets weights."""

import dataclasses
import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ConfigError, PatchlibError, UnknownNameError, WeightsError, nearest
from .models.base import ImageModel, Model
from .models.features import FeatureExtractor
from .registry import family_of, find_model, model_names
from .weights.catalog import SOURCES, Weights, find_weights, weights_of
from .weights.load import FLOATS, Checkpoint, fill, info_for, number_of_classes, read_checkpoint, unwrapped

log = logging.getLogger("patchlib")

MAX_PARAMETERS = 40_000_000_000  # the largest ViT that a paper reports has 22 billion
# Fields in which a model may differ from its weights and still give the same answers, or is adapted to them.
_FREE = ("img_size", "patch_size", "in_chans", "num_classes", "drop", "drop_path")


def create_model(
    name: str,
    *,
    pretrained: bool | None = None,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    out_indices: int | Iterable[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    check_finite: bool = False,
    **config_overrides: Any,
) -> Any:
    """Builds a model by name, with weights if asked.

        create_model("convmixer_16", pretrained=True)
        create_model("vit_base_patch16_224.augreg2_in21k_ft_in1k", pretrained=True, num_classes=10)
        create_model("hf-hub:timm/convmixer_768_32.in1k")
        create_model("local-dir:path/to/folder")
        create_model("vit_16_linear", patch_embed="early_conv", pos_embed="sinusoidal", depth=6)

    Args:
        name: a registered name, with ``.tag`` for particular weights; ``hf-hub:user/name[@revision]``; or
            ``local-dir:folder``. Folders and repositories may be patchlib's, timm's or transformers'.
        pretrained: load weights; left out, yes for ``hf-hub:`` and ``local-dir:``, no for names.
        checkpoint: weights from this file or source instead.
        num_classes: size of the classifier; another than the checkpoint's means a new head, drawn at random;
            0 for none.
        in_chans, img_size: channels and size (pixels) of the images; weights are adapted.
        features_only: return the feature maps of the steps `out_indices`, as a list of ``(batch, channels, h, w)``.
        out_indices: a list of steps, or how many of the last.
        device: where the model is put; ``"meta"`` for shapes only.
        dtype: of floating weights; None is torch's default, ``"file"`` keeps the checkpoint's and maps it uncopied.
        revision, cache_dir, token, local_files_only: as in huggingface_hub.
        allow_pickle: let `checkpoint` be a pickle, read with ``weights_only=True``.
        check_finite: refuse weights with NaN or infinity.
        config_overrides: fields of the model's config.

    Returns:
        the model, in evaluation mode if it has trained weights, else in training mode.

    Raises:
        UnknownNameError: no such model, or it has no weights; the nearest that exist are named.
        ConfigError: a field is unknown or its value is not allowed, arguments contradict each other, or the device
            cannot be used.
        InputError: the patches do not cover the config's own image size, or there is no such step as `out_indices` say.
        WeightsError, HubError: the weights cannot be had or do not fit.
    """
    given = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    overrides = {**config_overrides, **{key: value for key, value in given.items() if value is not None}}
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    place = _device(device)
    if pretrained is False and checkpoint is not None:
        raise ConfigError(f"pretrained: found False beside checkpoint={str(checkpoint)!r:.200}; leave one of them out")
    if out_indices is not None and not features_only:
        raise ConfigError(f"out_indices: found {out_indices!r:.80} without features_only=True; add it, or leave it out")
    if dtype not in (None, "file", *FLOATS):
        raise ConfigError(f"dtype: found {dtype!r}; allowed: None, 'file', {', '.join(map(str, FLOATS))}")

    loaded: Checkpoint | None = None
    shapes_only = place.type == "meta"
    if str(name).startswith(SOURCES):
        config_only = pretrained is False or shapes_only or checkpoint is not None
        loaded = read_checkpoint(name, config_only=config_only, **options)  # type: ignore[arg-type]
        model_class, config = loaded.model_class, loaded.config
        _check_names(config, config_overrides)
        if pretrained is False:
            loaded = None
    else:
        architecture, _, tag = str(name).partition(".")
        model_class, config = _find_model(name, architecture)
        _check_names(config, config_overrides)
        if tag or (pretrained and checkpoint is None):
            entry = find_weights(architecture, tag or None)
            config = config.replace(**entry.overrides)
            if pretrained and checkpoint is None:
                loaded = _from_catalog(entry, model_class, config, options, config_only=shapes_only)
                config = loaded.config
    if checkpoint is not None:
        loaded = read_checkpoint(checkpoint, allow_pickle=allow_pickle, **options)  # type: ignore[arg-type]
        _compare(loaded, model_class, config.replace(**overrides), overrides)

    config = config.replace(**overrides)
    if loaded is None or shapes_only:
        if not shapes_only and (overrides or str(name).startswith(SOURCES)):
            _refuse_giants(str(name), model_class, config)
        model = _build(str(name), model_class, config, place)
        if isinstance(dtype, torch.dtype):
            model.to(dtype)
        if loaded is not None:
            model.info = info_for(model, loaded, _needs_head(model, loaded, num_classes))
    else:
        model = _build(str(name), model_class, config, torch.device("meta"))
        new_head = _needs_head(model, loaded, num_classes)
        fill(model, loaded, new_head=new_head, dtype=dtype, check_finite=check_finite)
        model.to(place).eval()
    if not features_only:
        return model
    if not isinstance(model, ImageModel):
        raise ConfigError(f"features_only: {type(model).__name__} has no feature maps; leave it out")
    return FeatureExtractor(model, out_indices)


def _check_names(config: Any, overrides: Iterable[str]) -> None:
    """Raises `ConfigError` for what is no field of the config, before anything is fetched for the others. It may be a
    misspelt argument of `create_model` as well."""
    fields = {field.name for field in dataclasses.fields(config)}
    for key in overrides:
        if key not in fields:
            arguments = inspect.signature(create_model).parameters.keys() - {"name", "config_overrides"}
            raise ConfigError(
                f"create_model has no argument and {type(config).__name__} no field {key!r:.80}"
                f"{nearest(key, fields | arguments)}"
            )


def _device(device: torch.device | str | None) -> torch.device:
    try:
        place = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: found {device!r}; allowed: a torch.device or its name ({error})") from error
    try:
        torch.empty(0, device=place)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:  # each backend has its own kind
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device: found {str(place)!r}, which cannot be used here ({reason}); allowed: 'cpu', 'meta', or a device "
            "that this machine and this torch have"
        ) from error
    return place


def _find_model(name: str, architecture: str) -> tuple[Any, Any]:
    """The class and the config behind a registered name; an error says how to name a folder or a file."""
    try:
        return find_model(architecture)
    except UnknownNameError as error:
        path = str(name)
        if os.path.isdir(path):
            raise UnknownNameError(f"{name} is a folder, not a registered name: write 'local-dir:{path}'") from error
        if os.path.isfile(path):
            raise UnknownNameError(
                f"{name} is a file, which does not say what model it is for: write "
                f"create_model(registered name, checkpoint={path!r})"
            ) from error
        raise


def _build(name: str, model_class: Any, config: Any, device: torch.device) -> Any:
    """The model; an error says which it is."""
    try:
        with device:
            return model_class(config)
    except PatchlibError as error:
        raise type(error)(f"{name}: {error}") from error


def _refuse_giants(name: str, model_class: Any, config: Any) -> None:
    """Counts the parameters before memory is taken for them: fields that are fine one by one can be too much together,
    and a folder may be a stranger's."""
    model = _build(name, model_class, config, torch.device("meta"))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if (total := sum(sizes.values())) > MAX_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"{name}: its config makes {total:,} parameters, {sizes[largest]:,} of them in {largest}; "
            f"allowed: at most {MAX_PARAMETERS:,}; choose smaller sizes"
        )


def _needs_head(model: Model, loaded: Checkpoint, num_classes: int | None) -> bool:
    """Whether the weights' classifier is not the model's. Of a bare file that is so only if `num_classes` is named."""
    if loaded.config is None:
        return num_classes is not None and number_of_classes(model, loaded) != num_classes
    return getattr(loaded.config, "num_classes", None) != getattr(model.config, "num_classes", None)


def _compare(loaded: Checkpoint, model_class: Any, config: Any, named: Iterable[str] = ()) -> None:
    """Refuses weights of another class. Says where they were trained with another config and yet may fit in shape: that
    is an architecture which the weights do not know.

    Args:
        named: fields that the caller chose to differ in.
    """
    if loaded.model_class not in (None, model_class):
        raise WeightsError(
            f"{loaded.source}: holds a {loaded.model_class.__name__}; this model is a {model_class.__name__}; "
            "name that class's model, or other weights"
        )
    if loaded.config is None:
        return
    linear = {"linear", "conv"}
    for name in (f.name for f in dataclasses.fields(config) if f.name not in (*_FREE, *named)):
        theirs, ours = getattr(loaded.config, name), getattr(config, name)
        if name == "patch_embed" and {theirs["kind"], ours["kind"]} <= linear:  # these two are one function
            theirs, ours = {**theirs, "kind": ""}, {**ours, "kind": ""}
        if theirs != ours:
            log.warning("%s: trained with %s=%r; this model has %r", loaded.source, name, theirs, ours)


def load_pretrained(
    model: Model,
    source: str | Path,
    *,
    new_head: bool = False,
    allow_pickle: bool = False,
    check_finite: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Model:
    """Fills a model that stands from ``hf-hub:…``, ``local-dir:…``, a file, or a catalogue's ``name.tag``.

    Its parameters are overwritten in place: they keep dtype and device, and optimisers keep seeing them.

    Where the checkpoint's config differs in what is no size (activation, heads, …), a warning says so.

    Args:
        model: of patchlib; also one that `features_only`, `torch.compile` or data-parallel training has wrapped.
        new_head: leave the checkpoint's classifier out; the model's own stays.
        allow_pickle, check_finite, revision, cache_dir, token, local_files_only: as in `create_model`.

    Returns:
        the same model.

    Raises:
        WeightsError: a key is missing, unexpected or misshapen; the model is then unchanged.
    """
    options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    inner = unwrapped(model)
    architecture, _, tag = str(source).partition(".")
    if architecture in model_names() and not os.path.exists(source):
        model_class, config = find_model(architecture)
        entry = find_weights(architecture, tag or None)
        loaded = _from_catalog(entry, model_class, config.replace(**entry.overrides), options)
    else:
        loaded = read_checkpoint(source, allow_pickle=allow_pickle, **options)  # type: ignore[arg-type]
    _compare(loaded, type(inner), inner.config)
    fill(inner, loaded, new_head=new_head, check_finite=check_finite)
    return model


def _from_catalog(
    entry: Weights, model_class: Any, config: Any, options: dict[str, Any], config_only: bool = False
) -> Checkpoint:
    """The weights of a catalogue entry; only the file is fetched, since the catalogue knows the rest."""
    from .weights.files import read_tensors
    from .weights.hub import HubRepo

    if entry.bundled_folder is not None:
        loaded = read_checkpoint(entry.bundled_folder, config_only=config_only)
        loaded.source = entry.full_name
        loaded.info.setdefault("source", entry.full_name)
        return loaded
    tensors: dict[str, torch.Tensor] = {}
    if not config_only:
        repo = HubRepo.parse(entry.source.removeprefix("hf-hub:"), **options)
        tensors = read_tensors(repo.file("model.safetensors", sha256=entry.sha256))
    info = {**entry.info, "license": entry.license, "source": entry.source}
    return Checkpoint(entry.full_name, tensors, entry.format, model_class, config, info)


@dataclass(frozen=True)
class ModelInfo:
    """What `model_info` tells.

    Attributes:
        name, family, model: the registered name, its family, and the class.
        parameters: how many.
        multiply_adds: of one input, matrix products and convolutions, attention included.
        activations: numbers that convolutions and linear layers put out for one input.
        input_size: (channels, height, width) of an image, or (tokens,) of a text.
        config: plain values.
        weights: the catalogue's entries, the default first.
    """

    name: str
    family: str
    model: str
    parameters: int
    multiply_adds: int
    activations: int
    input_size: tuple[int, ...]
    config: dict[str, Any]
    weights: tuple[Weights, ...]


def model_info(name: str) -> ModelInfo:
    """Facts about a registered name, counted on the meta device: nothing is allocated or fetched.

    Raises:
        UnknownNameError: no model has the name.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from .layers.convmixer import Pointwise

    architecture = name.partition(".")[0]
    find_model(architecture)  # a source, such as hf-hub:…, has no registered facts and is refused here
    with torch.device("meta"):
        model = create_model(name, device="meta").eval()
        if isinstance(model, ImageModel):
            side = model.config.img_size
            input_size: tuple[int, ...] = (model.config.in_chans, *((side, side) if isinstance(side, int) else side))
            inputs = torch.empty(1, *input_size)
        else:
            input_size = (model.context,)
            inputs = torch.zeros(1, *input_size, dtype=torch.long)
        activations = 0

        def count(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            nonlocal activations
            activations += output.numel()

        layers = nn.Linear, nn.Conv2d, Pointwise
        hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, layers)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(inputs)
        for hook in hooks:
            hook.remove()
    return ModelInfo(
        name=architecture,
        family=family_of(architecture),
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=counter.get_total_flops() // 2,
        activations=activations,
        input_size=input_size,
        config=model.config.to_dict(),
        weights=tuple(weights_of(architecture)),
    )
