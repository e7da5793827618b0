"""A module trains under fasttrain as it trains under Lightning: weights, metrics, counts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.parity import modules as m
from tests.parity.harness import Case, assert_same, fast_fit, lightning_fit

VAL = partial(m.labelled, 24, shuffle=False, seed=9)
EVEN = partial(m.labelled, 40)

CASES: dict[str, Case] = {
    "linear_regression": Case(m.LinearRegression, val=VAL),
    "classifier": Case(m.Classifier, val=VAL),
    "batch_norm": Case(m.Normed, val=VAL),
    "dropout_zero": Case(lambda: m.Dropped(p=0.0), val=VAL),
    "dropout": Case(lambda: m.Dropped(p=0.4), val=VAL),
    "tied": Case(m.Tied),
    "frozen": Case(m.Frozen),
    "unused": Case(m.Unused),
    "groups": Case(m.Grouped),
    "dict_batch": Case(m.TakesDict, m.dicts, m.dicts),
    "tuple_batch": Case(m.TakesTuple, m.tuples, m.tuples),
    "dataclass_batch": Case(m.TakesDataclass, m.pairs, m.pairs),
    "none_loss": Case(m.SometimesNone),
    "accumulation": Case(m.Classifier, partial(m.labelled, 48), VAL, {"accumulate_grad_batches": 3}),
    "clip_norm": Case(m.Base, options={"gradient_clip_val": 0.1}),
    "clip_value": Case(m.Base, options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "step_scheduler": Case(m.StepScheduled),
    "epoch_scheduler": Case(m.EpochScheduled, options={"max_epochs": 5}),
    "plateau": Case(m.Plateau, val=VAL, options={"max_epochs": 5}),
    "one_cycle": Case(m.OneCycle),
    "cosine": Case(m.Cosine),
    "lambda_lr": Case(m.Schedules),
    **{f"optimizer_{name}": Case(partial(m.Optimized, optimizer=name)) for name in m.OPTIMIZERS},
    "conv": Case(m.Conv, m.images, m.images),
    "lstm": Case(m.Recurrent, m.sequences),
    "reads_its_loss": Case(m.ReadsItsLoss),
    "transformer": Case(m.Transformer, m.sequences),
    "embedding": Case(m.Embedded, m.tokens),
    "custom_function": Case(m.CustomFunction),
    "log_dict": Case(m.LogsDict, val=VAL),
    "reductions": Case(m.Reduces),
    "extra_outputs": Case(m.ReturnsMore),
    "on_after_backward": Case(m.AfterBackward),
    "own_clipping": Case(m.OwnClipping),
    "warm_up": Case(m.WarmsUp),
    "lr_scheduler_step": Case(m.OwnSchedulerStep),
    "buffers": Case(m.Buffered, val=VAL),
    "no_index": Case(m.NoIndex, val=VAL),
    "several_val": Case(m.SeveralVal, val=lambda: [VAL(), m.labelled(9, 4, shuffle=False)]),
    "datamodule": Case(m.Base, train=None, datamodule=m.Data),
    "reads_index": Case(m.ReadsIndex),
    "branches_on_index": Case(m.BranchesOnIndex, partial(m.labelled, 96), options={"max_epochs": 2}),
    "branches_on_step": Case(m.BranchesOnStep, partial(m.labelled, 96), options={"max_epochs": 2}),
    "branches_on_trainer": Case(m.BranchesOnTrainer),
    "counts_itself": Case(m.CountsItself),
    "unfreezes": Case(m.Unfreezes),
    "switches_mode": Case(m.Switches),
    "swaps_attribute": Case(m.SwapsLoss),
    "noise": Case(m.Noisy),
}

CAPTURED = (
    "classifier",
    "batch_norm",
    "dropout_zero",
    "dict_batch",
    "accumulation",
    "clip_norm",
    "one_cycle",
    "optimizer_rmsprop",
    "conv",
    "log_dict",
    "buffers",
    "on_after_backward",
    "own_clipping",
    "warm_up",
)
RANDOM = {"dropout", "noise"}  # a captured step may draw other numbers


@pytest.mark.parametrize("name", CASES)
def test_eager_is_lightning_bit_for_bit(name: str) -> None:
    """Weights and every random stream's end are Lightning's own; metrics to the last digits of a float32 sum."""
    ours, theirs = fast_fit(CASES[name]), lightning_fit(CASES[name])
    assert ours.rung == "eager"
    assert_same(ours, theirs)
    assert torch.equal(ours.rng, theirs.rng)


def _captured() -> list[Any]:
    names = [n for n in CASES if n not in RANDOM]
    return [n if n in CAPTURED else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", _captured())
def test_compiled_is_lightning_to_rounding(name: str) -> None:
    """A captured step changes the order of additions, nothing else: 2e-5 after some fifteen steps."""
    ours, theirs = fast_fit(CASES[name], capture="compile"), lightning_fit(CASES[name])
    assert ours.rung == "compile"
    assert_same(ours, theirs, weights=2e-5)


def test_what_branches_on_its_loss_is_followed() -> None:
    """capture="auto" takes it whole, computes what Lightning computes, and the report says which branch it follows."""
    ours, theirs = fast_fit(CASES["reads_its_loss"], capture="auto", deterministic=True), lightning_fit(CASES["reads_its_loss"])
    assert ours.rung == "compile"
    assert "a branch on data" in str(ours.result.capture.obstacles[0])
    assert_same(ours, theirs, weights=2e-5)


@pytest.mark.parametrize("name", ["classifier", "conv", "transformer", "batch_norm", "lstm", "noise"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_are_lightnings_bit_for_bit(name: str, precision: str) -> None:
    """Mixed and true precisions compute eagerly what Lightning computes, in the dtypes it computes them in."""
    ours, theirs = fast_fit(CASES[name], precision=precision), lightning_fit(CASES[name], precision=precision)
    assert_same(ours, theirs, metrics=1e-2 if precision == "bf16-true" else 1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow), "64-true"])
def test_captured_precisions_are_lightnings_to_rounding(precision: str) -> None:
    """bf16 rounds at 4e-3, and a captured step rounds less often: 2e-2 after fifteen steps; 64-true to 2e-5."""
    case = CASES["classifier"]
    ours, theirs = fast_fit(case, precision=precision, capture="compile"), lightning_fit(case, precision=precision)
    assert ours.rung == "compile"
    assert_same(ours, theirs, weights=2e-5 if precision == "64-true" else 2e-2, metrics=5e-2)


def test_the_module_is_lightnings_again_after_a_fit() -> None:
    """Lightning can go on with a module that fasttrain trained, and the other way round: nothing of ours sticks."""
    torch.manual_seed(0)
    module = m.Classifier()
    fast_fit(Case(lambda: module, val=VAL))
    after = lightning_fit(Case(lambda: module, val=VAL))
    torch.manual_seed(0)
    module = m.Classifier()
    lightning_fit(Case(lambda: module, val=VAL))
    assert_same(after, fast_fit(Case(lambda: module, val=VAL)))
