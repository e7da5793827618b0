"""Two networks that train against each other, in every form of training_step, and the same loop written out by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fasttrain
from fasttrain import FasttrainWarning, compile_fit

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
WIDTH, ROWS = 4, 6
ROUNDING = 2e-5  # a captured step adds up in another order
TRUE = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]

slow = pytest.mark.slow
BOTH = ["eager", pytest.param("compile", marks=slow)]
ALL = ["eager", "compile"]  # where a capture has most to lose


# -- data -------------------------------------------------------------------------------------------------------------
def batches(n: int = 10, *, last: int = ROWS, seed: int = 5, marked: int = -1) -> list[Tensor]:
    """float[6, 4] each; the last has ``last`` rows; batch ``marked`` begins with the number 100."""
    g = torch.Generator().manual_seed(seed)
    out = [torch.randn(last if i == n - 1 else ROWS, WIDTH, generator=g) for i in range(n)]
    if marked >= 0:
        out[marked][0, 0] = 100.0
    return out


def where_marked(batch: Tensor, value: float) -> Tensor:
    """``value`` for the marked batch, 1 for every other."""
    return torch.where(batch[0, 0] > 50, value, 1.0)


class Given(torch.utils.data.Dataset[Tensor]):
    """Batches as they are."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, i: int) -> Any:
        return self.given[i]


def loader(given: Sequence[Any]) -> Any:
    """The same batches for Lightning, which takes no list of them."""
    return torch.utils.data.DataLoader(Given(given), batch_size=None)


class Endless(torch.utils.data.IterableDataset[Any]):
    """Batches again and again, of a length nobody knows."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)


# -- modules ----------------------------------------------------------------------------------------------------------
class Nets(nn.Module):
    """A generator and a critic, and the two losses of a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.dis = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[Any] = []

    def fake(self, x: Tensor) -> Tensor:
        return self.gen(x.flip(1))

    def score(self, x: Tensor) -> Tensor:
        out = self.dis(x)
        return out.float() if out.dtype is torch.float16 else out  # or the loss scale itself is infinite

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.score(x)).mean() + F.softplus(self.score(fake.detach())).mean()

    def of_generator(self, x: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.score(fake)).mean()

    def loss(self, x: Tensor, i: int) -> Tensor:
        fake = self.fake(x)
        return self.of_critic(x, fake) if i == 0 else self.of_generator(x, fake)

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.dis.parameters(), lr=2e-2), torch.optim.SGD(self.gen.parameters(), lr=0.1, momentum=0.9)]

    def configure_optimizers(self) -> Any:
        return self.by_hand()


class Indexed(Nets):
    """``training_step(batch, batch_idx, optimizer_idx)``."""

    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int) -> Any:
        return self.loss(batch, optimizer_idx)


class Yielding(Nets):
    """A generator: the generator's forward is shared."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        fake = self.fake(batch)
        yield self.of_critic(batch, fake)
        yield self.of_generator(batch, fake)


class Manual(Nets):
    """``automatic_optimization = False``."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        critic, generator = self.optimizers()
        fake = self.fake(batch)
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, fake))
        critic.step()
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, fake))
        generator.step()


FORMS: dict[str, type[Nets]] = {"indexed": Indexed, "generator": Yielding, "manual": Manual}
TURNS: dict[str, type[Nets]] = {"indexed": Indexed, "generator": Yielding}


def mixed(form: str, *bases: type, **more: Any) -> Any:
    """A class of ``bases`` in this form of training_step."""
    return type(f"{form.title()}{bases[0].__name__ if bases else ''}", (*bases, FORMS[form]), more)


# -- training ---------------------------------------------------------------------------------------------------------
def made(make: Callable[[], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return make()


def trained(make: Callable[[], Any], data: Any, capture: str = "eager", *, ckpt_path: Any = None, turns: Any = None, val: Any = None,
            seed: int = 3, **options: Any) -> Any:  # fmt: skip
    """A module trained by fasttrain; its FitResult is ``module.result``. ``capture`` "captured": auto, nothing measured."""
    module = made(make, seed)
    if capture == "captured":
        capture, options = "auto", {"deterministic": True} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FasttrainWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        warnings.filterwarnings("ignore", "<class 'torch.autograd.function", DeprecationWarning)  # Dynamo's own doing
        more = {} if turns is None else {"turns": turns}
        trainer = compile_fit(module, capture=capture, **QUIET | {"max_epochs": 2} | options, **more)
        torch.manual_seed(7)
        result = trainer.fit(data, val, ckpt_path=ckpt_path)
    module.__dict__["result"], module.__dict__["fitted"] = result, trainer
    return module


def loss_scale(module: Any) -> tuple[float, int]:
    """The loss scale a run of :func:`trained` ended with, and its clean updates since it last moved."""
    state = module.fitted._run.maker.scaler.state_dict()
    return state["scale"], state["clean_steps"]


def both(make: Callable[[], Any], data: Callable[[], Any] = batches, *, capture: str = "compile", ratio: float = ROUNDING,
         callbacks: Any = None, **options: Any) -> tuple[Any, Any]:  # fmt: skip
    """The same training eagerly and captured: the same weights, steps and notes."""
    out = []
    for how in ("eager", capture):
        more = {} if callbacks is None else {"callbacks": callbacks()}
        out.append(trained(make, data(), how, **options, **more))
    eager, captured = out
    assert captured.result.steps == eager.result.steps
    same_weights(captured, eager, ratio)
    return eager, captured


def same_weights(ours: nn.Module, theirs: nn.Module, ratio: float = 0.0) -> None:
    """Bit for bit, or every tensor off by at most ``ratio`` of its size."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name, wanted in b.items():
        got = a[name]
        assert got.dtype == wanted.dtype, name
        if ratio == 0.0:
            assert torch.equal(got, wanted), f"{name} differs by up to {(got.double() - wanted.double()).abs().max():.3g}"
        else:
            gap = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
            assert gap <= ratio, f"{name} is off by a ratio of {gap:.2e}"


def alike(ours: Any, theirs: Any, rel: float = 1e-3) -> bool:
    """Equal, but for numbers, which may differ by rounding; through tuples, lists and dicts."""
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(alike(a, b, rel) for a, b in zip(ours, theirs, strict=True))
    if isinstance(theirs, dict):
        return bool(ours.keys() == theirs.keys()) and all(alike(ours[k], v, rel) for k, v in theirs.items())
    return bool(ours == pytest.approx(theirs, rel=rel, abs=1e-4)) if isinstance(theirs, float) else bool(ours == theirs)


def close(capture: str) -> float:
    return 0.0 if capture == "eager" else ROUNDING


def own(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def in_turns(make: Callable[[], Any], data: Iterable[Any], *, epochs: int = 2, window: int = 1, frequencies: Sequence[int] | None = None,
             clip: tuple[str, float] | None = None, precision: str = "32-true", scaler: Any = None, by_step: Any = None,
             stop: int = -1) -> Any:  # fmt: skip
    """Every optimizer's turn in a plain torch loop; ``module.windows`` counts the windows that were closed with a step.

    ``by_step(optimizers)`` gives a scheduler for each (or None); ``stop``: after that many batches the open window is closed.
    """
    module = made(make)
    if precision in TRUE:
        module.to(TRUE[precision])
    optimizers, data = module.by_hand(), list(data)
    schedulers = [None] * len(optimizers) if by_step is None else by_step(optimizers)
    torch.manual_seed(7)
    seen = windows = 0
    module.log = lambda *a, **k: None

    def step(k: int) -> bool:
        finite = True
        if scaler is not None:
            scaler.unscale_(optimizers[k])
            finite = all(bool(p.grad.isfinite().all()) for p in own(optimizers[k]))
        if clip is not None and clip[0] == "norm":
            nn.utils.clip_grad_norm_(own(optimizers[k]), clip[1])
        elif clip is not None:
            nn.utils.clip_grad_value_(own(optimizers[k]), clip[1])
        scaler.step(optimizers[k]) if scaler is not None else optimizers[k].step()
        if schedulers[k] is not None:
            schedulers[k].step()
        return finite

    for _ in range(epochs):
        for i, batch in enumerate(data):
            if precision in TRUE:
                batch = batch.to(TRUE[precision])
            length = min(window, len(data) - i // window * window)
            first, last = i % window == 0, i % window == length - 1
            seen += 1
            turns = range(len(optimizers)) if frequencies is None else [_whose(seen - 1, frequencies)]
            stepped = True
            for k in turns:
                others = {p for o in optimizers for p in own(o)} - set(own(optimizers[k]))
                for p in others:
                    p.requires_grad_(False)
                with torch.autocast("cpu", MIXED[precision], cache_enabled=False) if precision in MIXED else nullcontext():
                    loss = module.loss(batch, k)
                if first:
                    optimizers[k].zero_grad()
                loss = loss / length if length > 1 else loss
                (loss if scaler is None else scaler.scale(loss)).backward()
                if last:
                    stepped = step(k) and stepped
                for p in others:
                    p.requires_grad_(True)
            if seen == stop and not last:  # known only after the batch: every turn is over
                for k in turns:
                    for p in own(optimizers[k]):
                        p.grad.mul_(length / (i % window + 1))
                    stepped = step(k) and stepped
            if last or seen == stop:
                windows += stepped
                if scaler is not None:
                    scaler.update()
            if seen == stop:
                module.__dict__["windows"] = windows
                return module
    module.__dict__["windows"] = windows
    return module


def _whose(seen: int, frequencies: Sequence[int]) -> int:
    place = seen % sum(frequencies)
    return next(i for i in range(len(frequencies)) if place < sum(frequencies[: i + 1]))


# -- callbacks --------------------------------------------------------------------------------------------------------
class StopAfter(fasttrain.Callback):
    """Asks for the end after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.left -= 1
        trainer.should_stop = self.left == 0


class Saves(fasttrain.Callback):
    """Writes a checkpoint in the end of batch ``at``, counted over the run."""

    def __init__(self, path: Path | None, at: int) -> None:
        self.path, self.at, self.n = path, at, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.n += 1
        if self.n == self.at and self.path is not None:
            trainer.save_checkpoint(self.path)


class Acts(fasttrain.Callback):
    """Runs ``act(trainer, module, n)`` before batch n of the run."""

    def __init__(self, act: Any) -> None:
        self.act, self.n = act, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.act(trainer, pl_module, self.n)
        self.n += 1


def assert_resumes(make: Callable[[], Any], at: Iterable[int], tmp_path: Path, capture: str = "eager",
                   data: Callable[[], Any] = batches, **options: Any) -> None:  # fmt: skip
    """Saved at the end of each of these batches and resumed in a module of other weights: the same end, bit for bit."""
    for n in at:
        path = tmp_path / f"{n}"
        whole = trained(make, data(), capture, callbacks=[Saves(path, n)], **options)
        resumed = trained(make, data(), capture, ckpt_path=path, seed=11, callbacks=[Saves(None, n)], **options)
        assert resumed.result.steps == whole.result.steps, f"saved after batch {n}"
        try:
            same_weights(resumed, whole)
        except AssertionError as error:
            raise AssertionError(f"saved after batch {n}: {error}") from None
