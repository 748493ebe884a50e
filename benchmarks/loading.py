"""Import, creation and loading, each in a fresh process, the libraries in turn:

    python -m benchmarks.loading --peers DIR/bin/python [--rounds 5]

ViT-Base is created and filled from a local folder, timed until one element of every tensor has been read, and then
until the first logits. `added import` is what a library's import costs where torch has been imported already.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

CLOCK = "import time, torch; torch.set_num_threads(2); now = time.perf_counter\n"
LOAD = CLOCK + (
    "import sys; folder = sys.argv[1]\n{imports}\nstart = now()\nmodel = {create}\n"
    "sum(float(t.flatten()[0]) for t in model.state_dict().values())\nloaded = now() - start\n"
    "with torch.inference_mode(): {call}\nprint({{'load': loaded, 'logits': now() - start}})"
)
IMPORT = CLOCK + "start = now()\nimport {module}\nprint({{'import': now() - start}})"
IMAGE = "model.eval()(torch.zeros(1, 3, 224, 224))"
LOADERS = {
    "patchlib": (
        "import patchlib; patchlib.create_model",
        "patchlib.create_model('local-dir:' + folder + '/patchlib')",
    ),
    "timm": ("import timm", "timm.create_model('local-dir:' + folder + '/timm', pretrained=True)"),
    "transformers": (
        "from transformers import ViTForImageClassification as M",
        "M.from_pretrained(folder + '/transformers')",
    ),
}
MAKE_OWN = (
    "import sys, patchlib\n"
    "patchlib.save_pretrained(patchlib.create_model('vit_base_patch16_224'), sys.argv[1] + '/patchlib')"
)
MAKE_PEERS = (
    "import sys, timm, transformers; from timm.models._hub import save_for_hf\n"
    "save_for_hf(timm.create_model('vit_base_patch16_224'), sys.argv[1] + '/timm', safe_serialization=True)\n"
    "config = transformers.ViTConfig(num_labels=1000)\n"
    "transformers.ViTForImageClassification(config).save_pretrained(sys.argv[1] + '/transformers')"
)


def run(python: str, code: str, *arguments: str) -> dict[str, float]:
    """Runs code in a fresh process; the last line it prints is its answer."""
    result = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{python} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1].replace("'", '"'))


def measure(peers: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians in seconds: ``{library: {import, load, logits}}``."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", MAKE_OWN, folder], check=True)
        subprocess.run([peers, "-c", MAKE_PEERS, folder], check=True, capture_output=True)
        for _ in range(rounds):
            for name, (imports, create) in LOADERS.items():
                python = sys.executable if name == "patchlib" else peers
                answer = run(python, LOAD.format(imports=imports, create=create, call=IMAGE), folder)
                for key, value in answer.items():
                    found.setdefault(name, {}).setdefault(key, []).append(value)
            for module in ("patchlib", "timm", "transformers", "torchvision", "vit_pytorch"):
                python = sys.executable if module == "patchlib" else peers
                for key, value in run(python, IMPORT.format(module=module)).items():
                    found.setdefault(module, {}).setdefault(key, []).append(value)
    return {name: {key: statistics.median(values) for key, values in times.items()} for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="python of the environment of benchmarks/peers.txt")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    times = measure(args.peers, args.rounds)
    own = times["patchlib"]
    print("| library | added import, ms | create + load ViT-Base, ms | to first logits, ms | load / patchlib's |")
    print("|---|---|---|---|---|")
    for name, row in times.items():
        cells = [f"{row[key] * 1e3:.1f}" if key in row else "" for key in ("import", "load", "logits")]
        ratio = f"{row['load'] / own['load']:.1f}" if "load" in row else ""
        print(f"| {name} | {' | '.join(cells)} | {ratio} |")


if __name__ == "__main__":
    main()
