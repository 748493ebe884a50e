"""The main job in three minutes, offline: `make demo`, or `make demo IMAGES="a.jpg b.jpg"`.

1. The bundled weights tell cats from dogs, on a photograph that scikit-image ships and on any that you name.
2. A hybrid of convolutions and attention, given as data, learns handwritten digits.
3. It is saved, loaded again without its code, and gives the same numbers; a picture shows what it saw.

Exits with 1 if the cat is no cat, the digits stay under 0.95, or the reloaded model differs.
"""

import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from tqdm import tqdm

import patchlib

OUT = Path("out/demo")
SECONDS = 60


def classify(images: dict[str, Image.Image]) -> dict[str, str]:
    """The most likely class of each image, by the weights in the package."""
    model = patchlib.create_model("convmixer_16", pretrained=True)
    prepare = patchlib.preprocess(model)
    with torch.no_grad():
        shares = model(prepare(list(images.values()))).softmax(dim=1)
    answers = {}
    for name, share in zip(images, shares, strict=True):
        answers[name] = model.info["labels"][int(share.argmax())]
        print(f"  {name}: {answers[name]} ({share.max():.1%})")
    return answers


def train_digits() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A small hybrid, trained on four fifths of the digits; with the images and labels of the other fifth."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]

    torch.manual_seed(0)
    model = patchlib.PatchNet(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        pos_embed={"kind": "sinusoidal", "axes": 2},
        stages=[
            {"kind": "convmixer", "depth": 2, "dim": 64, "kernel_size": 5},
            {"kind": "transformer", "depth": 2, "dim": 128, "downsample": 2, "heads": 4},
        ],
    )
    model.info["labels"] = [str(i) for i in range(10)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    start = time.monotonic()
    with tqdm(total=SECONDS, unit="s", bar_format="  {l_bar}{bar}| {n:.0f}/{total} s {postfix}") as bar:
        while (passed := time.monotonic() - start) < SECONDS:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - passed / SECONDS)
            chosen = training[torch.randint(len(training), (128,))]
            shift = torch.randint(-1, 2, (2,)).tolist()
            batch = images[chosen].roll(shift, dims=(2, 3))
            loss = F.cross_entropy(model(batch), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.n = min(passed, SECONDS)
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval(), images[held_out], labels[held_out]


def draw(images: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor, path: Path) -> None:
    """A sheet of held-out digits with what was predicted; mistakes first, in red."""
    found = logits.argmax(dim=1)
    order = torch.argsort((found == labels).long(), stable=True)[:40]
    figure, axes = plt.subplots(4, 10, figsize=(10, 4.6))
    for axis, i in zip(axes.flat, order.tolist(), strict=True):
        axis.imshow(images[i, 0], cmap="gray_r")
        right = found[i] == labels[i]
        axis.set_title(f"{found[i]}" if right else f"{found[i]}, is {labels[i]}", color="black" if right else "red")
        axis.axis("off")
    figure.suptitle("Held-out digits and what the hybrid takes them for")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> int:
    failures = []
    images = {"the cat of scikit-image": Image.fromarray(skimage.data.chelsea())}
    for path in sys.argv[1:]:
        try:
            images[path] = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            print(f"  {path}: not a readable image ({error})", file=sys.stderr)
            failures.append(f"{path} could not be read")
    print("cats and dogs, with the weights in the package:")
    if classify(images)["the cat of scikit-image"] != "cat":
        failures.append("the cat was taken for a dog")

    print(f"a hybrid given as data learns handwritten digits for {SECONDS} seconds:")
    model, held_out, labels = train_digits()
    with torch.no_grad():
        logits = model(held_out)
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    print(f"  accuracy on the {len(labels)} held-out digits: {accuracy:.4f}")
    if accuracy < 0.95:
        failures.append(f"accuracy {accuracy:.4f} is under 0.95")

    folder = patchlib.save_pretrained(model, OUT / "digits")
    with torch.no_grad():
        same = torch.equal(patchlib.create_model(f"local-dir:{folder}")(held_out), logits)
    print(f"saved to {folder} and loaded again: {'the same numbers' if same else 'other numbers'}")
    if not same:
        failures.append("the reloaded model gives other numbers")
    draw(held_out, labels, logits, OUT / "digits.png")
    print(f"picture: {OUT / 'digits.png'}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
