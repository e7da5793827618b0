"""The options: Lightning's names and defaults, each form of each value, what overrides what."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain import OptionError, compile_fit, seed_everything
from fasttrain.cadence import limited, validation_interval, window_length
from fasttrain.options import OptionsDict, defaults, make_options
from fasttrain.retired import RETIRED
from tests.parity import modules as m

# the last was Lightning's until 2.0
OURS = {"seed", "capture", "verify", "nonfinite", "steps_per_launch", "val_every_n_steps", "track_grad_norm"}
THEIRS = inspect.signature(pl.Trainer.__init__).parameters


def test_every_option_is_lightnings_or_marked_ours() -> None:
    """No third kind: a name is Trainer's, or one of the few that this package adds."""
    assert set(OptionsDict.__annotations__) - OURS <= set(THEIRS)


@pytest.mark.parametrize(
    ("name", "value", "default"), [("check_val_every_n_epoch", 0, 1), ("val_every_n_steps", 0, None), ("max_steps", -2, -1)]
)
def test_a_message_names_the_default(name: str, value: int, default: int | None) -> None:
    """The one that Options has."""
    with pytest.raises(OptionError, match=f"{name}: got {value}; .*The default is {default}."):
        make_options({name: value})


def test_no_retired_name_is_in_use() -> None:
    """A name is current or retired, never both, and retired ones are not Trainer's."""
    assert not set(RETIRED) & set(OptionsDict.__annotations__)
    assert not set(RETIRED) & set(THEIRS)


def test_defaults_are_lightnings() -> None:
    """What a user does not give means what it means there."""
    ours = defaults()
    assert (ours["max_epochs"], ours["max_steps"], ours["min_epochs"], ours["min_steps"]) == (1000, -1, 0, 0)
    assert (ours["num_sanity_val_steps"], ours["log_every_n_steps"], ours["check_val_every_n_epoch"], ours["val_check_interval"]) == (
        2,
        50,
        1,
        1.0,
    )
    assert all(ours[f"limit_{s}_batches"] == 1.0 for s in ("train", "val", "test", "predict"))
    assert ours["precision"] == "32-true"
    for name in ("check_val_every_n_epoch", "accumulate_grad_batches", "overfit_batches", "max_steps"):
        theirs = THEIRS[name].default
        assert ours[name] in (theirs, {0: theirs}), name


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"precision": 16}, "precision", "16-mixed"),
        ({"precision": "bf16"}, "precision", "bf16-mixed"),
        ({"precision": 64}, "precision", "64-true"),
        ({"precision": "32"}, "precision", "32-true"),
        ({"precision": None}, "precision", "32-true"),
        ({"max_time": "01:02:03:04"}, "max_seconds", 93784.0),
        ({"max_time": timedelta(minutes=2)}, "max_seconds", 120.0),
        ({"max_time": {"hours": 1}}, "max_seconds", 3600.0),
        ({"max_time": "00:00:01:00"}, "max_epochs", -1),
        ({"max_steps": 5}, "max_epochs", -1),
        ({"max_steps": 5, "max_epochs": 2}, "max_epochs", 2),
        ({"min_steps": 5}, "min_epochs", 1),
        ({"min_steps": 5, "min_epochs": 0}, "min_epochs", 0),
        ({"val_check_interval": "00:00:05:00"}, "val_check_seconds", 300.0),
        ({"val_check_interval": None}, "val_check_interval", 1.0),
        ({"accumulate_grad_batches": 4}, "accumulate_grad_batches", {0: 4}),
        ({"accumulate_grad_batches": {3: 2}}, "accumulate_grad_batches", {0: 1, 3: 2}),
        ({"gradient_clip_val": 0}, "gradient_clip_val", None),
        ({"gradient_clip_val": 1}, "gradient_clip_val", 1.0),
        ({"overfit_batches": 3}, "limit_train_batches", 3),
        ({"overfit_batches": 0.5}, "limit_val_batches", 0.5),
        ({"fast_dev_run": True}, "limit_train_batches", 1),
        ({"fast_dev_run": 4}, "max_steps", 4),
        ({"fast_dev_run": True, "max_epochs": 9}, "max_epochs", 1),
        ({"fast_dev_run": True, "num_sanity_val_steps": 5}, "num_sanity_val_steps", 0),
        ({"fast_dev_run": True, "enable_checkpointing": True}, "enable_checkpointing", False),
        ({"fast_dev_run": False}, "max_steps", -1),
        ({"callbacks": None}, "callbacks", ()),
        ({"devices": 1}, "accelerator", "auto"),
    ],
)
def test_every_form_of_a_value(given: dict[str, Any], name: str, value: Any) -> None:
    """Numbers, texts, timedeltas and dicts that Lightning takes."""
    assert getattr(make_options(given), name) == value


def test_the_window_of_an_epoch_is_its_schedules_newest() -> None:
    """{0: 1, 2: 4, 5: 8}: 1 1 4 4 4 8 8."""
    options = make_options({"accumulate_grad_batches": {0: 1, 5: 8, 2: 4}})
    assert [options.window(e) for e in range(7)] == [1, 1, 4, 4, 4, 8, 8]


@pytest.mark.parametrize("name", sorted(RETIRED))
def test_every_retired_name_says_what_replaces_it(name: str) -> None:
    """The sentence ends with something to write instead."""
    with pytest.raises(OptionError, match=f"{name!r} is retired: use "):
        make_options({name: 1})


@given(total=st.integers(1, 50), k=st.integers(1, 60))
def test_windows_cover_the_epoch(total: int, k: int) -> None:
    """Window lengths are k but for a shorter last one, and add up to the epoch."""
    starts = range(0, total, k)
    assert sum(window_length(s, k, total) for s in starts) == total
    assert all(window_length(i, k, total) == window_length(i - i % k, k, total) for i in range(total))


@given(total=st.integers(1, 500), share=st.floats(0.001, 1.0))
def test_a_share_is_lightnings_share(total: int, share: float) -> None:
    """int(total * share) batches, an error when that is none; validation at least every batch."""
    if int(total * share) == 0:
        with pytest.raises(OptionError, match="no batch"):
            limited("limit_train_batches", total, share)
    else:
        assert limited("limit_train_batches", total, share) == int(total * share)
    assert validation_interval(total, share, across_epochs=False) == max(1, int(total * share))


def test_a_seed_seeds_all_streams() -> None:
    """python, numpy and torch; without the option nothing is seeded."""
    import random

    import numpy as np

    def draw() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 0}
    compile_fit(m.Base(), seed=5, **bare).fit(m.labelled())
    assert draw() == first
    before, module = draw(), m.Base()
    seed_everything(6)
    expected = draw()
    seed_everything(6)
    compile_fit(module, **bare).fit(m.labelled())
    assert draw() == expected != before


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seeded_run_is_repeated_exactly(seed: int) -> None:
    """Initial weights aside (the user's), shuffling and dropout come from seed=."""
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        module = m.Dropped(p=0.5)
        compile_fit(
            module, seed=seed, max_epochs=2, capture="eager", logger=False, enable_checkpointing=False, enable_progress_bar=False
        ).fit(m.labelled())
        ends.append(module.net[0].weight.detach().clone())
    assert torch.equal(*ends)
