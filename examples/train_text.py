"""Trains language models on one text for the same time each, and compares them.

    python examples/train_text.py tiny.txt --minutes 5
    python examples/train_text.py tiny.txt --device cuda --minutes 0.5 --lr 1e-3 3e-3 --seeds 0 1 2
    python examples/train_text.py tiny.txt --models gpt_tiny 'gpt_tiny:{"drop":0.2}'
    python examples/train_text.py tiny.txt --tokenizer bytes --context 64 --bf16

The rules, the same for every model:
- The text is cut by position: 90 % to train, 5 % to validate, 5 % to test (``--split random_windows`` deals overlapping
  windows instead; its losses are too good). The tokenizer learns from the first 85 %.
- A training lasts `--minutes` of training steps; evaluating, saving and one first step without effect do not count.
- The learning rate is the one of `--lr` with the lowest validation loss after `--tune-minutes`, with the first seed.
- A loss is over target tokens: a model reads the `--context` tokens before a target, all in the same part, and predicts
  it, be it windowed or causal; an n-gram looks at the last of them. In training there are `--targets`, evenly spaced;
  the final numbers are of `--final-targets`.
- The weights with the lowest validation loss in training count. The test part is read once, after everything.

Given again, the same command goes on where it was interrupted.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import patchlib
from patchlib.generation import generate
from patchlib.text.data import Windows, read_tokens, split_windows, write_tokens
from patchlib.text.ngram import fit_ngram
from patchlib.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

EVALUATIONS = 10


def arguments() -> argparse.Namespace:
    count, minutes = positive(int), positive(float)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", type=Path)
    add("--models", nargs="+", default=["gpt_tiny", "convnextv2_lm_tiny", "causal_conv_lm_tiny"])
    add("--tokenizer", default="1024", help="the size of a BPE to train, 'bytes', or what load_tokenizer takes")
    add("--minutes", type=minutes, default=5.0, help="of training, each model and seed")
    add("--tune-minutes", type=minutes, help="of training, each learning rate; a third of --minutes if left out")
    add("--lr", nargs="+", type=float, default=[1e-3])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--batch-size", type=count, default=64)
    add("--context", type=count, default=256, help="tokens that a model reads")
    add("--bf16", action="store_true", help="autocast on a CPU too, where it is faster on recent ones")
    add("--split", default="position", choices=["position", "random_windows"])
    add("--targets", type=count, default=1000)
    add("--final-targets", type=count, help="if left out, all on a GPU, 4000 on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("out/text"))
    args = parser.parse_args()
    args.on_gpu = args.device.startswith("cuda")
    args.tune_minutes = args.minutes / 3 if args.tune_minutes is None else args.tune_minutes
    args.final_targets = args.final_targets or (sys.maxsize if args.on_gpu else 4000)
    return args


def positive(kind: type) -> Callable[[str], float]:
    """What reads a number above 0 from the command line."""

    def read(text: str) -> float:
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"found {text}; allowed: a number above 0")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def digest(*origin: object) -> str:
    """Names what was made of all this: text, tokenizer, options. What is left out here is mistaken for another's."""
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, list[Windows]]:
    """The tokenizer, and the windows of the three parts. `args.data` becomes the name of text and tokenizer."""
    text = args.text.read_text(encoding="utf-8")
    if args.tokenizer == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif args.tokenizer.isdigit():
        tokenizer = BPETokenizer.train([text[: len(text) * 85 // 100]], int(args.tokenizer))
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    args.data = digest(text, tokenizer.to_json())
    file = args.out / f"{args.data}.safetensors"
    if not file.exists():
        write_tokens(file, tokenizer.encode(text), tokenizer)
    tokens = read_tokens(file, tokenizer)
    print(f"{len(tokens)} tokens of {tokenizer.vocab_size}, {len(text) / len(tokens):.2f} characters each")
    return tokenizer, split_windows(tokens, args.context + 1, (0.9, 0.05, 0.05), split=args.split)


def build(args: argparse.Namespace, spec: str, vocab_size: int) -> torch.nn.Module:
    name, _, fields = spec.partition(":")
    length = "num_tokens" if name.startswith("convnextv2") else "context"
    fields = {length: args.context, **json.loads(fields or "{}")}
    return patchlib.create_model(name, vocab_size=vocab_size, device=args.device, **fields)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast("cuda" if args.on_gpu else "cpu", torch.bfloat16, enabled=args.on_gpu or args.bf16)


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: torch.nn.Module, windows: Windows, count: int) -> float:
    """Mean negative log-probability of the last token of each of `count` windows, in nats."""
    model.eval()
    windows, total = windows.spread(count), 0.0
    for indices in torch.arange(len(windows)).split(512 if args.on_gpu else 32):
        batch = windows.take(indices).to(args.device)
        with autocast(args):
            logits = model.next_logits(batch[:, :-1])
        total += F.cross_entropy(logits.float(), batch[:, -1], reduction="sum").item()
    return total / len(windows)


def backward(args: argparse.Namespace, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with autocast(args):
        logits = model(batch[:, :-1])
    targets = batch[:, -logits.shape[1] :]  # all positions of a causal model, the last of a windowed one
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    return loss.detach()


def train(
    args: argparse.Namespace, spec: str, lr: float, seed: int, minutes: float, parts: list[Windows], vocab_size: int
) -> dict:
    """One training. Its folder keeps the best weights, the last state, and in the end the result."""
    run = {"model": spec, "lr": lr, "seed": seed, "minutes": minutes, "vocab_size": vocab_size}
    run |= {key: getattr(args, key) for key in ("data", "batch_size", "context", "bf16", "split", "device", "targets")}
    folder = args.out / "runs" / f"{spec.partition(':')[0]}-{digest(run)}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    torch.manual_seed(seed)
    model, draws = build(args, spec, vocab_size), torch.Generator().manual_seed(seed)
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=args.on_gpu)
    state = {"elapsed": 0.0, "steps": 0, "history": [], "peak": 0}
    if (last := folder / "last.pt").exists():
        saved = torch.load(last, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        draws.set_state(saved["draws"].cpu())
        state = saved["state"]
    peak_memory(args, reset=True)
    loss = backward(args, model.train(), parts[0].sample(args.batch_size).to(args.device))
    optimizer.zero_grad()
    budget = minutes * 60
    layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} s {postfix}"
    bar = tqdm(total=budget, initial=state["elapsed"], desc=f"{spec} lr {lr:g} seed {seed}", bar_format=layout)
    while state["elapsed"] < budget:
        model.train()
        start, until = time.perf_counter(), (state["elapsed"] * EVALUATIONS // budget + 1) * budget / EVALUATIONS
        while (now := state["elapsed"] + time.perf_counter() - start) < until:
            for group in optimizer.param_groups:  # warm-up, then a cosine to a tenth
                group["lr"] = lr * min(1, 20 * now / budget) * (0.55 + 0.45 * math.cos(math.pi * now / budget))
            loss = backward(args, model, parts[0].sample(args.batch_size, draws).to(args.device))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["steps"] += 1
            if state["steps"] % (20 if args.on_gpu else 1) == 0:  # reading the loss waits for the GPU
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update(now - bar.n)
        loss.item()
        state["elapsed"] += time.perf_counter() - start
        state["peak"] = max(state["peak"], peak_memory(args))
        state["history"].append([state["elapsed"], evaluate(args, model, parts[1], args.targets)])
        if state["history"][-1][1] == min(value for _, value in state["history"]):
            patchlib.save_pretrained(model, folder / "best")
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draws": draws.get_state()}
        torch.save({**saved, "state": state}, folder / "last.tmp")
        os.replace(folder / "last.tmp", last)
        bar.set_postfix_str(f"validation loss {state['history'][-1][1]:.3f}")
    bar.close()
    best = min(value for _, value in state["history"])
    result = {**run, **state, "best": best, "weights": f"local-dir:{folder}/best"}
    (folder / "result.json").write_text(json.dumps(result))
    last.unlink()
    return result


def peak_memory(args: argparse.Namespace, reset: bool = False) -> int:
    """Bytes at most since the last reset: of tensors on a GPU, of the process on a CPU (0 where it is not Linux)."""
    if args.on_gpu:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not (status := Path("/proc/self/status")).exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def measure(args: argparse.Namespace, results: list[dict], tokenizer: Tokenizer, parts: list[Windows]) -> dict:
    """The final numbers of one model, whose best weights of all seeds are saved with the tokenizer."""
    model = build(args, results[0]["model"], tokenizer.vocab_size)
    losses = []
    for result in results:
        patchlib.load_pretrained(model, result["weights"])
        losses.append([evaluate(args, model, part, args.final_targets) for part in parts[1:]])
    patchlib.load_pretrained(model, results[losses.index(min(losses))]["weights"])
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in results[0]["model"])
    patchlib.save_pretrained(model, args.out / name)
    tokenizer.save(args.out / name)
    prompt = parts[1][0][:16].tolist()
    generate(model, prompt, 10, seed=0)
    start = time.perf_counter()
    text = tokenizer.decode(generate(model, prompt, 100, temperature=0.8, seed=0))
    return {
        "model": results[0]["model"], "parameters": sum(p.numel() for p in model.parameters()), "lr": results[0]["lr"],
        "validation": [pair[0] for pair in losses], "test": [pair[1] for pair in losses],
        "samples_per_s": statistics.mean(r["steps"] * args.batch_size / r["elapsed"] for r in results),
        "ms_per_token": (time.perf_counter() - start) * 1000 / 100, "peak_mb": max(r["peak"] for r in results) / 1e6,
        "histories": [result["history"] for result in results], "sample": text,
    }  # fmt: skip


def report(args: argparse.Namespace, rows: list[dict], characters: float) -> None:
    """Prints the table, `characters` being those of a target of the test; writes it, and losses over time as a plot."""
    titles = ("model", "parameters", "lr", "validation", "test", "bits/character", "samples/s", "ms/token", "peak MB")
    print(f"\nLosses in nats a token; of several seeds their mean (least to most)\n\n| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for row in rows:
        losses = [row["validation"], row["test"]]
        ranges = [f" ({min(v):.3f} to {max(v):.3f})" if len(v) > 1 else "" for v in losses]
        cells = [f"{statistics.mean(v):.3f}{text}" for v, text in zip(losses, ranges, strict=True)]
        cells.append(f"{statistics.mean(row['test']) / characters / math.log(2):.3f}")
        if "lr" in row:
            cells = [f"{row['parameters']:,}", f"{row['lr']:g}", *cells, f"{row['samples_per_s']:.0f}",
                     f"{row['ms_per_token']:.2f}", f"{row['peak_mb']:.0f}"]  # fmt: skip
        else:
            cells = ["", "", *cells, "", "", ""]
        print(f"| {row['model']} | {' | '.join(cells)} |")
    for row in rows:
        if "sample" in row:
            print(f"\n{row['model']}: {row['sample']!r}")
    command = {key: str(value) for key, value in vars(args).items()}
    (args.out / "results.json").write_text(json.dumps({"arguments": command, "models": rows}, indent=1))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, row in enumerate(rows):
        for j, history in enumerate(row.get("histories", [])):
            axes.plot(*zip(*history, strict=True), f"C{i}.-", label=None if j else row["model"])
        if "histories" not in row:
            axes.axhline(row["validation"][0], color=f"C{i}", linestyle="--", label=row["model"])
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats a token")
    axes.legend()
    figure.savefig(args.out / "losses.png", dpi=150)
    print(f"\n{args.out}: results.json, losses.png, and a folder with each model's best weights and the tokenizer")


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, parts = prepare(args)
    tokens, vocab_size = parts[0].tokens, tokenizer.vocab_size
    trained = []
    for spec in args.models:
        lr = args.lr[0]
        if len(args.lr) > 1:
            tried = [train(args, spec, lr, args.seeds[0], args.tune_minutes, parts, vocab_size) for lr in args.lr]
            lr = min(tried, key=lambda result: result["best"])["lr"]
        trained.append([train(args, spec, lr, seed, args.minutes, parts, vocab_size) for seed in args.seeds])
    rows = [measure(args, results, tokenizer, parts) for results in trained]
    finals = [part.spread(args.final_targets) for part in parts[1:]]
    validation, test = (part.take(torch.arange(len(part))) for part in finals)
    for order, name in ((2, "bigram"), (3, "trigram")):
        ngram = fit_ngram(tokens[: round(len(tokens) * 0.9)], order, vocab_size)
        rows.append({"model": name, "validation": [ngram.loss(validation)], "test": [ngram.loss(test)]})
    report(args, rows, len(tokenizer.decode(test[:, -1])) / len(test))


if __name__ == "__main__":
    main()
