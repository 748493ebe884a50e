"""Writes patchlib/models/index.json from the VARIANTS of every model file: python tests/goldens/make_index.py"""

import importlib
import json
from pathlib import Path

MODELS = Path(__file__).parents[2] / "patchlib" / "models"


def build_index() -> dict[str, dict[str, object]]:
    """Family (the file's name) to module, class and names."""
    index = {}
    for path in sorted(MODELS.glob("[a-z]*.py")):
        module = importlib.import_module(f"patchlib.models.{path.stem}")
        if hasattr(module, "VARIANTS"):
            own = [m for m in vars(module).values() if getattr(m, "__module__", "") == module.__name__]
            (model,) = [m for m in own if hasattr(m, "Config")]
            index[path.stem] = {"module": module.__name__, "class": model.__name__, "names": list(module.VARIANTS)}
    return index


if __name__ == "__main__":
    (MODELS / "index.json").write_text(json.dumps(build_index(), indent=1) + "\n")
