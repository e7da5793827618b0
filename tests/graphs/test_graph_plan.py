"""The graph rung without a GPU: which graph is recorded and replayed when, and that the run is the eager one's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasttrain
from fasttrain.errors import CaptureError
from tests.graphs.fake_device import FakeDevice, device  # noqa: F401

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Net(nn.Module):
    """Dropout, batch norm and two logged values; subclasses bend one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        loss = F.cross_entropy(out, batch[1])
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", (out.argmax(1) == batch[1]).float().mean())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), "interval": "step"}]


def batches(sizes: list[int]) -> list[list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(n, 8, generator=g), torch.randint(4, (n,), generator=g)] for n in sizes]


def train(capture: str, data: Any, make: Any = Net, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    module = make()
    torch.manual_seed(2)
    return fasttrain.compile_fit(module, capture=capture, **QUIET, **{"max_epochs": 2, **options}).fit(data, data[:2]), module


def same(data: Any, make: Any = Net, **options: Any) -> Any:
    """The eager run and the recorded one: weights, buffers, metrics and counts. Returns the recorded one's result."""
    eager, a = train("eager", data, make, **options)
    graph, b = train("graph", data, make, **options)
    assert graph.capture.rung == "graph"
    assert (eager.steps, eager.epochs) == (graph.steps, graph.epochs)
    for name, value in a.state_dict().items():
        assert torch.allclose(value.float(), b.state_dict()[name].float(), rtol=1e-4, atol=1e-5), name
    assert eager.metrics == pytest.approx(graph.metrics, rel=1e-4)
    return graph


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3, 5])
def test_graph_is_eager(accumulate: int, clip: float | None, device: FakeDevice) -> None:  # noqa: F811
    """Windows whole and cut short, validation between, a learning rate that moves, dropout: the eager rung's run."""
    same(batches([8] * 11), accumulate_grad_batches=accumulate, gradient_clip_val=clip)


def test_a_window_of_one_batch_is_one_graph(device: FakeDevice) -> None:  # noqa: F811
    """Three real steps, one capture, and a replay for every batch from then on."""
    graph, _ = train("graph", batches([8] * 12), max_epochs=3)
    kinds = [entry[0] for entry in device.log if entry[0] in ("real", "capture", "replay")]
    assert kinds[:4] == ["real", "real", "capture", "replay"]  # the trial, behind a trace; then everything is put back
    assert kinds[4:5] == ["real"]  # one look at its gradients, and that is put back too
    assert kinds[5:] == ["real"] * 2 + ["capture"] + ["replay"] * 34
    assert graph.capture.direct
    assert graph.capture.traces == 1
    assert device.closed


def test_a_longer_window_has_three(device: FakeDevice) -> None:  # noqa: F811
    """First overwrites, others add, the update is its own; the epoch's last window, of one batch, is a whole one again."""
    train("graph", batches([8] * 12), accumulate_grad_batches=4, max_epochs=3)
    order = [entry[1] for entry in device.log if entry[0] == "replay"]
    first, more, update = 2, 1, 3  # in the order in which each was first wanted, after two real calls
    assert order[-5:] == [first, more, more, more, update]
    assert len(device.graphs) == 4


def test_a_shape_is_recorded_at_its_third_sight(device: FakeDevice) -> None:  # noqa: F811
    """The first shape at once; an epoch's odd last batch from the third epoch on."""
    data = batches([8] * 5 + [3])
    same(data, max_epochs=2)
    assert sum(1 for e in device.log if e[0] == "capture") == 2  # the trial's, and the run's
    device.log.clear()
    graph = same(data, max_epochs=8)
    assert graph.capture.traces == 2
    assert sum(1 for e in device.log if e[0] == "capture") == 3


def test_shapes_change_in_mid_window(device: FakeDevice) -> None:  # noqa: F811
    """Recorded or not, every batch of a window adds to the same gradients."""
    same(batches([8, 8, 5, 8, 5, 5, 8, 5, 3, 8, 8, 5, 5, 8]), accumulate_grad_batches=3, max_epochs=4)


def test_the_least_used_shape_gives_way(device: FakeDevice) -> None:  # noqa: F811
    """Fifty shapes: never more graphs alive than buckets, and the run stays right."""
    sizes = [n for n in range(2, 14) for _ in range(6)]
    graph = same(batches(sizes), max_epochs=1)
    assert graph.capture.traces == 12


def test_losses_are_of_their_own_steps(device: FakeDevice) -> None:  # noqa: F811
    """What a step gave back is not overwritten by the replays behind it."""
    kept: list[torch.Tensor] = []

    class Keeps(fasttrain.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            kept.append(outputs["loss"] if isinstance(outputs, dict) else outputs)

    train("graph", batches([8] * 10), callbacks=[Keeps()])
    assert device.count("replay") > 10
    assert len({float(x) for x in kept}) == len(kept)


def test_the_users_batch_stays_theirs(device: FakeDevice) -> None:  # noqa: F811
    """No batch is an input of a graph: a later one is not written into it."""
    data = batches([8] * 6)
    before = [[t.clone() for t in b] for b in data]
    train("graph", data)
    assert all(torch.equal(x, y) for a, b in zip(data, before, strict=True) for x, y in zip(a, b, strict=True))


def test_parameters_freeze_and_move(device: FakeDevice) -> None:  # noqa: F811
    """Layers frozen for an epoch, weights that lie elsewhere after it: recorded anew, and right."""

    class Bends(Net):
        def on_train_epoch_start(self) -> None:
            epoch = self.trainer.current_epoch
            self.net[0].weight.requires_grad_(epoch != 1)
            if epoch == 2:
                self.net[4].weight.data = self.net[4].weight.data.clone()

    same(batches([8] * 6), Bends, max_epochs=4)


def test_a_batch_without_a_loss(device: FakeDevice) -> None:  # noqa: F811
    """None is no gradient, in the middle of a window and alone."""

    class Passes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch[0].shape[0] == 5 else super().training_step(batch, batch_idx)

    same(batches([8, 8, 5, 8, 8, 8, 5, 8]), Passes, accumulate_grad_batches=2)


def test_a_loss_of_one_element(device: FakeDevice) -> None:  # noqa: F811
    """Shape [1], in windows."""

    class Shaped(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).reshape(1)

    same(batches([8] * 6), Shaped, accumulate_grad_batches=2)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_verified(accumulate: int, device: FakeDevice) -> None:  # noqa: F811
    """verify=n looks at gradients between, and finds no difference."""
    graph = same(batches([8] * 9), accumulate_grad_batches=accumulate, verify=4)
    assert "4 steps verified" in graph.capture.why


def test_a_capture_that_fails_is_an_error_where_it_was_named(device: FakeDevice) -> None:  # noqa: F811
    """With its reason."""
    device.refuse = "operation not permitted when stream is capturing"
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        train("graph", batches([8] * 6))


def test_a_capture_that_fails_goes_to_the_next_rung(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """capture="auto": compiled, and the report says why it is not recorded."""
    device.refuse = "operation not permitted when stream is capturing"
    result, _ = train("auto", batches([8] * 6), deterministic=True)
    assert result.capture.rung == "compile"
    assert "not permitted" in str(result.capture.obstacles[0])


def test_auto_measures_it(device: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:  # noqa: F811
    """Gradients compared, steps timed with their graphs, everything put back: then the run is the eager one's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fasttrain.graphs.auto.SAVING", 1e9)
    monkeypatch.setattr("fasttrain.graphs.auto._time", _counted_time(monkeypatch))
    eager, a = train("eager", batches([8] * 9))
    result, b = train("auto", batches([8] * 9))
    assert result.capture.rung == "graph", result.capture.why
    assert "captured/1" in result.capture.timings_us
    assert eager.steps == result.steps
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def _counted_time(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real measuring, whose outcome is that the captured step wins."""
    from fasttrain.graphs import auto

    real = auto._time

    def time(maker: Any, step: Any, *args: Any) -> float:
        real(maker, step, *args)
        return 1.0 if step.rung == "eager" else 0.1

    return time


def test_a_later_capture_that_fails(device: FakeDevice) -> None:  # noqa: F811
    """The run goes on, compiled and not recorded, and says so."""

    class Fails(fasttrain.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pass

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                device.refuse = "out of memory"

    result, _ = train("graph", batches([8] * 6), callbacks=[Fails()])
    assert result.capture.rung == "graph"
    assert "out of memory" in str(result.capture.obstacles[-1])
    assert result.steps == 12


def test_resumed_in_mid_window(device: FakeDevice, tmp_path: Any) -> None:  # noqa: F811
    """k steps, a checkpoint in an open window, and the rest: the bits of one run."""
    data, ends = batches([8] * 7), []
    for stop in (None, 5):
        torch.manual_seed(1)
        module = Net()
        torch.manual_seed(2)
        options = {"capture": "graph", "accumulate_grad_batches": 3, "max_epochs": 2, **QUIET}

        class Saves(fasttrain.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, stop: Any = stop) -> None:
                if stop is not None and trainer.current_epoch == 0 and batch_idx == stop - 1:
                    trainer.save_checkpoint(tmp_path / "mid")

        fasttrain.compile_fit(module, callbacks=[Saves()], **options).fit(data)
        if stop is not None:
            torch.manual_seed(5)
            module = Net()
            fasttrain.compile_fit(module, callbacks=[Saves()], **options).fit(data, ckpt_path=tmp_path / "mid")
        ends.append(module.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


class Steady(Net):
    """No schedule moves between its steps."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"log_every_n_steps": 5, "logger": True}], ids=str)
def test_several_steps_in_a_launch(options: dict[str, Any], device: FakeDevice, tmp_path: Any) -> None:  # noqa: F811
    """Every step's own batch, mask, update and logged values; what is left at an epoch's end runs one by one."""
    ends = []
    for n in (1, 4):
        torch.manual_seed(1)
        module = Steady()
        torch.manual_seed(2)
        device.log.clear()
        given = {**QUIET, "capture": "graph", "max_epochs": 3, "default_root_dir": tmp_path / str(n), **options}
        result = fasttrain.compile_fit(module, steps_per_launch=n, **given).fit(batches([8] * 11), batches([8]))
        ends.append((module.state_dict(), result.metrics, result.steps))
        launches = device.count("replay")
    assert launches <= 1 + 2 * (2 + 3) + 4 + 12  # the trial's, two launches and three leftovers an epoch, and what logging flushed
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name
    assert ends[0][1:] == ends[1][1:]


def test_launches_and_shapes(device: FakeDevice) -> None:  # noqa: F811
    """A batch of another shape comes while steps wait: they run first."""
    same(batches([8, 8, 8, 8, 8, 8, 5, 8, 8, 5, 8, 5, 8, 5, 5, 8]), Steady, max_epochs=3, steps_per_launch=1)
    torch.manual_seed(1)
    found = []
    for n in (1, 3):
        torch.manual_seed(1)
        module = Steady()
        torch.manual_seed(2)
        data = batches([8, 8, 8, 8, 8, 8, 5, 8, 8, 5, 8, 5, 8, 5, 5, 8])
        result = fasttrain.compile_fit(module, capture="graph", max_epochs=3, steps_per_launch=n, **QUIET).fit(data)
        found.append((module.state_dict(), result.metrics))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(v, found[1][0][k]) for k, v in found[0][0].items())


def test_launches_are_left_where_something_comes_between(device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A schedule that moves at every step: said in a line, and the run is as without."""
    torch.manual_seed(1)
    options = {**QUIET, "enable_progress_bar": True}
    fasttrain.compile_fit(Net(), capture="graph", max_epochs=1, steps_per_launch=4, **options).fit(batches([8] * 9))
    captured = capsys.readouterr()
    assert "steps_per_launch=4 has no effect: a schedule moves" in captured.out + captured.err


@pytest.mark.parametrize(
    ("given", "message"),
    [({"capture": "compile"}, "graph rung"), ({"accumulate_grad_batches": 2}, "whole steps"), ({}, "no launches to save")],
)
def test_launches_that_cannot_be(given: dict[str, Any], message: str) -> None:
    """Refused at the door, with a sentence."""
    with pytest.raises(fasttrain.OptionError, match=message):
        fasttrain.compile_fit(Net(), steps_per_launch=2, accelerator="cpu", **QUIET, **given).fit(batches([8]))


def test_inductor_partitions_it(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The real compiler behind it, backward and all."""
    monkeypatch.undo()
    monkeypatch.setattr("fasttrain.setup.make_device", lambda run: device)
    monkeypatch.setattr("fasttrain.graphs.cuda.make_tail", __import__("tests.graphs.fake_device", fromlist=["FakeTail"]).FakeTail)
    same(batches([8] * 6), accumulate_grad_batches=2)
