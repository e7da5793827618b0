"""What each feature costs beside the captured graph: own Python calls and µs a batch. ``python -m bench.overhead [--write] [case ...]``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasttrain
import fasttrain.loop

PACKAGE = os.path.dirname(fasttrain.__file__)
WARM, COUNTED = 20, 60  # batches before counting, and of the count: whole windows of 2, 3, 4, 5 and 6
SIZE = 8


# -- the modules, all of them tiny: what is measured is what stands around them -----------------------------------------------
class Plain(nn.Module):
    """One loss, one optimizer, nothing logged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Logged(Plain):
    """Two values a step, one of them over the epoch too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True)
        self.log("double", 2 * loss)
        return loss


class Scheduled(Plain):
    """A learning rate that moves every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 100), "interval": "step"}]


class Validated(Plain):
    """What a validation cadence and the callbacks that watch it ask for."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class WithResult(Plain):
    """A Result object in place of ``self.log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        result = fasttrain.TrainResult(minimize=self.loss(batch))
        result.log("loss", result.minimize, on_epoch=True)
        return result


class EndHook(Plain):
    """A module hook between two steps: guards are evaluated at every step, because its code may have changed anything."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


class OwnUpdate(Plain):
    """``optimizer_step`` overridden: the step is captured in the piece before it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


class SeveralLoaders(Plain):
    """Batches of two loaders in a dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["a"]) + self.loss(batch["b"])


class Pair(nn.Module):
    """Two networks and an optimizer for each."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.g = nn.Linear(8, 1), nn.Linear(8, 8)

    def losses(self, batch: Any) -> Iterator[Tensor]:
        fake = self.g(batch[0])
        yield (self.d(fake.detach()) - self.d(batch[0])).square().mean()
        yield self.d(fake).square().mean()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.d, self.g)]


class GeneratorGAN(Pair):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        yield from self.losses(batch)


class IndexedGAN(Pair):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:
        fake = self.g(batch[0])
        if optimizer_idx == 0:
            return (self.d(fake.detach()) - self.d(batch[0])).square().mean()
        return self.d(fake).square().mean()


class TakingTurns(IndexedGAN):
    """Five batches for one, one for the other."""

    def configure_optimizers(self) -> Any:
        return [{"optimizer": o, "frequency": n} for o, n in zip(super().configure_optimizers(), (5, 1), strict=True)]


class ManualGAN(Pair):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), self.losses(batch), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class Recurrent(nn.Module):
    """Batches of four splits, hidden state handed on."""

    truncated_bptt_steps = 2

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(16, 8), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        x, y = batch
        h = torch.zeros_like(x[:, 0]) if hiddens is None else hiddens
        for t in range(x.shape[1]):
            h = self.cell(torch.cat([x[:, t], h], 1)).tanh()
        return {"loss": F.mse_loss(self.out(h), y[:, -1]), "hiddens": h}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# -- the data -----------------------------------------------------------------------------------------------------------------
def rows(batches: int) -> list[list[Tensor]]:
    """Batches in a list, walked as they are."""
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(SIZE, 8, generator=g), torch.randn(SIZE, 1, generator=g)] for _ in range(batches)]


def in_memory(batches: int) -> DataLoader[Any]:
    """A shuffled DataLoader over tensors: its rows are gathered without its own Python."""
    g = torch.Generator().manual_seed(0)
    n = batches * SIZE
    return DataLoader(TensorDataset(torch.randn(n, 8, generator=g), torch.randn(n, 1, generator=g)), batch_size=SIZE, shuffle=True)


def two_loaders(batches: int) -> dict[str, Any]:
    return {"a": in_memory(batches), "b": in_memory(batches // 2)}


def sequences(batches: int) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(SIZE, 8, 8, generator=g), torch.randn(SIZE, 8, 1, generator=g)] for _ in range(batches)]


# -- the cases ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Case:
    """A feature switched on, and the most own calls a batch it may cost."""

    module: type[nn.Module] = Plain
    most: float
    data: Callable[[int], Any] = rows
    validates: bool = False
    quiet: bool = True  # no logger, no checkpoints, no bar
    options: Callable[[], dict[str, Any]] = field(default=dict)


def _callbacks() -> dict[str, Any]:
    return {
        "callbacks": [
            fasttrain.ModelCheckpoint(monitor="val_loss"), fasttrain.EarlyStopping(monitor="val_loss"), fasttrain.Timer(),
            fasttrain.LearningRateMonitor(logging_interval="epoch"),
        ],
        "logger": True, "enable_checkpointing": True, "log_every_n_steps": 1000,
    }  # fmt: skip


class ForeignCallback:
    """Anybody's callback with a hook between two steps."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


CASES: dict[str, Case] = {
    "plain": Case(most=15),
    "plain, every option at its default": Case(quiet=False, most=15),
    "plain, DataLoader in memory": Case(data=in_memory, most=15),
    "logging, two values": Case(module=Logged, most=15),
    "logging to files every 10 steps": Case(module=Logged, options=lambda: {"logger": True, "log_every_n_steps": 10}, most=30),
    "clipping by norm": Case(options=lambda: {"gradient_clip_val": 1.0}, most=15),
    "clipping by value": Case(options=lambda: {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, most=15),
    "accumulation of 4": Case(options=lambda: {"accumulate_grad_batches": 4}, most=15),
    "scheduler by step": Case(module=Scheduled, most=15),
    "validation every 1000 batches": Case(
        module=Validated, validates=True, options=lambda: {"val_check_interval": 1000, "check_val_every_n_epoch": None}, most=15
    ),
    "validation every 1000 steps": Case(module=Validated, validates=True, options=lambda: {"val_every_n_steps": 1000}, most=15),
    "validation every hour": Case(module=Validated, validates=True, options=lambda: {"val_check_interval": timedelta(hours=1)}, most=15),
    "checkpoint, early stopping, timer, lr monitor": Case(module=Validated, validates=True, options=_callbacks, most=40),
    "track_grad_norm": Case(options=lambda: {"track_grad_norm": 2}, most=30),
    "nonfinite='skip'": Case(options=lambda: {"nonfinite": "skip"}, most=15),
    "verify=3, once it is over": Case(options=lambda: {"verify": 3}, most=15),
    "16-mixed": Case(options=lambda: {"precision": "16-mixed"}, most=15),
    "barebones": Case(module=Logged, quiet=False, options=lambda: {"barebones": True}, most=15),
    "Result objects": Case(module=WithResult, most=15),
    "several train loaders": Case(module=SeveralLoaders, data=two_loaders, most=60),
    "GAN, generator": Case(module=GeneratorGAN, most=45),
    "GAN, optimizer_idx": Case(module=IndexedGAN, most=45),
    "GAN, frequency 5 and 1": Case(module=TakingTurns, most=30),
    "GAN, manual": Case(module=ManualGAN, most=70),
    "TBPTT, four splits a batch": Case(module=Recurrent, data=sequences, most=320),
    "somebody's on_train_batch_end": Case(options=lambda: {"callbacks": [ForeignCallback()]}, most=130),
    "the module's on_train_batch_end": Case(module=EndHook, most=140),
    "optimizer_step overridden": Case(module=OwnUpdate, most=115),
}


# -- the measuring ------------------------------------------------------------------------------------------------------------
class Measured(NamedTuple):
    """Own calls and µs of a batch, and what the step was."""

    calls: float
    by_name: dict[str, float]
    outside_us: float  # of a batch, without what ran in the graph
    graph_us: float
    explained: str

    @property
    def guards(self) -> float:
        """How often a batch the guards of a graph were evaluated."""
        return self.by_name.get("trace.py:recorded", 0.0)


class _Watch:
    """Hears of the start of every batch: counts a stretch of them, then times a stretch of them."""

    def __init__(self, timed: int) -> None:
        self.batches, self.timed = 0, timed
        self.seen: Counter[str] = Counter()
        self.spans: list[tuple[float, float]] = []
        self._since = self._graph_s = 0.0
        self.step: Callable[[], Any] = lambda: None

    def tick(self) -> None:
        self.batches += 1
        after = self.batches - WARM - COUNTED
        if self.batches == WARM:
            sys.setprofile(self._profile)
        elif after == 0:
            sys.setprofile(None)
        elif after == WARM:
            self._time_the_graph()
        now = time.perf_counter()
        if WARM < after <= WARM + self.timed:
            self.spans.append((now - self._since, self._graph_s))
        self._graph_s, self._since = 0.0, time.perf_counter()

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.seen[f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"] += 1

    def _time_the_graph(self) -> None:
        """Every compiled graph of the step with a clock around it."""
        for call in self.step().calls:
            for plan in call._plans.values():
                plan.run = plan.entry.run = self._clocked(plan.run)

    def _clocked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any) -> Any:
            started = time.perf_counter()
            outs = run(*args)
            self._graph_s += time.perf_counter() - started
            return outs

        return clocked


@contextlib.contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    """The loop's own look ahead, with a tick before each batch; no frame of ours is added."""
    lookahead = fasttrain.loop.Lookahead

    class Watched(lookahead):  # type: ignore[misc, valid-type]
        def __call__(self) -> Any:
            watch.tick()
            return super().__call__()

    fasttrain.loop.Lookahead = Watched  # type: ignore[misc]
    try:
        yield
    finally:
        sys.setprofile(None)
        fasttrain.loop.Lookahead = lookahead  # type: ignore[misc]


def measure(case: Case, *, timed: int = 0) -> Measured:
    """One fit of the case on the compile rung; ``timed`` batches more when microseconds are wanted."""
    torch.manual_seed(0)
    batches = WARM + COUNTED + (WARM + timed if timed else 0) + 1
    watch = _Watch(timed)
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(), _watching(watch):
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"max_epochs": 1, "capture": "compile", "default_root_dir": root}
        if case.quiet:
            options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
        trainer = fasttrain.compile_fit(case.module(), **(options | case.options()))
        watch.step = lambda: trainer._run.step  # type: ignore[union-attr]
        trainer.fit(case.data(batches), *([rows(1)] if case.validates else []))
    by_name = {n: c / COUNTED for n, c in watch.seen.most_common()}
    return Measured(
        calls=sum(by_name.values()),
        by_name=by_name,
        outside_us=_least_median([whole - graph for whole, graph in watch.spans]) * 1e6,
        graph_us=_least_median([graph for _, graph in watch.spans]) * 1e6,
        explained=trainer.explain(),
    )


def _least_median(seconds: list[float], stretch: int = 100) -> float:
    """Of the medians of every hundred batches the least: what else the machine does comes and goes."""
    return min((statistics.median(seconds[i : i + stretch]) for i in range(0, len(seconds), stretch)), default=float("nan"))


def table(found: dict[str, Measured]) -> str:
    """Markdown, in the order of the cases."""
    lines = ["| case | own calls a batch | bound | guarded | µs a batch outside the graph | in the graph |", "|---|---|---|---|---|---|"]
    for name, m in found.items():
        calls = f"{m.calls:.1f} | {CASES[name].most:g} | {m.guards:.1f}"
        lines.append(f"| {name} | {calls} | {m.outside_us:.1f} | {m.graph_us:.1f} |")
    return "\n".join(lines)


NOTES = f"""Own calls: Python functions of the package that run in a steady batch (mean of {COUNTED}), as `sys.setprofile` hears them.
Guarded: graphs a batch whose guards were evaluated because somebody's code had run; the others were called directly.
Outside the graph: time of a batch less the time in its compiled graphs; loader, loop, metrics and the update are in it.
Both times are the least of the medians of a hundred batches.
In the forms "generator" and "manual" the updates are operations of the graph and count as such."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--timed", type=int, default=1500, help="batches timed in each case")
    parser.add_argument("--names", action="store_true", help="print which functions were called, and how often a batch")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in args.cases:
        found[name] = measure(CASES[name], timed=args.timed)
        print(table({name: found[name]}).splitlines()[-1], flush=True)
        if args.names:
            print("\n".join(f"    {c:6.2f} {n}" for n, c in found[name].by_name.items()))
    print("\n" + table(found))
    if args.write:
        stamp = datetime.date.today().isoformat()
        machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        path = Path(__file__).parent / "results" / f"{stamp}-overhead.md"
        path.write_text(f"# What stands around the graph, {stamp}\n\n{machine}\n\n{NOTES}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
