"""One side of one case in a process of its own: its losses once, then an epoch each time a line comes in, answered with its seconds."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fasttrain
from bench.coverage_modules.breaks import graph_breaks
from bench.coverage_modules.case import Case, Repeated, Subject, loader
from bench.coverage_modules.cases import CASES
from fasttrain.graphs import auto

SIDES = ("reference", "eager", "compile", "auto")


class Rounds:
    """The other end of the pipe: an epoch is a round. The first is warm-up and goes with the record ``said``."""

    def __init__(self, dataset: Repeated, out: Any, said: Mapping[str, Any]) -> None:
        self.dataset, self.out, self.said = dataset, out, said

    def another(self) -> bool:
        """Say how the epoch went, seconds a batch between the first and the last fetch; wait for the word to train one more."""
        at = self.dataset.fetched
        say(self.out, self.said or {"us": (at[-1] - at[0]) / max(1, len(at) - 1) * 1e6})
        self.said = {}
        going = sys.stdin.readline().strip() == "go"
        at.clear()
        return going

    def hooks(self) -> dict[str, Any]:
        """Of a callback that does nothing between the batches: what stands there is paid for in every step."""

        def on_train_epoch_end(this: Any, trainer: Any, module: Any) -> None:
            trainer.should_stop = not self.another()

        return {"on_train_epoch_end": on_train_epoch_end}


class Losses:
    """One epoch, each batch's loss kept."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def another(self) -> bool:
        return False

    def hooks(self) -> dict[str, Any]:
        def on_train_batch_end(this: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.kept.append(_loss_in(outputs))

        def on_train_epoch_end(this: Any, trainer: Any, module: Any) -> None:
            trainer.should_stop = True

        return {"on_train_batch_end": on_train_batch_end, "on_train_epoch_end": on_train_epoch_end}


def say(out: Any, record: Mapping[str, Any]) -> None:
    print(json.dumps(record), file=out, flush=True)


def _loss_in(outputs: Any) -> Any:
    """The loss in what a trainer hands to ``on_train_batch_end``, its value as it is now; None when there is none."""
    loss = (
        outputs.get("loss") if isinstance(outputs, Mapping) else outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)
    )
    return loss.detach().clone() if isinstance(loss, Tensor) and loss.numel() == 1 else None


def family(module: nn.Module) -> str:
    """``pytorch_lightning`` or ``lightning.pytorch`` for a LightningModule, else empty."""
    names = (c.__module__ for c in type(module).__mro__ if c.__name__ == "LightningModule")
    return next((".".join(n.split(".")[:2]) if n.startswith("lightning.") else n.split(".")[0] for n in names), "")


def _lightning(subject: Subject, batches: Any, watch: Rounds | Losses, folder: str) -> None:
    name = family(subject.module)
    pl = __import__(name, fromlist=["Trainer"])
    logger = __import__(f"{name}.loggers", fromlist=["CSVLogger"]).CSVLogger(folder)
    trainer = pl.Trainer(
        max_epochs=-1, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, callbacks=[type("Watch", (pl.Callback,), watch.hooks())()], **subject.options,
    )  # fmt: skip
    trainer.fit(subject.module, batches)


def _own_loop(subject: Subject, batches: Any, watch: Rounds | Losses) -> None:
    """The loop that the module's documentation would write."""
    module = subject.module
    assert subject.optimizer is not None
    optimizer = subject.optimizer(module.parameters())
    module.train()
    going = True
    while going:
        for batch in batches:
            loss = subject.loss(module, batch) if subject.loss else module(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(watch, Losses):
                watch.kept.append(_loss_in(loss))
        going = watch.another()


def _fasttrain(subject: Subject, side: str, batches: Any, watch: Rounds | Losses, folder: str) -> dict[str, Any]:
    auto.LONG = math.inf  # rounds of the step it ends with
    own = {k: v for k, v in (("loss", subject.loss), ("optimizer", subject.optimizer)) if v is not None}
    trainer = fasttrain.compile_fit(
        subject.module, max_epochs=-1, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[type("Watch", (fasttrain.Callback,), watch.hooks())()], num_sanity_val_steps=0, capture=side,
        **own, **subject.options,
    )  # fmt: skip
    result = trainer.fit(batches)
    return {"capture": dataclasses.asdict(result.capture), "setup_s": result.ledger.compile_s, "explain": trainer.explain()}


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _train(case: Case, side: str, steps: int, watch: Callable[[Repeated], Rounds | Losses]) -> tuple[Subject, dict[str, Any]]:
    """A subject of its own, always from the same seeds, trained by one side until ``watch`` has enough."""
    seed_all(1)
    subject = case.make()
    seed_all(11)
    batches = loader(subject, steps)
    watching = watch(batches.dataset)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        if side != "reference":
            return subject, _fasttrain(subject, side, batches, watching, folder)
        if family(subject.module):
            _lightning(subject, batches, watching, folder)
        else:
            _own_loop(subject, batches, watching)
    return subject, {}


def run(case: Case, side: str, steps: int, out: Any) -> dict[str, Any]:
    """One epoch for its losses; then another start for its speed, epoch after epoch until the pipe says stop."""
    seed_all(1)
    module = case.make().module  # imports, which may draw random numbers, are done after it
    kind, sizes = type(module), [p.numel() for p in module.parameters()]
    say(
        out,
        {
            "kind": family(module) or "own loop",
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "parameters": sum(sizes),
            "tensors": len(sizes),
        },
    )
    sys.stdin.readline()
    losses = Losses()
    subject, first = _train(case, side, steps, lambda _: losses)
    said = {
        "losses": [float(v) for v in losses.kept if v is not None],
        "norms": [float(p.detach().double().norm()) for p in subject.module.parameters() if p.numel()],
        "cold": first,
    }
    return _train(case, side, steps, lambda dataset: Rounds(dataset, out, said))[1]


def main() -> None:
    """Speak JSON lines on the real stdout; whatever else is printed goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for noisy in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    end: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr), graph_breaks() if args.side in ("compile", "auto") else nullcontext([]) as breaks:
        try:
            end = run(next(c for c in CASES if c.name == args.name), args.side, args.steps, out)
        except Exception as error:
            traceback.print_exc()
            cause = error.__cause__ or error
            frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(cause.__traceback__)][-6:]
            end = {"error": f"{type(error).__name__}: {error}", "frames": frames}
    say(out, {"end": True, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, **end, "breaks": breaks})


if __name__ == "__main__":
    main()
