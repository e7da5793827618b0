"""Laws of early stopping: it stops where Lightning's stops, says why, and continues after a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fasttrain.callbacks import EarlyStopping, EarlyStoppingReason
from fasttrain.errors import OptionError

WORSE = [1.0, 0.9, 0.95, 0.91, 0.92, 0.93, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]

CASES: list[tuple[dict[str, Any], list[float], dict[str, Any]]] = [
    ({}, WORSE, {}),
    ({"patience": 1}, WORSE, {}),
    ({"patience": 0}, WORSE, {}),
    ({"mode": "max"}, WORSE, {}),
    ({"min_delta": 0.1, "patience": 2}, [1.0, 0.9, 0.8, 0.7, 0.69, 0.68, 0.67, 0.6, 0.5, 0.5, 0.5, 0.5], {}),
    ({"mode": "max", "min_delta": 0.1, "patience": 2}, [0.1 * i for i in range(12)], {}),
    ({"stopping_threshold": 0.45}, [1.0 - 0.1 * i for i in range(12)], {}),
    ({"divergence_threshold": 2.0, "patience": 9}, [1.0, 1.5, 2.5] + [3.0] * 9, {}),
    ({"patience": 9}, [1.0, 0.9, math.nan] + [0.1] * 9, {}),
    ({"patience": 9}, [1.0, 0.9, -math.inf] + [0.1] * 9, {}),
    ({"check_finite": False, "patience": 3}, [math.nan] * 12, {}),
    ({"patience": 2}, WORSE * 2, {"val_check_interval": 2}),
    ({"patience": 2}, WORSE * 2, {"val_check_interval": 0.5}),
    ({"patience": 1}, WORSE, {"check_val_every_n_epoch": 2}),
    ({"patience": 2, "check_on_train_epoch_end": True}, WORSE * 2, {"val_check_interval": 2}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_stops_where_lightning_stops(
    case: int, make_run: Callable[..., Any], lightning_fit: Callable[..., Any]
) -> None:
    """Same values, same arguments: same epoch, step, reason, count and best score."""
    arguments, values, cadence = CASES[case]
    theirs = pl.callbacks.EarlyStopping("val_loss", **arguments)
    trainer = lightning_fit([theirs], values, epochs=12, **cadence)
    ours = EarlyStopping("val_loss", **arguments)
    run = make_run(ours, **cadence)
    run.fit(values, epochs=12)
    assert run.global_step == trainer.global_step
    assert run.should_stop == trainer.should_stop
    assert ours.stopped_epoch == theirs.stopped_epoch
    assert ours.wait_count == theirs.wait_count
    assert ours.stopping_reason.value == theirs.stopping_reason.value
    assert ours.best_score.item() == theirs.best_score.item()


def test_a_stopped_run_that_resumes_is_the_run_that_was_not_stopped(make_run: Callable[..., Any]) -> None:
    """Its state goes through strict JSON; split anywhere, the run stops at the same step with the same counts."""
    whole = make_run(one := EarlyStopping("val_loss", patience=3))
    whole.fit(WORSE, epochs=12)
    for cut in range(1, 5):
        first = make_run(a := EarlyStopping("val_loss", patience=3))
        first.fit(WORSE, epochs=cut)
        then = make_run(b := EarlyStopping("val_loss", patience=3), current_epoch=cut, global_step=first.global_step)
        b.load_state_dict(json.loads(json.dumps(a.state_dict(), allow_nan=False)))
        then.fit(WORSE[cut:], epochs=12)
        assert then.global_step == whole.global_step
        assert (b.wait_count, b.stopped_epoch, b.best_score) == (one.wait_count, one.stopped_epoch, one.best_score)


def test_the_state_of_lightning_loads() -> None:
    """Its best score is a tensor."""
    theirs = pl.callbacks.EarlyStopping("val_loss")
    theirs.best_score, theirs.wait_count = torch.tensor(0.25), 2
    ours = EarlyStopping("val_loss")
    ours.load_state_dict(theirs.state_dict())
    assert (ours.best_score.item(), ours.wait_count, ours.state_key) == (0.25, 2, theirs.state_key)


def test_a_missing_metric_is_an_error_that_lists_those_that_exist(make_run: Callable[..., Any]) -> None:
    """Unless `strict=False`, which goes on."""
    with pytest.raises(OptionError, match=r"val_acc.*train_loss, val_loss"):
        make_run(EarlyStopping("val_acc")).fit(WORSE, epochs=3)
    run = make_run(EarlyStopping("val_acc", strict=False))
    run.fit(WORSE, epochs=3)
    assert run.current_epoch == 3


@pytest.mark.parametrize("idle", [{"fast_dev_run": 1}, {"sanity_checking": True}])
def test_it_rests_in_fast_dev_runs_and_sanity_checks(idle: dict[str, Any], make_run: Callable[..., Any]) -> None:
    """Nothing is counted there."""
    run = make_run(stop := EarlyStopping("val_loss", patience=1), **idle)
    run.fit([1.0, 2.0, 3.0], epochs=3)
    assert (stop.wait_count, stop.stopping_reason) == (0, EarlyStoppingReason.NOT_STOPPED)


@pytest.mark.parametrize("wrong", [{"mode": "auto"}, {"patience": -1}, {"monitor": ""}])
def test_wrong_arguments_are_refused_when_it_is_made(wrong: dict[str, Any]) -> None:
    """Before anything trains."""
    with pytest.raises(OptionError):
        EarlyStopping(**{"monitor": "x", **wrong})
