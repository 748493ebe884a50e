"""patchlib: patch-based models for PyTorch. Blocks compose on one grid; models are data; weights load strictly.

The public names stand in `__init__.pyi` and are imported when they are first used, so that ``import patchlib`` costs
next to nothing.
"""

import importlib
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_LISTED = re.findall(r"^from \.(\S+) import (\w+) as \2$", Path(__file__).with_suffix(".pyi").read_text(), re.MULTILINE)
_HOMES = {name: home for home, name in _LISTED}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        from .errors import nearest

        raise AttributeError(f"module 'patchlib' has no attribute {name!r}{nearest(name, _HOMES)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
