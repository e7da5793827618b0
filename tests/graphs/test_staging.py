"""Batches on their way: every copy and every read is ordered by events, whatever the streams do, and nobody's batch is overwritten."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import fasttrain
from fasttrain.graphs.staging import SHAPES, SLOTS, Staging
from tests.graphs.fake_device import FakeDevice, FakeEvent, device  # noqa: F401
from tests.graphs.test_graph_plan import Net, batches, same, train

READS = ("replay", "real")  # what the step does on its own stream


def races(log: list[tuple[Any, ...]]) -> list[str]:
    """Copies and reads of one slot between which no chain of events stands, by vector clocks."""
    clocks: dict[str, Counter[str]] = {"main": Counter(), "copy": Counter(), "capture": Counter()}
    events: dict[int, Counter[str]] = {}
    written: dict[int, Counter[str]] = {}  # slot -> the clock of its newest copy
    read: dict[int, list[Counter[str]]] = {}
    now: list[int] = []  # slots of the newest batch
    filling, found = False, []
    for what, *rest in log:
        stream = "copy" if what == "copy" else rest[1] if what in ("record", "wait") else "main"
        if what == "host waits":
            continue
        clock = clocks[stream]
        clock[stream] += 1
        if what == "record":
            events[rest[0]] = Counter(clock)
        elif what == "wait":
            clocks[stream] = clock | events.get(rest[0], Counter())
        elif what == "copy":
            now = [*now, rest[0]] if filling else [rest[0]]
            found += [f"a slot is filled while it is read ({rest[0]})" for r in read.pop(rest[0], []) if not r <= clock]
            written[rest[0]] = Counter(clock)
        elif what in READS:
            found += [f"a slot is read before it is filled ({s})" for s in now if not written[s] <= clock]
            for s in now:
                read.setdefault(s, []).append(Counter(clock))
        filling = what == "copy"
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_slot_is_touched_by_two(accumulate: int, device: FakeDevice) -> None:  # noqa: F811
    """The copy waits for the last read, the read for the copy; slots come round; and the run is the eager one's."""
    same(batches([8] * 12), accumulate_grad_batches=accumulate, max_epochs=3)
    copies = [entry[1] for entry in device.log if entry[0] == "copy"]
    assert len(copies) > 2 * 2 * SLOTS
    assert len(set(copies)) == 2 * SLOTS
    assert races(device.log) == []


@pytest.mark.parametrize("dropped", ["wait", "record"])
def test_the_race_is_found(dropped: str, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What finds races finds them: without its waits, or without its records, the same run has some."""
    monkeypatch.setattr(FakeEvent, dropped, lambda self: None)
    train("graph", batches([8] * 12), max_epochs=3)
    assert races(device.log)


def test_pinned_memory_is_written_when_it_is_free(device: FakeDevice) -> None:  # noqa: F811
    """The host waits for the copy out of a slot's pinned memory before it writes there again, and only then."""
    staging = Staging(device, torch.device("cpu"))
    staging.fixed = True
    for batch in batches([8] * (2 * SLOTS)):
        staging(batch)
    assert device.count("host waits") == SLOTS


def test_values_structure_and_few_shapes(device: FakeDevice) -> None:  # noqa: F811
    """A nested batch comes as it was; None and numbers go the plain way; of many shapes few keep their slots."""
    staging = Staging(device, torch.device("cpu"))
    staging.fixed = True
    batch = {"x": torch.randn(4, 3), "more": [torch.arange(4), (torch.ones(2, 2).t(),)]}
    out = staging(batch)
    assert list(out) == ["x", "more"]
    assert torch.equal(out["x"], batch["x"])
    assert out["x"] is not batch["x"]
    assert out["more"][1][0].stride() == batch["more"][1][0].stride()
    odd = [torch.ones(2), "a name"]
    assert staging(odd)[1] == "a name"
    for n in range(3 * SHAPES):
        staging([torch.ones(n + 1)])
    assert len(staging._rings) == SHAPES
    held = staging([torch.ones(5)])
    assert staging(held)[0] is held[0]  # it is there already


def test_whoever_sees_a_batch_keeps_it(device: FakeDevice) -> None:  # noqa: F811
    """A callback that keeps batches, and a module that does, have what they were given."""
    data, kept = batches([8] * 9), []

    class Keeps(fasttrain.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            kept.append(batch)

    class Holds(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.last = batch[0]
            return super().training_step(batch, batch_idx)

    train("graph", data, max_epochs=1, callbacks=[Keeps()])
    assert all(torch.equal(x, y) for a, b in zip(data, kept, strict=True) for x, y in zip(a, b, strict=True))
    _, module = train("graph", data, Holds, max_epochs=1)
    assert torch.equal(module.last, data[-1][0])


def test_a_transfer_hook_has_its_way(device: FakeDevice) -> None:  # noqa: F811
    """Nothing is staged where a module brings its batches itself."""

    class Brings(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2, batch[1]]

    same(batches([8] * 6), Brings)
    assert device.count("copy") == 0
