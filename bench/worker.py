"""One side of a comparison in a process of its own: trains one round each time a line comes in, answers with its seconds."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from bench.workloads import WORKLOADS, Workload

SIDES = ("fasttrain", "fasttrain-eager", "plain", "plain-1thread", "plain-fused", "plain-compiled", "lightning")


class Rounds:
    """The other end of the pipe: ``start`` waits for a go, ``stop`` reports."""

    def __init__(self) -> None:
        self.out, self.began, self.first = sys.stdout, time.perf_counter(), None
        self.stop_asked = False

    def start(self) -> bool:
        line = sys.stdin.readline().strip()
        self.stop_asked = line != "go"
        self.t = time.perf_counter()
        return not self.stop_asked

    def stop(self, **extra: Any) -> None:
        seconds = time.perf_counter() - self.t
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mb": peak, **extra}), file=self.out, flush=True)


def main(workload: str, side: str) -> None:
    """Read ``go`` lines from stdin until anything else comes."""
    warnings.simplefilter("ignore")
    rounds, w = Rounds(), WORKLOADS[workload]
    torch.manual_seed(1)
    model = w.make()
    with contextlib.redirect_stdout(sys.stderr):
        if side.startswith("plain"):
            _plain(w, model, side, rounds)
        elif side.startswith("lightning"):
            _lightning(w, model, rounds)
        else:
            _fasttrain(w, model, side, rounds)


def _plain(w: Workload, model: Any, side: str, rounds: Rounds) -> None:
    """The loop a careful person writes; ``compiled`` adds torch.compile and the fused optimizer."""
    if side == "plain-1thread":
        torch.set_num_threads(1)
    compiled = side == "plain-compiled"
    optimizer = model.optimizer(**({"fused": True} if side != "plain" and side != "plain-1thread" else {}))
    step = torch.compile(model.loss) if compiled else model.loss
    loader, mixed = w.loader(), w.precision == "bf16-mixed"
    torch.manual_seed(11)
    while rounds.start():
        for _ in range(w.passes):
            total, n = torch.zeros(()), 0
            for batch in loader:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    loss = step(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, n = total + loss.detach(), n + 1
            mean = float(total / n)
        rounds.stop(loss=mean)


class _Shaped:
    """training_step and configure_optimizers over a workload's module."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.model.loss(batch)  # type: ignore[attr-defined]
        self.log("loss", loss, on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.model.optimizer()  # type: ignore[attr-defined]


class _Stop(Exception):
    pass


def _hooks(rounds: Rounds, metric: str, passes: int) -> dict[str, Any]:
    """A few epochs are a round, for both trainers alike; the epoch's mean loss is read in every one, as a person would."""

    def on_train_epoch_start(self: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch % passes == 0 and not rounds.start():
            raise _Stop

    def on_train_epoch_end(self: Any, trainer: Any, module: Any) -> None:
        loss = float(trainer.callback_metrics[metric])
        if (trainer.current_epoch + 1) % passes == 0:
            rounds.stop(loss=loss)

    return {"on_train_epoch_start": on_train_epoch_start, "on_train_epoch_end": on_train_epoch_end}


def _lightning(w: Workload, model: Any, rounds: Rounds) -> None:
    import logging

    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(_Shaped, pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    watch = type("Watch", (pl.Callback,), _hooks(rounds, "loss_epoch", w.passes))()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Stop):
        trainer = pl.Trainer(
            max_epochs=-1, accelerator="cpu", logger=CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, precision=w.precision, callbacks=[watch],
        )  # fmt: skip
        torch.manual_seed(11)
        trainer.fit(Module(), w.loader())


def _fasttrain(w: Workload, model: Any, side: str, rounds: Rounds) -> None:
    import fasttrain

    class Module(_Shaped, torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    watch = type("Watch", (fasttrain.Callback,), _hooks(rounds, "loss_epoch", w.passes))()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Stop):
        trainer = fasttrain.compile_fit(
            Module(), max_epochs=10**6, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
            precision=w.precision, callbacks=[watch], capture="eager" if side == "fasttrain-eager" else "auto",
        )  # fmt: skip
        torch.manual_seed(11)
        try:
            trainer.fit(w.loader())
        finally:
            print(trainer.explain(), file=sys.stderr)


@contextlib.contextmanager
def worker(workload: str, side: str) -> Iterator[Any]:
    """A function that runs one round in a process of its own and returns what it reported."""
    import subprocess

    pipe, command = subprocess.PIPE, [sys.executable, "-m", "bench.worker", workload, side]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None

    def one_round() -> dict[str, Any]:
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{workload} / {side} ended:\n{process.stderr.read()[-3000:]}")
        return dict(json.loads(line))

    try:
        yield one_round
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        one_round.notes = process.stderr.read()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(*sys.argv[1:])
