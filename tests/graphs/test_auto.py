"""``capture="auto"``: measures on a snapshot, starts no compile that cannot pay, decides the same the next time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fasttrain
from fasttrain.graphs import auto, decisions
from fasttrain.options import make_options
from tests.graphs.test_compile_rung import QUIET, Net, batches


class StopAt(fasttrain.Callback):
    """Asks for the end of the run after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Decisions of this test alone, and at the first batch (``test_ahead.py`` has those that wait)."""
    monkeypatch.setattr(decisions, "_folder", lambda: tmp_path)
    monkeypatch.setattr(auto, "can_compile_ahead", lambda *given: False)
    return tmp_path


def run(**options: Any) -> tuple[Any, Net]:
    torch.manual_seed(1)
    module = Net()
    torch.manual_seed(2)
    return fasttrain.compile_fit(module, **QUIET, **options).fit(batches([8] * 12)), module


def test_few_steps_stay_eager(folder: Path) -> None:
    """A run too short to pay for a compile runs op by op, says so, and computes what the eager rung computes, its update fused."""
    auto, a = run(max_epochs=1)
    b_result, b = run(max_epochs=1, capture="eager")
    assert auto.capture.rung == "eager"
    assert "cannot pay" in auto.capture.why
    assert (auto.capture.tail, b_result.capture.tail) == ("fused native", "torch")
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # the update's arithmetic in another order


def test_measuring_leaves_no_trace_and_is_remembered(folder: Path) -> None:
    """An endless run measures, keeps the quicker rung, starts from untouched weights, and the next one decides the same bits."""
    first, a = run(max_epochs=-1, callbacks=[StopAt(9)])
    assert {"eager", "captured/1"} <= set(first.capture.timings_us)
    kept = [json.loads(p.read_text()) for p in folder.glob("*.json")]
    assert len(kept) == 1
    second, b = run(max_epochs=-1, callbacks=[StopAt(9)])
    assert second.capture.why == "measured before on this machine"
    assert second.capture.rung == first.capture.rung
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    _, c = run(max_epochs=-1, callbacks=[StopAt(9)], capture="eager")
    for x, y in zip(a.parameters(), c.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-4)  # reassociated sums over nine AdamW steps of 1e-2


def test_a_look_is_not_heard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a step prints is printed once a batch, however often it was looked at and timed."""

    class Talks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            print("step")
            return super().training_step(batch, batch_idx)

    fasttrain.compile_fit(Talks(), max_epochs=1, **QUIET).fit(batches([8] * 3))
    assert capsys.readouterr().out.count("step") == 3


class Lies(Net):
    """Traced, it computes something else: what a fault of the compiler comes to."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (1.2 if torch.compiler.is_compiling() else 1.0)


def test_auto_takes_no_capture_with_other_gradients(folder: Path) -> None:
    """Nor at the next start."""
    for _ in range(2):
        torch.manual_seed(1)
        result = fasttrain.compile_fit(Lies(), max_epochs=100_000, callbacks=[StopAt(3)], **QUIET).fit(batches([8] * 12))
        assert result.capture.rung == "eager"
    decided = json.loads(next(folder.glob("*.json")).read_text())
    assert decided["captured_us"] > decided["eager_us"]


def test_auto_says_which_gradient_is_another(folder: Path) -> None:
    result = fasttrain.compile_fit(Lies(), max_epochs=100_000, callbacks=[StopAt(3)], **QUIET).fit(batches([8] * 12))
    assert "captured, the gradient of" in result.capture.why


def test_a_named_rung_with_other_gradients_is_refused() -> None:
    with pytest.raises(fasttrain.CaptureError, match="the gradient of"):
        fasttrain.compile_fit(Lies(), max_epochs=1, capture="compile", **QUIET).fit(batches([8] * 3))


class Unsteady(Net):
    """Another step each time it is called, eagerly too: nobody winds a file back."""

    def __init__(self) -> None:
        super().__init__()
        self.file = io.StringIO()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.file.write("x")
        return super().training_step(batch, batch_idx) * (1.0 + self.file.tell() % 3)


def test_a_step_that_is_never_the_same_is_not_called_wrong() -> None:
    """Nothing can be said of its capture by one look."""
    result = fasttrain.compile_fit(Unsteady(), max_epochs=1, capture="compile", **QUIET).fit(batches([8] * 3))
    assert result.capture.rung == "compile"


class Unfreezes(Net):
    """In the middle of a step, at the fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        next(self.parameters()).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        if self.calls == 5:
            next(self.parameters()).requires_grad_(True)
        return super().training_step(batch, batch_idx)


class UnfreezesBehindTheBackwardPass(Net):
    """Between the captured piece and its update."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        next(self.parameters()).requires_grad_(False)

    def on_after_backward(self) -> None:
        self.calls += 1
        if self.calls == 3:
            next(self.parameters()).requires_grad_(True)


def test_a_hook_behind_a_captured_piece_may_unfreeze() -> None:
    weights = []
    for capture in ("eager", "compile"):
        torch.manual_seed(1)
        module = UnfreezesBehindTheBackwardPass()
        fasttrain.compile_fit(module, max_epochs=1, capture=capture, **QUIET).fit(batches([8] * 8))
        weights.append([p.detach() for p in module.parameters()])
    for x, y in zip(*weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)  # reassociated sums over eight AdamW steps of 1e-2


class WritesGradients(Net):
    """Of a parameter that does not train."""

    def __init__(self) -> None:
        super().__init__()
        next(self.parameters()).requires_grad_(False)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        p = next(self.parameters())
        p.grad = torch.ones_like(p)


class OwnZeroGrad(Net):
    """Put on the object."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.zero_grad = lambda set_to_none=True: [p.grad.mul_(0.5) for p in self.parameters() if p.grad is not None]
        return optimizer


@pytest.mark.parametrize("make", [Unfreezes, WritesGradients, OwnZeroGrad])
def test_what_is_not_captured_is_a_plain_loop(make: type[Net], folder: Path) -> None:
    """The fused update takes what torch's would, whoever has changed it since."""
    weights = []
    for capture in ("eager", "auto"):
        torch.manual_seed(1)
        module = make()
        result = fasttrain.compile_fit(module, max_epochs=1, capture=capture, **QUIET).fit(batches([8] * 8))
        assert result.capture.rung == "eager"
        weights.append([p.detach() for p in module.parameters()])
    for x, y in zip(*weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_clipped_gradients_are_there_to_be_seen(folder: Path) -> None:
    """Behind the step, as a plain loop leaves them."""

    class Sees(Net):
        seen: tuple[float, ...] = ()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen += (float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])),)

    module = Sees()
    result = fasttrain.compile_fit(module, max_epochs=1, gradient_clip_val=1e-3, **QUIET).fit(batches([8] * 3))
    assert result.capture.tail == "torch"
    assert module.seen == pytest.approx([1e-3] * 3, rel=1e-2)


def test_the_key_knows_the_loss() -> None:
    """Another ``loss=`` is another step."""
    keys = {decisions.key_for(Net(), [], torch.zeros(2), make_options(QUIET), [f]) for f in (nn.functional.mse_loss, nn.functional.l1_loss)}
    assert len(keys) == 2
