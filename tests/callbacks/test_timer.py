"""Laws of the timer: it stops in time, counts on after a restart, and reads durations as Lightning does."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fasttrain.callbacks import Timer, as_seconds
from fasttrain.errors import OptionError


def test_durations_have_three_forms() -> None:
    """A timedelta, DD:HH:MM:SS, a dict; anything else is refused."""
    assert as_seconds(timedelta(hours=1)) == as_seconds("00:01:00:00") == as_seconds({"hours": 1}) == 3600.0
    for wrong in ("1:00", "x", {"hour": 1}, 5):
        with pytest.raises(OptionError, match="DD:HH:MM:SS"):
            as_seconds(wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="interval"):
        Timer(interval="batch")


@pytest.mark.parametrize(("interval", "step"), [("step", 1), ("epoch", 4)])
def test_it_stops_when_the_time_is_up(interval: str, step: int, make_run: Callable[..., Any]) -> None:
    """After the step or the epoch in which that happens."""
    timer = Timer(timedelta(0), interval=interval)
    run = make_run(timer, val_enabled=False)
    run.call("on_train_start")
    run.fit([], epochs=3)
    assert run.should_stop
    assert run.global_step in (0, step)  # 0: seen at the start of the fit already
    assert timer.time_remaining() is not None


def test_it_counts_on_after_a_restart(make_run: Callable[..., Any]) -> None:
    """A run that has no time left stops before its first step."""
    timer = Timer("00:00:00:10")
    timer.load_state_dict(json.loads(json.dumps({"time_elapsed": {"train": 11.0}})))
    run = make_run(timer)
    run.fit([], epochs=3)
    assert run.should_stop
    assert run.global_step == 0
    assert timer.time_elapsed() >= 11.0


def test_each_stage_has_its_time(make_run: Callable[..., Any]) -> None:
    """Training and validation are measured apart; without a duration nothing stops."""
    run = make_run(timer := Timer())
    run.fit([1.0] * 3, epochs=3)
    assert timer.time_elapsed("train") >= timer.time_elapsed("validate") > 0.0
    assert timer.time_elapsed("test") == 0.0
    assert timer.time_remaining() is None
    assert run.current_epoch == 3
