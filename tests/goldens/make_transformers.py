"""Makes the goldens of transformers' ViT and DeiT: tiny models, every parameter redrawn, as folders in its own format.

    python tests/goldens/make_transformers.py      (with an environment that has transformers)

Writes tests/goldens/transformers/<case>/: what its `save_pretrained` writes, answers.safetensors, and in one
case state.safetensors, with the names that the model has in memory, which since its version 5 are others than on disk.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

FOLDER = Path(__file__).parent / "transformers"
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip
LABELS = {"id2label": dict(enumerate(("cat", "dog", "eel", "fox", "gnu")))}
CASES = {
    "vit": (ViTForImageClassification, ViTConfig(**TINY, **LABELS)),
    "vit_tanh": (
        ViTForImageClassification,
        ViTConfig(**TINY, num_labels=3, hidden_act="gelu_new", layer_norm_eps=0.05, qkv_bias=False, num_channels=1),
    ),
    "vit_headless": (ViTModel, ViTConfig(**TINY)),
    "deit": (DeiTForImageClassificationWithTeacher, DeiTConfig(**TINY, num_labels=5)),
}
CONVNEXT = {"depths": [1, 1, 2, 1], "hidden_sizes": [6, 8, 10, 12], "num_labels": 5, "image_size": 64}
GPT = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
OTHERS = {
    "convnext": (ConvNextForImageClassification, ConvNextConfig(**CONVNEXT, layer_norm_eps=0.05)),
    "convnextv2": (ConvNextV2ForImageClassification, ConvNextV2Config(**CONVNEXT)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT, layer_norm_epsilon=0.01, n_inner=40)),
}


def redraw(model: torch.nn.Module, seed: int) -> None:
    """Every parameter at random, far from what initialisation leaves."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() >= 2 and "token" not in name and "position" not in name:
            tensor.copy_(noise * 1.5 / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(noise * 0.5 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


@torch.no_grad()
def main() -> None:
    for seed, (case, (model_class, config)) in enumerate(CASES.items()):
        model = model_class(config).eval()
        redraw(model, seed)
        shape = (2, config.num_channels, 24, 24)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))
        base = getattr(model, model.base_model_prefix, model)
        answers = {"images": images, "features": base(images).last_hidden_state}
        if base is not model:
            answers["logits"] = model(images).logits
        model.save_pretrained(FOLDER / case, max_shard_size="20KB" if case == "vit_tanh" else "5GB")
        save_file({k: t.contiguous() for k, t in answers.items()}, FOLDER / case / "answers.safetensors")
        if case == "deit":
            save_file(model.state_dict(), FOLDER / case / "state.safetensors")
    for seed, (case, (model_class, config)) in enumerate(OTHERS.items()):
        model = model_class(config).eval()
        redraw(model, seed)
        generator = torch.Generator().manual_seed(200 + seed)
        if case == "gpt2":
            inputs = torch.randint(config.vocab_size, (2, 12), generator=generator)
        else:
            inputs = torch.randn(2, 3, 64, 64, generator=generator)
        model.save_pretrained(FOLDER / case)
        save_file({"inputs": inputs, "logits": model(inputs).logits}, FOLDER / case / "answers.safetensors")
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(FOLDER / "vit")
    for path in FOLDER.glob("*/*"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
