"""The compile rung under everything that may change while it runs: right, and without a recompile storm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttrain
from fasttrain.graphs.plan import Plan

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Net(nn.Module):
    """One hidden layer; subclasses bend one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(sizes: list[int]) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(n, 8, generator=g), torch.randint(4, (n,), generator=g)] for n in sizes]


def both(make: Any, data: Any, **options: Any) -> tuple[Any, nn.Module, Any, nn.Module]:
    """The same run on the eager rung and on the compile rung."""
    out: list[Any] = []
    for capture in ("eager", "compile"):
        torch.manual_seed(1)
        module = make()
        torch.manual_seed(2)
        out += [fasttrain.compile_fit(module, capture=capture, **QUIET, **{"max_epochs": 1, **options}).fit(data), module]
    return tuple(out)  # type: ignore[return-value]


def same(a: nn.Module, b: nn.Module) -> None:
    for name, value in a.state_dict().items():
        # rounding of reassociated sums, at the scale of a few AdamW steps of 1e-2
        assert torch.allclose(value, b.state_dict()[name], rtol=1e-4, atol=1e-4), name


def test_changing_batch_shapes() -> None:
    """Many shapes: the frequent one has its own graph, the others share one; never more than a few traces."""
    _, a, compiled, b = both(Net, batches([8, 8, 5, 8, 7, 3, 8, 6, 5, 4, 8, 9, 3, 2, 8, 5, 6, 7, 11, 12, 8, 3, 13, 8]))
    same(a, b)
    assert compiled.capture.rung == "compile"
    assert 1 <= compiled.capture.traces <= 3


def test_train_and_eval_mode() -> None:
    """Batch norm frozen for the second epoch with eval(): each mode computes what eager computes."""

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.norm(self.a(x))))

        def on_train_epoch_start(self) -> None:
            self.norm.train(self.trainer.current_epoch != 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    _, a, compiled, b = both(Frozen, batches([8] * 6), max_epochs=3)
    same(a, b)
    assert compiled.capture.traces == 2


def test_unfrozen_in_the_middle() -> None:
    """A parameter that starts to train in the second epoch trains, on every rung."""

    class Unfreezes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.a.requires_grad_(self.trainer.current_epoch >= 1)

    _, a, compiled, b = both(Unfreezes, batches([8] * 6), max_epochs=3)
    same(a, b)
    torch.manual_seed(1)
    assert not torch.equal(Unfreezes().a.weight, b.a.weight)  # type: ignore[union-attr, arg-type]
    assert compiled.capture.rung == "compile"
    assert compiled.capture.traces == 2


def test_learning_rate_that_changes_every_step() -> None:
    """A schedule a step reaches the captured step without a recompile."""

    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    _, a, compiled, b = both(Scheduled, batches([8] * 12))
    same(a, b)
    assert compiled.capture.traces == 1
    assert compiled.capture.direct


def test_a_counter_in_the_module() -> None:
    """Python state the step changes is changed as often as eagerly, and the step still runs captured."""

    class Counts(Net):
        count = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            return super().training_step(batch, batch_idx)

    _, a, compiled, b = both(Counts, batches([8] * 12))
    same(a, b)
    assert a.count == b.count == 12
    assert (compiled.capture.rung, compiled.capture.traces, compiled.capture.direct) == ("compile", 1, True)


def test_a_counter_that_the_loss_takes_up() -> None:
    """It stays in the trace: a number of the graph's, and guards are evaluated every step."""

    class Weighs(Net):
        count = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            return super().training_step(batch, batch_idx) * (1 + self.count)

    _, a, compiled, b = both(Weighs, batches([8] * 12))
    same(a, b)
    assert a.count == b.count == 12
    assert compiled.capture.rung == "compile"
    assert compiled.capture.traces <= 3
    assert "Python state" in compiled.capture.why_guarded


def test_the_step_and_epoch_numbers() -> None:
    """A loss that reads global_step and current_epoch is traced with them as symbols, not anew at every step."""

    class Warms(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (1.0 + 0.1 * self.trainer.global_step + self.trainer.current_epoch)

    _, a, compiled, b = both(Warms, batches([8] * 6), max_epochs=3)
    same(a, b)
    assert compiled.capture.traces <= 4


def test_tied_frozen_and_unused() -> None:
    """Tied weights are updated once and stay tied; frozen and unused parameters stay as they were."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.frozen(self.a(x))))

    _, a, compiled, b = both(Tied, batches([8] * 6), gradient_clip_val=0.1)
    same(a, b)
    assert b.a.weight is b.b.weight
    assert torch.equal(a.unused.weight, b.unused.weight)  # type: ignore[union-attr, arg-type]
    assert compiled.capture.direct


def test_what_cannot_be_captured_whole_is_cut() -> None:
    """A branch on a value: compiled stretches on both sides of it, file and line named; too small ones are left eager by "auto"."""

    class Branches(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if round(loss.item(), 6) > 100:  # nobody follows it
                loss = loss * 0.5
            return loss

    weights = []
    for capture in ("eager", "compile"):
        torch.manual_seed(0)
        module = Branches()
        trainer = fasttrain.compile_fit(module, max_epochs=1, capture=capture, **QUIET)
        result = trainer.fit(batches([8] * 6))
        assert result.capture.rung == capture
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert (result.capture.whole, result.capture.pieces) == (False, 1)
    assert "test_compile_rung.py" in trainer.explain()
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
    trainer = fasttrain.compile_fit(Branches(), max_epochs=1, capture="auto", deterministic=True, **QUIET)
    result = trainer.fit(batches([8] * 3))
    assert (result.steps, result.capture.rung) == (3, "eager")
    assert result.capture.obstacles
    assert "test_compile_rung.py" in trainer.explain()


@pytest.mark.parametrize("where", ["tensor", "parameter", "module"])
def test_hooks_are_never_dropped(where: str) -> None:
    """Hooks the tracer would drop in silence run, because the step takes another rung."""
    seen: list[str] = []

    class Hooked(Net):
        def __init__(self) -> None:
            super().__init__()
            if where == "parameter":
                self.a.weight.register_hook(lambda g: seen.append("parameter"))  # type: ignore[func-returns-value]
            if where == "module":
                self.b.register_full_backward_hook(lambda m, gi, go: seen.append("module"))  # type: ignore[func-returns-value]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            if where == "tensor":
                h.register_hook(lambda g: seen.append("tensor"))  # type: ignore[func-returns-value]
            return self.b(F.relu(h))

    result = fasttrain.compile_fit(Hooked(), max_epochs=1, capture="auto", deterministic=True, **QUIET).fit(batches([8] * 4))
    assert seen == [where] * 4
    assert result.capture.rung == "eager"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_verify_agrees(precision: str) -> None:
    """verify=n passes on a right capture and leaves the run as it would have been without it."""
    runs = []
    for verify in (0, 3):
        torch.manual_seed(1)
        module = Net()
        options = {"precision": precision, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
        result = fasttrain.compile_fit(module, max_epochs=1, capture="compile", verify=verify, **options, **QUIET).fit(batches([8] * 10))
        assert result.capture.rung == "compile"
        runs.append(module)
    assert "3 steps verified" in result.capture.why
    for x, y in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(x, y)


def test_verify_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step that computes something else is found, named, and the run goes on eagerly with the right weights."""
    honest = Plan.__call__

    def lying(self: Plan, batch: Any) -> Any:
        out = honest(self, batch)
        return None if out is None else out._replace(grads=[g * 2 for g in out.grads or ()])

    monkeypatch.setattr(Plan, "__call__", lying)
    _, a, compiled, b = both(Net, batches([8] * 8), verify=4)
    same(a, b)
    assert compiled.capture.rung == "eager"
    assert any("gradient" in str(o) for o in compiled.capture.obstacles)


def test_clip_by_value_and_accumulation() -> None:
    """Windows of three over ten batches with clipping by value: the last window divides by one."""
    eager, a, compiled, b = both(Net, batches([8] * 10), accumulate_grad_batches=3, gradient_clip_val=1e-2, gradient_clip_algorithm="value")
    same(a, b)
    assert eager.steps == compiled.steps == 4


@pytest.mark.parametrize("kind", ["dict", "tuple", "nested", "single"])
def test_batch_containers(kind: str) -> None:
    """Batches in every plain container take the direct call."""

    class Takes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = {
                "dict": lambda: (batch["x"], batch["y"]), "tuple": lambda: batch, "nested": lambda: (batch["in"][0], batch["out"]["y"]),
                "single": lambda: (batch, batch[:, 0].gt(0).long()),
            }[kind]()  # fmt: skip
            return super().training_step((x, y), batch_idx)

    made = {
        "dict": lambda b: {"x": b[0], "y": b[1]}, "tuple": tuple, "nested": lambda b: {"in": [b[0], None], "out": {"y": b[1]}},
        "single": lambda b: b[0],
    }[kind]  # fmt: skip
    _, a, compiled, b = both(Takes, [made(x) for x in batches([8] * 6)])
    same(a, b)
    assert compiled.capture.direct


def test_nothing_is_written_when_the_loss_is_not_finite() -> None:
    """nonfinite="raise" stops before the update with the step's number; "skip" goes on; weights stay finite."""
    data = batches([8] * 6)
    data[3][0][0, 0] = float("nan")
    for capture in ("eager", "compile"):
        torch.manual_seed(1)
        module = Net()
        with pytest.raises(fasttrain.NonFiniteError, match="step 3"):
            fasttrain.compile_fit(module, max_epochs=1, capture=capture, **QUIET).fit(data)
        assert all(p.isfinite().all() for p in module.parameters())
        result = fasttrain.compile_fit(module, max_epochs=1, capture=capture, nonfinite="skip", **QUIET).fit(data)
        assert (result.steps, result.ledger.skipped_steps) == (5, 1)
        assert all(p.isfinite().all() for p in module.parameters())


def test_a_logger_that_changes_the_module() -> None:
    """Code in somebody's logger may freeze a layer in mid-epoch: the next step sees it, captured as eagerly."""

    class Freezes:
        module: Net | None = None

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert self.module is not None
            self.module.scale = 0.0

    class Scaled(Net):
        scale = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * self.scale

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    runs = []
    for capture in ("eager", "compile"):
        torch.manual_seed(1)
        module, logger = Scaled(), Freezes()
        logger.module = module
        options = {**QUIET, "logger": logger, "log_every_n_steps": 4}
        fasttrain.compile_fit(module, max_epochs=1, capture=capture, **options).fit(batches([8] * 10))
        runs.append(module)
    same(*runs)


def test_a_bad_first_batch_is_skipped_when_asked() -> None:
    """nonfinite="skip" skips a first batch that is not finite, too; "raise" names it before anything compiles."""
    data = batches([8] * 4)
    data[0][0][0, 0] = float("inf")
    result = fasttrain.compile_fit(Net(), max_epochs=1, capture="compile", nonfinite="skip", **QUIET).fit(data)
    assert (result.steps, result.ledger.skipped_steps) == (3, 1)
    with pytest.raises(fasttrain.ModuleError, match="first batch"):
        fasttrain.compile_fit(Net(), max_epochs=1, capture="compile", **QUIET).fit(data)
