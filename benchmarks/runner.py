"""Runs contenders in turn, A B A B, each time in a fresh process."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
OWN = ("patchlib", "plain")  # contenders that run in this environment


class BenchmarkError(Exception):
    """A process that measures has failed."""


class Piece(NamedTuple):
    """A piece of work: `model` is a name for `create_model`, or a class; `what` is "training", "inference" (of images,
    or of tokens if there is no `side`), or "generate" (of `tokens` after 16); `dtype` is "fp32" or "bf16"."""

    model: str
    options: dict[str, Any]
    what: str
    dtype: str
    batch: int
    side: int = 0
    tokens: int = 0


class Options(NamedTuple):
    """How to measure: `peers` is the python of the environment of ``peers.txt``, or None to leave the peers out."""

    peers: str | None = None
    rounds: int = 3
    seconds: float = 4.0
    threads: int = 2


@dataclass
class Row:
    """One measurement: a number for each contender, this library's first.

    Attributes:
        name: what was done.
        unit: of the values, "s" or "MB"; less is better.
        values: by contender, medians.
        targets: ratios that are to be reached, by the contender they are against.
        share: the ratio is our part of theirs, and is to stay below the target; else it is theirs over ours, a speed.
        gflops: the machine's matrix products in the same minutes.
        versions: of the libraries.
        curves: for plots, by contender: lists of the same length, "x" and what was measured there.
    """

    name: str
    unit: str
    values: dict[str, float]
    targets: dict[str, float] = field(default_factory=dict)
    share: bool = False
    gflops: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return next(iter(self.values))

    def ratio(self, other: str) -> float:
        ours, theirs = self.values[self.ours], self.values[other]
        return ours / theirs if self.share else theirs / ours

    def reached(self, other: str) -> bool:
        ratio, target = self.ratio(other), self.targets[other]
        return ratio <= target if self.share else ratio >= target


class Job(NamedTuple):
    """A row that can be measured."""

    name: str
    run: Callable[[Options], Row]


def call(python: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Runs python; the last line that it prints is the answer."""
    env = {**os.environ, **environment}
    if python == sys.executable:
        env["PYTHONPATH"] = str(HERE.parent)
    result = subprocess.run([python, "-P", *arguments], capture_output=True, text=True, check=False, env=env)
    if result.returncode:
        raise BenchmarkError(f"{python} {' '.join(arguments)[:300]} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def python_of(contender: str, options: Options) -> str | None:
    return sys.executable if contender.split()[0] in OWN else options.peers


def in_turn(
    contenders: Sequence[str], pieces: Sequence[Piece], options: Options, **environment: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Contenders with their answers (see `child`), round by round; those without an environment are left out."""
    for _ in range(options.rounds):
        for contender in contenders:
            if python := python_of(contender, options):
                work = {"contender": contender, "pieces": [piece._asdict() for piece in pieces]}
                task = {**work, "seconds": options.seconds, "threads": options.threads}
                yield contender, call(python, str(HERE / "child.py"), json.dumps(task), **environment)


def matrix_rate(options: Options) -> float:
    """GFLOP/s of this machine's matrix products, now."""
    ((_, answer),) = in_turn(["plain"], [], options._replace(rounds=1))
    return answer["gflops"]


def measured(
    name: str,
    contenders: Sequence[str],
    piece: Piece,
    options: Options,
    *,
    unit: str = "s",
    targets: dict[str, float],
    share: bool = False,
    **environment: str,
) -> Row:
    """The row of one piece of work: median seconds or, if that is the unit, the peak in MB."""
    samples: dict[str, list[float]] = {}
    rates: list[float] = []
    versions: dict[str, str] = {}
    for contender, answer in in_turn(contenders, [piece], options, **environment):
        found = answer["pieces"][0]
        samples.setdefault(contender, []).extend(found["seconds"] if unit == "s" else [found["peak"] / 1e6])
        rates.append(answer["gflops"])
        versions |= answer["versions"]
    values = {contender: statistics.median(times) for contender, times in samples.items()}
    return Row(name, unit, values, targets, share, statistics.median(rates), versions)
