"""The captured step computes what the eager one computes, whatever happens around it and inside it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.parity import modules as m
from tests.parity.harness import Case, Outcome, assert_same, assert_same_metrics, assert_same_weights, fast_fit, lightning_fit


def both(
    make: Any, train: Any = m.labelled, *, ratio: float = 2e-5, callbacks: Any = None, rung: str | None = "compile", **options: Any
) -> tuple[Outcome, Outcome]:
    """The same training on both rungs; asserts that they agree."""
    out = []
    for capture in ("eager", "auto" if rung is None else "compile"):
        random.seed(3)
        np.random.seed(3)
        more = {"callbacks": callbacks()} if callbacks else {}
        if capture == "auto":
            more["deterministic"] = True  # captured when it can be, nothing measured
        out.append(fast_fit(Case(make, train, options={"max_epochs": 2} | options | more), capture=capture))
    eager, compiled = out
    if rung is not None:
        assert compiled.rung == rung
    assert compiled.steps == eager.steps
    assert_same_weights(compiled.weights, eager.weights, ratio)
    assert_same_metrics(compiled.metrics, eager.metrics, max(ratio, 1e-4))
    return eager, compiled


class Acts:
    """Runs ``act(trainer, module, n)`` before batch n, counted over the whole run."""

    def __init__(self, act: Any) -> None:
        self.act, self.n = act, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.act(trainer, module, self.n)
        self.n += 1


def _lr(trainer: Any, module: Any, n: int) -> None:
    group = trainer.optimizers[0].param_groups[0]
    group["lr"], group["weight_decay"] = 1e-2 / (1 + n), 0.1 * n
    if "betas" in group:
        group["betas"] = (0.8, 0.9 + 0.005 * n)


def _decay_weights(trainer: Any, module: Any, n: int) -> None:
    for p in module.parameters():
        p.data = p.data.clone() * 0.98  # other storage, as averaging callbacks do


def _reload_slots(trainer: Any, module: Any, n: int) -> None:
    if n == 5:
        opt = trainer.optimizers[0]
        opt.load_state_dict(opt.state_dict())
        for slots in opt.state.values():
            for v in slots.values():
                if isinstance(v, Tensor) and v.dim():
                    v.mul_(0.5)


def _clear_slots(trainer: Any, module: Any, n: int) -> None:
    if n == 5:
        trainer.optimizers[0].state.clear()


def _add_group(trainer: Any, module: Any, n: int) -> None:
    if n == 4:
        for p in module.net[0].parameters():
            p.requires_grad_(True)
        trainer.optimizers[0].add_param_group({"params": list(module.net[0].parameters()), "lr": 3e-3})


def _replace_layer(trainer: Any, module: Any, n: int) -> None:
    if n == 4:
        torch.manual_seed(11)
        module.net[2] = nn.Linear(16, m.CLASSES)
        trainer.optimizers[0].add_param_group({"params": list(module.net[2].parameters())})


def _toggle_grad(trainer: Any, module: Any, n: int) -> None:
    module.net[0].requires_grad_(n // 3 % 2 == 1)  # where windows of three begin


def _toggle_mode(trainer: Any, module: Any, n: int) -> None:
    module.net.train(n % 3 != 1)


def _write_weights(trainer: Any, module: Any, n: int) -> None:
    with torch.no_grad():
        module.net[0].weight.clamp_(-0.2, 0.2)


def _prune(trainer: Any, module: Any, n: int) -> None:
    if n == 6:
        module.net[0].weight.data[:, ::2] = 0
        module.net[2].weight = nn.Parameter(module.net[2].weight.detach().clone())  # a new object the optimizer does not hold


class HeadOnly(m.Classifier):
    def configure_optimizers(self) -> Any:
        self.net[0].requires_grad_(False)
        return torch.optim.AdamW(self.net[2].parameters(), lr=1e-2)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(
    ("act", "make"),
    [
        (_lr, m.Classifier),
        (_lr, m.StepScheduled),
        (_decay_weights, m.Classifier),
        (_reload_slots, m.Classifier),
        (_reload_slots, m.StepScheduled),
        (_clear_slots, m.Classifier),
        (_add_group, HeadOnly),
        (_replace_layer, m.Classifier),
        (_toggle_grad, m.Classifier),
        (_toggle_mode, m.Normed),
        (_write_weights, m.Classifier),
        (_prune, m.Classifier),
    ],
)
def test_what_callbacks_change_between_batches_reaches_the_captured_step(act: Any, make: Any, window: int) -> None:
    """Learning rates, storages, slots, groups, layers, modes and requires_grad, changed in any batch, in a window too."""
    both(make, callbacks=lambda: [Acts(act)], accumulate_grad_batches=window)


class PythonRandom(m.Base):
    """Mixup's coefficient from Python's random."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        c = random.random()
        return F.cross_entropy(self(x * c), y)


class PythonCoin(m.Base):
    """A coin tossed in Python."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if random.random() < 0.5:
            x = x.flip(0)
        return F.cross_entropy(self(x), y)


class NumpyRandom(m.Base):
    """A coefficient from numpy's global stream."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x * float(np.random.beta(0.4, 0.4))), y)


class PythonInt(m.Base):
    """An index from Python's random."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x.roll(random.randint(0, 3), 1)), y)


class OwnRandom(m.Base):
    """A random.Random of the module's own."""

    def build(self) -> None:
        super().build()
        self.rng = random.Random(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x * self.rng.uniform(0.5, 1.5)), y)


class OwnIterator(m.Base):
    """A coefficient from an iterator."""

    def build(self) -> None:
        super().build()
        self.factors = iter([0.1 * i for i in range(100)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x * next(self.factors)), y)


class Helper:
    """A plain object with a counter."""

    def __init__(self) -> None:
        self.n = 0.0

    def next(self) -> float:
        self.n += 0.1
        return self.n


class OwnHelper(m.Base):
    """A coefficient from an object of its own."""

    def build(self) -> None:
        super().build()
        self.helper = Helper()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x * self.helper.next()), y)


class OwnGenerator(m.Base):
    """A torch.Generator and a numpy Generator of the module's own."""

    def build(self) -> None:
        super().build()
        self.noise, self.rng = torch.Generator().manual_seed(3), np.random.default_rng(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn(x.shape, generator=self.noise)
        return F.cross_entropy(self(x * self.rng.uniform(0.5, 1.5) + noise), y)


class KeepsOutput(m.Base):
    """A tensor kept on the module and read by the next step: a running target."""

    def build(self) -> None:
        super().build()
        self.last: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        loss = F.cross_entropy(out, y)
        if self.last is not None:
            loss = loss + 0.1 * (out.mean() - self.last) ** 2
        self.last = out.mean().detach()
        return loss


class Queue(m.Base):
    """A memory bank: a buffer replaced by a new tensor in each step."""

    def build(self) -> None:
        super().build()
        self.register_buffer("bank", torch.zeros(4, m.CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        loss = F.cross_entropy(out, y) + 0.1 * (out.mean(0) - self.bank.mean(0)).pow(2).sum()
        self.bank = torch.cat([self.bank[1:], out.mean(0, keepdim=True).detach()])
        return loss


class Teacher(m.Base):
    """A moving average of the weights, updated in the step and used as the target."""

    def build(self) -> None:
        super().build()
        self.ema = nn.Linear(m.WIDTH, m.CLASSES).requires_grad_(False)
        self.student = nn.Linear(m.WIDTH, m.CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            for e, s in zip(self.ema.parameters(), self.student.parameters(), strict=True):
                e.lerp_(s, 0.1)
            target = self.ema(x)
        return F.cross_entropy(self(x) + self.student(x), y) + F.mse_loss(self.student(x), target)


class ShapeOne(m.Base):
    """A loss of shape [1]."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).reshape(1)


class Doubles(m.Base):
    """A loss in float64 from float32 weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).double()


class ChannelsLast(m.Conv):
    """Weights in channels_last."""

    def build(self) -> None:
        super().build()
        self.net.to(memory_format=torch.channels_last)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Transposed(m.Base):
    """A parameter that is not contiguous."""

    def build(self) -> None:
        super().build()
        self.odd = nn.Parameter((torch.randn(16, m.WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1).t())
        self.out = nn.Linear(16, m.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.out(x @ self.odd)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Parametrized(m.Base):
    """Weight norm and spectral norm."""

    def build(self) -> None:
        super().build()
        nn.utils.parametrizations.weight_norm(self.net[0])
        nn.utils.parametrizations.spectral_norm(self.net[2])


class SparseTable(m.Embedded):
    """Sparse gradients."""

    def build(self) -> None:
        super().build()
        self.table = nn.Embedding(20, m.WIDTH, sparse=True)


class Remembers(m.Base):
    """A forward hook that keeps activations in a list, emptied after the batch."""

    def build(self) -> None:
        super().build()
        self.kept: list[Tensor] = []
        self.sums: list[float] = []
        self.net[0].register_forward_hook(lambda mod, args, out: self.kept.append(out.detach()))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sums.append(float(self.kept[-1].sum()))
        assert len(self.kept) == 1
        self.kept.clear()


class NoGraphBranch(m.Base):
    """Loss None in the middle of a window."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx in (1, 3) else super().training_step(batch, batch_idx)


class Metered(m.LogsDict):
    """Logs other names in other batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("a", loss, on_epoch=True)
        if batch_idx % 2:
            self.log("b", loss * 2, on_epoch=True, reduce_fx="sum")
        return loss


@pytest.mark.parametrize(
    "make",
    [
        PythonRandom,
        PythonCoin,
        NumpyRandom,
        PythonInt,
        OwnRandom,
        OwnIterator,
        OwnHelper,
        OwnGenerator,
        KeepsOutput,
        Queue,
        Teacher,
        ShapeOne,
        Doubles,
        Transposed,
        Parametrized,
        Remembers,
        NoGraphBranch,
        Metered,
    ],
)
def test_python_inside_the_step_means_the_same_captured(make: Any) -> None:
    """Random numbers, counters, iterators, kept tensors, odd losses and odd parameters: captured right, or not captured."""
    both(make, rung=None)


@pytest.mark.parametrize(("make", "train"), [(ChannelsLast, m.images), (SparseTable, m.tokens)])
def test_odd_layouts_mean_the_same_captured(make: Any, train: Any) -> None:
    """channels_last weights and sparse gradients."""
    both(make, train, rung=None)


class Ragged:
    """Batches whose number of rows differs every time."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Any:
        x, y = m.rows(200)
        at = 0
        for n in self.sizes:
            yield x[at : at + n], y[at : at + n]
            at += n

    def __len__(self) -> int:
        return len(self.sizes)


@pytest.mark.parametrize("window", [1, 3])
def test_batches_of_every_size_without_a_recompile_storm(window: int) -> None:
    """Twenty batches of ten sizes: right, and traced at most three times."""
    _, compiled = both(
        m.Classifier, lambda: Ragged([8, 3, 5, 8, 7, 2, 9, 4, 6, 1, 8, 3, 5, 8, 7, 2, 9, 4, 6, 10]), accumulate_grad_batches=window
    )
    assert compiled.result.capture.traces <= 3


def _with_text(items: list[Any]) -> dict[str, Any]:
    p = m.to_pair(items)
    return {"x": p.x, "y": p.y, "names": [f"row {float(v[0]):.3f}" for v in p.x], "n": len(items)}


def test_texts_and_numbers_in_a_batch() -> None:
    """A batch with strings that differ every time and a count: right, whether it can be captured or not."""
    both(m.TakesDict, lambda: DataLoader(torch.utils.data.TensorDataset(*m.rows(44)), 8, shuffle=True, collate_fn=_with_text), rung=None)


@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1}])
def test_nonfinite_steps_are_treated_alike(nonfinite: str, window: int, clip: dict[str, Any]) -> None:
    """A nan in the third batch: skipped with its whole window, or let through, on both rungs."""

    class Breaks(m.Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y) * (float("nan") if batch_idx == 2 else 1.0)

    out = [
        fast_fit(Case(Breaks, options={"max_epochs": 2, "nonfinite": nonfinite, "accumulate_grad_batches": window, **clip}), capture=c)
        for c in ("eager", "compile")
    ]
    assert out[0].steps == out[1].steps
    assert out[0].result.ledger.skipped_steps == out[1].result.ledger.skipped_steps
    if nonfinite == "skip":
        assert out[0].result.ledger.skipped_steps == 2
        assert_same_weights(out[1].weights, out[0].weights, 2e-5)
    else:
        assert all(bool(w.isnan().any()) for w in out[1].weights.values())


def _mine() -> tuple[Any, ...]:
    return PythonRandom, PythonCoin, NumpyRandom, PythonInt, OwnRandom, OwnHelper, OwnGenerator, KeepsOutput, Queue, Teacher


@pytest.mark.parametrize("make", _mine())
def test_the_look_before_training_leaves_no_trace(make: Any) -> None:
    """What the module draws, counts, keeps or replaces in the dry look is put back: the run is Lightning's, bit for bit."""
    outcomes = []
    for train in (fast_fit, lightning_fit):
        random.seed(3)
        np.random.seed(3)
        outcomes.append(train(Case(make)))
    assert_same(*outcomes)


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("clip", [{"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}])
def test_layers_unfrozen_later_are_clipped_like_the_others(capture: str, clip: dict[str, Any]) -> None:
    """The norm is over all the parameters that train now, not over those that trained first."""
    case = Case(m.Unfreezes, options=clip)
    assert_same(fast_fit(case, capture=capture), lightning_fit(case), weights=0.0 if capture == "eager" else 2e-5)


class LogsComputed(m.Base):
    """A Python float that a hook changes, computed with, used in the loss and logged."""

    def build(self) -> None:
        super().build()
        self.temperature = 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.temperature *= 0.9

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        half = self.temperature * 0.5
        self.log("half", half)
        return F.cross_entropy(self(x) / half, y)


class Anneals(m.Base):
    """A coefficient computed from global_step, used in the loss and logged."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        beta = min(1.0, self.global_step / 8)
        self.log("beta", beta)
        return F.cross_entropy(self(x), y) + beta * self.net[0].weight.pow(2).sum()


class AnnealsTemperature(LogsComputed):
    """The float changed by the step itself."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.temperature = self.temperature * 0.9
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("make", [LogsComputed, Anneals, AnnealsTemperature])
def test_python_numbers_that_change_are_logged_as_they_are(make: Any) -> None:
    """A number computed in Python and used in the loss has its present value in the metrics, at every step."""
    seen: list[list[float]] = []

    class Watched(make):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            name = "beta" if make is Anneals else "half"
            seen[-1].append(round(float(self.trainer.callback_metrics[name]), 6))

    for capture in ("eager", "compile"):
        seen.append([])
        fast_fit(Case(Watched), capture=capture)
    assert seen[0] == seen[1]


class ValidationHooks(m.Base):
    """A hook between validation batches changes what the step reads, and the weights' scale."""

    def build(self) -> None:
        super().build()
        self.scale = 1.0

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.scale = 1.0 + batch_idx

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x) * self.scale, y))
        self.log("val_sum", self(x).sum(), reduce_fx="sum")


class ValidationIndex(m.Base):
    """validation_step that reads batch_idx, the epoch and the mode."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        assert not self.training
        self.log("val_loss", F.cross_entropy(self(x), y) * (1 + batch_idx) * (1 + self.current_epoch))


@pytest.mark.parametrize("make", [m.Base, m.Normed, ValidationHooks, ValidationIndex, lambda: m.Dropped(p=0.5)])
def test_captured_validation_is_eager_validation(make: Any) -> None:
    """With a short last batch, in every epoch: the same metrics, whatever hooks change between its batches."""

    def val() -> Any:
        return m.labelled(44, 8, shuffle=False, seed=9)

    options = {"max_epochs": 3, "limit_train_batches": 2}
    torch.manual_seed(1)
    eager = fast_fit(Case(make, val=val, options=options))
    compiled = fast_fit(Case(make, val=val, options=options), capture="compile")
    names = [n for n in eager.metrics if n.startswith("val")]
    if not isinstance(eager.module, m.Dropped):
        assert [compiled.metrics[n] for n in names] == pytest.approx([eager.metrics[n] for n in names], rel=1e-4)
    assert names
