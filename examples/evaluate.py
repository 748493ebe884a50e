"""Accuracy of a model on a folder of images, one sub-folder a class named as in the model's labels.

python examples/evaluate.py convmixer_16 photos/test
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import patchlib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name, or a source such as local-dir:folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    model = patchlib.create_model(args.model, pretrained=True)
    prepare, labels = patchlib.preprocess(model), list(model.info["labels"])
    files = [(path, labels.index(sub.name)) for sub in sorted(args.folder.iterdir()) for path in sorted(sub.iterdir())]
    hits = 0
    for start in tqdm(range(0, len(files), args.batch), leave=False):
        part = files[start : start + args.batch]
        with torch.no_grad():
            found = model(prepare([Image.open(path) for path, _ in part])).argmax(dim=1)
        hits += int((found == torch.tensor([label for _, label in part])).sum())
    print(f"{hits} of {len(files)} right: {hits / len(files):.4f}")


if __name__ == "__main__":
    main()
