"""The tiny GPT-2 that tests/goldens/make_gpt.py wrote, as a patchlib model."""

import json

import torch
from conftest import GOLDENS
from safetensors import safe_open
from safetensors.torch import load_file

from patchlib.models.gpt import GPT, GPTConfig

FILE = GOLDENS / "gpt" / "transformers.safetensors"
NAMES = {
    "wte": "token_embed", "wpe": "pos_embed", "h.": "blocks.", "ln_1": "norm1", "ln_2": "norm2", "ln_f": "norm",
    "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def read_golden() -> dict[str, torch.Tensor]:
    return load_file(FILE)


def metadata(name: str) -> dict:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()[name])


def tiny_gpt(golden: dict[str, torch.Tensor], **overrides) -> GPT:
    """The model; transformers keeps matrices as (in, out)."""
    sizes = metadata("sizes")
    config = GPTConfig(
        vocab_size=sizes["vocab_size"], context=sizes["n_positions"], dim=sizes["n_embd"], depth=sizes["n_layer"],
        heads=sizes["n_head"],
    )  # fmt: skip
    model = GPT(config, **overrides).eval()
    state = {}
    for name, value in golden.items():
        if name.startswith("model.transformer."):
            name = name.removeprefix("model.transformer.")
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = value.T if value.dim() == 2 and name.startswith("blocks.") else value
    model.load_state_dict(state)
    return model
