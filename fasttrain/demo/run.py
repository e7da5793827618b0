"""``fasttrain demo``: reads the text, plans for the time given, trains on the main road, and says what came of it."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import checkpoint
from fasttrain.callbacks import ModelCheckpoint
from fasttrain.demo.model import ByteGPT, GPTConfig
from fasttrain.demo.pace import Pace
from fasttrain.demo.summary import sample_text, summary
from fasttrain.demo.text import Text, order0_entropy, read_standard_library, rows_of, spread
from fasttrain.errors import OptionError, reject
from fasttrain.fit import CompiledFit, compile_fit
from fasttrain.graphs.capture import seed_everything
from fasttrain.loggers import CsvLogger, JsonlLogger
from fasttrain.loggers.run_directory import next_version
from fasttrain.results import FitResult

VALIDATION_BYTES = 16_384
MOST_VALIDATIONS = 16
PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the batch it is trained with."""

    config: GPTConfig
    batch: int
    sample_bytes: int

    @property
    def tokens(self) -> int:
        """Bytes predicted in one step."""
        return self.batch * self.config.block


SIZES: Mapping[str, Size] = {
    "small": Size(config=GPTConfig(layers=4, heads=4, width=144, block=64, lr=4e-3), batch=16, sample_bytes=400),
    "base": Size(config=GPTConfig(layers=6, heads=6, width=384, block=128, lr=1.5e-3), batch=8, sample_bytes=200),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed before the first step and kept beside the checkpoints, so that a resumed run follows it."""

    size: str
    seed: int
    precision: str
    steps: int
    validate_every: int
    folder: str = ""  # of this run, below the one given


def demo(
    *,
    out: Path,
    max_time: float = 180.0,
    size: str | None = None,
    seed: int | None = None,
    capture: str = "auto",
    precision: str | None = None,
    resume: bool = False,
    text: Text | None = None,
    sizes: Mapping[str, Size] = SIZES,
) -> bool:
    """Train for at most ``max_time`` seconds, compiling apart; False when ctrl-C ended it (everything is written then too).

    Raises:
        FasttrainError: there is no text, nothing to resume from, or an option is wrong.
    """
    text = read_standard_library() if text is None else text
    before = _find(out) if resume else None
    plan = _plan_of(before, size, seed, precision)
    shape = sizes[plan.size]
    seed_everything(plan.seed)
    model = _model(shape)
    train, validation = _rows(text, shape)
    print(
        f"text: {text.train.numel() / 1e6:.1f} MB of {text.train_files} files to train on, {text.validation_files} other files to validate"
    )
    print(f"model: {_millions(model)}, {shape.config.layers} layers of width {shape.config.width}, {shape.config.block} bytes of context")
    done = 0 if before is None else int(json.loads((before / checkpoint.MANIFEST).read_text())["global_step"])
    if done >= plan.steps:
        plan = _extended(plan, done, max_time, _eager_step_s(model, train, shape, plan.precision), shape, len(validation))
    plan = _in_folder(plan, out, before)
    model.steps = plan.steps
    rest = f" (of which {done:,} are done)" if done else ""
    print(
        f"plan: {plan.steps:,} steps{rest} of {shape.tokens:,} bytes in {plan.precision}, {max_time:.0f} s of training at most", flush=True
    )
    trainer, keeper = _trainer(model, plan, out, max_time, capture, shape)
    val_loader = DataLoader(TensorDataset(validation), batch_size=64)
    finished = True
    try:
        trainer.fit(_train_loader(train, shape), val_loader, ckpt_path=before)
    except KeyboardInterrupt:
        if trainer.result is None:
            raise
        finished = False
    assert trainer.result is not None
    _report(trainer.result, keeper, model, plan, shape, out, done, validation, val_loader)
    return finished


def _find(out: Path) -> Path:
    found = checkpoint.newest([out])
    if found is None:
        raise OptionError(
            reject("--resume", f"no checkpoint below {out}", "one that an earlier demo wrote", "Leave --resume out, or give its --out.")
        )
    return found


def _plan_of(before: Path | None, size: str | None, seed: int | None, precision: str | None) -> Plan:
    """The plan that a checkpoint was written under, or a new one that has no steps yet."""
    if before is None:
        return Plan(size=size or "small", seed=seed or 0, precision=precision or _precision(), steps=0, validate_every=1)
    try:
        plan = Plan(**json.loads((before.parent.parent / PLAN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"--resume: {before} has no readable {PLAN} beside it ({error}). Start anew without --resume.") from error
    for name, given, was in (("size", size, plan.size), ("seed", seed, plan.seed), ("precision", precision, plan.precision)):
        if given is not None and given != was:
            raise OptionError(reject(f"--{name}", given, f"{was}, with which this run was started", "Leave it out, or leave --resume out."))
    return plan


def _precision() -> str:
    """By what the hardware has, never by timing: the choice must be the same at the next start, or its compile is lost."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16-mixed" if found.get("avx512_bf16") or found.get("amx_bf16") else "32-true"


def _model(shape: Size) -> ByteGPT:
    model = ByteGPT(shape.config)
    model.progress_unit = ("tokens", shape.tokens)
    return model


def _rows(text: Text, shape: Size) -> tuple[Tensor, Tensor]:
    length = shape.config.block + 1
    return rows_of(text.train, length), spread(rows_of(text.validation, length), VALIDATION_BYTES // length)


def _train_loader(rows: Tensor, shape: Size) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(rows), batch_size=shape.batch, shuffle=True, drop_last=True)


def _eager_step_s(model: ByteGPT, rows: Tensor, shape: Size, precision: str) -> float:
    """Seconds of an eager step, the least of a few, on a copy: what the plan is made with."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trial = copy.deepcopy(model).to(device)
    optimizer = trial.configure_optimizers()["optimizer"]
    batch, best = rows[: shape.batch].to(device), math.inf
    for i in range(8):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled="mixed" in precision):
            loss = trial.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # host read: waits for the device
        best = min(best, time.perf_counter() - started) if i else best
    return best


def _extended(plan: Plan, done: int, max_time: float, step_s: float, shape: Size, val_rows: int) -> Plan:
    """As many steps more as ``max_time`` has room for, with a validation now and then that takes a small part of it."""
    validation_s = step_s / 3 * val_rows / shape.batch  # a forward pass is a third of a step
    validations = max(2, min(MOST_VALIDATIONS, int(0.1 * max_time / validation_s)))
    every = max(1, int((max_time - validations * validation_s) / step_s / validations))
    return replace(plan, steps=done + every * validations, validate_every=every)


def _in_folder(plan: Plan, out: Path, before: Path | None) -> Plan:
    """The plan with its run's folder, on disk in it."""
    folder = out / f"version_{next_version(out)}" if before is None else before.parent.parent
    plan = replace(plan, folder=folder.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PLAN).write_text(json.dumps(asdict(plan), indent=2) + "\n")
    except OSError as error:
        raise OptionError(reject("--out", f"{out} ({error.strerror})", "a directory that can be written", "Give another.")) from error
    return plan


def _trainer(model: ByteGPT, plan: Plan, out: Path, max_time: float, capture: str, shape: Size) -> tuple[CompiledFit, ModelCheckpoint]:
    keeper = ModelCheckpoint(monitor="val_loss", filename="{step}-{val_loss:.3f}", save_last=True, enable_version_counter=False)
    trainer = compile_fit(
        model,
        max_steps=plan.steps,
        max_time=timedelta(seconds=max_time),
        val_every_n_steps=plan.validate_every,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        precision=plan.precision,
        gradient_clip_val=1.0,
        capture=capture,
        seed=plan.seed,
        callbacks=[Pace(max_time, plan.steps, shape.tokens), keeper],
        logger=[JsonlLogger(out, name="", version=plan.folder), CsvLogger(out, name="", version=plan.folder)],
        default_root_dir=out,
    )
    return trainer, keeper


def _report(
    result: FitResult, keeper: ModelCheckpoint, model: ByteGPT, plan: Plan, shape: Size,
    out: Path, done: int, validation: Tensor, val_loader: Any,
) -> None:  # fmt: skip
    """Summary and sample, both of the weights as they are now."""
    quiet = compile_fit(model, precision=plan.precision, enable_progress_bar=False)
    loss = quiet.validate(val_loader)["val_loss"]
    rows = {"parameters": _millions(model)} | summary(
        result,
        tokens_per_step=shape.tokens,
        steps_before=done,
        val_loss=loss,
        entropy=order0_entropy(validation[:, 1:]),
    )
    rows |= {"checkpoint": keeper.last_model_path or "none", "metrics": f"{out / plan.folder / 'metrics.jsonl'} and .csv"}
    print("\n" + "\n".join(f"  {name:<14} {value}" for name, value in rows.items()))
    print(f"\n  what it writes after {'def '!r} (temperature 0.8):\n")
    print("\n".join("    " + text for text in sample_text(model, shape.sample_bytes, plan.seed).splitlines()), flush=True)


def _millions(model: ByteGPT) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
