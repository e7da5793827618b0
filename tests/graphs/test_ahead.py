"""A long run begins with eager steps while another process compiles, and takes the captured step at a batch fixed in advance."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttrain
from fasttrain.graphs import ahead, auto, decisions
from tests.graphs.test_compile_rung import QUIET, Net, batches

FIRST = 30  # eager steps


@pytest.fixture(autouse=True)
def soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Decisions of this test alone; compiling is expected to take so many steps, and wins."""
    folder = tmp_path / "decisions"
    monkeypatch.setattr(decisions, "_folder", lambda: folder)
    monkeypatch.setattr(auto, "_cost", lambda maker: FIRST * 1e-3)
    monkeypatch.setattr(auto, "_time_eager", lambda maker, batch: (1e-3, 1))
    real = auto._time

    def time(maker: Any, step: Any, *args: Any) -> float:
        real(maker, step, *args)
        return 1e-3 if step.rung == "eager" else 1e-4

    monkeypatch.setattr(auto, "_time", time)
    return folder


class Watch(fasttrain.Callback):
    """The rung of every batch, the threads it had, and whether a process of ours lives."""

    def __init__(self, stop: int = -1) -> None:
        self.rungs: list[str] = []
        self.threads: list[int] = []
        self.children: set[int] = set()
        self.stop = stop

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rungs.append(trainer.capture.rung)
        self.threads.append(torch.get_num_threads())
        self.children |= _children()
        trainer.should_stop = len(self.rungs) == self.stop


def _children() -> set[int]:
    return {int(p) for t in Path(f"/proc/{os.getpid()}/task").iterdir() for p in (t / "children").read_text().split()}


def run(watch: Watch, tmp_path: Path, kind: type[Net] = Net, **options: Any) -> tuple[Any, Net]:
    torch.manual_seed(1)
    module = kind()
    torch.manual_seed(2)
    options = {"max_epochs": 20, "callbacks": [watch], "default_root_dir": tmp_path} | QUIET | options
    ckpt = options.pop("ckpt_path", None)
    return fasttrain.compile_fit(module, **options).fit(batches([8] * 12), ckpt_path=ckpt), module


needs_fork = pytest.mark.skipif(not os.path.exists(f"/proc/{os.getpid()}/task"), reason="forks, and looks at them in /proc: Linux")


@needs_fork
def test_it_begins_eagerly_and_is_captured_at_the_batch_that_was_fixed(soon: Path, tmp_path: Path) -> None:
    before = _children()
    watch, threads = Watch(), torch.get_num_threads()
    result, a = run(watch, tmp_path)
    assert watch.rungs == ["eager"] * FIRST + ["compile"] * (240 - FIRST)
    assert len(watch.children - before) == 1, "one process, and none of its own is ours"
    assert _children() <= before, "it has ended, and was waited for"
    assert torch.get_num_threads() == threads
    assert max(watch.threads[:FIRST]) <= max(1, threads - 1), "a core is the compiler's"
    assert result.capture.rung == "compile"
    again = Watch()
    _, b = run(again, tmp_path)
    assert again.rungs == watch.rungs
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    _, c = run(Watch(), tmp_path, capture="eager")
    for x, y in zip(a.parameters(), c.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)  # 240 AdamW steps of other roundings


@needs_fork
def test_the_compile_cache_is_filled_beside(soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty cache the run finds every kernel made: nothing is compiled a second time."""
    cache = tmp_path / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    made: list[dict[Path, int]] = []
    real = auto.traced

    def traced(maker: Any, *args: Any, **named: Any) -> Any:
        if maker.ahead is None and args[2:3] == ("",) and os.getpid() == me:
            made.append(_libraries(cache))
        return real(maker, *args, **named)

    me = os.getpid()
    monkeypatch.setattr(auto, "traced", traced)

    class Another(Net):
        """What no other test has compiled: this process keeps in memory what it has."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).mul(1.375).sinh()

    run(Watch(), tmp_path, Another)
    assert made, "the captured step was made here too"
    assert made[0], "there were kernels already"
    assert {p: n for p, n in _libraries(cache).items() if p in made[0]} == made[0], "and they were not made anew"


def _libraries(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.so")}


@needs_fork
def test_a_run_that_ends_before_leaves_no_process(soon: Path, tmp_path: Path) -> None:
    before = _children()
    watch = Watch(stop=5)
    result, _ = run(watch, tmp_path)
    assert watch.children - before
    assert _children() <= before
    assert result.capture.rung == "eager"
    assert f"from batch {FIRST}" in result.capture.why


@needs_fork
def test_a_run_that_fails_leaves_no_process(soon: Path, tmp_path: Path) -> None:
    before = _children()

    class Fails(Watch):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(Fails(), tmp_path)
    assert _children() <= before


@needs_fork
def test_children_that_nobody_waits_for(soon: Path, tmp_path: Path) -> None:
    """A process that ignores its children's ends cannot ask for one; it sees that it is gone."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        watch = Watch()
        run(watch, tmp_path)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert watch.rungs.index("compile") == FIRST


@needs_fork
def test_a_process_that_hangs_is_not_waited_for(soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that some thread held at the fork is never given back there."""
    before, me, real = _children(), os.getpid(), auto.traced
    monkeypatch.setattr(ahead, "IDLE_S", 0.5)
    monkeypatch.setattr(auto, "traced", lambda *args, **named: real(*args, **named) if os.getpid() == me else threading.Event().wait())
    watch = Watch()
    run(watch, tmp_path)
    assert watch.rungs.index("compile") == FIRST
    assert _children() <= before


@needs_fork
def test_a_pool_of_the_parents_is_not_waited_for(soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has compiled before has the compiler's threads; what it forks has not. Settings go with it."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    with config.patch({"compile_threads": 2}):
        AsyncCompile.pool().submit(int).result()
        told, real, me = tmp_path / "told", auto.traced, os.getpid()

        def traced(*args: Any, **named: Any) -> Any:
            if os.getpid() != me:
                told.write_text(f"{get_compile_threads()} {config.cpp.threads}")
            return real(*args, **named)

        monkeypatch.setattr(auto, "traced", traced)
        with config.patch({"cpp.threads": 7}):
            run(Watch(stop=FIRST + 1), tmp_path)
    assert told.read_text() == "1 7"


def test_where_no_process_can_be_had_it_is_compiled_at_that_batch(soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", none)
    watch = Watch()
    run(watch, tmp_path)
    assert watch.rungs.index("compile") == FIRST


@needs_fork
@pytest.mark.parametrize(("saved_at", "window"), [(20, 1), (FIRST, 1), (31, 4)], ids=["before", "at it", "in an open window"])
def test_a_resumed_run_is_captured_at_the_same_batch(soon: Path, tmp_path: Path, saved_at: int, window: int) -> None:
    """Saved while it was compiled beside: the rest is the same run, to the last bit."""
    watched = Watch()
    _, whole = run(watched, tmp_path / "whole", accumulate_grad_batches=window)

    class Saves(Watch):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if len(self.rungs) == saved_at:
                trainer.save_checkpoint(tmp_path / "saved")
                trainer.should_stop = True

    run(Saves(), tmp_path / "a", accumulate_grad_batches=window)
    watch = Watch()
    _, resumed = run(watch, tmp_path / "b", ckpt_path=tmp_path / "saved", accumulate_grad_batches=window)
    assert watch.rungs == watched.rungs[saved_at:]
    assert watch.threads == watched.threads[saved_at:]
    for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(x, y)


@needs_fork
def test_a_run_in_which_the_eager_step_wins_begins_so_again(
    soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the threads that it had beside the compiler, for they are in the bits; there is nothing to be compiled any more."""
    monkeypatch.setattr(auto, "_time", lambda maker, step, *args: 1e-3 if step.rung == "eager" else 2e-3)
    monkeypatch.setattr(auto, "_time_eager", lambda maker, batch: (1e-3, torch.get_num_threads()))
    before, first, second = _children(), Watch(), Watch()
    run(first, tmp_path)
    assert first.children - before
    run(second, tmp_path)
    assert set(first.rungs) == {"eager"}
    assert second.threads == first.threads
    assert second.children <= before


@needs_fork
def test_a_run_that_is_ended_while_it_waits(soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ctrl-C is heard: the batch at hand is the last one, and no process is left."""
    before, me, real = _children(), os.getpid(), auto.traced
    monkeypatch.setattr(auto, "traced", lambda *args, **named: real(*args, **named) if os.getpid() == me else _busy())
    timer = threading.Timer(2.0, os.kill, (me, signal.SIGINT))
    timer.start()
    watch = Watch()
    with pytest.raises(KeyboardInterrupt):
        run(watch, tmp_path)
    timer.join()
    assert watch.rungs == ["eager"] * (FIRST + 1)
    assert _children() <= before


def _busy() -> None:
    while True:
        pass


@needs_fork
def test_handlers_of_the_runs_are_not_called_beside_it(soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that tells every process of a job to end means one."""
    told, me, real = tmp_path / "told", os.getpid(), auto.traced

    def handler(*_: Any) -> None:
        told.write_text(told.read_text() + "x" if told.exists() else "x")

    def traced(*args: Any, **named: Any) -> Any:
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **named)

    monkeypatch.setattr(auto, "traced", traced)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        run(Watch(stop=FIRST + 1), tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not told.exists()


@needs_fork
def test_a_checkpoint_from_such_a_run_does_not_fork_where_it_must_not(
    soon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Watch(stop=20)
    run(saver, tmp_path, enable_checkpointing=True)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    watch = Watch()
    run(watch, tmp_path, ckpt_path="last", enable_checkpointing=True, verify=2)
    assert watch.rungs == ["eager"] * (FIRST - 20) + ["compile"] * (240 - FIRST)


@needs_fork
def test_a_window_is_not_broken(soon: Path, tmp_path: Path) -> None:
    watch = Watch()
    run(watch, tmp_path, accumulate_grad_batches=4)
    assert watch.rungs.index("compile") == 32, "the window that was open at the thirtieth batch ends first"


@pytest.mark.parametrize("options", [{"verify": 2}, {"deterministic": True}, {"max_epochs": 5}], ids=str)
def test_it_is_not_done(soon: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What promises more of the first steps, and what is too short, has no steps of another kind."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    watch = Watch()
    run(watch, tmp_path, **options)
    assert len(set(watch.rungs)) == 1


@needs_fork
def test_what_was_decided_says_so(soon: Path, tmp_path: Path) -> None:
    run(Watch(), tmp_path)
    decided = json.loads(next(soon.glob("*.json")).read_text())
    assert decided["steps_to_compile"] == FIRST
