"""The step tail against torch's own: time, bytes and launches of clip + AdamW, both sides in one run.

    python bench/kernels.py                  # CPU at 1 and 2 threads, and the GPU when there is one
    python bench/kernels.py --quick          # tiny sizes: does it run?
    python bench/kernels.py --device cuda --out bench/results/kernels-gpu.md

Sides are interleaved round by round; a row gives the median over rounds. Every side steps from the same gradients, and the
weights of all sides are compared after the clocks have stopped: a run whose sides disagree prints no time. Bytes are what a
side must move (counted from its passes over parameters, gradients and moments), bandwidth is bytes over time, and beside it
stands the in-place bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.kernels import library
from fasttrain.kernels.native_tail import NativeTail
from fasttrain.kernels.triton_tail import TritonTail

# float32 traffic a parameter: the norm reads 4, the scaling of gradients moves 8, a fused update 28; foreach's own are
# one pass an operation (capturable adds 8), the loop's the same passes tensor by tensor.
BYTES = {"for-loop": 92, "foreach": 92, "fused": 40, "ours": 32, "ours in a graph": 32}


@dataclass(frozen=True)
class Size:
    """A list of tensors."""

    name: str
    shapes: tuple[int, ...]
    rounds: int


def _even(total: int, count: int) -> tuple[int, ...]:
    return tuple(total // count + (i < total % count) for i in range(count))


def _gpt(total: int, count: int) -> tuple[int, ...]:
    """A third of the tensors are matrices of one size, the others vectors, as in a transformer."""
    matrices = max(count // 3, 1)
    vectors = (768,) * (count - matrices)
    return (*_even(total - sum(vectors), matrices), *vectors)


CPU_SIZES = (
    Size("10k (8 tensors)", _even(10_000, 8), 400), Size("150 small tensors", (512,) * 150, 400), Size("0.2M (8)", _even(200_000, 8), 300),
    Size("1M (31)", _even(1_000_000, 31), 200), Size("25M (60)", _even(25_000_000, 60), 20), Size("124M (148)", _gpt(124_000_000, 148), 7),
)  # fmt: skip
GPU_SIZES = (*CPU_SIZES, Size("1.5B (580)", _gpt(1_500_000_000, 580), 10))
QUICK = (Size("1k (8 tensors)", _even(1000, 8), 3), Size("20 small tensors", (51,) * 20, 3))


class Side:
    """One way to clip and step, over parameters of its own."""

    def __init__(self, name: str, shapes: Sequence[int], device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name, self.device = name, device
        self.params = [nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in shapes]
        roads = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
        self.optimizer = AdamW(self.params, lr=1e-4, capturable=device != "cpu" and name != "fused", **roads.get(name, {}))
        self.tail: NativeTail | TritonTail | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        if name.startswith("ours"):
            self.tail = NativeTail(self.optimizer, self.params) if device == "cpu" else TritonTail(self.optimizer, self.params)

    def bind(self, grads: list[Tensor]) -> None:
        """The same gradients for every side; a captured one records its step on them."""
        self.grads = grads
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.step()
        if self.name.endswith("graph"):
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            assert isinstance(self.tail, TritonTail)
            self.tail.sync()

    def step(self) -> None:
        if self.tail is not None:
            self.tail.step(self.grads, max_norm=1e9, check=True)
        else:
            torch.nn.utils.clip_grad_norm_(self.params, 1e9)
            self.optimizer.step()

    def run(self) -> Callable[[], object]:
        return self.graph.replay if self.graph is not None else self.step


def _clock(run: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU, of the device, with its queue empty before."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


class Calls(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def launches(side: Side) -> int:
    """Kernels on a GPU; on the CPU, torch operations called (a native call is one)."""
    if isinstance(side.tail, TritonTail):
        return side.tail.launches
    if side.device == "cpu":
        if side.tail is not None:
            return 1
        with Calls() as calls:
            side.step()
        return calls.count
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        side.step()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events() or [])


def bandwidth(device: str, elements: int) -> float:
    """Bytes a second of an in-place multiplication, read and written."""
    memory = torch.ones(elements, device=device)
    times = [_clock(lambda: memory.mul_(1.0), device) for _ in range(12)]
    return 8 * elements / min(times[2:])


def measure(size: Size, device: str) -> list[str]:
    """The rows of one size."""
    names = ["for-loop", "foreach", "fused", "ours", *(["ours in a graph"] if device != "cpu" else [])]
    if len(size.shapes) * sum(size.shapes) > 2e11 or sum(size.shapes) > 1e9:
        names.remove("for-loop")
    sides = [Side(name, size.shapes, device) for name in names]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(n, generator=generator).to(device) * 1e-3 for n in size.shapes]
    for side in sides:
        side.bind(grads)
    runs = [side.run() for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    gc.disable()
    try:
        for i in range(size.rounds + 2):
            for k in range(len(sides)):  # who begins changes from round to round
                j = (k + i) % len(sides)
                times[j].append(_clock(runs[j], device))
    finally:
        gc.enable()
    reference = next(side for side in sides if side.name == "fused")
    for side in sides:
        for p, q in zip(side.params, reference.params, strict=True):
            gap = (p.detach() - q.detach()).abs().max()
            assert gap <= 2e-5 * q.detach().abs().max(), f"{side.name} is {float(gap):.3g} off at {size.name}: no time is printed"
    total = sum(size.shapes)
    best = min(statistics.median(t[2:]) for side, t in zip(sides, times, strict=True) if not side.name.startswith("ours"))
    rows = []
    for side, t in zip(sides, times, strict=True):
        middle, moved = statistics.median(t[2:]), BYTES[side.name] * total
        rows.append(
            f"| {size.name} | {side.name} | {middle * 1e6:.0f} | {min(t[2:]) * 1e6:.0f} | {best / middle:.2f} | {launches(side)} "
            f"| {moved / 1e6:.1f} | {moved / middle / 1e9:.1f} |"
        )
    return rows


def table(device: str, sizes: Sequence[Size], threads: int | None) -> list[str]:
    where = f"{threads} thread{'s' if threads != 1 else ''}" if threads else torch.cuda.get_device_name()
    floor = bandwidth(device, 1000 if sizes is QUICK else 50_000_000)
    lines = [
        f"\n### clip + AdamW, float32, {where}; in-place bandwidth {floor / 1e9:.1f} GB/s\n",
        "| parameters | side | median µs | best µs | times the best of torch | launches | MB | GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        print(line, flush=True)
    for size in sizes:
        rows = measure(size, device)
        print("\n".join(rows), flush=True)
        lines += rows
        gc.collect()
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only this one")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    asked = parser.parse_args()
    lines = [f"torch {torch.__version__}, native kernels on {library.instruction_set()}, command: {' '.join(sys.argv)}"]
    print(lines[0])
    if asked.device in (None, "cpu"):
        for threads in asked.threads:
            torch.set_num_threads(threads)
            lines += table("cpu", QUICK if asked.quick else CPU_SIZES, threads)
    if asked.device == "cuda" or (asked.device is None and torch.cuda.is_available()):
        lines += table("cuda", QUICK if asked.quick else GPU_SIZES, None)
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
