"""Times the depthwise convolution's parts against torch's own, in turn (A B A B), in one process.

    python -m benchmarks.depthwise                            # CPU: fills the measurements beside `RULES`
    python -m benchmarks.depthwise --device cuda --out FILE   # CUDA: checks, sweeps the tiles, compares with cuDNN

On CUDA the kernels are first compiled side by side in other processes, then checked against float64, then each tile is
timed, then the best are compared with cuDNN. It stops starting new work after `--seconds`; what fails is reported and
left out. Times are medians, in milliseconds; rates count two operations a multiply-add.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from patchlib.ops import depthwise as ops

Work = Callable[[], Any]


class Shape(NamedTuple):
    """One layer: where it comes from, and its sizes."""

    name: str
    batch: int
    channels: int
    side: int
    kernel: int

    def flops(self) -> int:
        return 2 * self.batch * self.channels * self.side**2 * self.kernel**2

    def tensors(self, dtype: torch.dtype, device: str, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """An input, kernels, and a gradient for the output."""
        size = (self.batch, self.channels, self.side, self.side)
        layout = torch.channels_last if last else torch.contiguous_format
        x, grad = (torch.randn(size, device=device).to(dtype).to(memory_format=layout) for _ in range(2))
        weight = torch.randn((self.channels, 1, self.kernel, self.kernel), device=device) / self.kernel
        return x, weight.to(dtype), grad


CPU_SHAPES = (
    Shape("convmixer_16", 32, 512, 12, 9),
    Shape("convmixer_768_32", 8, 768, 32, 7),
    Shape("convmixer_256_8", 64, 256, 16, 5),
    Shape("convnextv2_tiny.0", 16, 96, 56, 7),
    Shape("convnextv2_tiny.1", 16, 192, 28, 7),
    Shape("convnextv2_tiny.2", 16, 384, 14, 7),
    Shape("convnextv2_tiny.3", 16, 768, 7, 7),
    Shape("three", 16, 256, 28, 3),
    Shape("small", 1, 64, 16, 7),
    Shape("smaller", 1, 64, 8, 5),
)
CUDA_SHAPES = (
    Shape("convmixer_768_32", 64, 768, 32, 7),
    Shape("convmixer_16", 256, 512, 12, 9),
    Shape("convmixer_256_8", 512, 256, 16, 5),
    Shape("nine_32", 64, 512, 32, 9),
    Shape("convnextv2_tiny.0", 128, 96, 56, 7),
    Shape("convnextv2_tiny.1", 128, 192, 28, 7),
    Shape("convnextv2_tiny.2", 128, 384, 14, 7),
    Shape("convnextv2_tiny.3", 128, 768, 7, 7),
    Shape("three_28", 128, 384, 28, 3),
)
SWEPT = ("convmixer_768_32", "convmixer_16", "convmixer_256_8", "convnextv2_tiny.0", "convnextv2_tiny.2", "three_28")
# (cols, block, lanes, warps) by bytes of an element
FORWARD_TILES = {
    2: (
        *((8, 64, 8, 2), (8, 64, 8, 4), (8, 64, 8, 8), (4, 64, 8, 4), (8, 128, 8, 4), (8, 64, 4, 2), (8, 64, 4, 4)),
        *((8, 64, 4, 8), (8, 128, 4, 4), (16, 64, 4, 4), (4, 64, 4, 4), (8, 64, 2, 4), (16, 64, 2, 4)),
    ),
    4: ((8, 64, 4, 4), (8, 32, 4, 4), (4, 64, 4, 4), (8, 128, 4, 4), (8, 64, 2, 4), (16, 64, 2, 4)),
}
WEIGHT_TILES = {
    2: (
        *((8, 64, 8, 1), (8, 64, 8, 2), (8, 128, 8, 1), (8, 128, 8, 2), (8, 128, 8, 4), (8, 256, 8, 1), (4, 64, 8, 2)),
        *((8, 64, 4, 1), (8, 64, 4, 2), (8, 64, 4, 4), (8, 128, 4, 4), (16, 64, 4, 4), (8, 64, 2, 4), (8, 64, 2, 8)),
    ),
    4: ((8, 32, 4, 1), (8, 32, 4, 2), (8, 64, 4, 2), (8, 64, 4, 4), (8, 128, 4, 4), (8, 64, 2, 4)),
}
PROGRAMS = (512, 1024, 2048, 4096)


def in_turn(works: dict[str, Work], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, run A B A B; the machine's noise falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + seconds
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def on_gpu(work: Work, seconds: float = 0.06) -> float:
    """Median milliseconds of one call between device events. Calls are replayed from a graph, so that what the host
    does is not counted; those that cannot be recorded run as they are."""

    def span(run: Work, repeats: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / repeats

    work()
    one = max(1e-3, min(span(work, 1) for _ in range(3)))
    calls = max(1, min(20, int(2 / one)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        run: Work = graph.replay
        run()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        run, calls = work, 1
    repeats = max(1, min(10, int(4 / (one * calls))))
    spans = max(3, min(15, int(1e3 * seconds / (one * calls * repeats))))
    return statistics.median(span(run, repeats) / calls for _ in range(spans))


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def parts(shape: Shape, x: Tensor, weight: Tensor, grad: Tensor, route: ops.Route) -> dict[str, Work]:
    """The work of one layer's forward, its gradients, and all of them through autograd."""
    pad = shape.kernel // 2
    bias = weight[:, 0, 0, 0].clone()
    leaf_x, leaf_weight, leaf_bias = (t.detach().requires_grad_() for t in (x, weight, bias))

    def forward() -> Tensor:
        with torch.no_grad():
            return ops.depthwise_conv2d(x, weight, bias, 1, pad, route=route)

    def step() -> Any:
        y = ops.depthwise_conv2d(leaf_x, leaf_weight, leaf_bias, 1, pad, route=route)
        return torch.autograd.grad(y, (leaf_x, leaf_weight, leaf_bias), grad)

    return {
        "forward": forward,
        "input_grad": lambda: ops.depthwise_input_grad(grad, weight, pad, route=route),
        "weight_grad": lambda: ops.depthwise_weight_grad(grad, x, shape.kernel, pad, route=route),
        "step": step,
    }


def cpu(rounds: int, seconds: float) -> list[dict[str, Any]]:
    results = []
    print("milliseconds (GFLOP/s), torch's own | ours; step is forward and backward with bias")
    for shape, dtype, last in itertools.product(CPU_SHAPES, (torch.float32, torch.bfloat16), (True, False)):
        x, weight, grad = shape.tensors(dtype, "cpu", last)
        theirs, ours = (parts(shape, x, weight, grad, route) for route in (ops.TORCH, ops.BATCH))
        works = {f"{who} {part}": w for part in theirs for who, w in (("torch", theirs[part]), ("ours", ours[part]))}
        works.pop("ours forward")
        took = in_turn(works, rounds, seconds)
        want = conv2d_weight(x.double(), weight.shape, grad.double(), 1, shape.kernel // 2, 1, shape.channels)
        errors = {who: relative(p["weight_grad"](), want) for who, p in (("torch", theirs), ("ours", ours))}
        row = {"shape": shape._asdict(), "dtype": str(dtype), "channels_last": last, "milliseconds": took}
        results.append({**row, "weight_grad_error": errors})
        cells = [f"{shape.name:18} {str(dtype)[6:]:8} {'last' if last else 'first':5}"]
        for part in theirs:
            pair = [took[k] for k in (f"torch {part}", f"ours {part}") if k in took]
            work = shape.flops() * (3 if part == "step" else 1)
            cells.append(f"{part} " + " | ".join(f"{t:.2f} ({work / t / 1e6:.0f})" for t in pair))
        cells.append(f"step {took['torch step'] / took['ours step']:.2f}x")
        cells.append(f"error {errors['torch']:.0e} | {errors['ours']:.0e}")
        print("; ".join(cells), flush=True)
    return results


def compile_tile(kind: str, dtype: torch.dtype, kernel: int, tile: tuple[int, ...], bias: bool) -> None:
    """Leaves a kernel in Triton's cache on disk; run in another process."""
    from patchlib.ops import depthwise_triton as kernels

    block = tile[1]
    x = torch.zeros((1, block, 8, 8), device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.zeros((block, 1, kernel, kernel), device="cuda", dtype=dtype)
    pads = (kernel // 2, kernel // 2)
    if kind == "forward":
        kernels.forward(x, weight, weight[:, 0, 0, 0].clone() if bias else None, pads, tile=kernels.Tile(*tile))
    else:
        kernels.weight_grad(x, x, (kernel, kernel), pads, tile=kernels.Tile(*tile))
    torch.cuda.synchronize()


CHECKED = (
    *((2, 64, 32, 32, 7, 7), (3, 96, 14, 9, 7, 7), (2, 512, 12, 12, 9, 9), (5, 40, 13, 21, 5, 3), (1, 64, 1, 1, 3, 3)),
    *((2, 33, 8, 8, 3, 3), (4, 768, 7, 7, 7, 7), (2, 64, 16, 16, 4, 4), (2, 32, 65, 65, 5, 5)),
)


def errors(case: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Relative errors against float64, ours and cuDNN's, for (batch, channels, height, width, kernel, kernel)."""
    batch, channels, height, width, *kernel = case
    pads = [(k - 1) // 2 for k in kernel]
    torch.manual_seed(sum(case))
    x = torch.randn((batch, channels, height, width), device="cuda").to(dtype)
    weight = (torch.randn((channels, 1, *kernel), device="cuda") / kernel[0]).to(dtype)
    bias, scale, shift = (torch.randn(channels, device="cuda").to(dtype) for _ in range(3))
    size = [n + 2 * p - k + 1 for n, p, k in zip((height, width), pads, kernel, strict=True)]
    grad = torch.randn((batch, channels, *size), device="cuda").to(dtype)

    def run(route: ops.Route, to: torch.dtype) -> tuple[Tensor, ...]:
        leaf_x, leaf_weight = (t.to(to).requires_grad_() for t in (x.detach(), weight.detach()))
        y = ops.depthwise_conv2d(leaf_x, leaf_weight, bias.to(to), 1, pads, route=route)
        into = torch.autograd.grad(y, (leaf_x, leaf_weight), grad.to(to))
        with torch.no_grad():
            affine = (bias.to(to), scale.to(to), shift.to(to))
            return y.detach(), *into, ops.depthwise_gelu_affine(leaf_x, leaf_weight, *affine, pads, route=route)

    want, ours, theirs = run(ops.TORCH, torch.float64), run(ops.TRITON, dtype), run(ops.TORCH, dtype)
    names = ("forward", "input", "weight", "fused")
    return {n: (relative(a, w), relative(b, w)) for n, a, b, w in zip(names, ours, theirs, want, strict=True)}


class Cuda:
    """The run on a GPU, in steps that each survive the failure of one configuration."""

    def __init__(self, seconds: float, workers: int, out: str | None) -> None:
        from patchlib.ops import depthwise_triton as kernels

        self.kernels, self.workers, self.out = kernels, workers, out
        self.end = time.perf_counter() + seconds
        self.results: dict[str, Any] = {"errors": [], "checks": [], "sweep": [], "compare": []}
        self.shapes = {shape.name: shape for shape in CUDA_SHAPES}
        torch.backends.cudnn.benchmark = True

    def late(self, share: float = 1.0) -> bool:
        return time.perf_counter() > self.end - (1 - share) * 300

    def attempt(self, what: str, work: Work) -> Any:
        try:
            return work()
        except Exception as error:
            self.results["errors"].append({"what": what, "error": repr(error)[:400]})
            print(f"failed: {what}: {repr(error)[:200]}", flush=True)
            return None

    def save(self) -> None:
        if self.out:
            with open(self.out, "w") as file:
                json.dump(self.results, file, indent=1)

    def ceilings(self) -> None:
        """What the card moves and computes, to hold the kernels against."""
        big = torch.randn(1 << 28, device="cuda")
        copy = torch.empty_like(big)
        took = on_gpu(lambda: copy.copy_(big))
        card = torch.cuda.get_device_properties(0)
        self.results["device"] = {
            "name": card.name,
            "multiprocessors": card.multi_processor_count,
            "torch": torch.__version__,
            "triton": self.kernels.triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "copy GB/s": 8 * big.numel() / took / 1e6,
        }
        print(self.results["device"], flush=True)

    def tiles(self, shape: Shape, dtype: torch.dtype) -> dict[str, list[tuple[int, ...]]]:
        """The tiles to try, fitted to the shape as the library fits them, without repeats."""

        def fitted(tiles: Any) -> list[tuple[int, ...]]:
            fit = self.kernels._fitted
            sizes = (shape.channels, shape.side, shape.kernel)
            found = [tuple(fit(self.kernels.Tile(*t), *sizes)) for t in tiles]
            return [t for t in dict.fromkeys(found) if 32 * t[3] * t[2] >= t[1]]

        size = dtype.itemsize
        return {"forward": fitted(FORWARD_TILES[size]), "weight": fitted(WEIGHT_TILES[size])}

    def swept(self) -> list[tuple[Shape, torch.dtype]]:
        half = [(self.shapes[name], torch.bfloat16) for name in SWEPT]
        return [*half, (self.shapes["convmixer_768_32"], torch.float32)]

    def compared(self) -> list[tuple[Shape, torch.dtype]]:
        rows = [(shape, torch.bfloat16) for shape in CUDA_SHAPES]
        return rows + [(self.shapes[name], dtype) for dtype in (torch.float32, torch.float16) for name in SWEPT[:4]]

    def side_by_side(self, work: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], Any]:
        """`work` of every task, in other processes; what failed is noted and left out."""
        done = {}
        with ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = {pool.submit(work, *task): task for task in tasks}
            for job in as_completed(jobs):
                result = self.attempt(f"{work.__name__} {jobs[job]}", job.result)
                if job.exception() is None:
                    done[jobs[job]] = result
        return done

    def compile(self) -> None:
        tasks: dict[tuple[Any, ...], None] = {}
        for shape, dtype in self.swept():
            for kind, tiles in self.tiles(shape, dtype).items():
                for tile in tiles:
                    tasks[(kind, dtype, shape.kernel, tile, False)] = None
        for shape, dtype in self.compared():
            size, fit = dtype.itemsize, (shape.channels, shape.side, shape.kernel)
            forward = tuple(self.kernels._fitted(self.kernels.FORWARD[size], *fit))
            weight = tuple(self.kernels._fitted(self.kernels.WEIGHT_GRAD[size], *fit))
            for task in (("forward", forward, True), ("forward", forward, False), ("weight", weight, False)):
                tasks[(task[0], dtype, shape.kernel, *task[1:])] = None
        start = time.perf_counter()
        done = self.side_by_side(compile_tile, list(tasks))
        print(f"compiled {len(done)} of {len(tasks)} kernels in {time.perf_counter() - start:.0f} s", flush=True)

    def check(self) -> None:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        done = self.side_by_side(errors, list(itertools.product(CHECKED, dtypes)))
        print(f"\nworst errors against float64, ours/cuDNN's, over {len(done)} of {len(CHECKED) * len(dtypes)} cases")
        for dtype in dtypes:
            found = [done[key] for key in done if key[1] == dtype]
            worst = {
                name: [max((e[name][who] for e in found), key=lambda v: (v != v, v)) for who in (0, 1)]
                for name in (found[0] if found else ())
            }
            self.results["checks"].append({"dtype": str(dtype), "worst": worst})
            print(f"  {str(dtype)[6:]:9}", "  ".join(f"{k} {a:.1e}/{b:.1e}" for k, (a, b) in worst.items()), flush=True)

    def sweep(self) -> None:
        print("\nbest tiles (cols, block, lanes, warps): milliseconds")
        kernels = self.kernels
        for shape, dtype in self.swept():
            if self.late(0.6):
                self.results["errors"].append({"what": f"sweep {shape.name}", "error": "no time left"})
                continue
            x, weight, grad = shape.tensors(dtype, "cuda", True)
            pads, size = (shape.kernel // 2,) * 2, (shape.kernel,) * 2
            works: dict[str, Callable[..., Any]] = {
                "forward": partial(kernels.forward, x, weight, None, pads),
                "weight": partial(kernels.weight_grad, grad, x, size, pads),
            }
            for kind, tiles in self.tiles(shape, dtype).items():
                found = []
                for tile in tiles:
                    work = partial(works[kind], tile=kernels.Tile(*tile))
                    took = self.attempt(f"{kind} {shape.name} {tile}", partial(on_gpu, work, 0.02))
                    if took is not None:
                        found.append((took, tile))
                found.sort()
                if not found:
                    continue
                self.results["sweep"].append({"kind": kind, "shape": shape.name, "dtype": str(dtype), "tiles": found})
                top = "  ".join(f"{','.join(map(str, tile))}:{took:.3f}" for took, tile in found[:7])
                rate = shape.flops() / found[0][0] / 1e9
                print(f"{kind:8}{shape.name:18} {str(dtype)[6:]:9} {rate:5.1f} TFLOP/s  {top}", flush=True)
                if kind == "weight":
                    self.programs(partial(works[kind], tile=kernels.Tile(*found[0][1])))
            torch.cuda.empty_cache()  # what the recorded graphs held
            self.save()

    def programs(self, work: Work) -> None:
        """How many programs the weight gradient is best shared out to."""
        before, times = self.kernels.PROGRAMS, {}
        for count in PROGRAMS:
            self.kernels.PROGRAMS = count
            times[count] = self.attempt(f"programs {count}", partial(on_gpu, work, 0.02))
        self.kernels.PROGRAMS = before
        self.results["sweep"][-1]["programs"] = times
        print("         by programs: ", "  ".join(f"{n}:{t:.3f}" for n, t in times.items() if t), flush=True)

    def best(self, kind: str, shape: Shape, dtype: torch.dtype) -> tuple[int, ...] | None:
        """The fastest tile of the sweep for the nearest swept shape: the same one, else the same kernel size."""
        rows = [r for r in self.results["sweep"] if r["kind"] == kind]
        rows = [r for r in rows if (torch.float32 == dtype) == (r["dtype"] == "torch.float32")]
        rows = [r for r in rows if self.shapes[r["shape"]].kernel == shape.kernel]
        rows.sort(key=lambda r: (r["shape"] != shape.name, abs(self.shapes[r["shape"]].side - shape.side)))
        return tuple(rows[0]["tiles"][0][1]) if rows else None

    def compare(self) -> None:
        """Ours with the best tiles, and with the library's own, against cuDNN in both formats."""
        kernels = self.kernels
        defaults = dict(kernels.FORWARD), dict(kernels.WEIGHT_GRAD)
        print("\nmilliseconds: cuDNN contiguous / cuDNN channels_last / ours by default / ours with the best tiles")
        for shape, dtype in self.compared():
            if self.late():
                self.results["errors"].append({"what": f"compare {shape.name} {dtype}", "error": "no time left"})
                continue
            times: dict[str, dict[str, float]] = {}
            for name, last, route in (
                ("cudnn", False, ops.TORCH),
                ("cudnn last", True, ops.TORCH),
                ("ours", True, ops.TRITON),
                ("ours best", True, ops.TRITON),
            ):
                kernels.FORWARD.update(defaults[0])
                kernels.WEIGHT_GRAD.update(defaults[1])
                if name == "ours best":
                    found = [self.best(kind, shape, dtype) for kind in ("forward", "weight")]
                    for table, tile in zip((kernels.FORWARD, kernels.WEIGHT_GRAD), found, strict=True):
                        if tile is not None:
                            table[dtype.itemsize] = kernels.Tile(*tile)
                x, weight, grad = shape.tensors(dtype, "cuda", last)
                for part, work in parts(shape, x, weight, grad, route).items():
                    span = self.attempt(f"{name} {shape.name} {dtype} {part}", partial(on_gpu, work))
                    times.setdefault(part, {})[name] = span or float("nan")
            kernels.FORWARD.update(defaults[0])
            kernels.WEIGHT_GRAD.update(defaults[1])
            row = {"shape": shape._asdict(), "dtype": str(dtype), "milliseconds": times}
            self.results["compare"].append(row)
            print(f"{shape.name} {tuple(shape[1:])} {str(dtype)[6:]}")
            moved = dtype.itemsize * shape.batch * shape.channels * shape.side**2
            for part, took in times.items():
                ours, theirs = (min(took[a], took[b]) for a, b in (("ours", "ours best"), ("cudnn", "cudnn last")))
                passes, flops = (7, 3 * shape.flops()) if part == "step" else (2, shape.flops())
                rates = f"{flops / ours / 1e9:5.1f} TFLOP/s {passes * moved / ours / 1e6:5.0f} GB/s"
                print(f"   {part:12}{' / '.join(f'{t:7.3f}' for t in took.values())}  {theirs / ours:5.2f}x  {rates}")
            self.save()

    def run(self) -> None:
        for step in (self.ceilings, self.compile, self.check, self.sweep, self.compare):
            started = time.perf_counter()
            try:
                step()
            except Exception:
                self.results["errors"].append({"what": step.__name__, "error": traceback.format_exc()[-2000:]})
                print(f"failed: {step.__name__}\n{traceback.format_exc()[-1500:]}", flush=True)
            self.results.setdefault("seconds", {})[step.__name__] = time.perf_counter() - started
            self.save()
        print(
            "\nseconds",
            {k: round(v) for k, v in self.results["seconds"].items()},
            f"{len(self.results['errors'])} errors",
        )
        for error in self.results["errors"][:8]:
            print("  ", error["what"], "|", error["error"][-160:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", help="JSON file for everything measured")
    parser.add_argument("--threads", type=int, default=2, help="CPU: threads of torch")
    parser.add_argument("--rounds", type=int, default=9, help="CPU: turns of A B")
    parser.add_argument("--seconds", type=float, default=None, help="CPU: for each row; CUDA: for the whole run")
    parser.add_argument("--workers", type=int, default=12, help="CUDA: processes that compile")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":
        Cuda(args.seconds or 320.0, args.workers, args.out).run()
        return
    torch.set_num_threads(args.threads)
    results = cpu(args.rounds, args.seconds or 3.0)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"torch": torch.__version__, "threads": args.threads, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
