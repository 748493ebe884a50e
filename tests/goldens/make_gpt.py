"""Writes gpt/transformers.safetensors: a tiny GPT-2 of transformers with every parameter redrawn, its logits, the
tokens it generates greedily, and logits as transformers' sampling filters leave them.

Needs transformers, not patchlib:

    python tests/goldens/make_gpt.py
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TARGET = Path(__file__).parent / "gpt" / "transformers.safetensors"
SIZES = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 4, "n_head": 4}
PENALTIES = {"1.0": 1.0, "1.3": 1.3}
FILTERS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "tiny_top_p": {"top_p": 0.01},
    "penalty": {"repetition_penalty": 1.7},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
}


def redraw(model: torch.nn.Module) -> None:
    """Embeddings so small that the first norm's epsilon counts; the rest large enough that each branch does."""
    for name, value in model.named_parameters():
        if name.endswith(("wte.weight", "wpe.weight")):
            value.normal_(std=0.03)
        elif ".ln_" in name and name.endswith("weight"):
            value.normal_(mean=1.0, std=0.3)
        elif name.endswith("bias"):
            value.normal_(std=0.3)
        else:
            value.normal_(std=0.6)


def filtered(logits: torch.Tensor, ids: torch.Tensor, options: dict) -> torch.Tensor:
    steps = LogitsProcessorList()
    if "repetition_penalty" in options:
        steps.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        steps.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        steps.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(TopPLogitsWarper(options["top_p"]))
    return steps(ids, logits.clone())


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=None)).eval()
    redraw(model)
    ids = torch.randint(SIZES["vocab_size"], (3, 20))
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    tensors |= {"ids": ids, "logits": model(ids).logits}
    prompts = ids[:, :6].contiguous()
    for name, penalty in PENALTIES.items():
        cached, plain = (
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=26,
                do_sample=False,
                use_cache=use_cache,
                repetition_penalty=penalty,
                pad_token_id=0,
            )
            for use_cache in (True, False)
        )
        if not torch.equal(cached, plain):
            raise SystemExit("transformers' tokens differ with and without its cache: a near tie; take another seed")
        tensors[f"greedy.{name}"] = cached
    scores = 3 * torch.randn(2, 50)
    tensors |= {"scores": scores, "scores.ids": torch.randint(50, (2, 12))}
    for name, options in FILTERS.items():
        tensors[f"filtered.{name}"] = filtered(scores, tensors["scores.ids"], options)
    TARGET.parent.mkdir(exist_ok=True)
    metadata = {"transformers": transformers.__version__, "sizes": json.dumps(SIZES), "filters": json.dumps(FILTERS)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, TARGET, metadata)
    print(f"{TARGET}: {len(tensors)} tensors, {TARGET.stat().st_size} bytes")
    print(tensors["greedy.1.0"][:, 6:], tensors["greedy.1.3"][:, 6:], tensors["logits"].abs().max(), sep="\n")


if __name__ == "__main__":
    main()
