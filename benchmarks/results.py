"""The results of a run: a folder with them as JSON, Markdown and plots, complete after each row."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .growth import SETTING, exponent
from .runner import Row

GROWTH = "growth"
COLOURS = ("#2f6fab", "#d9822b", "#4c9a52", "#9b59b6", "#555555")


class Results:
    """Rows by part and name. A folder that has some already is added to.

    Args:
        folder: holds ``results.json``, ``report.md``, ``speed.png`` and ``growth.png``.
        machine: where and how they are measured; a folder of another machine is refused.
    """

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        self.folder, self.machine = folder, machine
        self.rows: dict[str, dict[str, Row]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        if not file.exists():
            return
        found = json.loads(file.read_text())
        if found["machine"] != machine:
            sys.exit(f"{file} was measured on {found['machine']}; this is {machine}: give another --out")
        names = {field.name for field in fields(Row)}
        for part, rows in found["parts"].items():
            kept = [Row(**{key: value for key, value in row.items() if key in names}) for row in rows]
            self.rows[part] = {row.name: row for row in kept}

    def has(self, part: str, name: str) -> bool:
        return name in self.rows.get(part, {})

    def add(self, part: str, row: Row) -> None:
        self.rows.setdefault(part, {})[row.name] = row
        self.write()

    def write(self) -> None:
        def replace(name: str, write: Callable[[Path], object]) -> None:
            beside = self.folder / f"{name}.part"
            write(beside)
            os.replace(beside, self.folder / name)

        replace("results.json", lambda path: path.write_text(json.dumps(self.as_json(), indent=1) + "\n"))
        replace("report.md", lambda path: path.write_text(self.as_markdown()))
        pairs = [(row, other) for rows in self.rows.values() for row in rows.values() for other in row.targets]
        pairs = [(row, other) for row, other in pairs if other in row.values]
        if pairs:
            replace("speed.png", lambda path: plot_ratios(pairs, path))
        if growth := self.rows.get(GROWTH):
            replace("growth.png", lambda path: plot_growth(list(growth.values()), path))

    def as_json(self) -> dict[str, Any]:
        def full(row: Row) -> dict[str, Any]:
            others = [other for other in row.values if other != row.ours]
            known = [other for other in row.targets if other in row.values]
            found = {"ratios": {other: row.ratio(other) for other in others}}
            return {**asdict(row), **found, "reached": {other: row.reached(other) for other in known}}

        parts = {part: [full(row) for row in rows.values()] for part, rows in self.rows.items()}
        return {"machine": self.machine, "parts": parts}

    def as_markdown(self) -> str:
        versions: dict[str, str] = {}
        for rows in self.rows.values():
            for row in rows.values():
                versions |= row.versions
        machine = {**self.machine, **dict(sorted(versions.items()))}
        lines = ["Measured with " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
        for part, rows in self.rows.items():
            lines += ["", f"**{part.capitalize()}**", ""]
            lines += growth_table(list(rows.values())) if part == GROWTH else ratio_table(list(rows.values()))
            if part == GROWTH:
                lines += ["", f"![Time and memory against size, on logarithmic axes]({GROWTH}.png)"]
            elif part == "speed":
                lines += ["", "![How many times faster, by row, with the targets](speed.png)"]
        return "\n".join(lines) + "\n"


def show(value: float, unit: str) -> str:
    """Three digits, in milliseconds where that reads better."""
    if unit == "s" and value < 1:
        value, unit = 1e3 * value, "ms"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def ratio_table(rows: list[Row]) -> list[str]:
    """A line for each contender that a row is compared with."""
    lines = [
        "| work | patchlib | against | its | ratio | target | reached | matrix product, GFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = show(row.values[row.ours], row.unit)
        rate = f"{row.gflops:.0f}" if row.gflops else ""
        for other in [name for name in row.values if name != row.ours] or [""]:
            cells = [row.name, own, other, "", "", "", "", rate]
            if other:
                cells[3:5] = show(row.values[other], row.unit), f"{row.ratio(other):.2f}"
            if other in row.targets and other:
                sign = "at most" if row.share else "at least"
                cells[5:7] = f"{sign} {row.targets[other]:g}", "yes" if row.reached(other) else "no"
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def growth_table(rows: list[Row]) -> list[str]:
    lines = [
        SETTING,
        "",
        "| model, and what grows | library | sizes | time | exponent | memory | exponent |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for contender, curve in row.curves.items():
            cells = [row.name, contender, ", ".join(f"{x:g}" for x in curve["x"])]
            for unit in ("s", "MB"):
                cells += [", ".join(show(y, unit) for y in curve[unit]), f"{exponent(curve['x'], curve[unit]):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot_ratios(pairs: list[tuple[Row, str]], path: Path) -> None:
    """Bars: how many times less time or memory we need, and a mark at the target."""
    figure, axes = _subplots(1, 1, figsize=(9, 0.8 + 0.3 * len(pairs)))
    ax = axes[0][0]
    for i, (row, other) in enumerate(pairs):
        ratio, target = row.ratio(other), row.targets[other]
        ratio, target = (1 / ratio, 1 / target) if row.share else (ratio, target)
        ax.barh(i, ratio, color=COLOURS[0] if row.reached(other) else COLOURS[1], height=0.7)
        ax.plot([target, target], [i - 0.45, i + 0.45], color="black", linewidth=2)
        ax.text(1.01, i, f"{ratio:.2f}", va="center", fontsize=8, transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(pairs)), [f"{row.name} / {other}" for row, other in pairs], fontsize=7)
    ax.set(xscale="log", xlim=(0.5, 50), ylim=(len(pairs) - 0.4, -0.6))  # what is beyond is read from the number
    ax.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    ax.set_xlabel("times less time or memory than the other; the mark is the target", fontsize=8)
    ax.minorticks_off()
    ax.axvline(1, color="black", linewidth=0.6)
    figure.savefig(path, format="png", dpi=110)


def plot_growth(rows: list[Row], path: Path) -> None:
    """Time above, memory below; a column for each thing that grows, a colour for each model."""
    columns = list(dict.fromkeys(row.name.rsplit(", ", 1)[1] for row in rows))
    models = list(dict.fromkeys(row.name.rsplit(", ", 1)[0] for row in rows))
    figure, axes = _subplots(2, len(columns), figsize=(0.6 + 3.4 * len(columns), 6.4))
    for row in rows:
        model, what = row.name.rsplit(", ", 1)
        for contender, curve in row.curves.items():
            for line, unit in enumerate(("s", "MB")):
                ax = axes[line][columns.index(what)]
                style = {"color": COLOURS[models.index(model)], "linestyle": "-" if contender == row.ours else "--"}
                slope = exponent(curve["x"], curve[unit])
                ax.loglog(
                    curve["x"],
                    curve[unit],
                    marker="o",
                    markersize=3,
                    **style,
                    label=f"{model} {contender}: {slope:.2f}",
                )
                ax.set(xlabel=what, ylabel={"s": "seconds", "MB": "MB beside the weights"}[unit])
                ax.set_xticks(curve["x"], [f"{x:g}" for x in curve["x"]])
                ax.minorticks_off()
    for ax in axes.flat:
        ax.legend(fontsize=6, title="exponent", title_fontsize=6, frameon=False)
    figure.savefig(path, format="png", dpi=110)


def _subplots(rows: int, columns: int, figsize: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
