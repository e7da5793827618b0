"""What a steady step may cost: few Python calls, no host read, one trace, no recompile; and that it is the right step."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import fasttrain

PACKAGE = os.path.dirname(fasttrain.__file__)
HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero"}


class Net(nn.Module):
    """Dropout, batch norm and two logged values: an ordinary small module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.log("train_loss", loss, on_epoch=True)
        self.log("accuracy", (out.argmax(1) == y).float().mean())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batches: int = 60, size: int = 8) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    n = batches * size
    return DataLoader(TensorDataset(torch.randn(n, 8, generator=g), torch.randint(4, (n,), generator=g)), batch_size=size, shuffle=True)


def quiet(**options: Any) -> Any:
    return {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}


class Counted:
    """A list of batches that switches a watcher on and off as it is walked, so that no hook has to."""

    def __init__(self, batches: list[Any], start: int, stop: int, on: Any, off: Any) -> None:
        self.batches, self.start, self.stop, self.on, self.off = batches, start, stop, on, off

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for i, batch in enumerate(self.batches):
            if i == self.start:
                self.on()
            if i == self.stop:
                self.off()
            yield batch


def test_few_python_calls() -> None:
    """A steady captured batch with logging makes at most 15 calls of our own Python functions."""
    calls: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_name)

    batches = list(loader())
    data = Counted(batches, 20, 50, lambda: sys.setprofile(profile), lambda: sys.setprofile(None))
    try:
        trainer = fasttrain.compile_fit(Net(), max_epochs=1, capture="compile", gradient_clip_val=1.0, **quiet())
        trainer.fit(data)
    finally:
        sys.setprofile(None)
    per_batch = len(calls) / 30
    counted = {name: calls.count(name) for name in calls}
    assert trainer.result is not None
    assert trainer.result.capture.direct, trainer.explain()
    assert per_batch <= 15, f"{per_batch:.1f} calls a batch: {counted}"


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in HOST_READS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_no_host_read() -> None:
    """A steady captured batch with logging, clipping and a scheduler reads no tensor on the host."""
    mode = _Reads()
    stack: list[Any] = []

    def on() -> None:
        mode.__enter__()
        stack.append(mode)

    def off() -> None:
        stack.pop().__exit__(None, None, None)

    data = Counted(list(loader()), 20, 50, on, off)
    fasttrain.compile_fit(Net(), max_epochs=1, capture="compile", gradient_clip_val=1.0, **quiet()).fit(data)
    assert mode.seen == []


def test_one_trace_a_shape() -> None:
    """Several epochs with validation, a partial last batch and a moving learning rate: one trace, no recompile."""
    g = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(83, 8, generator=g), torch.randint(4, (83,), generator=g)), batch_size=8, shuffle=True)

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    trainer = fasttrain.compile_fit(Validated(), max_epochs=4, capture="compile", **quiet())
    result = trainer.fit(data, data)
    assert result.capture.rung == "compile"
    assert result.capture.traces == 1
    assert not result.capture.obstacles


@pytest.mark.parametrize("accumulate", [1, 3])
def test_eager_is_a_plain_loop(accumulate: int) -> None:
    """The eager rung gives, bit for bit, the weights of a plain torch loop."""
    torch.manual_seed(3)
    ours, plain = Net(), Net()
    plain.load_state_dict(ours.state_dict())
    data = loader(12)
    torch.manual_seed(5)
    options = quiet(max_epochs=2, capture="eager", accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    fasttrain.compile_fit(ours, **options).fit(data)
    torch.manual_seed(5)
    plain.log = lambda *args, **kwargs: None  # type: ignore[assignment]
    configured = plain.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(2):
        for i, batch in enumerate(data):
            (plain.training_step(batch, i) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def _train(capture: str, **options: Any) -> tuple[Any, Net]:
    torch.manual_seed(3)
    module = Net()
    torch.manual_seed(5)
    return fasttrain.compile_fit(module, max_epochs=2, capture=capture, gradient_clip_val=0.5, **quiet(**options)).fit(loader(12)), module


@pytest.mark.parametrize("accumulate", [1, 5])
def test_compile_is_eager(accumulate: int) -> None:
    """The compile rung computes the eager rung's run: dropout masks, batch norm, clipping and schedule included."""
    eager, a = _train("eager", accumulate_grad_batches=accumulate)
    compiled, b = _train("compile", accumulate_grad_batches=accumulate)
    assert compiled.capture.whole
    assert (eager.steps, eager.epochs) == (compiled.steps, compiled.epochs)
    for name, value in a.state_dict().items():
        # AdamW divides by the gradient's own size, so rounding in a near-zero gradient shows at lr scale.
        assert torch.allclose(value.float(), b.state_dict()[name].float(), rtol=1e-3, atol=2e-3), name
    assert eager.metrics == pytest.approx(compiled.metrics, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_two_runs_are_equal(capture: str) -> None:
    """The same seed on the same machine gives the same bits."""
    (_, a), (_, b) = _train(capture), _train(capture)
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
