"""Writes the timm part of patchlib/weights/catalog.json from timm's own tables (run with an environment that has timm):

    python tests/goldens/make_catalog.py

Only facts are taken: repository, licence, number of classes, preprocessing. Other entries of the file stay.
"""

import json
import sys
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from patchlib.registry import find_model  # noqa: E402

PACKAGE = ROOT / "patchlib"
LABELS = {1000: "imagenet-1k", 21843: "imagenet-21k", 21841: "imagenet-22k"}


def entry(full_name: str) -> dict | None:
    cfg = get_pretrained_cfg(full_name).to_dict()
    tag = full_name.partition(".")[2]
    if not cfg.get("hf_hub_id") or (tag.startswith("clip_") and "_ft_" not in tag):  # CLIP's towers have other heads
        return None
    _, config = find_model(full_name.split(".")[0])
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    info = {"preprocessing": {key: cfg[key] for key in keys}}
    if cfg["num_classes"] in LABELS:
        info["labels"] = LABELS[cfg["num_classes"]]
    there = {"num_classes": cfg["num_classes"], "img_size": cfg["input_size"][1]}
    return {
        "source": f"hf-hub:{cfg['hf_hub_id']}",
        "format": "timm",
        "license": cfg.get("license") or "unknown",
        "overrides": {key: value for key, value in there.items() if value != getattr(config, key)},
        "info": info,
    }


def main() -> None:
    path = PACKAGE / "weights" / "catalog.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    index = json.loads((PACKAGE / "models" / "index.json").read_text())
    tagged: dict[str, list[str]] = {}
    for full in timm.list_pretrained():
        tagged.setdefault(full.split(".")[0], []).append(full)
    catalog = {}
    for name in (name for family in index.values() for name in family["names"]):
        default = get_pretrained_cfg(name).tag if name in tagged else ""
        order = sorted(tagged.get(name, []), key=lambda full: (full != f"{name}.{default}", full))
        entries = {
            tag: kept for tag, kept in old.get(name, {}).items() if not kept["source"].startswith("hf-hub:timm/")
        }
        entries |= {full.partition(".")[2]: made for full in order if (made := entry(full))}
        if entries:
            catalog[name] = entries
    path.write_text(json.dumps(catalog, indent=1) + "\n")


if __name__ == "__main__":
    main()
