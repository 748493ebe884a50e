"""Import, creation and loading, each in a fresh process, the libraries in turn.

ViT-Base is created and filled from a local folder, timed until one element of every tensor has been read, and then
until the first logits. The time to import is what a library adds where torch has been imported already.
"""

import statistics
import sys
import tempfile
from functools import partial

from .runner import Job, Options, Row, call, matrix_rate

CLOCK = "import json, sys, time, torch; torch.set_num_threads({threads}); now = time.perf_counter\n"
LOAD = (
    "folder = sys.argv[1]\n{imports}\nstart = now()\nmodel = {create}\n"
    "sum(float(t.flatten()[0]) for t in model.state_dict().values())\nloaded = now() - start\n"
    "with torch.inference_mode(): model.eval()(torch.zeros(1, 3, 224, 224))\n"
    "print(json.dumps({{'load': loaded, 'logits': now() - start}}))"
)
IMPORT = (
    "start = now()\nimport {module}\ntime = now() - start\nfrom importlib.metadata import version\n"
    "print(json.dumps({{'import': time, 'version': version('{module}')}}))"
)
IMPORTS = "import, beyond torch"
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
    "patchlib.save_pretrained(patchlib.create_model('vit_base_patch16_224'), sys.argv[1] + '/patchlib')\n"
    "print(0)"
)
MAKE_PEERS = (
    "import sys, timm, transformers; from timm.models._hub import save_for_hf\n"
    "save_for_hf(timm.create_model('vit_base_patch16_224'), sys.argv[1] + '/timm', safe_serialization=True)\n"
    "config = transformers.ViTConfig(num_labels=1000)\n"
    "transformers.ViTForImageClassification(config).save_pretrained(sys.argv[1] + '/transformers')\n"
    "print(0)"
)


def libraries(options: Options) -> dict[str, str]:
    """Each with its python; the peers where there are any."""
    peers = ("timm", "transformers", "torchvision", "vit_pytorch")
    return {"patchlib": sys.executable} | (dict.fromkeys(peers, options.peers) if options.peers else {})


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Without the first round, in which files may still be on their way from the disk."""
    return {name: statistics.median(times[1:]) for name, times in samples.items()}


def imports(options: Options) -> Row:
    samples: dict[str, list[float]] = {}
    versions: dict[str, str] = {}
    for _ in range(1 + options.rounds):
        for module, python in libraries(options).items():
            code = CLOCK.format(threads=options.threads) + IMPORT.format(module=module)
            answer = call(python, "-c", code)
            samples.setdefault(module, []).append(answer["import"])
            versions[module] = answer["version"]
    return Row(IMPORTS, "s", medians(samples), {"timm": 20}, gflops=matrix_rate(options), versions=versions)


def load(key: str, name: str, targets: dict[str, float], options: Options) -> Row:
    samples: dict[str, list[float]] = {}
    found = {library: python for library, python in libraries(options).items() if library in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        call(sys.executable, "-c", MAKE_OWN, folder)
        if options.peers:
            call(options.peers, "-c", MAKE_PEERS, folder)
        for _ in range(1 + options.rounds):
            for library, python in found.items():
                first, create = LOADERS[library]
                code = CLOCK.format(threads=options.threads) + LOAD.format(imports=first, create=create)
                samples.setdefault(library, []).append(call(python, "-c", code, folder)[key])
    return Row(name, "s", medians(samples), targets, gflops=matrix_rate(options))


def jobs() -> list[Job]:
    loads = {
        "load": ("create and load ViT-Base from a folder", {"timm": 20.0, "transformers": 2.0}),
        "logits": ("the same, to the first logits", {}),
    }
    found = [Job(name, partial(load, key, name, targets)) for key, (name, targets) in loads.items()]
    return [Job(IMPORTS, imports), *found]
