"""Automatic optimization with several optimizers - asked for by index, or yielded - is the loop one writes by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fasttrain
from tests.forms.pairs import (
    ALL,
    BOTH,
    FORMS,
    PRECISIONS,
    QUIET,
    ROUNDING,
    TURNS,
    WIDTH,
    Acts,
    Endless,
    Indexed,
    Nets,
    StopAfter,
    Yielding,
    assert_resumes,
    batches,
    both,
    close,
    in_turns,
    loss_scale,
    made,
    mixed,
    own,
    same_weights,
    slow,
    trained,
    where_marked,
)


# -- the loop by hand -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("clip", [None, ("norm", 0.05), ("value", 0.01)])
def test_eager_is_the_loop_by_hand(form: str, precision: str, window: int, clip: Any) -> None:
    """Order, toggling, updates seen by the next turn, short last batches and windows, clipping, every precision: bit for bit."""
    options = {} if clip is None else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    ours = trained(TURNS[form], batches(last=3), accumulate_grad_batches=window, precision=precision, **options)
    theirs = in_turns(Indexed, batches(last=3), window=window, precision=precision, clip=clip)
    same_weights(ours, theirs)
    assert ours.result.steps == theirs.windows


@pytest.mark.parametrize("form", ["indexed", "generator", pytest.param("manual", marks=slow)])
@pytest.mark.parametrize(
    ("precision", "window", "clip"),
    [
        ("32-true", 4, ("norm", 0.05)),
        pytest.param("32-true", 1, None, marks=slow),
        pytest.param("32-true", 1, ("value", 0.01), marks=slow),
        pytest.param("64-true", 4, ("norm", 0.05), marks=slow),
        pytest.param("bf16-mixed", 1, None, marks=slow),
        pytest.param("bf16-true", 1, None, marks=slow),
    ],
)
def test_captured_is_the_loop_by_hand(form: str, precision: str, window: int, clip: Any) -> None:
    """The same on the compile rung, up to rounding of the dtype the forward runs in."""
    if form == "manual":
        window, clip = 1, None
    options = {} if clip is None else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    options |= {} if window == 1 else {"accumulate_grad_batches": window}
    ours = trained(FORMS[form], batches(last=3), "compile", precision=precision, **options)
    theirs = in_turns(Indexed, batches(last=3), window=window, precision=precision, clip=clip)
    assert ours.result.capture.rung == "compile"
    same_weights(ours, theirs, {"64-true": 1e-10, "32-true": ROUNDING}.get(precision, 5e-2))
    assert ours.result.steps == theirs.windows


@pytest.mark.parametrize("capture", BOTH)
def test_an_optimizer_owns_batches_in_a_row_over_the_whole_fit(capture: str) -> None:
    """frequency 5 and 1 over three epochs of ten batches: the count does not begin anew in an epoch."""

    class Frequent(Indexed):
        def configure_optimizers(self) -> Any:
            return [{"optimizer": o, "frequency": n} for o, n in zip(self.by_hand(), (5, 1), strict=True)]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            critic = self.trainer.optimizers[0]
            self.seen.append(int(next(iter(critic.state.values()))["step"]))

    ours = trained(Frequent, batches(), capture, max_epochs=3)
    theirs = in_turns(Indexed, batches(), epochs=3, frequencies=(5, 1))
    same_weights(ours, theirs, close(capture))
    assert ours.result.steps == theirs.windows == 30
    assert ours.seen == [n - n // 6 for n in range(1, 31)]  # five of six batches are the critic's


def owning(frequencies: tuple[int, int]) -> Any:
    class Frequent(Indexed):
        def configure_optimizers(self) -> Any:
            return [{"optimizer": o, "frequency": n} for o, n in zip(self.by_hand(), frequencies, strict=True)]

    return Frequent


def means_by_hand(frequencies: tuple[int, int], windows: Any) -> Any:
    """A step is the mean over the optimizer's own batches of the window."""
    module, seen = made(Indexed), 0
    optimizers = module.by_hand()
    for window in windows:
        mine: list[list[Any]] = [[], []]
        for batch in window:
            k = int(seen % sum(frequencies) >= frequencies[0])
            mine[k].append(torch.autograd.grad(module.loss(batch, k), own(optimizers[k])))
            seen += 1
        for optimizer, grads in zip(optimizers, mine, strict=True):
            for j, p in enumerate(own(optimizer)):
                p.grad = torch.stack([g[j] for g in grads]).mean(0) if grads else None
            optimizer.step()
    return module


@pytest.mark.parametrize("frequencies", [(1, 1), (3, 1), (1, 5)])
@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_whoever_had_a_turn_in_a_window_steps_at_its_end(frequencies: tuple[int, int], capture: str) -> None:
    """frequency and accumulate_grad_batches, over two epochs of two windows and a half."""
    ours = trained(owning(frequencies), batches(), capture, accumulate_grad_batches=4)
    windows = [batches()[start : start + 4] for _ in range(2) for start in (0, 4, 8)]
    same_weights(ours, means_by_hand(frequencies, windows), 1e-6 if capture == "eager" else ROUNDING)
    assert ours.result.steps == 6


@pytest.mark.parametrize("frequencies", [(1, 1), (2, 1)])
def test_whoever_had_a_turn_before_a_stop_steps_then(frequencies: tuple[int, int]) -> None:
    """In the third batch of a window of four, where neither optimizer had three."""
    ours = trained(owning(frequencies), batches(), accumulate_grad_batches=4, callbacks=[StopAfter(7)])
    same_weights(ours, means_by_hand(frequencies, [batches()[:4], batches()[4:7]]), 1e-6)


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_a_stop_in_mid_window_closes_it_for_every_optimizer(form: str, capture: str) -> None:
    """Six batches in windows of four: the second step of each is the mean over two."""
    ours = trained(TURNS[form], batches(), capture, accumulate_grad_batches=4, callbacks=[StopAfter(6)])
    theirs = in_turns(Indexed, batches(), window=4, stop=6)
    assert ours.result.steps == theirs.windows == 2
    same_weights(ours, theirs, close(capture))


@pytest.mark.parametrize("form", TURNS)
def test_a_stream_of_unknown_length_closes_its_last_window(form: str) -> None:
    """Ten batches in windows of four, of a loader without a length: the last two weigh fully."""
    data = torch.utils.data.DataLoader(Endless(batches()), batch_size=None)
    ours = trained(TURNS[form], data, accumulate_grad_batches=4)
    theirs = in_turns(Indexed, batches(), window=4)
    same_weights(ours, theirs, 1e-6)  # divided by 4 and multiplied by 2, not divided by 2
    assert ours.result.steps == theirs.windows


# -- fp16 -------------------------------------------------------------------------------------------------------------
class Overflowing(Nets):
    """The critic's loss overflows fp16 in the marked batch; the generator's does not."""

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        return super().of_critic(x, fake) * where_marked(x, 1e36)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_one_loss_scale_for_all_optimizers_moved_once_a_window(form: str, window: int, capture: str) -> None:
    """torch.amp.GradScaler by hand: the critic's overflow skips its update alone, and halves the scale once."""
    scaler = torch.amp.GradScaler("cpu")
    theirs = in_turns(mixed("indexed", Overflowing), batches(marked=3), window=window, precision="16-mixed", scaler=scaler)
    ours = trained(mixed(form, Overflowing), batches(marked=3), capture, precision="16-mixed", accumulate_grad_batches=window)
    assert loss_scale(ours)[0] == scaler.get_scale() == 65536.0 / 4
    assert loss_scale(ours)[1] == scaler._get_growth_tracker()
    assert ours.result.ledger.skipped_steps == 2
    assert ours.result.steps == theirs.windows
    same_weights(ours, theirs, 1e-5 if capture == "eager" else 2e-2)


@pytest.mark.parametrize(
    ("form", "capture"),
    [
        pytest.param("indexed", "eager"),
        pytest.param("indexed", "compile", marks=slow),
        pytest.param("generator", "eager"),
        pytest.param("generator", "compile", marks=slow),
    ],
)
def test_the_loss_scale_moves_once_at_a_stop(form: str, capture: str) -> None:
    """A window that a stop cuts short is one more update of the scale, not one an optimizer."""
    ours = trained(TURNS[form], batches(), capture, precision="16-mixed", accumulate_grad_batches=4, callbacks=[StopAfter(6)])
    assert loss_scale(ours) == (65536.0, 2)


# -- what is not finite -----------------------------------------------------------------------------------------------
class NotFinite(Nets):
    """The generator's loss is nan in the marked batch, the critic's is not."""

    def of_generator(self, x: Tensor, fake: Tensor) -> Tensor:
        return super().of_generator(x, fake) * where_marked(x, float("nan"))


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_a_refused_update_is_that_optimizers_alone(form: str, capture: str) -> None:
    """nonfinite="skip": the other one steps, and no weight is nan."""
    make = mixed(form, NotFinite)
    ours = trained(make, batches(marked=3), capture, nonfinite="skip")
    module = made(make)
    optimizers = module.by_hand()
    for _ in range(2):
        for batch in batches(marked=3):
            for k, other in ((0, module.gen), (1, module.dis)):
                other.requires_grad_(False)
                optimizers[k].zero_grad()
                loss = module.loss(batch, k)
                loss.backward()
                if bool(loss.isfinite()):
                    optimizers[k].step()
                other.requires_grad_(True)
    same_weights(ours, module, close(capture))
    assert ours.result.ledger.skipped_steps == 2


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_ignore_lets_it_through(form: str, capture: str) -> None:
    """nonfinite="ignore": as a plain loop."""
    ours = trained(mixed(form, NotFinite), batches(marked=3), capture, nonfinite="ignore")
    assert ours.result.steps == 20
    assert all(bool(p.isnan().all()) for p in ours.gen.parameters())


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_raise_keeps_nan_out_of_the_weights(form: str, capture: str) -> None:
    """nonfinite="raise": the run ends at that batch, and no weight is nan."""
    module = made(mixed(form, NotFinite))
    with pytest.raises(fasttrain.NonFiniteError, match=r"batch 3"):
        fasttrain.compile_fit(module, capture=capture, max_epochs=1, **QUIET).fit(batches(marked=3))
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("form", TURNS)
def test_raise_says_of_the_weights_what_is_true(form: str) -> None:
    """What the error says of the weights: as before the step means all of them."""
    module, before = made(mixed(form, NotFinite)), {}

    def keep(trainer: Any, pl_module: Any, n: int) -> None:
        before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    with pytest.raises(fasttrain.NonFiniteError) as caught:
        fasttrain.compile_fit(module, capture="eager", max_epochs=1, callbacks=[Acts(keep)], **QUIET).fit(batches(marked=3))
    same = all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert same or "The weights are as they were before this step" not in str(caught.value)


# -- schedulers -------------------------------------------------------------------------------------------------------
class Scheduled(Nets):
    """Schedulers by step, by step with a frequency, by epoch and on a plateau, over two optimizers."""

    def configure_optimizers(self) -> Any:
        critic, generator = self.made = self.by_hand()
        self.by_step, self.every_third = lr_scheduler.ExponentialLR(critic, 0.95), lr_scheduler.ExponentialLR(generator, 0.9)
        self.by_epoch = lr_scheduler.ExponentialLR(critic, 0.5)
        self.plateau = lr_scheduler.ReduceLROnPlateau(generator, patience=0, threshold=0.9)
        return [critic, generator], [
            {"scheduler": self.by_step, "interval": "step"},
            {"scheduler": self.every_third, "interval": "step", "frequency": 3},
            self.by_epoch,
            {"scheduler": self.plateau, "monitor": "seen"},
        ]

    def on_train_epoch_end(self) -> None:
        self.log("seen", 1.0)


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("capture", BOTH)
def test_schedulers_count_the_steps_of_their_own_optimizer(form: str, window: int, capture: str) -> None:
    """By step, by every third step, by epoch, on a plateau: after three epochs of ten batches."""
    ours = trained(mixed(form, Scheduled), batches(), capture, max_epochs=3, accumulate_grad_batches=window)
    steps = 30 if window == 1 else 9
    assert (ours.by_step.last_epoch, ours.every_third.last_epoch, ours.by_epoch.last_epoch) == (steps, steps // 3, 3)
    critic = 2e-2 * 0.95**steps * 0.5**3
    generator = 0.1 * 0.9 ** (steps // 3) * 0.1**2  # worse in the second and the third epoch
    assert [o.param_groups[0]["lr"] for o in ours.made] == pytest.approx([critic, generator])


@pytest.mark.parametrize("capture", BOTH)
def test_a_scheduler_moves_only_when_its_optimizer_had_its_turn(capture: str) -> None:
    """frequency 5 and 1: after 24 batches 20 steps and 4; and the learning rates are those of the loop by hand."""

    class Frequent(Indexed):
        def configure_optimizers(self) -> Any:
            optimizers = self.by_hand()
            self.rules = [lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
            return [
                {"optimizer": o, "frequency": n, "lr_scheduler": {"scheduler": s, "interval": "step"}}
                for o, n, s in zip(optimizers, (5, 1), self.rules, strict=True)
            ]

    ours = trained(Frequent, batches(12), capture)
    theirs = in_turns(Indexed, batches(12), frequencies=(5, 1), by_step=lambda made: [lr_scheduler.ExponentialLR(o, 0.9) for o in made])
    assert [s.last_epoch for s in ours.rules] == [20, 4]
    same_weights(ours, theirs, close(capture))


@pytest.mark.parametrize("form", TURNS)
def test_a_refused_update_moves_no_scheduler_but_its_own(form: str) -> None:
    """The critic stepped in all 20 batches, the generator in 18."""

    class Rules(NotFinite):
        def configure_optimizers(self) -> Any:
            optimizers = self.by_hand()
            self.rules = [lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
            return optimizers, [{"scheduler": s, "interval": "step"} for s in self.rules]

    ours = trained(mixed(form, Rules), batches(marked=3), nonfinite="skip")
    assert [s.last_epoch for s in ours.rules] == [20, 18]


# -- around a batch ---------------------------------------------------------------------------------------------------
class Watching(Nets):
    """Logs in each turn, counts forward passes, and is validated in between."""

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        loss = super().of_critic(x, fake)
        self.log("critic", loss, on_epoch=True)
        self.log("step", float(self.global_step))
        return loss

    def of_generator(self, x: Tensor, fake: Tensor) -> Tensor:
        loss = super().of_generator(x, fake)
        self.log("generator", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", super().of_critic(batch, self.fake(batch)))

    def on_validation_end(self) -> None:
        self.seen.append(("val", self.trainer.global_step))

    @property
    def global_step(self) -> int:
        return int(self.trainer.global_step)


@pytest.mark.parametrize(
    ("form", "capture"),
    [("indexed", "eager"), ("generator", "eager"), ("generator", "compile"), pytest.param("indexed", "compile", marks=slow)],
)
def test_what_every_turn_logs_arrives(form: str, capture: str) -> None:
    """Both losses, by step and by epoch, are those of the loop by hand; validation stands between windows; steps are windows."""
    ours = trained(mixed(form, Watching), batches(), capture, val=batches(2, seed=9), accumulate_grad_batches=2, val_check_interval=4)
    losses: list[list[float]] = [[], []]

    class Kept(Indexed):
        def loss(self, x: Tensor, i: int) -> Tensor:
            loss = super().loss(x, i)
            losses[i].append(float(loss.detach()))
            return loss

    in_turns(Kept, batches(), window=2)
    metrics = ours.result.metrics
    ratio = 1e-6 if capture == "eager" else 1e-4
    for name, values in zip(("critic", "generator"), losses, strict=True):
        assert metrics[f"{name}_step"] == pytest.approx(values[-1], rel=ratio)
        assert metrics[f"{name}_epoch"] == pytest.approx(sum(values[10:]) / 10, rel=ratio)
    assert ours.seen == [("val", 2), ("val", 4), ("val", 7), ("val", 9)]
    assert ours.result.steps == 10
    assert metrics["step"] == 9


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_the_end_of_a_batch_is_given_what_every_turn_returned(form: str, capture: str) -> None:
    """A list with an entry an optimizer, in order, dicts as they were."""

    class Returns(Nets):
        def of_critic(self, x: Tensor, fake: Tensor) -> Any:
            return {"loss": super().of_critic(x, fake), "mean": fake.detach().mean()}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            critic, generator = outputs
            assert not critic["loss"].requires_grad
            self.seen.append((round(float(critic["loss"]), 4), round(float(critic["mean"]), 4), round(float(generator), 4)))

    ours = trained(mixed(form, Returns), batches(), capture)
    reference = trained(mixed(form, Returns), batches())
    assert len(ours.seen) == 20
    assert ours.seen == [tuple(pytest.approx(v, abs=2e-4) for v in row) for row in reference.seen]


def test_the_shared_part_of_a_generator_is_computed_once() -> None:
    """One forward of the generator network a batch, where the indexed form needs two."""
    counts = {}
    for form, make in TURNS.items():
        calls = []

        class Counting(make):  # type: ignore[valid-type,misc]
            def fake(self, x: Tensor) -> Tensor:
                calls.append(1)  # noqa: B023
                return super().fake(x)

        module = made(Counting)
        fasttrain.compile_fit(module, capture="eager", max_epochs=1, **QUIET).fit(batches(5))
        counts[form] = len(calls)
    assert counts == {"generator": 5, "indexed": 10}  # the look before training has left no trace in the list


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_code_behind_a_yield_sees_the_update(capture: str) -> None:
    """What is logged after the last yield is computed with the weights of after both updates."""

    class Late(Yielding):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            fake = self.fake(batch)
            before = self.dis[0].weight.detach().clone()
            yield self.of_critic(batch, fake)
            self.log("moved", (self.dis[0].weight - before).abs().sum())
            yield self.of_generator(batch, fake)
            self.log("after", self.gen[0].weight.sum())

    ours = trained(Late, batches(), capture)
    assert ours.result.metrics["moved"] > 1e-3
    assert ours.result.metrics["after"] == pytest.approx(float(ours.gen[0].weight.detach().sum()), rel=1e-5)
    same_weights(ours, in_turns(Indexed, batches()), close(capture))


class Remembers(Yielding):
    """What weights and outputs were before an update, used after it."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        fake = self.fake(batch)
        weight, score = self.dis[0].weight.detach().clone(), self.dis(batch).detach()
        yield self.of_critic(batch, fake)
        far = (self.dis[0].weight.detach() - weight).abs().sum() + (self.dis(batch).detach() - score).abs().sum()
        self.log("far", far)
        yield self.of_generator(batch, fake) * (1 + far)


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile")])
def test_locals_from_before_a_yield_are_what_they_were(capture: str) -> None:
    """A copy of the weights and an output from before the critic's update enter the generator's loss."""
    ours = trained(Remembers, batches(), capture)
    module = made(Remembers)
    critic, generator = module.by_hand()
    for _ in range(2):
        for batch in batches():
            fake = module.fake(batch)
            weight, score = module.dis[0].weight.detach().clone(), module.dis(batch).detach()
            critic.zero_grad()
            module.of_critic(batch, fake).backward()
            critic.step()
            far = (module.dis[0].weight.detach() - weight).abs().sum() + (module.dis(batch).detach() - score).abs().sum()
            generator.zero_grad()
            (module.of_generator(batch, fake) * (1 + far)).backward(inputs=own(generator))
            generator.step()
    assert ours.result.metrics["far"] == pytest.approx(float(far), rel=1e-4)
    same_weights(ours, module, close(capture))


@pytest.mark.parametrize("capture", ALL)
def test_a_trunk_of_one_optimizer_feeds_another(capture: str) -> None:
    """Features computed before their trunk's update, used detached after it."""

    class Trunk(Nets):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 1)

        def by_hand(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.Adam(self.dis.parameters(), lr=2e-2), torch.optim.SGD(self.head.parameters(), lr=0.1)]

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            features = self.dis[:2](batch)
            yield (self.dis[2](features) - 1).square().mean()
            yield (self.head(features.detach()) - 2).square().mean()

    ours = trained(Trunk, batches(), capture)
    module = made(Trunk)
    first, second = module.by_hand()
    for _ in range(2):
        for batch in batches():
            features = module.dis[:2](batch)
            first.zero_grad()
            (module.dis[2](features) - 1).square().mean().backward()
            first.step()
            second.zero_grad()
            (module.head(features.detach()) - 2).square().mean().backward()
            second.step()
    same_weights(ours, module, close(capture))


@pytest.mark.parametrize("capture", BOTH)
@pytest.mark.parametrize("window", [1, 3])
def test_a_yield_of_none_leaves_that_optimizer_alone(capture: str, window: int) -> None:
    """None in the batches 0, 3, 6, 9 of ten; a dict in the place of a loss; both in windows too."""

    class Sometimes(Yielding):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            fake = self.fake(batch)
            yield self.of_critic(batch, fake) if batch_idx % 3 else None
            yield {"loss": self.of_generator(batch, fake), "more": fake.sum()}

    ours = trained(Sometimes, batches(), capture, accumulate_grad_batches=window)
    module = made(Sometimes)
    critic, generator = module.by_hand()
    for _ in range(2):
        for i, batch in enumerate(batches()):
            first, last = i % window == 0, i % window == window - 1 or i == 9
            length = min(window, 10 - i // window * window)
            fake = module.fake(batch)
            if first:
                critic.zero_grad()
            if i % 3:
                (module.of_critic(batch, fake) / length).backward()
            if last and module.dis[0].weight.grad is not None:
                critic.step()
            if first:
                generator.zero_grad()
            (module.of_generator(batch, fake) / length).backward(inputs=own(generator))
            if last:
                generator.step()
    same_weights(ours, module, close(capture))


@pytest.mark.parametrize("make", [Nets, Indexed, FORMS["manual"]])
def test_turns_given_to_compile_fit_replace_the_training_step(make: type[Nets]) -> None:
    """The module needs none, and one that it has is not called."""
    ours = trained(make, batches(), turns=alternately)
    same_weights(ours, trained(Yielding, batches()))


@slow
def test_turns_given_to_compile_fit_are_captured() -> None:
    """And they compute what they compute eagerly."""
    ours = trained(Nets, batches(), "compile", turns=alternately)
    assert ours.result.capture.rung == "compile"
    same_weights(ours, trained(Yielding, batches()), ROUNDING)


def alternately(module: Any, batch: Tensor, batch_idx: int) -> Any:
    fake = module.fake(batch)
    yield module.of_critic(batch, fake)
    yield module.of_generator(batch, fake)


# -- what requires a gradient -----------------------------------------------------------------------------------------
class Penalized(Nets):
    """A penalty over whatever requires a gradient while the turn runs."""

    def loss(self, x: Tensor, i: int) -> Tensor:
        mine = {"dis": i == 0, "gen": i == 1}
        self.seen.append(all(p.requires_grad == mine[n.split(".")[0]] for n, p in self.named_parameters()))
        penalty = sum((p.square().sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))
        loss = super().loss(x, i) + 0.01 * penalty
        self.log(f"loss_{i}", loss)
        return loss


class PenalizedIndexed(Penalized):
    def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int) -> Tensor:
        return self.loss(batch, optimizer_idx)


def test_only_the_own_parameters_require_a_gradient_in_a_turn() -> None:
    """In every turn of every batch; afterwards all of them do again."""
    ours = trained(PenalizedIndexed, batches())
    assert all(ours.seen)
    assert all(p.requires_grad for p in ours.parameters())
    same_weights(ours, in_turns(PenalizedIndexed, batches()))


@slow
def test_a_captured_turn_sees_what_requires_a_gradient_too() -> None:
    """The logged losses are those of the eager rung."""
    eager, captured = both(PenalizedIndexed, capture="captured")
    for name in ("loss_0", "loss_1"):
        assert captured.result.metrics[name] == pytest.approx(eager.result.metrics[name], rel=1e-4)


def test_a_turn_may_insist_on_being_toggled() -> None:
    """A step that asserts what requires a gradient trains."""

    class Insists(Indexed):
        def loss(self, x: Tensor, i: int) -> Tensor:
            assert self.gen[0].weight.requires_grad == (i == 1)
            return super().loss(x, i)

    trained(Insists, batches(2))


@pytest.mark.parametrize("form", [pytest.param("indexed", marks=slow), "generator"])
def test_layers_frozen_and_unfrozen_between_windows(form: str) -> None:
    """The critic's first layer does not train in four batches: captured and eager agree, and what is frozen stands still."""

    def freeze(trainer: Any, module: Any, n: int) -> None:
        module.dis[0].requires_grad_(not 3 <= n < 7)
        module.seen.append(module.dis[0].weight.detach().clone())

    eager, captured = both(TURNS[form], callbacks=lambda: [Acts(freeze)])
    for module in (eager, captured):
        moved = [not torch.equal(a, b) for a, b in zip(module.seen, module.seen[1:], strict=False)]
        assert moved == [not 3 <= n < 7 for n in range(19)]


class Shared(Nets):
    """An encoder that both optimizers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(WIDTH, WIDTH)

    def fake(self, x: Tensor) -> Tensor:
        return self.gen(self.enc(x).flip(1))

    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        return super().of_critic(self.enc(x), fake)

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam([*self.enc.parameters(), *self.dis.parameters()], lr=2e-2),
            torch.optim.SGD([*self.enc.parameters(), *self.gen.parameters()], lr=0.1, momentum=0.9),
        ]


class SharedYielding(Shared):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        yield self.loss(batch, 0)
        yield self.loss(batch, 1)


def shared(form: str) -> Any:
    return mixed("indexed", Shared) if form == "indexed" else SharedYielding


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_parameters_that_two_optimizers_share(form: str, capture: str) -> None:
    """Each turn updates them from its own loss."""
    ours = trained(shared(form), batches(), capture)
    same_weights(ours, in_turns(shared("indexed"), batches()), close(capture))


@pytest.mark.parametrize(
    ("form", "capture"),
    [
        ("indexed", "eager"),
        pytest.param("indexed", "compile", marks=slow),
        ("generator", "eager"),
        pytest.param("generator", "compile", marks=slow),
    ],
)
def test_a_window_over_shared_parameters_keeps_gradients_apart(form: str, capture: str) -> None:
    """An optimizer's step is the mean of its own losses' gradients over the window."""
    ours = trained(shared(form), batches(), capture, accumulate_grad_batches=5)
    module = made(shared("indexed"))
    optimizers = module.by_hand()
    kept: list[list[Any]] = [[], []]
    for _ in range(2):
        for i, batch in enumerate(batches()):
            for k, optimizer in enumerate(optimizers):
                grads = torch.autograd.grad(module.loss(batch, k) / 5, own(optimizer))
                kept[k] = list(grads) if i % 5 == 0 else [a + b for a, b in zip(kept[k], grads, strict=True)]
                if i % 5 == 4:
                    for p, g in zip(own(optimizer), kept[k], strict=True):
                        p.grad = g
                    optimizer.step()
    same_weights(ours, module, 1e-6 if capture == "eager" else ROUNDING)


def frozen_within(trainer: Any, module: Any, n: int) -> None:
    """The critic's first layer, and in the last batch of a window the generator's bias, from batch 2 to batch 5."""
    module.dis[0].requires_grad_(not 2 <= n < 6)
    module.gen[0].bias.requires_grad_(not 3 <= n < 6)


class OneLoss(Nets):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch, 0) + self.loss(batch, 1)

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)]


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_layer_frozen_within_a_window_is_torchs(capture: str) -> None:
    """What it was given before still moves it at the window's end; in the next one it stands still."""
    ours = trained(OneLoss, batches(), capture, accumulate_grad_batches=4, max_epochs=1, callbacks=[Acts(frozen_within)])
    module = made(OneLoss)
    (optimizer,) = module.by_hand()
    for i, batch in enumerate(batches()):
        frozen_within(None, module, i)
        if i % 4 == 0:
            optimizer.zero_grad()
        (module.training_step(batch, i) / (4 if i < 8 else 2)).backward()
        if i % 4 == 3 or i == 9:
            optimizer.step()
    same_weights(ours, module, close(capture))


class OneLossHooked(OneLoss):
    """Captured in pieces."""

    def on_after_backward(self) -> None:
        self.seen.append(self.dis[0].weight.grad is None)


class ManualWindows(Nets):
    """Windows of four by hand."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):
            self.manual_backward(self.loss(batch, i) / 4)
            if batch_idx % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(("make", "window"), [(Yielding, 4), *(pytest.param(m, w, marks=slow) for m, w in (
    (Indexed, 4), (SharedYielding, 4), (OneLossHooked, 4), (ManualWindows, 1)))])  # fmt: skip
def test_a_layer_frozen_within_a_window_in_every_form(make: Any, window: int) -> None:
    """Captured as eagerly."""
    both(make, callbacks=lambda: [Acts(frozen_within)], max_epochs=1, accumulate_grad_batches=window)


@pytest.mark.parametrize("capture", BOTH)
@pytest.mark.parametrize("form", TURNS)
def test_an_optimizer_of_which_nothing_trains_any_more_is_named(form: str, capture: str) -> None:
    """Frozen in mid-run: which optimizer it is."""

    def freeze(trainer: Any, module: Any, n: int) -> None:
        module.gen.requires_grad_(n < 4)

    with pytest.raises(fasttrain.ModuleError, match="no parameter of optimizer 1 trains"):
        trained(TURNS[form], batches(), capture, callbacks=[Acts(freeze)])


# -- resume -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_a_window_over_shared_parameters_resumes(form: str, capture: str, tmp_path: Path) -> None:
    """Each optimizer's own gradients are in the checkpoint."""
    assert_resumes(shared(form), [3, 12], tmp_path, capture, accumulate_grad_batches=5)


class Everything(Nets):
    """Dropout, batch norm, schedulers by step and by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def fake(self, x: Tensor) -> Tensor:
        return self.gen(nn.functional.dropout(self.norm(x), 0.2))

    def configure_optimizers(self) -> Any:
        made = self.by_hand()
        first, second = lr_scheduler.ExponentialLR(made[0], 0.95), lr_scheduler.StepLR(made[1], 1, 0.5)
        return made, [{"scheduler": first, "interval": "step"}, second]


@pytest.mark.parametrize("form", TURNS)
def test_a_run_resumes(form: str, tmp_path: Path) -> None:
    """Saved after a batch of either epoch: the same end, bit for bit."""
    assert_resumes(mixed(form, Everything), range(1, 20, 3), tmp_path)


@pytest.mark.parametrize("form", TURNS)
def test_a_run_resumes_at_every_batch_of_a_window(form: str, tmp_path: Path) -> None:
    """The same with windows of four, two of them short: after every batch."""
    assert_resumes(mixed(form, Everything), range(1, 20), tmp_path, accumulate_grad_batches=4)


@pytest.mark.parametrize("form", ["generator", pytest.param("indexed", marks=slow)])
@pytest.mark.parametrize("at", [pytest.param(8, marks=slow), 6])
def test_a_captured_run_resumes(form: str, at: int, tmp_path: Path) -> None:
    """On the compile rung: at a window's end, and within one."""
    assert_resumes(mixed(form, Everything), [at], tmp_path, "compile", accumulate_grad_batches=4)


def test_whose_turn_it_is_survives_a_resume(tmp_path: Path) -> None:
    """frequency 5 and 1."""

    class Frequent(Indexed):
        def configure_optimizers(self) -> Any:
            return [{"optimizer": o, "frequency": n} for o, n in zip(self.by_hand(), (5, 1), strict=True)]

    assert_resumes(Frequent, range(1, 20, 2), tmp_path)


# -- other ways through the same steps ----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("capture", BOTH)
def test_a_loop_of_ones_own(form: str, capture: str) -> None:
    """trainer.step(batch) takes every optimizer's turn, in windows."""
    window = 1 if form == "manual" else 2
    module = made(FORMS[form])
    options = {} if form == "manual" else {"accumulate_grad_batches": window}
    trainer = fasttrain.compile_fit(module, capture=capture, **QUIET, **options)
    torch.manual_seed(7)
    for batch in batches():
        trainer.step(batch)
    same_weights(module, in_turns(Indexed, batches(), epochs=1, window=window), close(capture))


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("capture", BOTH)
def test_an_epoch_that_a_hook_ends_closes_its_window(form: str, capture: str) -> None:
    """on_train_batch_start gives -1 before the seventh batch: two of four are gathered, and stepped."""

    class Ends(Nets):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 6 else None

    ours = trained(mixed(form, Ends), batches(), capture, accumulate_grad_batches=4, max_epochs=1)
    same_weights(ours, in_turns(Indexed, batches(), epochs=1, window=4, stop=6), 1e-6 if capture == "eager" else ROUNDING)
    assert ours.result.steps == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("capture", BOTH)
def test_a_second_fit_begins_with_new_optimizers(form: str, capture: str) -> None:
    """On the weights as the first one left them."""
    module = made(FORMS[form])
    trainer = fasttrain.compile_fit(module, capture=capture, max_epochs=1, **QUIET)
    trainer.fit(batches())
    trainer.fit(batches())
    theirs = made(Indexed)
    for _ in range(2):
        optimizers = theirs.by_hand()
        for batch in batches():
            for k, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                theirs.loss(batch, k).backward(inputs=own(optimizer))
                optimizer.step()
    same_weights(module, theirs, close(capture))


def _change(trainer: Any, module: Any, n: int) -> None:
    """Rates, storages, slots: whatever a callback may lay hands on."""
    for group in trainer.optimizers[0].param_groups:
        group["lr"] = 2e-2 / (1 + n)
    if n % 4 == 3:
        for p in module.dis.parameters():
            p.data = p.data.clone() * 0.9
    if n == 6:
        trainer.optimizers[0].load_state_dict(trainer.optimizers[0].state_dict())
    if n == 9:
        trainer.optimizers[0].state.clear()


def _replace(trainer: Any, module: Any, n: int) -> None:
    if n == 4:
        torch.manual_seed(1)
        module.dis[2] = nn.Linear(8, 1)
        trainer.optimizers[0].add_param_group({"params": list(module.dis[2].parameters())})


@pytest.mark.parametrize("form", ["generator", pytest.param("indexed", marks=slow), pytest.param("manual", marks=slow)])
@pytest.mark.parametrize("act", [_change, pytest.param(_replace, marks=slow)])
def test_what_callbacks_change_reaches_a_captured_pair(form: str, act: Any) -> None:
    """Between any two batches."""
    _, captured = both(FORMS[form], callbacks=lambda: [Acts(act)])
    assert captured.result.capture.rung == "compile"


@slow
def test_trainers_side_by_side() -> None:
    """Three of them, batch by batch: each keeps its own gradients and weights."""
    modules = [made(Yielding, seed) for seed in range(3)]
    trainers = [fasttrain.compile_fit(m, capture="compile", **QUIET) for m in modules]
    for batch in batches():
        for trainer in trainers:
            trainer.step(batch)
    for seed, module in enumerate(modules):
        alone = made(Yielding, seed)
        trainer = fasttrain.compile_fit(alone, capture="eager", **QUIET)
        for batch in batches():
            trainer.step(batch)
        same_weights(module, alone, ROUNDING)


# -- measured ---------------------------------------------------------------------------------------------------------
@slow
def test_auto_measures_several_optimizers_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed on both rungs from a snapshot: the run is that of the eager rung."""
    from fasttrain.graphs import decisions

    monkeypatch.setattr(decisions, "_folder", lambda: tmp_path)
    runs: list[Callable[..., Any]] = [Indexed, Yielding]
    for make in runs:
        options = {"max_epochs": -1}
        ours = trained(make, batches(), "auto", callbacks=[StopAfter(9)], **options)
        theirs = trained(make, batches(), "eager", callbacks=[StopAfter(9)], **options)
        assert {"eager", "captured/1"} <= set(ours.result.capture.timings_us)
        same_weights(ours, theirs, ROUNDING)
