"""Manual optimization: every verb means what it means in Lightning 2.6.6, eagerly and captured."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fasttrain
from tests.forms.pairs import (
    PRECISIONS,
    QUIET,
    ROUNDING,
    WIDTH,
    Manual,
    Nets,
    assert_resumes,
    batches,
    both,
    loader,
    loss_scale,
    made,
    same_weights,
    slow,
    trained,
    where_marked,
)
from tests.parity.harness import BARE

for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Lit(Nets, LightningModule):
    """The pair as a LightningModule that optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def critic_step(self, batch: Tensor, critic: Any) -> Tensor:
        loss = self.of_critic(batch, self.fake(batch))
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        return loss


def lightning(make: Any, given: Any = None, **options: Any) -> Any:
    """The module trained by Lightning; ``module.steps`` is what it counted."""
    module = made(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**BARE | {"max_epochs": 2, "num_sanity_val_steps": 0} | options)
        torch.manual_seed(7)
        trainer.fit(module, loader(batches() if given is None else given))
    module.__dict__["steps"] = trainer.global_step
    return module


# -- the verbs --------------------------------------------------------------------------------------------------------
class Plain(Lit):
    training_step = Manual.training_step


class Toggles(Lit):
    """toggle_optimizer, toggle_model, toggled_optimizer."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        self.toggle_optimizer(critic)
        self.critic_step(batch, critic)
        self.untoggle_optimizer(critic)
        for context in (generator.toggle_model(), self.toggled_optimizer(generator)):
            with context:
                generator.zero_grad()
                self.manual_backward(self.of_generator(batch, self.fake(batch)))
                generator.step()


class TogglesLate(Lit):
    """Toggled only after the forward pass."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        fake = self.fake(batch)
        loss = self.of_critic(batch, fake)
        with critic.toggle_model():
            critic.zero_grad()
            self.manual_backward(loss)
            critic.step()
        loss = self.of_generator(batch, fake)
        with generator.toggle_model():
            generator.zero_grad()
            self.manual_backward(loss)
            generator.step()


class Reuses(Lit):
    """What was computed under one toggle enters the loss under the next: it has no gradient there."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        self.toggle_optimizer(critic)
        fake = self.fake(batch)
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, fake))
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, fake) + self.of_generator(batch, self.fake(batch * 2)))
        generator.step()
        self.untoggle_optimizer(generator)


class Freezes(Lit):
    """requires_grad set by hand around the generator's turn."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        for p in self.dis.parameters():
            p.requires_grad = False
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, self.fake(batch)))
        generator.step()
        self.dis.requires_grad_(True)
        self.critic_step(batch, critic)


class Clips(Lit):
    """clip_gradients by norm and by value."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        fake = self.fake(batch)
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, fake))
        self.clip_gradients(critic, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        critic.step()
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, fake))
        self.clip_gradients(generator, gradient_clip_val=0.01, gradient_clip_algorithm="value")
        generator.step()


class Retains(Lit):
    """Two backward passes through one graph."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        fake = self.fake(batch)
        critic.zero_grad()
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, fake), retain_graph=True)
        self.manual_backward(self.of_generator(batch, fake * 2), retain_graph=True)
        self.manual_backward(self.of_critic(batch, fake))
        critic.step()
        generator.step()


class Weighs(Lit):
    """A backward pass from a vector."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        out = self.dis(batch)
        critic.zero_grad()
        self.manual_backward(out, gradient=torch.ones_like(out) * 0.1)
        critic.step()


class WeighsItself(Weighs):
    """The same through a backward of the module's own."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.seen.append(len(loss))
        super().backward(loss * 2, *args, **kwargs)


class Zeroes(Lit):
    """Gradients of zero in the place of none: Adam moves on without one."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad(set_to_none=False)
        if batch_idx % 3 != 2:
            self.manual_backward(self.of_critic(batch, self.fake(batch)))
        critic.step()


class Closes(Lit):
    """step(closure) gives back what the closure gave."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()

        def closure() -> Tensor:
            loss = self.of_critic(batch, self.fake(batch))
            critic.zero_grad()
            self.manual_backward(loss)
            return loss

        self.log("closed", critic.step(closure=closure))


class Accumulates(Lit):
    """Gradients over four batches, and what is left at the end of an epoch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        critic, _ = self.optimizers()
        loss = self.of_critic(batch, self.fake(batch)) / 4
        self.manual_backward(loss)
        if (batch_idx + 1) % 4 == 0 or self.trainer.is_last_batch:
            critic.step()
            critic.zero_grad()
        return loss


class AccumulatesLate(Lit):
    """The same, zeroed when the next window begins; the last window of an epoch stays open."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        if batch_idx % 4 == 0 and batch_idx:
            critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)) / 4)
        if (batch_idx + 1) % 4 == 0:
            critic.step()


class Repeats(Lit):
    """Three steps of one optimizer in a batch, and one of the other in every third."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        critic, generator = self.optimizers()
        for k in range(3):
            self.critic_step(batch * (1 + k), critic)
        if (batch_idx + 1) % 3 == 0:
            generator.zero_grad()
            self.manual_backward(self.of_generator(batch, self.fake(batch)))
            generator.step()
            return {"loss": batch.sum()}
        return None


class Remembers(Lit):
    """How far the weights went is part of the second step's loss; what they were is half kept."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        before = [p.detach().clone() for p in self.dis.parameters()]
        for _ in range(2):
            far = sum((p - q).square().sum() for p, q in zip(self.dis.parameters(), before, strict=True))
            critic.zero_grad()
            self.manual_backward(self.of_critic(batch, self.fake(batch)) + 0.5 * far)
            critic.step()
        with torch.no_grad():
            for p, q in zip(self.dis.parameters(), before, strict=True):
                p.lerp_(q, 0.5)


class ClampsWeights(Lit):
    """A WGAN's critic, and a penalty on the gradient of its score."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        x = (batch + self.fake(batch).detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.score(x).sum(), x, create_graph=True)
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)) + slope.square().mean())
        critic.step()
        with torch.no_grad():
            for p in self.dis.parameters():
                p.clamp_(-0.3, 0.3)
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, self.fake(batch)))
        generator.step()


class Sgd(Lit):
    """Under SGD, where the size of a gradient and of a learning rate shows at once."""

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.dis.parameters(), lr=0.1), torch.optim.SGD(self.gen.parameters(), lr=0.1)]


class Penalizes(Sgd):
    """A penalty over what requires a gradient under a toggle; the frozen ones by hand, as CycleGANs do."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        with critic.toggle_model():
            fake = self.fake(batch)
            loss = self.of_critic(batch, fake) + 0.1 * sum(p.square().sum() for p in self.parameters() if p.requires_grad)
            self.log("loss", loss)
            critic.zero_grad()
            self.manual_backward(loss)
            critic.step()


class Waits(Sgd):
    """The generator is frozen until the second epoch, and its turn comes with it."""

    def by_hand(self) -> list[torch.optim.Optimizer]:
        self.gen.requires_grad_(False)
        return super().by_hand()

    def on_train_epoch_start(self) -> None:
        self.gen.requires_grad_(self.current_epoch > 0)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        self.critic_step(batch, critic)
        if self.current_epoch:
            generator.zero_grad()
            self.manual_backward(self.of_generator(batch, self.fake(batch)))
            generator.step()


class Rates(Sgd):
    """The learning rate written into param_groups before the step, from the batch's number."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        for group in critic.param_groups:
            group["lr"] = 0.2 * min(1.0, (batch_idx + 1) / 8)
        self.critic_step(batch, critic)


class RatesShrink(Sgd):
    """The learning rate multiplied in every step, through the optimizer itself."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        for group in critic.optimizer.param_groups:
            group["lr"] *= 0.8
        self.critic_step(batch, critic)


class RatesSwitch(Sgd):
    """One learning rate in even batches, another in odd ones, through the trainer."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.1 if batch_idx % 2 else 0.01
        self.critic_step(batch, critic)


class Direct(Sgd):
    """loss.backward() in the place of manual_backward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad()
        self.of_critic(batch, self.fake(batch)).backward()
        critic.step()


class TorchClips(Sgd):
    """torch.nn.utils.clip_grad_norm_ between backward and step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        nn.utils.clip_grad_norm_(self.dis.parameters(), 0.05)
        critic.step()


class ReadsGradients(Sgd):
    """Logs the gradients' norm."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        self.log("norm", sum(p.grad.norm() for p in self.dis.parameters() if p.grad is not None))
        critic.step()


class WritesGradients(Sgd):
    """Divides gradients by hand."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        for p in self.dis.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)
        critic.step()


class Raw(Lit):
    """Torch's own optimizers."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.critic_step(batch, self.optimizers(use_pl_optimizer=False)[0])


class Inner(Lit):
    """Torch's own step behind ours."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        critic.optimizer.step()


class SecondOrder(Lit):
    """LBFGS asks again and again."""

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.LBFGS(self.dis.parameters(), lr=0.1, max_iter=4)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic = self.optimizers()

        def closure() -> Tensor:
            loss = self.of_critic(batch, self.fake(batch).detach())
            critic.zero_grad()
            self.manual_backward(loss)
            return loss

        critic.step(closure=closure)


class OwnOptimizers(Lit):
    """configure_optimizers gives None: the module keeps Adam, momentum and a schedule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = self.by_hand()
        self.rates = {"gen": lr_scheduler.StepLR(self.mine[1], 3, 0.5)}

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.optimizers().step()  # of nothing
        for i, optimizer in enumerate(self.mine):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, i))
            optimizer.step()
        self.rates["gen"].step()


class Steps(Lit):
    """A scheduler moved after every step, one after every third, in the step."""

    def configure_optimizers(self) -> Any:
        made = self.by_hand()
        return made, [lr_scheduler.LambdaLR(made[0], lambda n: 1 / (1 + n)), lr_scheduler.StepLR(made[1], 2, 0.5)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        first, second = self.lr_schedulers()
        self.critic_step(batch, critic)
        first.step()
        generator.zero_grad()
        self.manual_backward(self.of_generator(batch, self.fake(batch)))
        generator.step()
        if batch_idx % 3 == 0:
            second.step()


class StepsAtEpochs(Steps):
    """Schedulers moved at an epoch's end."""

    training_step = Manual.training_step

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()


class Plateaus(Lit):
    """Lightning's own example: a plateau told of a metric at an epoch's end, with the monitor beside it."""

    def configure_optimizers(self) -> Any:
        critic, generator = self.by_hand()
        plateau = lr_scheduler.ReduceLROnPlateau(critic, patience=0, threshold=0.9)
        return [critic, generator], [{"scheduler": plateau, "monitor": "loss"}]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        self.log("loss", self.critic_step(batch, critic))

    def on_train_epoch_end(self) -> None:
        plateau = self.lr_schedulers()
        assert isinstance(plateau, lr_scheduler.ReduceLROnPlateau)
        plateau.step(self.trainer.callback_metrics["loss"])
        self.seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])


class PlateausAlone(Plateaus):
    """Without a monitor: nobody but the module moves it."""

    def configure_optimizers(self) -> Any:
        (critic, generator), (plateau,) = super().configure_optimizers()
        return [critic, generator], [plateau["scheduler"]]


class PlateausWithin(Plateaus):
    """Told of the loss in the step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        self.lr_schedulers().step(self.critic_step(batch, critic).detach())

    def on_train_epoch_end(self) -> None:
        pass


class StepsInHooks(Lit):
    """The step is made in on_train_batch_end; gradients go at the epoch's start."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.optimizers()[0].zero_grad()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.of_critic(batch, self.fake(batch)))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 2:
            critic, _ = self.optimizers()
            critic.step()
            critic.zero_grad()


class ZeroesFirst(StepsAtEpochs):
    """zero_grad and a scheduler's step before the first batch."""

    def on_train_start(self) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that no optimizer has moved yet
            for scheduler in self.lr_schedulers():
                scheduler.step()


class StepsBefore(Lit):
    """A gradient before the run, which goes; one and its step before the first batch, whose own gradient is added to it."""

    def on_fit_start(self) -> None:
        self.manual_backward(self.of_critic(batches()[0], self.fake(batches()[0])))

    def on_train_start(self) -> None:
        critic, _ = self.optimizers()
        self.manual_backward(self.of_critic(batches()[1], self.fake(batches()[1])))
        self.clip_gradients(critic, 0.1, "norm")
        critic.step()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        critic.step()
        critic.zero_grad()


class Sam(torch.optim.SGD):
    """An optimizer with a method of its own."""

    def twice(self) -> int:
        self.step()
        self.step()
        return 7


class OwnMethods(Lit):
    def by_hand(self) -> list[torch.optim.Optimizer]:
        return [Sam(self.dis.parameters(), lr=0.1)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        assert optimizer.twice() == 7
        assert isinstance(optimizer, torch.optim.Optimizer)


EVERY: list[type[Lit]] = [
    Plain, Toggles, TogglesLate, Reuses, Penalizes, Freezes, Clips, Retains, Weighs, Zeroes, Closes, Accumulates, AccumulatesLate, Repeats,
    Remembers, ClampsWeights, Rates, RatesShrink, RatesSwitch, Direct, TorchClips, ReadsGradients, WritesGradients, Raw, Inner, SecondOrder,
    OwnOptimizers, Steps, StepsAtEpochs, Plateaus, PlateausAlone, PlateausWithin, StepsInHooks, ZeroesFirst, StepsBefore,
    Waits, OwnMethods, WeighsItself,
]  # fmt: skip
AT_ONCE: set[type[Lit]] = {Clips, Repeats, ClampsWeights, AccumulatesLate, Rates, RatesSwitch, Remembers, Direct, TorchClips, Plateaus}


@pytest.mark.parametrize("make", EVERY)
def test_every_verb_is_lightnings(make: type[Lit]) -> None:
    """Weights, what hooks have noted, and what was logged last: bit for bit, with a short last batch."""
    ours, theirs = trained(make, loader(batches(last=3))), lightning(make, batches(last=3))
    same_weights(ours, theirs)
    assert ours.seen == theirs.seen
    assert ours.result.metrics == {k: float(v) for k, v in theirs.trainer.callback_metrics.items()}


@pytest.mark.parametrize("make", [m if m in AT_ONCE else pytest.param(m, marks=slow) for m in EVERY])
def test_every_verb_is_lightnings_when_it_can_be_captured(make: type[Lit]) -> None:
    """Captured or, where it cannot be, eager: the same weights up to rounding, the same notes, the same metrics."""
    ours, theirs = trained(make, loader(batches()), "captured"), lightning(make)
    same_weights(ours, theirs, ROUNDING)
    assert ours.seen == pytest.approx(theirs.seen, rel=1e-4)
    assert ours.result.metrics == pytest.approx({k: float(v) for k, v in theirs.trainer.callback_metrics.items()}, rel=1e-4)


@pytest.mark.parametrize("make", [Plain, *(pytest.param(m, marks=slow) for m in (Clips, Repeats, Steps))])
def test_the_ordinary_forms_are_captured(make: type[Lit]) -> None:
    """On the rung that was asked for, with a short last batch."""
    ours = trained(make, loader(batches(last=3)), "compile")
    assert ours.result.capture.rung == "compile"
    same_weights(ours, lightning(make, batches(last=3)), ROUNDING)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [Plain, Clips])
def test_every_precision_is_lightnings(precision: str, make: type[Lit]) -> None:
    """Bit for bit."""
    same_weights(trained(make, loader(batches()), precision=precision), lightning(make, precision=precision))


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_fp16_is_torchs_grad_scaler(capture: str) -> None:
    """One scale for both optimizers, moved once a batch; an overflow skips that update alone."""

    class Overflows(Manual):
        def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
            return super().of_critic(x, fake) * where_marked(x, 1e36)

    ours = trained(Overflows, batches(marked=3), capture, precision="16-mixed")
    module, scaler = made(Overflows), torch.amp.GradScaler("cpu")
    optimizers = module.by_hand()
    for _ in range(2):
        for batch in batches(marked=3):
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                fake = module.fake(batch)
                losses = [module.of_critic(batch, fake)]
            optimizers[0].zero_grad()
            scaler.scale(losses[0]).backward()
            scaler.step(optimizers[0])
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = module.of_generator(batch, fake)
            optimizers[1].zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizers[1])
            scaler.update()
    assert loss_scale(ours)[0] == scaler.get_scale()
    same_weights(ours, module, 1e-5 if capture == "eager" else 2e-2)


# -- counting ---------------------------------------------------------------------------------------------------------
class OneOptimizer(Lit):
    """Three steps a batch of the only optimizer."""

    def by_hand(self) -> list[torch.optim.Optimizer]:
        return super().by_hand()[:1]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for k in range(3):
            self.critic_step(batch * (k + 1), self.optimizers())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.global_step)


@pytest.mark.parametrize("options", [{}, {"max_epochs": -1, "max_steps": 7}, {"max_epochs": -1, "max_steps": 30}])
def test_steps_of_one_optimizer_are_counted_as_lightning_counts_them(options: dict[str, Any]) -> None:
    """Every step counts, and max_steps ends the run at the batch that reaches it."""
    ours, theirs = trained(OneOptimizer, loader(batches()), **options), lightning(OneOptimizer, **options)
    assert (ours.result.steps, ours.seen) == (theirs.steps, theirs.seen)
    same_weights(ours, theirs)


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_several_optimizers_count_windows(capture: str) -> None:
    """[ours] Two optimizers that step in every batch: as many steps as batches."""
    assert trained(Manual, batches(), capture).result.steps == 20


class Counts(Accumulates):
    """Notes the count behind every step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(self.global_step)
        return loss


def test_a_step_counts_at_once() -> None:
    """Code behind opt.step() reads the new count, as under Lightning."""
    assert trained(Counts, loader(batches())).seen == lightning(Counts).seen


class CountsInside(OneOptimizer):
    """The count before, between and behind the steps is in the loss of the next."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        before = self.global_step
        for k in range(3):
            self.critic_step(batch * (1 + self.global_step - before), self.optimizers())
            self.log(f"count_{k}", float(self.global_step))


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}])
def test_a_captured_step_counts_at_once(options: dict[str, Any]) -> None:
    """In one graph, or where a step may be refused in pieces: what Lightning counts."""
    ours, theirs = trained(CountsInside, loader(batches()), "compile", **options), lightning(CountsInside)
    same_weights(ours, theirs, ROUNDING)
    assert ours.result.capture.whole == (not options)
    assert ours.result.metrics == {k: float(v) for k, v in theirs.trainer.callback_metrics.items()}


# -- hooks ------------------------------------------------------------------------------------------------------------
class Hooked(Plain):
    def on_before_backward(self, loss: Tensor) -> None:
        self.seen.append(("before_backward", float(loss.detach())))

    def on_after_backward(self) -> None:
        self.seen.append(("after_backward", sum(float(p.grad.sum()) for p in self.parameters() if p.grad is not None)))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(("before_step", type(optimizer).__name__.removeprefix("Lightning")))
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen.append("before_zero_grad")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("optimizer_step")

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("optimizer_zero_grad")


class HookedClipping(Plain):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("clip")


@pytest.mark.parametrize("capture", ["eager", "captured"])
def test_hooks_are_called_as_lightning_calls_them(capture: str) -> None:
    """Which, in which order, with the same gradients; those of automatic optimization are not called."""
    ours, theirs = trained(Hooked, loader(batches(4)), capture), lightning(Hooked, batches(4))
    assert ours.seen == theirs.seen
    same_weights(ours, theirs)


def test_clipping_is_not_configured_by_hand_and_by_hook() -> None:
    assert trained(HookedClipping, loader(batches(4))).seen == lightning(HookedClipping, batches(4)).seen


# -- what self.optimizers() and self.lr_schedulers() give ---------------------------------------------------------------
class Faces(Steps):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        critic, _ = self.optimizers()
        first, second = self.lr_schedulers()
        self.seen += [
            sorted(critic.state_dict()), sorted(critic.defaults), len(critic.param_groups), len(critic.state),
            first.get_last_lr(), first.last_epoch, second.step_size, second.optimizer is self.trainer.optimizers[1],
            isinstance(second, lr_scheduler.StepLR),
        ]  # fmt: skip


def test_optimizers_and_schedulers_can_be_read() -> None:
    """State, groups, defaults, rates, counters and classes, as under Lightning."""
    assert trained(Faces, loader(batches(3))).seen == lightning(Faces, batches(3)).seen


class States(Steps):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        first, second = self.lr_schedulers()
        self.seen.append((sorted(first.state_dict()), second.state_dict()["last_epoch"]))


def test_a_schedulers_state_is_its_own() -> None:
    assert trained(States, loader(batches(3))).seen == lightning(States, batches(3)).seen


# -- what is not finite -----------------------------------------------------------------------------------------------
class NotFinite(Manual):
    def of_critic(self, x: Tensor, fake: Tensor) -> Tensor:
        return super().of_critic(x, fake) * where_marked(x, float("nan"))


class NotFiniteWindow(NotFinite):
    """The marked batch is in the middle of a window of five."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        self.manual_backward(self.of_critic(batch, self.fake(batch)) / 5)
        if batch_idx % 5 == 4:
            critic.step()
            critic.zero_grad()


class NotFiniteCritic(NotFinite):
    """The critic alone."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, _ = self.optimizers()
        critic.zero_grad()
        self.manual_backward(self.of_critic(batch, self.fake(batch)))
        critic.step()


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile")])
def test_a_nan_is_skipped_once(capture: str) -> None:
    """nonfinite="skip": two of twenty steps are refused."""
    ours = trained(NotFiniteCritic, batches(marked=3), capture, nonfinite="skip")
    assert (ours.result.steps, ours.result.ledger.skipped_steps) == (18, 2)
    assert all(bool(p.isfinite().all()) for p in ours.parameters())


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_a_nan_is_skipped_with_its_window(capture: str) -> None:
    """Gathered over five batches by hand: the window that holds it is refused, and no weight is nan."""
    ours = trained(NotFiniteWindow, batches(marked=3), capture, nonfinite="skip")
    assert ours.result.steps == 2
    assert all(bool(p.isfinite().all()) for p in ours.parameters())


@pytest.mark.parametrize("capture", [pytest.param("eager"),
                                     pytest.param("compile", marks=slow)])  # fmt: skip
def test_raise_keeps_nan_out_of_the_weights(capture: str) -> None:
    """nonfinite="raise": the run ends at the step that would have taken it."""
    module = made(NotFiniteWindow)
    with pytest.raises(fasttrain.NonFiniteError, match="batch 4"):
        fasttrain.compile_fit(module, capture=capture, max_epochs=1, **QUIET).fit(batches(marked=3))
    assert all(bool(p.isfinite().all()) for p in module.parameters())


# -- shapes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [Plain, AccumulatesLate])
@slow
def test_batches_of_every_size(make: type[Lit]) -> None:
    """Twenty-four batches of eight sizes: right, and traced at most three times a branch of the step."""
    g = torch.Generator().manual_seed(4)
    given = [torch.randn(n, WIDTH, generator=g) for n in (8, 3, 5, 8, 7, 2, 9, 4, 6, 8, 3, 5, 8, 7, 2, 9, 4, 6, 8, 3, 5, 7, 2, 9)]
    _, captured = both(make, lambda: loader(given), max_epochs=1)
    assert captured.result.capture.traces <= (3 if make is Plain else 9)


# -- resume -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [Plain, AccumulatesLate, Accumulates])
def test_a_run_resumes_at_every_batch(make: type[Lit], tmp_path: Path) -> None:
    """In mid-accumulation too: bit for bit."""
    assert_resumes(make, range(1, 20, 1 if make is AccumulatesLate else 4), tmp_path, data=lambda: loader(batches()))


@pytest.mark.parametrize("capture", ["eager", pytest.param("compile", marks=slow)])
def test_schedulers_moved_by_hand_resume(capture: str, tmp_path: Path) -> None:
    """Their counters are part of the state."""
    assert_resumes(Steps, [3, 13], tmp_path, capture, data=lambda: loader(batches()))


@pytest.mark.parametrize("make", [pytest.param(Plain, marks=slow), AccumulatesLate])
def test_a_captured_run_resumes(make: type[Lit], tmp_path: Path) -> None:
    """In mid-accumulation, on the compile rung."""
    assert_resumes(make, [6], tmp_path, "compile", data=lambda: loader(batches()))


def test_validation_in_between_sees_nothing_toggled() -> None:
    """Weights as Lightning's, and every parameter requires a gradient again."""

    class Validated(Toggles):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", self.of_critic(batch, self.fake(batch)))
            self.seen.append([p.requires_grad for p in self.parameters()])

    ours = trained(Validated, loader(batches()), val=loader(batches(3, seed=9)), val_check_interval=4)
    module = made(Validated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(**BARE | {"max_epochs": 2, "num_sanity_val_steps": 0, "val_check_interval": 4})
        torch.manual_seed(7)
        trainer.fit(module, loader(batches()), loader(batches(3, seed=9)))
    same_weights(ours, module)
    assert ours.seen == module.seen


@pytest.mark.parametrize("make", [Plain, Manual])
def test_a_module_of_its_own_package_needs_no_lightning(make: Any) -> None:
    """An nn.Module with automatic_optimization = False has the verbs, and trains as the LightningModule does."""
    same_weights(trained(make, batches()), trained(Plain, batches()))


class Asks(Lit):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        assert isinstance(critic, torch.optim.Optimizer)
        assert not isinstance(generator, nn.Module)
        self.critic_step(batch, critic)


def test_what_passes_for_an_optimizer_passes_in_a_graph() -> None:
    """``isinstance`` is true as it is outside, and ends no capture."""
    ours = trained(Asks, loader(batches()), capture="compile")
    assert ours.result.capture.whole
