"""Makes the goldens of timm's models: tiny ones, every parameter and buffer redrawn, as folders in timm's own format.

    python tests/goldens/make_timm.py      (with an environment that has timm)

Writes tests/goldens/timm/<case>/{config.json,model.safetensors,answers.safetensors} and, for every name that patchlib
shares with timm, a digest of timm's keys and shapes in tests/goldens/timm/keys.json.
"""

import hashlib
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.models.convmixer import ConvMixer
from timm.models.convnext import ConvNeXt

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "timm"
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 24, "patch_size": 8, "num_classes": 7}
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 7}
CASES = {
    "vit": ("vit_base_patch16_224", TINY),
    "vit_registers_avg": ("vit_base_patch16_224", {**TINY, "reg_tokens": 2, "global_pool": "avg", "qkv_bias": False}),
    "vit_rectangular": ("vit_base_patch16_224", {**TINY, "img_size": (16, 24), "in_chans": 1, "mlp_ratio": 2.5}),
    "vit_gap": ("vit_medium_patch16_gap_256", TINY),
    "deit_distilled": ("deit_base_distilled_patch16_224", TINY),
    "deit3": ("deit3_base_patch16_224", TINY),
    "convmixer_gelu": (None, {"dim": 24, "depth": 2, "kernel_size": 5, "patch_size": 4, "num_classes": 7}),
    "convnext": (None, {**SMALL, "conv_mlp": False}),
    "convnextv2": (None, {**SMALL, "use_grn": True, "ls_init_value": None, "conv_mlp": True}),
    "convmixer_relu": (None, {"dim": 24, "depth": 2, "kernel_size": 3, "patch_size": 5, "num_classes": 7}),
}  # fmt: skip


def redraw(model: torch.nn.Module, seed: int) -> None:
    """Every parameter and buffer at random, far from what initialisation leaves."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(noise.abs() + 0.5)
        elif tensor.dim() >= 2 and "token" not in name and "pos_embed" not in name:
            tensor.copy_(noise * 1.5 / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(noise * 0.5 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def digest(state: dict[str, torch.Tensor]) -> str:
    lines = sorted(f"{name} {tuple(t.shape)}" for name, t in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def main() -> None:
    for seed, (case, (architecture, arguments)) in enumerate(CASES.items()):
        if architecture is None:  # timm's ConvMixers have no sizes to choose, so these come without a config.json
            act = torch.nn.ReLU if "relu" in case else torch.nn.GELU
            made = ConvNeXt(**arguments) if "depths" in arguments else ConvMixer(**arguments, act_layer=act)
            model = made.eval()
        else:
            model = timm.create_model(architecture, **arguments).eval()
        redraw(model, seed)
        size = arguments.get("img_size", 64 if "depths" in arguments else 24)
        shape = (2, arguments.get("in_chans", 3), *((size, size) if isinstance(size, int) else size))
        images = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))
        _, maps = model.forward_intermediates(images)
        answers = {
            "images": images,
            "logits": model(images),
            "features": model.forward_features(images),
            "pre_logits": model.forward_head(model.forward_features(images), pre_logits=True),
            **{f"map{i}": m for i, m in enumerate(maps)},
        }
        (FOLDER / case).mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous() for k, t in answers.items()}, FOLDER / case / "answers.safetensors")
        if architecture is None:
            save_file(model.state_dict(), FOLDER / case / "model.safetensors")
            continue
        saved = {key: list(v) if isinstance(v, tuple) else v for key, v in arguments.items() if key != "num_classes"}
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": list(shape[1:]), "num_classes": 7}
        save_for_hf(model, FOLDER / case, model_config={"num_classes": 7}, model_args=saved, safe_serialization=True)
    index = json.loads((ROOT / "patchlib" / "models" / "index.json").read_text())
    shared = [name for family in index.values() for name in family["names"] if name in set(timm.list_models())]
    with torch.device("meta"):
        keys = {name: digest(timm.create_model(name, num_classes=1000).state_dict()) for name in shared}
    (FOLDER / "keys.json").write_text(json.dumps(keys, indent=1) + "\n")


if __name__ == "__main__":
    main()
