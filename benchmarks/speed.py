"""Inference and training speed, this library and timm in turn, A B A B, each in a fresh process:

    python -m benchmarks.speed --peers DIR/bin/python [--rounds 3] [--only convmixer] [--out out/speed]

Same threads, dtype and batch. A ratio is timm's median time over patchlib's: above 1, patchlib is faster. The machine's
matrix-product rate, measured in the same run, stands beside, since a shared machine's speed changes by the hour.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

THREADS = 2
# label, model, what is timed, dtype, batch
WORK = [
    ("ConvMixer-768/32 inference", "convmixer_768_32", "inference", "fp32", 4),
    ("ConvMixer-768/32 inference", "convmixer_768_32", "inference", "bf16", 4),
    ("ConvMixer-768/32 training step", "convmixer_768_32", "training", "fp32", 4),
    ("ConvMixer-768/32 training step", "convmixer_768_32", "training", "bf16", 4),
    ("ViT-Base/16 inference", "vit_base_patch16_224", "inference", "fp32", 4),
    ("ViT-Base/16 inference", "vit_base_patch16_224", "inference", "bf16", 4),
    ("ConvNeXtV2-Tiny inference", "convnextv2_tiny", "inference", "fp32", 4),
    ("ConvNeXtV2-Tiny inference", "convnextv2_tiny", "inference", "bf16", 4),
    ("ConvNeXtV2-Tiny training step", "convnextv2_tiny", "training", "fp32", 4),
    ("ConvNeXtV2-Tiny training step", "convnextv2_tiny", "training", "bf16", 4),
]
CHILD = """
import contextlib, json, sys, time
import torch
library, name, what, dtype, batch, layout, seconds, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
create = __import__(library).create_model
model = create(name).train(what == "training")
images = torch.randn(batch, 3, 224, 224)
if layout == "channels_last":
    model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
cast = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
def step():
    if what == "inference":
        with torch.inference_mode(), cast:
            model(images)
        return
    with cast:
        loss = model(images).float().square().mean()
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
step()
times, start = [], time.perf_counter()
while len(times) < 2 or time.perf_counter() - start < seconds:
    before = time.perf_counter()
    step()
    times.append(time.perf_counter() - before)
a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
a @ b
before = time.perf_counter()
for _ in range(10):
    a @ b
print(json.dumps({"times": times, "gflops": 10 * 2 * 1024**3 / (time.perf_counter() - before) / 1e9}))
"""


def child(python: str, *work: object) -> dict[str, list[float] | float]:
    """Runs one piece of work in a fresh process."""
    result = subprocess.run([python, "-c", CHILD, json.dumps(work)], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{work}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure(peers: str, rounds: int, seconds: float, only: str) -> list[dict[str, object]]:
    """One row a piece of work: median times in seconds, ratios, and the machine's matrix-product rate."""
    rows = []
    for label, name, what, dtype, batch in (work for work in WORK if only in work[1]):
        contenders = {
            "patchlib": (sys.executable, "patchlib", "default"),
            "timm": (peers, "timm", "default"),
            "timm channels_last": (peers, "timm", "channels_last"),
        }
        times: dict[str, list[float]] = {key: [] for key in contenders}
        rates: list[float] = []
        for _ in range(rounds):
            for key, (python, library, layout) in contenders.items():
                answer = child(python, library, name, what, dtype, batch, layout, seconds, THREADS)
                times[key] += answer["times"]  # type: ignore[operator]
                rates.append(answer["gflops"])  # type: ignore[arg-type]
        medians = {key: statistics.median(values) for key, values in times.items()}
        ratios = {key: medians[key] / medians["patchlib"] for key in contenders if key != "patchlib"}
        row = {"work": label, "dtype": dtype, "batch": batch, "seconds": medians, "ratios": ratios}
        rows.append(row | {"matrix_gflops": statistics.median(rates)})
        speeds = " | ".join(f"{batch / medians[key]:.2f}" for key in contenders)
        shown = " | ".join(f"{ratio:.2f}" for ratio in ratios.values())
        print(f"| {label} | {dtype} | {speeds} | {shown} | {statistics.median(rates):.0f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="python of the environment of benchmarks/peers.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each round of each contender")
    parser.add_argument("--only", default="", help="a piece of the models' names")
    parser.add_argument("--out", type=Path, help="folder for speed.json")
    args = parser.parse_args()
    print(
        "| work | dtype | patchlib, images/s | timm | timm channels_last | ratio | ratio to channels_last | GFLOP/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = measure(args.peers, args.rounds, args.seconds, args.only)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
