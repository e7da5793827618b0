"""What public code puts into a training step: each captured whole or cut, with the eager result."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from torch import Tensor, nn

import fasttrain
from fasttrain.graphs import cut, traced, tracer
from tests.parity.modules import assert_finite

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
log = logging.getLogger("tests.obstacles")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Net(nn.Module):
    """Two layers; subclasses put something into the step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.b(torch.tanh(self.a(x))), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(n: int = 12) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 8, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(n)]


def both(make: type[Net], **options: Any) -> tuple[Any, Any, nn.Module, nn.Module]:
    """The module trained eagerly and captured, weights and metrics equal to rounding."""
    results, modules = [], []
    for capture in ("eager", "compile"):
        torch.manual_seed(0)
        module = make()
        torch.manual_seed(1)
        results.append(fasttrain.compile_fit(module, capture=capture, **QUIET | options).fit(batches()))
        modules.append(module)
    for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2e-5, atol=1e-6)
    assert results[0].metrics.keys() == results[1].metrics.keys()
    for name, value in results[0].metrics.items():
        assert results[1].metrics[name] == pytest.approx(value, rel=1e-4), name
    return results[0], results[1], modules[0], modules[1]


class ReadsForALogLine(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss.item(), on_epoch=True)
        return loss


class KeepsNumbers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.seen.append(loss.item())
        return loss


class Flag(Net):
    def __init__(self) -> None:
        super().__init__()
        self.helper = type("Helper", (), {"inside": False})()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.helper.inside = True
        loss = self.loss(batch)
        self.helper.inside = False
        return loss


class Silent(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        log.debug("step %d", batch_idx)
        return self.loss(batch)


class SumsOver(Net):
    """Dimensions listed by way of a tensor, as in monai's Dice loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        axes = torch.arange(0, batch[0].ndim).tolist()
        return self.loss(batch) + self.a(batch[0]).square().mean(axes)


class HeadIsAProperty(Net):
    """``self.head = module`` under a property without a setter: nn.Module finds it where the property fails."""

    @property
    def head(self) -> Any:
        return self._head

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + F.cross_entropy(self.head(batch[0]), batch[1])


class Branches(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if round(loss.item(), 6) > 1.4:  # nobody follows it
            loss = loss * 0.5
        return loss + 1e-3 * self.a.weight.square().sum()


@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="this torch counts all fits together")
def test_a_fit_does_not_use_up_what_the_next_may_compile() -> None:
    """Dynamo's recompile limit (8) is by code: ten modules of one class have the same."""

    class Wide(Branches):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(width, 8), nn.Linear(8, 4), width

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            x = x.new_ones(len(x), self.width)
            loss = F.cross_entropy(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(x.sin()))))).sigmoid(), y)
            return loss * 0.5 if round(loss.item(), 3) > 9.0 else loss

    for width in range(3, 13):
        captured = fasttrain.compile_fit(Wide(width), capture="compile", **QUIET).fit(batches(3)).capture
        assert (captured.whole, captured.pieces) == (False, 1)


class Prints(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        print("loss of", batch_idx, f"{loss:.6f}")
        return loss


class Smooths(Net):
    """A running mean of the loss as a Python number, which the loss itself takes up."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean


def test_a_value_read_for_a_log_line_is_read_between_the_kernels() -> None:
    """One whole graph, the value of that very step."""
    _, captured, _, _ = both(ReadsForALogLine)
    assert (captured.capture.whole, captured.capture.traces) == (True, 1)


def test_numbers_kept_in_a_list() -> None:
    """Appended in order, as many as there were steps, whatever that does to the graph."""
    _, _, eager, module = both(KeepsNumbers)
    assert module.seen == pytest.approx(eager.seen, rel=1e-5)  # type: ignore[arg-type]
    assert len(module.seen) == 12  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [SumsOver, HeadIsAProperty])
def test_what_plain_tracing_stumbles_over(make: type[Net]) -> None:
    """One whole graph, past the guards."""
    _, captured, _, _ = both(make)
    whole = make is not SumsOver or TORCH < (2, 15)  # whose tracer keeps a table of its own of a tensor's methods
    assert (captured.capture.whole, captured.capture.direct) == (whole, whole)


def test_a_flag_set_and_put_back_is_no_change() -> None:
    """Steady steps are called past the guards."""
    _, captured, _, _ = both(Flag)
    assert captured.capture.whole
    assert captured.capture.direct


def test_a_logger_that_says_nothing_does_not_stand_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """Its level off: left out. Its level on: every message is heard, whatever that does to the graph."""
    _, captured, _, _ = both(Silent)
    assert captured.capture.whole
    with caplog.at_level(logging.DEBUG, log.name):
        _, captured, _, _ = both(Silent)
    messages = [r.getMessage() for r in caplog.records if r.name == log.name]
    assert [messages.count(f"step {i}") for i in range(1, 12)] == [2] * 11  # once on each rung; the first batch is looked at too


def test_a_logger_that_speaks_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' warning_once: heard in the dry look, no part of the graph."""

    @functools.lru_cache(None)
    def warning_once(self: logging.Logger, message: str) -> None:
        self.warning(message)

    monkeypatch.setattr(logging.Logger, "warning_once", warning_once, raising=False)

    class Once(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            log.warning_once("deprecated")  # type: ignore[attr-defined]
            return self.loss(batch)

    _, captured, _, _ = both(Once)
    assert captured.capture.whole
    assert [r.getMessage() for r in caplog.records if r.name == log.name] == ["deprecated"]


def test_a_branch_on_a_value_cuts_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides of it in compiled stretches, as many branches taken as eagerly; explain says where."""
    _, captured, _, _ = both(Branches)
    assert (captured.capture.rung, captured.capture.whole) == ("compile", False)
    assert 1 <= captured.capture.pieces <= 2
    assert "test_obstacles.py" in str(captured.capture.obstacles[0])


def test_new_code_in_every_step_is_not_compiled_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated functions are other functions in every step: a few are compiled, then they run as they are."""

    class Generates(Branches):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            names: dict[str, Any] = {}
            exec("def f(x):\n" + "    x = x * 0.5 + x.sin()\n" * 8 + "    return x", names)
            return names["f"](super().training_step(batch, batch_idx))  # type: ignore[no-any-return]

    compiled: list[int] = []
    compile_fx = torch._inductor.compile_fx.compile_fx

    def counted(*args: Any, **kwargs: Any) -> Any:
        compiled.append(1)
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", counted)
    monkeypatch.setattr(cut, "MORE", 2)
    both(Generates)
    assert 1 <= len(compiled) <= 10


def test_prints_are_printed_once_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """In order, with the values of their step, whatever that does to the graph; nothing of a trial is seen."""
    both(Prints)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss of")]
    eager, captured = lines[:12], lines[12:]
    assert [line.split()[2] for line in eager] == [str(i) for i in range(12)]
    assert [float(line.split()[3]) for line in captured] == pytest.approx([float(line.split()[3]) for line in eager], abs=2e-6)


def test_a_number_that_feeds_back_is_never_frozen() -> None:
    """Whether it stays a symbol or cuts the step."""
    _, _, eager, module = both(Smooths)
    assert module.mean == pytest.approx(eager.mean, rel=1e-5)  # type: ignore[arg-type]


class Vae(Net):
    """Distributions with their arguments checked, as torch has them by default."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        mean, spread = self.a(x).chunk(2, 1)
        posterior = torch.distributions.Normal(mean, F.softplus(spread))
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        return torch.distributions.kl_divergence(posterior, prior).sum(1).mean() + posterior.rsample().square().mean()


def test_distributions_are_captured_whole_and_still_look_at_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dry look, and every so many steps: the error is torch's own. The default is put back."""
    monkeypatch.setattr(traced, "VALIDATE_EVERY", 5)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # any torch.compile before has switched it off
    before = torch.distributions.Distribution._validate_args
    _, captured, _, _ = both(Vae)
    assert captured.capture.whole
    assert torch.distributions.Distribution._validate_args is before
    bad = batches(3) + [(torch.full((8, 8), float("nan")), torch.zeros(8, dtype=torch.long))] * 8
    with pytest.raises(ValueError, match="constraint"):
        fasttrain.compile_fit(Vae(), capture="compile", nonfinite="ignore", **QUIET).fit(bad)


class Attends(Net):
    """An encoder under a causal mask and one of padding; the decoder's is a mask that only looks causal."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        causal, x = nn.Transformer.generate_square_subsequent_mask(5), x.unsqueeze(1) * torch.linspace(1, 2, 5).view(5, 1)  # [8, 5, 8]
        padding = torch.zeros_like(causal[:1]).masked_fill(torch.arange(5) > 3, -torch.inf).expand(8, -1)
        x = self.encoder(x, mask=causal, src_key_padding_mask=padding)
        x = self.decoder(x, x, tgt_mask=causal.masked_fill(torch.eye(5) > 0, -0.5))
        return self.loss((x.mean(1), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)  # the gradient of a key's bias is nothing but rounding


def test_a_mask_is_applied_and_not_read() -> None:
    """torch reads it on the host to find out whether it is the causal one; the random stream is the eager one."""
    _, captured, _, _ = both(Attends)
    assert (captured.capture.whole, captured.capture.traces) == (True, 1)


class Taught(Net):
    """A teacher in eval mode under a mask of padding: torch's own encoder gives zeros there, on a road that no trace takes."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.teacher = nn.TransformerEncoder(layer, 1).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        self.teacher.eval()
        padding = torch.arange(5).expand(8, 5) > 2
        with torch.no_grad():
            target = self.teacher(x.unsqueeze(1) * torch.linspace(1, 2, 5).view(5, 1), src_key_padding_mask=padding)
        return self.loss(batch) + (self.a(x)[:, :8] - target.mean(1)).square().mean()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Dynamo does not know", "ignore:.*torch.compiler.disable")
def test_an_encoder_that_takes_its_nested_road_runs_as_it_is() -> None:
    _, captured, _, _ = both(Taught)
    assert (captured.capture.rung, captured.capture.whole) == ("compile", False)
    assert "enable_nested_tensor=False" in str(captured.capture.obstacles[0])


class Asserts(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert_finite(batch[0])
        return self.loss(batch)


class Raises(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if torch.isnan(batch[0]).any():
            raise ValueError("x is not finite")
        return self.loss(batch)


@pytest.mark.parametrize("make", [Asserts, Raises])
def test_a_check_of_values_is_heard_where_it_fails(make: type[Net]) -> None:
    """An assertion, or a branch that raises: one of the graph's own, left out at no step."""
    _, captured, _, _ = both(make)
    assert captured.capture.whole
    bad = [*batches(5), (torch.full((8, 8), float("nan")), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(AssertionError if make is Asserts else ValueError, match="x is not finite"):
        fasttrain.compile_fit(make(), capture="compile", nonfinite="ignore", **QUIET).fit(bad)


class Picks(Net):
    """Rows by a mask and by number, as many as there are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out, mask = self.b(torch.tanh(self.a(x))), y > 0
        rows = (y < 3).nonzero().squeeze(1)
        return F.cross_entropy(out[mask], y[mask]) + out.index_select(0, rows).square().mean()


def test_rows_picked_by_value() -> None:
    """One graph whatever their number."""
    _, captured, _, _ = both(Picks)
    assert (captured.capture.whole, captured.capture.traces, captured.capture.direct) == (True, 1, True)


def test_the_tracers_settings_cost_nothing_between_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's callback has the guards looked at in every step; the settings are in force once, for the trace."""
    entered: list[str] = []

    class Watched(tracer._Within):
        def __call__(self, *args: Any) -> Any:
            entered.append("settings")
            return super().__call__(*args)

    class Foreign(fasttrain.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            entered.append("batch")

    class Plain(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    monkeypatch.setattr(tracer, "_Within", Watched)
    fasttrain.compile_fit(Plain(), capture="compile", callbacks=[Foreign()], **QUIET).fit(batches())
    assert entered == ["settings", *["batch"] * 12]


def test_a_librarys_anomaly_mode_is_off_within_a_fit() -> None:
    """Set on import somewhere, it would end every capture; Lightning's Trainer switches it off, too."""
    with torch.autograd.set_detect_anomaly(True):
        _, captured, _, _ = both(Silent)
        assert torch.is_anomaly_enabled()
    assert captured.capture.whole


@pytest.mark.parametrize("folder", ["torch", "site-packages"])
def test_the_place_of_an_obstacle(folder: str, tmp_path: Path) -> None:
    """A folder called torch is not torch; in a package, its line comes with the user's own."""
    path = tmp_path / folder / "mine.py"
    path.parent.mkdir()
    path.write_text("def loss(module, batch):\n    value = module.loss(batch)\n    return value * 0.5 if value.item() > 0 else value\n")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    given = {"loss": lambda module, batch: mine.loss(module, batch), "optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}
    result = fasttrain.compile_fit(Net(), capture="compile", **given, **QUIET).fit(batches())
    where = result.capture.obstacles[0].where
    own, line = where.split(" (in ")[0].split(":")
    assert (Path(own).name, "mine.py:3" in where) == ("mine.py" if folder == "torch" else Path(__file__).name, True), (where, line)


@pytest.mark.parametrize("as_object", [False, True])
def test_metrics_of_torchmetrics_are_captured_whole(as_object: bool) -> None:
    """Their validation of arguments, which looks at values, is left out as that of distributions is; their counts go on."""
    torchmetrics = pytest.importorskip("torchmetrics")
    kind = {"task": "multiclass", "num_classes": 4}

    class Measures(Net):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.Accuracy(**kind)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            out = self.b(torch.tanh(self.a(x)))
            value = self.accuracy(out, y) if as_object else torchmetrics.functional.accuracy(out, y, **kind)
            self.log("accuracy", value, on_epoch=True)
            return F.cross_entropy(out, y)

    _, captured, eager, module = both(Measures)
    assert captured.capture.whole or TORCH < (2, 13)
    assert (module.accuracy._update_count, eager.accuracy._update_count) == ((12, 12) if as_object else (0, 0))  # type: ignore[union-attr]
    if as_object:
        assert torch.equal(module.accuracy.compute(), eager.accuracy.compute())  # type: ignore[operator, union-attr]
