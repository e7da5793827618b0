"""Every optimizer, every scheduler and every precision of torch trains under fasttrain as under Lightning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as by

from tests.parity import modules as m
from tests.parity.harness import Case, Outcome, assert_same, fast_fit, lightning_fit

VAL = partial(m.labelled, 24, shuffle=False, seed=9)
ROUNDING = 2e-5  # a captured step adds up in another order: some fifteen steps of float32

# -- what is trained --------------------------------------------------------------------------------------------------


class Chosen(m.Base):
    """The optimizer and the schedulers it is given; at each batch's end it notes what they have set."""

    def build(self) -> None:
        super().build()
        self.rates: list[tuple[Any, ...]] = []

    def configure_optimizers(self) -> Any:
        opt = self.kw["optimizer"](self.parameters())
        made = self.kw["schedule"](opt, self) if "schedule" in self.kw else []
        return [opt], made if isinstance(made, list) else [made]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note()

    def on_train_epoch_end(self) -> None:
        self.note()

    def note(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            self.rates.append(tuple(float(group[k]) for k in ("lr", "momentum") if k in group))


class Quiet(Chosen):
    """The same without a hook at the batch's end, which leaves the captured step to itself."""

    on_train_batch_end = m.Base.on_train_batch_end


class Matrices(Chosen):
    """Two-dimensional parameters only, as Muon wants them."""

    def build(self) -> None:
        super().build()
        self.net = nn.Sequential(nn.Linear(m.WIDTH, 16, bias=False), nn.Tanh(), nn.Linear(16, m.CLASSES, bias=False))


class Sparse(Chosen):
    """A table that gives sparse gradients, and nothing else."""

    def build(self) -> None:
        super().build()
        self.net = nn.Embedding(20, m.CLASSES, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum(1)


optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd_momentum": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "sgd_nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "sgd_fused": partial(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": partial(optim.Adam, lr=1e-2),
    "adam_decoupled": partial(optim.Adam, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "adam_for_loop": partial(optim.Adam, lr=1e-2, foreach=False),
    "adam_foreach": partial(optim.Adam, lr=1e-2, foreach=True, amsgrad=True),
    "adamw": partial(optim.AdamW, lr=1e-2, weight_decay=0.1),
    "adamw_maximize": partial(optim.AdamW, lr=1e-3, maximize=True),
    "adamax": partial(optim.Adamax, lr=1e-2, weight_decay=0.01),
    "nadam": partial(optim.NAdam, lr=1e-2, momentum_decay=4e-3),
    "radam": partial(optim.RAdam, lr=1e-2),
    "rmsprop": partial(optim.RMSprop, lr=1e-3, alpha=0.9),
    "rmsprop_centered": partial(optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
    "rprop": partial(optim.Rprop, lr=1e-3),
    "adagrad": partial(optim.Adagrad, lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1),
    "adadelta": partial(optim.Adadelta, lr=1.0, rho=0.8),
    "asgd": partial(optim.ASGD, lr=0.05, t0=5, lambd=1e-2),
    "adafactor": partial(optim.Adafactor, lr=1e-2),
}
SECOND_ORDER: dict[str, Callable[[Any], Any]] = {
    "lbfgs": partial(optim.LBFGS, lr=0.5, max_iter=4),
    "lbfgs_wolfe": partial(optim.LBFGS, max_iter=5, history_size=3, line_search_fn="strong_wolfe"),
}


def case(make: type[Chosen], train: Callable[[], Any] = m.labelled, *, options: dict[str, Any] | None = None, **kw: Any) -> Case:
    return Case(partial(make, **kw), train, None if make is Sparse else VAL, options or {})


def but_the_loss(*ends: Outcome) -> None:
    """Takes the logged loss off: which of a closure's evaluations it is of has its own test."""
    for end in ends:
        del end.metrics["train_loss"]


def assert_same_rates(ours: Outcome, theirs: Outcome) -> None:
    assert ours.module.rates == theirs.module.rates


# -- optimizers -------------------------------------------------------------------------------------------------------
FAMILIES: dict[str, Case] = {
    **{name: case(Chosen, optimizer=make) for name, make in (OPTIMIZERS | SECOND_ORDER).items()},
    "muon": case(Matrices, optimizer=partial(optim.Muon, lr=2e-2)),
    "sparse_adam": case(Sparse, partial(m.tokens, 48), optimizer=partial(optim.SparseAdam, lr=5e-2)),
    "sparse_sgd": case(Sparse, partial(m.tokens, 48), optimizer=partial(optim.SGD, lr=0.5)),
    "sparse_adagrad": case(Sparse, partial(m.tokens, 48), optimizer=partial(optim.Adagrad, lr=0.5)),
}


def test_every_optimizer_of_torch_is_here() -> None:
    """A class that torch adds has to be added to this file."""
    made = {type(c.make().kw["optimizer"](c.make().parameters())) for c in FAMILIES.values()}
    there = {getattr(optim, n) for n in dir(optim) if isinstance(getattr(optim, n), type)} - {optim.Optimizer}
    assert made == there


@pytest.mark.parametrize("name", FAMILIES)
def test_every_optimizer_is_lightnings_bit_for_bit(name: str) -> None:
    """Weights, metrics, counts and every random stream, after three epochs of six batches."""
    ours, theirs = fast_fit(FAMILIES[name]), lightning_fit(FAMILIES[name])
    if name in SECOND_ORDER:
        but_the_loss(ours, theirs)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)
    assert torch.equal(ours.rng, theirs.rng)


LIMITED = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in FAMILIES
    for options in ({"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"max_steps": 8})
    if name not in SECOND_ORDER and not (name.startswith("sparse") and "gradient_clip_val" in options)  # torch has no norm of sparse ones
]


@pytest.mark.parametrize(("name", "options"), LIMITED)
def test_every_optimizer_takes_windows_clipping_and_a_last_step(name: str, options: dict[str, Any]) -> None:
    """Six batches in windows of three; one norm over all gradients; a stop in mid-epoch."""
    one = FAMILIES[name]
    ours, theirs = fast_fit(one, **options), lightning_fit(one, **options)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"max_steps": 8}],
    ids=str,
)
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_closure_is_clipped_at_each_evaluation(name: str, options: dict[str, Any]) -> None:
    """LBFGS asks for the loss several times a step: each time the gradients are made anew and clipped."""
    ours, theirs = fast_fit(FAMILIES[name], **options), lightning_fit(FAMILIES[name], **options)
    but_the_loss(ours, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_closure_logs_its_last_evaluation(name: str) -> None:
    """What is logged in a step that a closure runs again is of its last run."""
    ours, theirs = fast_fit(FAMILIES[name]), lightning_fit(FAMILIES[name])
    assert_same(ours, theirs)


COMPILED = ("sgd_nesterov", "adam_decoupled", "radam", "rmsprop_centered", "adafactor")
UNCAPTURED = ("sparse_adam", "sparse_sgd", "sparse_adagrad")

FIRST_ORDER = [
    n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in UNCAPTURED and n not in SECOND_ORDER
]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_every_optimizer_ends_a_captured_step(name: str) -> None:
    """The captured step with this optimizer's update is Lightning's to rounding."""
    one = FAMILIES[name]
    one = Case(partial(Quiet if one.make.func is Chosen else one.make.func, **one.make.keywords), one.train, one.val, one.options)
    ours, theirs = fast_fit(one, capture="compile"), lightning_fit(one)
    assert ours.rung == "compile"
    assert_same(ours, theirs, weights=ROUNDING)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_closure_runs_a_captured_step_again(name: str) -> None:
    """Over all rows at once, because LBFGS on small batches turns one rounding into another run."""
    one = case(Quiet, partial(m.labelled, 48, 48, shuffle=False), optimizer=SECOND_ORDER[name])
    ours, theirs = fast_fit(one, capture="compile"), lightning_fit(one)
    assert ours.rung == "compile"
    but_the_loss(ours, theirs)
    assert_same(ours, theirs, weights=ROUNDING)


@pytest.mark.parametrize("name", UNCAPTURED)
def test_an_optimizer_that_cannot_be_captured_says_so(name: str) -> None:
    """Sparse gradients train on the eager rung, with the reason in the report."""
    ours, theirs = fast_fit(FAMILIES[name], capture="auto", deterministic=True), lightning_fit(FAMILIES[name])
    assert ours.rung == "eager"
    assert "sparse" in str(ours.result.capture.obstacles[0])
    assert_same(ours, theirs)


# -- schedulers -------------------------------------------------------------------------------------------------------
SCHEDULERS: dict[str, Callable[[Any, Any], Any]] = {
    "LambdaLR": lambda opt, _: by.LambdaLR(opt, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda opt, _: by.MultiplicativeLR(opt, lambda i: 0.9 if i % 2 else 0.8),
    "StepLR": lambda opt, _: by.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt, _: by.MultiStepLR(opt, [1, 4, 9], 0.5),
    "ConstantLR": lambda opt, _: by.ConstantLR(opt, 0.25, 3),
    "LinearLR": lambda opt, _: by.LinearLR(opt, 0.1, 1.0, 4),
    "ExponentialLR": lambda opt, _: by.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt, _: by.PolynomialLR(opt, 10, 2.0),
    "CosineAnnealingLR": lambda opt, _: by.CosineAnnealingLR(opt, 7, 1e-3),
    "CosineAnnealingWarmRestarts": lambda opt, _: by.CosineAnnealingWarmRestarts(opt, 2, 2),
    "CyclicLR": lambda opt, _: by.CyclicLR(opt, 0.01, 0.2, 3, mode="triangular2"),
    "OneCycleLR": lambda opt, _: by.OneCycleLR(opt, 0.3, total_steps=60),
    "SequentialLR": lambda opt, _: by.SequentialLR(opt, [by.LinearLR(opt, 0.1, 1.0, 3), by.ExponentialLR(opt, 0.9)], [3]),
    "ChainedScheduler": lambda opt, _: by.ChainedScheduler([by.ConstantLR(opt, 0.5, 2), by.ExponentialLR(opt, 0.9)]),
    "SWALR": lambda opt, _: torch.optim.swa_utils.SWALR(opt, 0.01, anneal_epochs=4),
}
MOMENTUM = partial(optim.SGD, lr=0.2, momentum=0.9)


def scheduled(
    name: str, *, optimizer: Any = MOMENTUM, make: type[Chosen] = Chosen, train: Callable[[], Any] = m.labelled, **config: Any
) -> Case:
    def schedule(opt: Any, module: Any) -> Any:
        return {"scheduler": SCHEDULERS[name](opt, module), **config}

    return case(make, train, optimizer=optimizer, schedule=schedule, options={"max_epochs": 4})


def test_every_scheduler_of_torch_is_here() -> None:
    """A class that torch adds has to be added to this file; the plateau has its own tests."""
    assert set(by.__all__) - {"LRScheduler", "ReduceLROnPlateau"} == set(SCHEDULERS) - {"SWALR"}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_moves_as_lightnings(name: str, interval: str) -> None:
    """The learning rate (and the momentum that a cycle moves) after every batch and every epoch, the weights at the end."""
    one = scheduled(name, interval=interval)
    ours, theirs = fast_fit(one), lightning_fit(one)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)
    assert len(set(ours.module.rates)) > 1


@pytest.mark.parametrize(("interval", "frequency"), [("step", 2), ("step", 3), ("epoch", 2), ("epoch", 3)])
@pytest.mark.parametrize("name", ["StepLR", "SequentialLR", "CyclicLR"])
def test_a_frequency_is_lightnings_where_steps_are_batches(name: str, interval: str, frequency: int) -> None:
    """Six batches an epoch, no windows: counting batch indices and counting steps come to the same."""
    one = scheduled(name, interval=interval, frequency=frequency)
    ours, theirs = fast_fit(one), lightning_fit(one)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ["ExponentialLR", "OneCycleLR", "ChainedScheduler"])
def test_schedulers_move_at_the_end_of_windows(name: str, interval: str) -> None:
    """Windows of three: by step they move twice an epoch, by epoch once."""
    one = scheduled(name, interval=interval)
    ours, theirs = (fit(one, accumulate_grad_batches=3) for fit in (fast_fit, lightning_fit))
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"max_steps": 9},
        {"limit_train_batches": 3},
        {"max_epochs": 2, "accumulate_grad_batches": 9},
    ],
    ids=str,
)
def test_a_cycle_over_the_estimated_steps_ends_with_the_run(options: dict[str, Any]) -> None:
    """trainer.estimated_stepping_batches is Lightning's number, and OneCycleLR comes out at its last value."""

    def schedule(opt: Any, module: Any) -> Any:
        module.estimated = module.trainer.estimated_stepping_batches
        return {"scheduler": by.OneCycleLR(opt, 0.3, total_steps=int(module.estimated)), "interval": "step"}

    one = case(Chosen, partial(m.labelled, 48) if "accumulate_grad_batches" not in options else partial(m.labelled, 64),
               optimizer=MOMENTUM, schedule=schedule)  # fmt: skip
    ours, theirs = fast_fit(one, **options), lightning_fit(one, **options)
    assert ours.module.estimated == theirs.module.estimated == ours.steps
    if options.get("accumulate_grad_batches") != 9:
        assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


@pytest.mark.parametrize(
    ("plateau", "config"),
    [
        ({"patience": 0, "threshold": 0.9}, {"monitor": "val_loss"}),
        ({"patience": 1, "cooldown": 1, "threshold": 0.9, "min_lr": 0.02}, {"monitor": "val_loss"}),
        ({"mode": "max", "patience": 0}, {"monitor": "train_loss", "interval": "epoch"}),
        ({"patience": 0, "threshold": 0.9}, {"monitor": "train_loss", "interval": "step"}),
        ({"patience": 0, "threshold": 0.9}, {"monitor": "train_loss", "interval": "step", "frequency": 2}),
        ({"patience": 0, "threshold": 0.9}, {"monitor": "val_loss", "frequency": 2}),
        ({"patience": 0, "threshold": 0.9}, {"monitor": "train_loss", "interval": "step", "frequency": 6, "name": "mine"}),
    ],
    ids=str,
)
def test_a_plateau_moves_as_lightnings(plateau: dict[str, Any], config: dict[str, Any]) -> None:
    """By epoch after the epoch's hooks, by step after the batch; patience, cooldown, mode, least rate, frequency."""

    def schedule(opt: Any, _: Any) -> Any:
        return {"scheduler": by.ReduceLROnPlateau(opt, **plateau), **config}

    one = case(Chosen, optimizer=MOMENTUM, schedule=schedule, options={"max_epochs": 6})
    ours, theirs = fast_fit(one), lightning_fit(one)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")
def test_a_plateau_that_is_not_strict_waits_for_its_metric() -> None:
    """Validation comes every second epoch: before the first there is nothing to go by, and nothing moves."""

    def schedule(opt: Any, _: Any) -> Any:
        return {"scheduler": by.ReduceLROnPlateau(opt, patience=0, threshold=0.9), "monitor": "val_loss", "strict": False}

    one = case(Chosen, optimizer=MOMENTUM, schedule=schedule, options={"max_epochs": 6, "check_val_every_n_epoch": 2})
    ours, theirs = fast_fit(one), lightning_fit(one)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


def test_schedulers_of_every_kind_side_by_side() -> None:
    """By step, by epoch, by every second epoch and a plateau, all on one optimizer."""

    def schedule(opt: Any, _: Any) -> Any:
        return [
            {"scheduler": by.ExponentialLR(opt, 0.99), "interval": "step"},
            by.StepLR(opt, 2, 0.5),
            {"scheduler": by.MultiplicativeLR(opt, lambda _: 0.9), "frequency": 2},
            {"scheduler": by.ReduceLROnPlateau(opt, patience=0, threshold=0.9), "monitor": "val_loss"},
        ]

    one = case(Chosen, optimizer=MOMENTUM, schedule=schedule, options={"max_epochs": 5})
    ours, theirs = fast_fit(one), lightning_fit(one)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


class Halves(by.LRScheduler):
    """A scheduler somebody wrote, over its two groups one after the other."""

    def get_lr(self) -> list[float]:
        return [g["lr"] * (0.5 if (self.last_epoch + i) % 2 else 1.1) for i, g in enumerate(self.optimizer.param_groups)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_scheduler_of_ones_own_over_groups(interval: str) -> None:
    """Each group has its own rate, and a class that torch does not know moves them."""

    def groups(params: Any) -> Any:
        first, *rest = params
        return optim.Adam([{"params": [first], "lr": 1e-3}, {"params": rest, "lr": 3e-2, "betas": (0.8, 0.9)}])

    one = case(Chosen, optimizer=groups, schedule=lambda opt, _: {"scheduler": Halves(opt), "interval": interval})
    ours, theirs = fast_fit(one), lightning_fit(one)
    assert_same(ours, theirs)
    assert_same_rates(ours, theirs)


COMPILED_RATES = ("SequentialLR", "CyclicLR", "CosineAnnealingWarmRestarts")


@pytest.mark.parametrize("interval", ["step", pytest.param("epoch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n if n in COMPILED_RATES else pytest.param(n, marks=pytest.mark.slow) for n in SCHEDULERS])
def test_every_scheduler_reaches_the_captured_step(name: str, interval: str) -> None:
    """Without a second trace."""
    one = scheduled(name, make=Quiet, interval=interval, train=partial(m.labelled, 48))
    ours, theirs = fast_fit(one, capture="compile"), lightning_fit(one)
    assert ours.rung == "compile"
    assert ours.result.capture.traces == 1
    assert_same(ours, theirs, weights=ROUNDING)


# -- precisions -------------------------------------------------------------------------------------------------------
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_optimizer_in_every_precision(name: str, precision: str) -> None:
    """Slots and updates in the dtypes that Lightning has them in."""
    one = FAMILIES[name]
    ours, theirs = fast_fit(one, precision=precision), lightning_fit(one, precision=precision)
    if name in SECOND_ORDER:
        but_the_loss(ours, theirs)
    assert_same(ours, theirs, metrics=1e-2 if precision == "bf16-true" else 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"val_check_interval": 2, "max_steps": 14},
    ],
    ids=str,
)
def test_windows_and_clipping_in_every_precision(options: dict[str, Any], precision: str) -> None:
    """The gradients' dtype is the one that is clipped and gathered over a window."""
    one = scheduled("OneCycleLR", optimizer=partial(optim.AdamW, lr=1e-2), interval="step")
    ours, theirs = (fit(one, precision=precision, **options) for fit in (fast_fit, lightning_fit))
    assert_same(ours, theirs, metrics=1e-2 if precision == "bf16-true" else 1e-6)


@pytest.mark.parametrize(
    "precision", ["64-true", pytest.param("bf16-mixed", marks=pytest.mark.slow), pytest.param("bf16-true", marks=pytest.mark.slow)]
)
def test_windows_and_clipping_captured_in_every_precision(precision: str) -> None:
    """2e-2 under bf16, whose steps are 4e-3 apart; rounding else."""
    one = scheduled("OneCycleLR", optimizer=partial(optim.AdamW, lr=1e-2), make=Quiet, interval="step")
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    ours, theirs = fast_fit(one, capture="compile", **options), lightning_fit(one, **options)
    assert ours.rung == "compile"
    assert_same(ours, theirs, weights=ROUNDING if precision == "64-true" else 2e-2, metrics=5e-2)
