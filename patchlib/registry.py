"""Names of blocks and models. Built-in names are text ("module:Class") until somebody asks for one."""

import importlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from .errors import ConfigError, PatchlibError, UnknownNameError, nearest

_LAYERS = "patchlib.layers."
_BLOCKS: dict[str, dict[str, Any]] = {
    "patch_embed": {
        "linear": _LAYERS + "patch_embed:LinearPatches",
        "conv": _LAYERS + "patch_embed:ConvPatches",
        "early_conv": _LAYERS + "patch_embed:EarlyConv",
    },
    "pos_embed": {
        "learned": _LAYERS + "pos_embed:LearnedPE",
        "sinusoidal": _LAYERS + "pos_embed:SinusoidalPE",
        "rotary": _LAYERS + "pos_embed:RotaryPE",
    },
    "stage": {
        "convmixer": _LAYERS + "convmixer:ConvMixerBlock",
        "transformer": _LAYERS + "transformer:TransformerBlock",
        "convnext": _LAYERS + "convnext:ConvNeXtBlock",
    },
    "mlp": {"gelu": _LAYERS + "mlp:MLP", "swiglu": _LAYERS + "mlp:SwiGLU"},
    "norm": {"layer": "torch.nn:LayerNorm", "rms": "torch.nn:RMSNorm"},
    "pool": {
        "class": _LAYERS + "pool:ClassPool",
        "avg": _LAYERS + "pool:AvgPool",
        "attention": _LAYERS + "pool:AttentionPool",
    },
}
# What the models set themselves, and an option therefore cannot.
_GIVEN = {
    "patch_embed": ("patch_size", "in_chans", "dim"),
    "pos_embed": ("dim", "size", "prefix", "head_dim"),
    "stage": ("dim", "drop_path"),
    "mlp": ("dim", "drop"),
    "norm": ("normalized_shape",),
    "pool": ("dim",),
}
_user_blocks: dict[tuple[str | None, str], Callable[..., Any]] = {}
_user_models: dict[str, "ModelEntry"] = {}


class ModelEntry(NamedTuple):
    """Where a registered name leads: its family, the class, and the config (or how to find both)."""

    family: str
    module: str | None = None
    model_class: Any = None
    config: Any = None


def register_block(name: str, block: Callable[..., Any], *, role: str | None = None) -> None:
    """Makes `block` a kind that configs can name.

    Args:
        name: the kind, as in ``patch_embed={"kind": name, **options}``.
        block: a class (or function) that returns an `nn.Module`. What it is called with depends on where it is
            used: ``patch_embed(patch_size=, in_chans=, dim=)``, ``pos_embed(dim=, size=, prefix=)``,
            ``stage(dim=)``, ``mlp(dim=)``, ``norm(dim)``, ``pool(dim=)``; options follow as keywords.
        role: one of those six words, to allow the name there only. Left out, it is allowed anywhere.

    Raises:
        ConfigError: the role is unknown, the name is empty, built in, or taken by another block. A class that was
            defined again, as by a notebook's cell, takes its own place.
    """
    if role is not None and role not in _BLOCKS:
        raise ConfigError(f"role: found {role!r}{nearest(role, _BLOCKS)}")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name of a block: found {name!r}; allowed: a non-empty string")
    if not callable(block):
        raise ConfigError(f"block {name!r}: found {type(block).__name__}; allowed: a class or a function")
    if any(name in _BLOCKS[r] for r in ([role] if role else _BLOCKS)):
        raise ConfigError(f"block {name!r} is built in; choose another name")
    known = _user_blocks.get((role, name), block)
    if known is not block and not _is_redefined(known, block):
        raise ConfigError(f"block {name!r} is already registered with another class; choose another name")
    try:
        _options(block)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"block {name!r}: its options cannot be told ({error}); wrap it in a function") from error
    _user_blocks[role, name] = block


def _is_redefined(old: Any, new: Any) -> bool:
    """Whether `new` is the same definition as `old`, run again, as a notebook's cells are."""
    names = ("__module__", "__qualname__")
    return old is not new and all(hasattr(new, n) and getattr(old, n, None) == getattr(new, n) for n in names)


def block_names(role: str) -> list[str]:
    """The kinds that a config field of this role may name."""
    return sorted({*_BLOCKS[role], *(name for r, name in _user_blocks if r in (None, role))})


def find_block(role: str, kind: str) -> Callable[..., Any]:
    """The class behind a kind.

    Raises:
        UnknownNameError: nobody registered it.
    """
    found = _BLOCKS[role].get(kind) or _user_blocks.get((role, kind)) or _user_blocks.get((None, kind))
    if found is None:
        raise UnknownNameError(
            f"no {role} block is named {kind!r:.80}{nearest(kind, block_names(role))}"
            " (a block of your own must be registered first: patchlib.register_block(name, cls))"
        )
    return _import(found) if isinstance(found, str) else found


def is_built_in(kind: Any) -> bool:
    """Whether some role has a block of patchlib's by this name."""
    return isinstance(kind, str) and any(kind in kinds for kinds in _BLOCKS.values())


def build_block(role: str, spec: str | Mapping[str, Any], *args: Any, **given: Any) -> Any:
    """Builds the block that ``"name"`` or ``{"kind": name, **options}`` means.

    `args` and `given` come from the model; of `given`, a block receives what its constructor has parameters for.

    Raises:
        ConfigError: the block has no such option, it is the model that sets it, or the block refuses its value.
    """
    kind = spec if isinstance(spec, str) else spec.get("kind") if isinstance(spec, Mapping) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{role}: found {spec!r:.80}; allowed: the name of a kind, or an object with 'kind'")
    options = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "kind"}
    block = find_block(role, kind)
    check_options(role, kind, options, given)
    takes = _options(block)
    try:
        return block(*args, **{key: value for key, value in given.items() if takes is None or key in takes}, **options)
    except PatchlibError:
        raise
    except Exception as error:  # options may come from a file, and torch has no one kind for what it cannot build
        raise ConfigError(f"{role} {kind!r} cannot be built with the options {options!r:.200} ({error})") from error


def check_options(
    role: str, kind: str, options: Mapping[str, Any], given: Collection[str] = (), shared: Collection[str] = ()
) -> None:
    """Raises `ConfigError` if the block of this kind has no such option, annotates it with another type, or is `given`
    it by the model. Options in `shared` are allowed beside the block's own: a message that lists some names them too.
    """
    takes = _options(find_block(role, kind))
    for key, value in options.items():
        if key in given or key in _GIVEN[role]:
            raise ConfigError(f"{role} {kind!r}: option {key!r} is set by the model; leave it out")
        if takes is None:
            continue
        if key not in takes:
            allowed_keys = {*takes, *shared} - ({*given, *_GIVEN[role]} - {*shared})
            raise ConfigError(f"{role} {kind!r} has no option {key!r:.80}{nearest(key, allowed_keys)}")
        if not _fits(value, takes[key]):
            allowed = inspect.formatannotation(takes[key])
            raise ConfigError(f"{role} {kind!r}, option {key!r}: found {value!r:.80}; allowed: {allowed}")


@cache
def _options(block: Callable[..., Any]) -> dict[str, Any] | None:
    """The names that a constructor takes, with their annotations; None if it takes any."""
    from torch import nn  # listing names needs no torch

    if isinstance(block, type) and block.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return {}  # its signature claims to take anything
    parameters = inspect.signature(block).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    by_position = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    where = ("device", "dtype")  # of torch's own layers; that is the caller's business, and none of a config
    return {p.name: p.annotation for p in parameters if p.kind not in by_position and p.name not in where}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value is of an annotated type. Annotations that are about other things fit all."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = inner[:1] * len(value) if Ellipsis in inner else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if annotation in (None, type(None)):
        return value is None
    if annotation in (int, float, bool, str):
        numeric = (int, float) if annotation is float else annotation
        return isinstance(value, numeric) and (annotation is bool or not isinstance(value, bool))
    return isinstance(value, Mapping) if origin is Mapping else True


def register_model(name: str, model_class: Any, config: Any, *, family: str = "user") -> None:
    """Gives a config a name, for `create_model` and `list_models`.

    Args:
        name: letters, digits, ``_`` and ``-``; no dot (what follows a dot is the tag of weights).
        model_class: the class that builds it, called as ``model_class(config)``.
        config: an instance of ``model_class.Config``.

    Raises:
        ConfigError: the name is malformed or taken, the config is not the class's own, or another class that saved
            folders know has this class's name. A class that was defined again takes its own place.
    """
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_-" for c in name):
        raise ConfigError(f"name of a model: found {name!r}; allowed: letters, digits, '_' and '-'")
    if name in _index():
        raise ConfigError(f"model {name!r} is built in; choose another name")
    if not isinstance(config, getattr(model_class, "Config", ())):
        raise ConfigError(f"config of {name!r}: found {type(config).__name__}; allowed: {model_class.__name__}.Config")
    homes = {built_in.model_class: built_in.module for built_in in _index().values()}
    if homes.get(model_class.__name__, model_class.__module__) != model_class.__module__:
        raise ConfigError(
            f"class {model_class.__name__!r}: patchlib has one of this name, and saved folders tell them "
            "apart by name; rename yours"
        )
    entry = ModelEntry(family, None, model_class, config)
    known = _user_models.get(name, entry)
    if known != entry and not _is_redefined(known.model_class, model_class):
        raise ConfigError(f"model {name!r} is already registered with another config; choose another name")
    _user_models[name] = entry


def model_names(family: str | None = None) -> list[str]:
    """Every registered name, in natural order; of one family if asked."""
    entries = {**_index(), **_user_models}
    if family is not None and family not in (families := {e.family for e in entries.values()}):
        raise UnknownNameError(f"no family is named {family!r:.80}{nearest(family, families)}")
    return sorted(name for name, entry in entries.items() if family in (None, entry.family))


def find_model(name: str) -> tuple[Any, Any]:
    """The class and the config behind a name; imports that model's file and no other.

    Raises:
        UnknownNameError: no model has the name.
    """
    entry = _user_models.get(name) or _index().get(name)
    if entry is None:
        raise UnknownNameError(
            f"no model is named {name!r:.80}{nearest(name, model_names())}; see patchlib.list_models()"
        )
    if entry.module is None:
        return entry.model_class, entry.config
    module = importlib.import_module(entry.module)
    model_class = getattr(module, entry.model_class)
    return model_class, model_class.Config(**module.VARIANTS[name])


def find_model_class(class_name: str) -> Any:
    """The built-in or registered model class of this name, as saved folders write it."""
    classes = {entry.model_class: entry.module or "" for entry in _index().values()}
    own = {entry.model_class.__name__: entry.model_class for entry in _user_models.values()}
    if isinstance(class_name, str) and class_name in own:
        return own[class_name]
    if not isinstance(class_name, str) or class_name not in classes:
        raise UnknownNameError(f"no model class is named {class_name!r:.80}{nearest(class_name, {*classes, *own})}")
    return getattr(importlib.import_module(classes[class_name]), class_name)


def family_of(name: str) -> str:
    """The family of a registered name."""
    return (_user_models.get(name) or _index()[name]).family


@cache
def _index() -> dict[str, ModelEntry]:
    index = json.loads((Path(__file__).parent / "models" / "index.json").read_text())
    return {
        name: ModelEntry(family, entry["module"], entry["class"])
        for family, entry in index.items()
        for name in entry["names"]
    }


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
