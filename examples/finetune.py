"""Trains any patchlib image model on a folder of images, one sub-folder a class.

    python examples/finetune.py --data photos/train --model convmixer_16 --epochs 100 --out out/cats_dogs
    python examples/finetune.py --data photos/train --model vit_small_patch16_224 --pretrained

A part of the images is kept back (every tenth of each class, by a fixed shuffle). The weights that did best on it are
saved after each improvement, with what rebuilds the model; Ctrl-C keeps the best so far. What is saved is a running
mean of the weights, which does better than the last ones.
"""

import argparse
import datetime
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import patchlib


def load_folder(folder: Path, side: int) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a folder as (n, 3, side, side) bytes, their classes, and the classes' names."""
    kinds = Image.registered_extensions()
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in kinds)
    classes = sorted({path.parent.name for path in files})
    if len(classes) < 2:
        sys.exit(f"{folder}: found images in {len(classes)} sub-folders; a class needs one each, and two at least")

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        except OSError as error:
            sys.exit(f"{path}: no image that can be read ({error}); mend or remove it")
        return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)

    pixels = torch.stack(thread_map(read, files, desc="read", leave=False))
    return pixels, torch.tensor([classes.index(path.parent.name) for path in files]), classes


def split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation part; the same share of each class, always the same images."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for one_class in (order[labels[order] == c] for c in labels.unique()):
        kept[one_class[: round(fraction * len(one_class))]] = True
    return (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]


def augment(images: Tensor, light: float, smallest: float = 0.35) -> Tensor:
    """Random crops of `smallest` to all of the area, a little stretched, flips, and other light, for a whole batch."""
    n = len(images)
    area, stretch = torch.empty(2, n, device=images.device).uniform_(0, 1)
    scale = (smallest + (1 - smallest) * area).sqrt()
    ratio = (stretch * 0.5 - 0.25).exp()
    size = torch.stack([scale * ratio, scale / ratio], dim=1).clamp(max=1)
    shift = torch.empty(n, 2, device=images.device).uniform_(-1, 1) * (1 - size)
    flip = torch.where(torch.rand(n, device=images.device) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n, device=images.device)
    rows = [torch.stack([size[:, 0] * flip, zero, shift[:, 0]], 1), torch.stack([zero, size[:, 1], shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    gain, shift = torch.empty(2, n, 3, 1, 1, device=images.device).uniform_(-light, light)
    return images * (1 + gain) + shift


def mix(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blends a batch with a shuffle of itself: all pixels (mixup) or one rectangle (CutMix), by chance."""
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    other = torch.randperm(len(images), device=images.device)
    if torch.rand(()) < 0.5:
        return images.lerp(images[other], share), targets.lerp(targets[other], share)
    height, width = (round(n * share**0.5) for n in images.shape[-2:])
    top, left = (int(torch.randint(n - m + 1, ())) for n, m in zip(images.shape[-2:], (height, width), strict=True))
    cut = (..., slice(top, top + height), slice(left, left + width))
    mixed = images.clone()
    mixed[cut] = images[other][cut]
    return mixed, targets.lerp(targets[other], height * width / images[0, 0].numel())


@torch.no_grad()
def accuracy(model: torch.nn.Module, prepare, pixels: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Share of images whose largest logit is their class."""
    model.eval()
    hits = sum(
        int((model(prepare(part)).argmax(1) == wanted).sum())
        for part, wanted in zip(pixels.split(batch), labels.split(batch), strict=True)
    )
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder a class")
    parser.add_argument("--model", default="convmixer_16")
    parser.add_argument("--pretrained", action="store_true", help="start from the model's default weights")
    parser.add_argument("--checkpoint", help="start from this file or folder instead")
    parser.add_argument("--out", type=Path, default=Path("out/finetuned"))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--mix", type=float, default=0.8, help="strength of mixup and CutMix; 0 for none")
    parser.add_argument("--light", type=float, default=0.3, help="change of each channel's gain and offset")
    parser.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the running mean of the weights")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the images that is kept back")
    parser.add_argument("--patience", type=int, default=40, help="stop after so many epochs without improvement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--license", default="other", help="of the data, for the saved model's card")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    side = patchlib.model_info(args.model).input_size[-1]
    pixels, labels, classes = load_folder(args.data, side)
    start = {"pretrained": args.pretrained, "checkpoint": args.checkpoint}
    model = patchlib.create_model(
        args.model, **start, num_classes=len(classes), drop_path=args.drop_path, device=device
    )
    spec = {"input_size": [3, side, side], "crop_pct": 1.0, **model.info.get("preprocessing", {})}
    command = f"python examples/finetune.py {' '.join(sys.argv[1:])}"
    model.info = {"labels": classes, "preprocessing": spec, "command": command, "license": args.license}
    prepare = patchlib.preprocess(model)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (prepare.mean, prepare.std))

    def normalise(images: Tensor) -> Tensor:
        return (images.float() / 255 - mean) / std

    pixels, labels = pixels.to(device), labels.to(device)
    training, validation = (part.to(device) for part in split(labels.cpu(), args.validation))
    skip = model.no_weight_decay()
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and name not in skip]
    others = [p for name, p in model.named_parameters() if p.dim() <= 1 or name in skip]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.average), use_buffers=True)
    batch = min(args.batch, len(training))
    steps = args.epochs * (len(training) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    print(f"{len(training)} images to train, {len(validation)} kept back, {len(classes)} classes, on {device}")

    best, best_epoch = 0.0, 0
    try:
        for epoch in range(args.epochs):
            model.train()
            order = training[torch.randperm(len(training), device=device)]
            for chosen in tqdm(order[: len(order) // batch * batch].split(batch), f"epoch {epoch}", leave=False):
                images = augment(normalise(pixels[chosen]), args.light)
                wanted = F.one_hot(labels[chosen], len(classes)).float()
                if args.mix:
                    images, wanted = mix(images, wanted, args.mix)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = F.cross_entropy(model(images), wanted, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                average.update_parameters(model)
            score = accuracy(average.module, normalise, pixels[validation], labels[validation])
            if score > best:
                best, best_epoch = score, epoch
                found = {"validation_accuracy": round(score, 4), "date": datetime.date.today().isoformat()}
                average.module.info = model.info | found
                patchlib.save_pretrained(average.module, args.out, dtype=torch.float16)
            print(f"epoch {epoch}: loss {loss.item():.3f}, validation {score:.4f} (best {best:.4f} at {best_epoch})")
            if epoch - best_epoch >= args.patience:
                break
    except KeyboardInterrupt:
        print("stopped; the best so far is kept")
    if best:
        print(f"{args.out}: validation accuracy {best:.4f} after epoch {best_epoch}")


if __name__ == "__main__":
    main()
