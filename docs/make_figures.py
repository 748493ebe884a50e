"""Draws the pictures of these pages with the library itself:  python docs/make_figures.py [NAME …]

Without names it draws all. The photograph is scikit-image's cat (Stéfan van der Walt, CC0).
"""

import argparse
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image

import patchlib
from patchlib.layers.pos_embed import sinusoid
from patchlib.text.tokenizer import BPETokenizer

DOCS = Path(__file__).parent
TEXT = DOCS.parents[1] / "shared" / "data" / "shakespeare" / "tiny.txt"  # public domain; any long English text will do
BLUE, ORANGE, GREY = "#2f6fab", "#d9822b", "#555555"
STYLE: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "figure.dpi": 110, "savefig.bbox": "tight", "savefig.pad_inches": 0.08,
    "axes.spines.top": False, "axes.spines.right": False, "image.cmap": "coolwarm",
}  # fmt: skip


def photograph(side: int) -> torch.Tensor:
    """The cat, square: ``(3, side, side)``, from 0 to 1."""
    whole = {"mean": 0.0, "std": 1.0, "crop_pct": 1.0, "input_size": (3, side, side)}
    return patchlib.preprocess(whole)(Image.fromarray(skimage.data.chelsea()))[0]


def show(ax: Axes, image: torch.Tensor, title: str = "") -> None:
    ax.imshow(image.permute(1, 2, 0).clamp(0, 1))
    ax.set_title(title)
    ax.axis("off")


def table(ax: Axes, values: torch.Tensor, title: str, *, texts: str = "", limit: float | None = None) -> None:
    """A matrix as coloured cells, with numbers in them if `texts` is a format."""
    limit = limit or float(values.abs().max()) or 1.0
    ax.imshow(values, vmin=-limit, vmax=limit, aspect="equal")
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(True)
    if not texts:
        return
    for (i, j), value in np.ndenumerate(values.numpy()):
        colour = "white" if abs(value) > 0.75 * limit else "black"
        ax.text(j, i, format(float(value), texts), ha="center", va="center", fontsize=7, color=colour)
    for i in range(values.shape[0] + 1):
        ax.axhline(i - 0.5, color="white", linewidth=1)
    for j in range(values.shape[1] + 1):
        ax.axvline(j - 0.5, color="white", linewidth=1)


def grid() -> plt.Figure:
    """An image, its patches, the grid, and the two views of it."""
    image = photograph(96)
    patch_embed = patchlib.PatchEmbed(patch_size=16, dim=12)
    torch.manual_seed(3)
    patch_embed.proj.reset_parameters()
    with torch.no_grad():
        vectors = patch_embed(image[None])[0]  # (6, 6, 12)
    vectors = vectors - vectors.mean((0, 1))
    figure = plt.figure(figsize=(10.5, 4.6))
    photo = figure.add_axes((0.0, 0.30, 0.20, 0.46))
    show(photo, image, "image\n(batch, 3, 96, 96)")

    cut = [figure.add_axes((0.265 + 0.036 * j, 0.694 - 0.082 * i, 0.033, 0.075)) for i in range(6) for j in range(6)]
    for k, ax in enumerate(cut):
        i, j = divmod(k, 6)
        show(ax, image[:, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16])
        ax.text(1, 4, str(k), fontsize=5.5, color="white", bbox={"facecolor": "black", "pad": 0.6, "linewidth": 0})
    figure.text(0.373, 0.79, "6 x 6 patches of 16 x 16 pixels", ha="center", fontsize=10)

    limit = float(vectors.abs().max())
    colours = plt.get_cmap("coolwarm")
    box = figure.add_axes((0.562, 0.24, 0.2, 0.52))
    box.set_xlim(-0.3, 9.6)
    box.set_ylim(8.6, -3.2)
    box.axis("off")
    for c in range(12)[::-1]:
        for i in range(6):
            for j in range(6):
                if c and i and j != 5:
                    continue  # hidden behind the front
                colour = colours(0.5 + float(vectors[i, j, c]) / (2 * limit))
                place = (j + 0.27 * c, i - 0.27 * c)
                box.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4, zorder=12 - c))
    figure.text(0.65, 0.79, "grid\n(batch, 6, 6, dim)", ha="center", fontsize=10)
    box.text(3, 6.9, "width", ha="center", fontsize=8, color=GREY)
    box.text(-0.3, 3, "height", rotation=90, ha="right", va="center", fontsize=8, color=GREY)
    box.text(8.3, 4.6, "dim", fontsize=8, color=GREY)

    tokens = figure.add_axes((0.84, 0.60, 0.16, 0.2))
    tokens.imshow(vectors.flatten(0, 1).T, vmin=-limit, vmax=limit, aspect="auto")
    tokens.set_title("grid.flatten(1, 2): tokens\n(batch, 36, dim)", fontsize=9)
    tokens.set_xticks([0, 35])
    tokens.set_yticks([])
    tokens.tick_params(labelsize=7)
    figure.text(0.92, 0.42, "grid.permute(0, 3, 1, 2): channels\n(batch, dim, 6, 6)", ha="center", fontsize=9)
    for c in range(6):
        ax = figure.add_axes((0.842 + 0.053 * (c % 3), 0.27 - 0.13 * (c // 3), 0.048, 0.115))
        ax.imshow(vectors[..., c], vmin=-limit, vmax=limit)
        ax.axis("off")
    figure.text(0.92, 0.10, "… one map for each of dim", ha="center", fontsize=8, color=GREY)

    def pointer(start: tuple[float, float], end: tuple[float, float], text: str) -> None:
        figure.add_artist(ConnectionPatch(start, end, "figure fraction", arrowstyle="-|>", color=GREY))
        figure.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.03, text, ha="center", fontsize=8, color=GREY)

    pointer((0.207, 0.53), (0.258, 0.53), "cut")
    pointer((0.488, 0.53), (0.54, 0.53), "PatchEmbed")
    pointer((0.775, 0.58), (0.83, 0.68), "")
    pointer((0.775, 0.42), (0.83, 0.30), "")
    figure.text(0.797, 0.50, "views,\nno copies", ha="center", va="center", fontsize=8, color=GREY)
    return figure


def positions_broadcast() -> plt.Figure:
    """The table of positions: a column of patches against a row of frequencies."""
    patches, dim = 6, 8
    position = torch.arange(patches)[:, None].float()
    frequency = (10_000.0 ** (-torch.arange(0, dim, 2) / dim)).repeat_interleave(2)
    rows = sinusoid(torch.arange(patches), dim)
    figure = plt.figure(figsize=(10.5, 6.2))
    width, height = 0.27, 0.27 * 10.5 / 6.2 * patches / dim
    upper, lower = 0.56, 0.09
    column = figure.add_axes((0.04, upper, width, height))
    table(column, position.expand(-1, dim), "position\n(patches, 1)", texts=".0f", limit=9)
    line = figure.add_axes((0.37, upper, width, height))
    table(line, frequency.expand(patches, -1), "frequency\n(dim,)", texts=".3g", limit=2)
    angle = figure.add_axes((0.70, upper, width, height))
    table(angle, position * frequency, "position * frequency\n(patches, dim)", texts=".3g", limit=9)
    column.add_patch(Rectangle((0.5, -0.5), dim - 1, patches, facecolor="white", alpha=0.72, zorder=3))
    line.add_patch(Rectangle((-0.5, 0.5), dim, patches - 1, facecolor="white", alpha=0.72, zorder=3))
    column.add_patch(Rectangle((-0.5, -0.5), 1, patches, fill=False, linewidth=2, zorder=4, clip_on=False))
    line.add_patch(Rectangle((-0.5, -0.5), dim, 1, fill=False, linewidth=2, zorder=4, clip_on=False))
    column.set_ylabel("patches, in reading order", color=GREY, labelpad=8)
    for ax in (column, line):
        ax.text((dim - 1) / 2 + 0.5, 2.5, "repeated", ha="center", va="center", fontsize=13, color=GREY, zorder=5)
    column.annotate("", (7.3, 3.1), (0.6, 3.1), arrowprops={"arrowstyle": "-|>", "color": GREY}, zorder=5)
    line.annotate("", (1.1, 5.4), (1.1, 0.6), arrowprops={"arrowstyle": "-|>", "color": GREY}, zorder=5)
    for x, sign in ((0.34, "x"), (0.67, "=")):
        figure.text(x, upper + height / 2, sign, ha="center", va="center", fontsize=16, color=GREY)

    final = figure.add_axes((0.70, lower, width, height))
    table(final, rows, "", texts=".2f", limit=1.35)
    final.set_xticks(range(dim), ["sin", "cos"] * (dim // 2), fontsize=8)
    final.tick_params(length=0)
    final.set_xlabel("the table, (patches, dim)", fontsize=10)
    figure.add_artist(
        ConnectionPatch(
            (0.835, upper - 0.008), (0.835, lower + height + 0.008), "figure fraction", arrowstyle="-|>", color=GREY
        )
    )
    figure.text(0.845, (upper + lower + height) / 2, "sine or cosine", va="center", color=GREY)
    figure.text(
        0.04, lower + height / 2,
        "The column has one entry a patch, the row one a place in the vector.\n"
        "Multiplied, both are repeated until they are (patches, dim):\n"
        "every patch meets every frequency.\n\n"
        "Frequencies come in pairs. The sine of an angle goes to an even place,\n"
        "its cosine to the odd place beside it.",
        va="center", fontsize=10.5, linespacing=1.5,
    )  # fmt: skip
    return figure


def positions_added() -> plt.Figure:
    """Patches of a photograph, plus the table, for both samples of a batch."""
    images = torch.stack([photograph(96), photograph(96).flip(-1)])
    patch_embed = patchlib.PatchEmbed(16, dim=32)
    positions = patchlib.SinusoidalPE(32)
    with torch.no_grad():
        tokens = patch_embed(images * 2 - 1).flatten(1, 2)
        total = positions(tokens)
    added = positions.table(tokens)
    assert torch.equal(total, tokens + added)
    figure = plt.figure(figsize=(10.5, 4.1))
    width, height = 0.2, 0.66
    columns = [(0.05, tokens), (0.40, added), (0.75, total)]
    for x, values in columns:
        layers = list(values) if values.dim() == 3 else [values]
        for k, layer in reversed(list(enumerate(layers))):
            ax = figure.add_axes((x + 0.018 * k, 0.13 + 0.035 * k, width, height))
            ax.imshow(layer, vmin=-1.5, vmax=1.5, aspect="auto")
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set_visible(True)
        ax.set_xlabel("dim", color=GREY)
        ax.set_ylabel("patches", color=GREY)
    heads = ["patches of two images\n(batch, patches, dim)", "table\n(patches, dim)", "what the blocks read"]
    for (x, _), text in zip(columns, [*heads[:2], heads[2] + "\n(batch, patches, dim)"], strict=True):
        figure.text(x + width / 2, 0.86, text, ha="center", fontsize=10)
    for x, sign in ((0.337, "+"), (0.675, "=")):
        figure.text(x, 0.47, sign, ha="center", va="center", fontsize=18, color=GREY)
    figure.text(
        0.5, 0.015, "The same table is added to every image of the batch: (patches, dim) has no batch axis, "
        "and is repeated along it.", ha="center", color=GREY,
    )  # fmt: skip
    return figure


def positions_waves() -> plt.Figure:
    """The table of a 14 x 14 grid, as a picture and as curves."""
    dim = 64
    rows = sinusoid(torch.arange(196), dim)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1, 1.25), layout="constrained")
    left.imshow(rows, vmin=-1.3, vmax=1.3, aspect="auto", interpolation="nearest")
    left.set(title="table (196, 64)", xlabel="dim", ylabel="patch")
    for place, colour in ((0, BLUE), (8, ORANGE), (20, "#4c9a52"), (40, "#9b59b6")):
        wavelength = 2 * np.pi * 10_000 ** (place / dim)
        right.plot(rows[:, place], color=colour, linewidth=1, label=f"place {place}: {wavelength:,.1f} patches a wave")
    right.set(title="four columns of it: sines, slower and slower", xlabel="patch", xlim=(0, 195), ylim=(-1.1, 1.9))
    right.legend(ncols=2, fontsize=8, frameon=False, loc="upper center")
    return figure


def positions_similarity() -> plt.Figure:
    """How alike the position of one patch is to those of all others."""
    dim, side, chosen = 64, 14, (4, 9)
    cells = torch.zeros(1, side, side, dim)
    line = patchlib.SinusoidalPE(dim).table(cells)
    axial = patchlib.SinusoidalPE(dim, axes=2).table(cells)
    angles = patchlib.RotaryPE(dim)((side, side)).view(side, side, -1)
    turned = (angles - angles[chosen]).cos().mean(-1)  # of a query with itself, averaged over its pairs
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
    titles = [
        "SinusoidalPE(64)\ncounts patches in reading order",
        "SinusoidalPE(64, axes=2)\nrow and column",
        "RotaryPE(64)\nturns queries and keys",
    ]
    alike = [(t @ t[chosen]) / (dim / 2) for t in (line, axial)]
    for ax, values, title in zip(axes, [*alike, turned], titles, strict=True):
        shown = ax.imshow(values, vmin=0, vmax=1, cmap="viridis")
        ax.add_patch(Rectangle((chosen[1] - 0.5, chosen[0] - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.6))
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(shown, ax=axes, shrink=0.8, label="similarity to the framed patch")
    return figure


def masked_images() -> plt.Figure:
    """Digits, what was seen of them, and what was made of it: by the code of masked_images.md, trained longer."""
    code = "".join(re.findall(r"```python\n(.*?)```", (DOCS / "masked_images.md").read_text(), re.DOTALL)[:-1])
    page: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        exec(code.replace("steps = 300\n", "steps = 4000\n"), page)
    assert page["steps"] == 4000
    torch.manual_seed(1)
    images = page["held_out"][[3, 10, 25, 40, 61, 77, 102, 140]]
    with torch.no_grad():
        seen = page["encoder"].encode(page["hide"](page["encoder"].embed(images), share=0.5))
        guess = page["decoder"](seen)
    known = torch.zeros(len(images), 16, 1).scatter(1, seen.keep[..., None], 1.0).unflatten(1, (4, 4))
    true = page["pixels"](images)
    rows = [true, true * known + 0.5 * (1 - known), true * known + guess * (1 - known)]
    figure, axes = plt.subplots(3, len(images), figsize=(7.6, 3.1), layout="constrained")
    for row, patches, word in zip(axes, rows, ("digit", "half of it", "guessed"), strict=True):
        pictures = rearrange(patches, "b h w (p q) -> b (h p) (w q)", p=2)
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(word, rotation=0, ha="right", va="center")
    for ax, mask in zip(axes[1], known[..., 0], strict=True):
        for i, j in (mask == 0).nonzero().tolist():
            ax.add_patch(
                Rectangle((2 * j - 0.5, 2 * i - 0.5), 2, 2, facecolor="#9ab7d3", edgecolor="white", linewidth=0.5)
            )
    return figure


def sentence() -> plt.Figure:
    """A sentence as an image, by embeddings that a small language model learns here from `TEXT`."""
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = BPETokenizer.train([text], 512)
    ids = torch.tensor(tokenizer.encode(text))
    trunk = {"kind": "convnextv2", "depths": (2, 2), "dims": (64, 128), "patch_size": 8}
    model = patchlib.ConvNeXtV2LM(vocab_size=512, num_tokens=36, patch_size=8, readout="pool", trunk=trunk)
    steps = 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids) - 37, (64, 1)) + torch.arange(37)]
        loss = F.cross_entropy(model(batch[:, :-1])[:, 0], batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"loss of the last step: {loss.item():.2f}")

    words = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"
    chosen = tokenizer.encode(words)[:36]
    encoder, given = model.encoder, torch.tensor([chosen])
    with torch.no_grad():
        plain = encoder.to_image(F.embedding(given, encoder.tokens))[0]
        placed = encoder(given)[0]
    spread = 2.5 * float(placed[placed != 0].std())
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.0), layout="constrained")
    titles = (
        f"{len(chosen)} tokens, in reading order",
        "each as a patch of 8 x 8 pixels",
        "with positions: what the trunk reads",
    )
    repeated = [token for token in dict.fromkeys(chosen) if chosen.count(token) > 1]
    colours = mpl.color_sequences["tab10"]
    for ax, image, title in zip(axes, (None, plain, placed), titles, strict=True):
        shown = torch.ones_like(plain) if image is None else 0.5 + image / (2 * spread)
        ax.imshow(shown.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
        for place in range(0, 49, 8):
            ax.axhline(place - 0.5, color="lightgrey" if image is None else "white", linewidth=3)
            ax.axvline(place - 0.5, color="lightgrey" if image is None else "white", linewidth=3)
        for i, token in enumerate(chosen):
            if token in repeated:
                colour = colours[repeated.index(token) % 10]
                corner = (i % 6 * 8 - 0.4, i // 6 * 8 - 0.4)
                ax.add_patch(Rectangle(corner, 7.8, 7.8, fill=False, edgecolor=colour, linewidth=2.2, zorder=3))
    for i, token in enumerate(chosen):
        word = tokenizer.decode([token])
        word = word.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        axes[0].text(i % 6 * 8 + 3.5, i // 6 * 8 + 3.5, word, ha="center", va="center", fontsize=10)
    return figure


def depthwise_gradient() -> plt.Figure:
    """The kernels' gradient of a depthwise convolution, as one convolution over batch * channels channels."""
    first = photograph(48)
    images = torch.stack([first, first.flip(-1)])
    images -= images.mean((2, 3), keepdim=True)
    conv = torch.nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
    output = conv(images)
    output.retain_grad()
    (output - images.roll(1, dims=-1)).square().sum().backward()  # each kernel is to learn a shift by one pixel
    assert output.grad is not None
    assert conv.weight.grad is not None
    maps = F.conv2d(images.reshape(1, 6, 48, 48), output.grad.reshape(6, 1, 48, 48), padding=2, groups=6)
    total = maps.reshape(2, 3, 5, 5).sum(0)
    assert torch.allclose(total, conv.weight.grad[:, 0], rtol=1e-4)

    figure = plt.figure(figsize=(9.2, 7.4))
    height, gap = 0.118, 0.136
    heads = ("input\n(1, batch * channels, 48, 48)", "output's gradient, as kernels\n(batch * channels, 1, 48, 48)",
             "convolved\n(1, batch * channels, 5, 5)", "added over the batch:\ngradient of the kernels")  # fmt: skip
    lefts = (0.06, 0.31, 0.56, 0.83)
    names = ("red", "green", "blue")
    limit = float(total.abs().max())
    for k in range(6):
        bottom = 0.77 - gap * k - (0.035 if k > 2 else 0)
        kernel = output.grad.flatten(0, 1)[k]
        views = ((images.flatten(0, 1)[k], 0.5), (kernel, float(output.grad.abs().max()) * 0.7), (maps[0, k], limit))
        for x, (values, most) in zip(lefts, views, strict=False):
            ax = figure.add_axes((x, bottom, 0.095, height))
            ax.imshow(values.detach(), vmin=-most, vmax=most, cmap="gray" if x == lefts[0] else "coolwarm")
            ax.set_xticks([])
            ax.set_yticks([])
            if x == lefts[0]:
                ax.set_ylabel(names[k % 3], color=GREY, fontsize=8)
        for x, sign in ((0.232, "*"), (0.482, "=")):
            figure.text(x, bottom + height / 2, sign, ha="center", va="center", fontsize=15, color=GREY)
        middle = 0.77 - gap * (k % 3) - 0.5 * (3 * gap + 0.035) + height / 2
        start, end = (0.66, bottom + height / 2), (0.822, middle)
        figure.add_artist(ConnectionPatch(start, end, "figure fraction", arrowstyle="-|>", color=GREY, linewidth=0.8))
        if k < 3:
            ax = figure.add_axes((lefts[3], middle - height / 2, 0.095, height))
            ax.imshow(total[k], vmin=-limit, vmax=limit)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.yaxis.set_label_position("right")
            ax.set_ylabel(names[k], color=GREY, fontsize=8)
    for x, head in zip(lefts, heads, strict=True):
        figure.text(x + 0.0475, 0.91, head, ha="center", fontsize=9.5)
    for bottom, word in ((0.62, "first image"), (0.175, "second image")):
        figure.text(0.012, bottom + 0.07, word, rotation=90, va="center", fontsize=10)
    return figure


def language_losses() -> plt.Figure:
    """Validation losses over the minutes of training, as `examples/train_text.py` measured them."""
    names = {"gpt_tiny": "GPT", "convnextv2_lm_tiny": "ConvNeXtV2LM, windowed", "causal_conv_lm_tiny": "CausalConvLM"}
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, row in enumerate(json.loads((DOCS / "measured" / "language.json").read_text())["models"]):
        if "histories" not in row:
            ax.axhline(row["validation"][0], color="grey", linestyle="--", linewidth=1)
            ax.text(0.3, row["validation"][0], row["model"], va="bottom", color="dimgrey")
            continue
        for j, history in enumerate(row["histories"]):
            seconds, losses = zip(*history, strict=True)
            label = None if j else names[row["model"].partition(":")[0]]
            ax.plot([s / 60 for s in seconds], losses, f"C{i}.-", label=label)
    ax.set(xlabel="minutes of training on one core", ylabel="validation loss, nats a byte", ylim=(1.5, 2.8))
    ax.legend()
    return figure


def crops() -> plt.Figure:
    """One photograph through the three crop modes."""
    cat = Image.fromarray(skimage.data.chelsea())
    plain = patchlib.preprocess({"input_size": (3, 192, 192), "mean": 0.0, "std": 1.0, "background": (0.5, 0.45, 0.4)})
    ways = [
        ("photograph, 451 x 300", None),
        ('"center", crop_pct=0.875', plain),
        ('"squash", crop_pct=1', plain.replace(crop_mode="squash", crop_pct=1.0)),
        ('"border", crop_pct=1', plain.replace(crop_mode="border", crop_pct=1.0)),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(7.4, 1.9), layout="constrained", width_ratios=(1.5, 1, 1, 1))
    for ax, (title, prepare) in zip(axes, ways, strict=True):
        ax.imshow(cat if prepare is None else prepare(cat)[0].permute(1, 2, 0).clamp(0, 1))
        ax.set_title(title, fontsize=8)
        ax.axis("off")
    return figure


FIGURES = [
    grid,
    positions_broadcast,
    positions_added,
    positions_waves,
    positions_similarity,
    masked_images,
    crops,
    depthwise_gradient,
    sentence,
    language_losses,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = {function.__name__: function for function in FIGURES}
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(figures))
    parser.add_argument("--out", type=Path, default=DOCS / "images")
    args = parser.parse_args()
    mpl.use("agg")
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name in args.names or figures:
            torch.manual_seed(0)
            figure = figures[name]()
            drawn = io.BytesIO()
            figure.savefig(drawn)
            plt.close(figure)
            Image.open(drawn).convert("RGB").save(args.out / f"{name}.png", optimize=True)
            print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
