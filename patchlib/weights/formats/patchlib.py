"""Our own folders: `config.json` (format version, model, config, info) and `model.safetensors`."""

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError, UnknownNameError, WeightsError, nearest
from ...registry import find_model_class
from .table import IDENTITY, Table

VERSION = 1
FIELDS = ("format", "format_version", "model", "config", "info")

# From each older version to the next; none is ever taken out.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return content.get("format") == "patchlib" or "format_version" in content


def tables(model: Any) -> tuple[Table, ...]:
    """The names are the model's own."""
    return (IDENTITY,)


def to_config(content: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Class, config and info from a config.json.

    Raises:
        WeightsError: it is from a newer patchlib, or a field is unknown or missing.
        ConfigError: the config is not valid.
    """
    content = migrate(dict(content))
    for key in content:
        if key not in FIELDS:
            raise WeightsError(f"unknown field {key!r:.80}{nearest(key, FIELDS)}")
    for key in ("model", "config"):
        if key not in content:
            raise WeightsError(f"field {key!r} is missing")
    info = content.get("info", {})
    if not isinstance(info, dict):
        raise WeightsError(f"field 'info': found {type(info).__name__}; allowed: an object")
    if not isinstance(info.get("preprocessing", {}), dict):
        raise WeightsError(f"field 'info.preprocessing': found {info['preprocessing']!r:.80}; allowed: an object")
    try:
        model_class = find_model_class(content["model"])
    except UnknownNameError as error:
        raise ConfigError(f"field 'model': {error}; if it is your own, register a model of this class first") from error
    return model_class, model_class.Config.from_dict(content["config"]), info


def migrate(content: dict[str, Any]) -> dict[str, Any]:
    """A config.json of any earlier version in today's form."""
    version = content.get("format_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise WeightsError(
            f"field 'format_version': found {version!r:.80}; allowed: 1 to {VERSION}; "
            "a newer one needs a newer patchlib"
        )
    for step in range(version, VERSION):
        content = MIGRATIONS[step](content)
    return content


def from_model(model: Any) -> dict[str, Any]:
    """The config.json of a model."""
    return {
        "format": "patchlib",
        "format_version": VERSION,
        "model": type(model).__name__,
        "config": model.config.to_dict(),
        "info": model.info,
    }
