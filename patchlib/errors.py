"""The errors of patchlib. Each is a `PatchlibError` and also the built-in kind that fits it."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PatchlibError(Exception):
    """What every error raised on purpose by patchlib has in common."""


class ConfigError(PatchlibError, ValueError):
    """A field of a config is unknown, of the wrong kind, or out of range."""


class InputError(PatchlibError, ValueError):
    """An image, a batch of tokens or another argument of a call cannot be used as it is."""


class UnknownNameError(PatchlibError, LookupError):
    """No model, block, weights or option has this name."""


class WeightsError(PatchlibError, RuntimeError):
    """A checkpoint is damaged, foreign, or does not fit the model."""


class HubError(PatchlibError, OSError):
    """A file cannot be had from the Hub, nor from its cache."""


class MissingExtraError(PatchlibError, ImportError):
    """An optional dependency is not installed."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Ends an error message about an unknown `name`: ``"; did you mean 'a' or 'b'?"``, or the
    options themselves where none is near and they are few, or nothing."""
    known = sorted(set(map(str, options)))
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if 0 < len(known) <= 12:
        return f"; allowed: {', '.join(map(repr, known))}"
    return ""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra installs it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{module!r} is not installed; it comes with: pip install 'patchlib[{extra}]'"
        raise MissingExtraError(message) from error
