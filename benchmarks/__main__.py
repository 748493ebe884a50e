"""Measures this library against those that users would pick instead:

    python -m benchmarks --peers DIR/bin/python [--only convmixer] [--rounds 3] [--seconds 4] [--out out/benchmarks]

Contenders run in turn, A B A B, in fresh processes, with the same threads, number type and batch. The folder `--out`
has the results as JSON, Markdown and plots after each row; a run that was interrupted goes on where it stopped. Without
`--peers`, an environment of `peers.txt`, only what needs none is measured. Parts: speed, loading, memory, growth.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import growth, loading, memory, speed
from .results import Results
from .runner import BenchmarkError, Options

PARTS = {"speed": speed, "loading": loading, "memory": memory, "growth": growth}


def machine(threads: int) -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"CPU": names[0] if names else platform.machine(), "cores": os.cpu_count(), "threads": threads}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Options()
    parser.add_argument("--peers", help="python of the environment of benchmarks/peers.txt")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="pieces of a part's or a row's name")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of each contender in each round")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--list", action="store_true", help="print the rows that would be measured, and measure none")
    args = parser.parse_args(arguments)
    options = Options(args.peers, args.rounds, args.seconds, args.threads)
    jobs = [(part, job) for part, module in PARTS.items() for job in module.jobs()]
    chosen = [(part, job) for part, job in jobs if any(text in f"{part}: {job.name}" for text in args.only)]
    if not chosen:
        parser.error(f"--only: no row's name has {' or '.join(map(repr, args.only))} in it; --list prints them")
    results, failed = Results(args.out, machine(args.threads)), 0
    for part, job in chosen:
        if results.has(part, job.name):
            continue
        print(f"{part}: {job.name}", flush=True)
        if args.list:
            continue
        try:
            results.add(part, job.run(options))
        except BenchmarkError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
    if not args.list:
        print(results.as_markdown())
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
