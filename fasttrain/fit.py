"""``compile_fit``: puts the rooms together and hands them to the loop."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Unpack

from torch import Tensor, nn

from fasttrain import resume
from fasttrain.errors import FasttrainError, FasttrainWarning, ModuleError, reject
from fasttrain.evaluate import evaluate, predict
from fasttrain.graphs.capture import settings
from fasttrain.graphs.explain import explain
from fasttrain.loaders import evaluation_sources
from fasttrain.loop import fit_loop
from fasttrain.module import Trainable, attached, overridden
from fasttrain.options import Options, OptionsDict, make_options
from fasttrain.own_loop import OwnLoop
from fasttrain.results import FitResult, to_floats
from fasttrain.retired import OLDER_HOOKS
from fasttrain.run import Run
from fasttrain.setup import make_run, prepare_training, set_up, tear_down
from fasttrain.stopping import save_interrupted


def compile_fit(
    module: nn.Module,
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Any = None,
    lr_scheduler: Any = None,
    turns: Callable[[nn.Module, Any, int], Iterator[Any]] | None = None,
    **options: Unpack[OptionsDict],
) -> CompiledFit:
    """Give a module, get a trainer whose optimizer step is one captured callable.

    Args:
        module: a LightningModule of either package, any ``nn.Module`` with ``training_step`` and
            ``configure_optimizers``, or any ``nn.Module`` together with ``loss`` and ``optimizer``. A Hugging Face
            model whose output has ``.loss`` needs ``optimizer`` only. It is not rewritten.
        loss: ``loss(output, target)`` for batches ``(input, target)``, or ``loss(module, batch)`` when its first
            argument is called ``module`` or ``model``. Returns one number.
        optimizer: a ``torch.optim.Optimizer`` over the module's parameters, or ``f(parameters) -> optimizer``.
        lr_scheduler: a scheduler of that optimizer, or ``f(optimizer) -> scheduler``; it moves once an epoch.
        turns: how the optimizers take their turns on a batch, in place of ``training_step``: a generator function
            ``turns(module, batch, batch_idx)`` that yields one loss for each optimizer, in order. What stands after a
            yield sees that optimizer's update.
        **options: Lightning's Trainer arguments by their current names, and ``capture``, ``verify``, ``nonfinite``,
            ``steps_per_launch``, ``val_every_n_steps`` (see docs/options.md).

    Returns:
        CompiledFit: ``fit``, ``validate``, ``test``, ``predict``, ``step``, ``explain``.

    Raises:
        OptionError: an option is unknown, retired, out of range or contradicts another.
        ModuleError: the module cannot be trained as given.

    Example::

        trainer = fasttrain.compile_fit(module, max_epochs=3, precision="bf16-mixed", gradient_clip_val=1.0)
        result = trainer.fit(train_loader, val_loader)
    """
    return CompiledFit(module, make_options(options), loss=loss, optimizer=optimizer, lr_scheduler=lr_scheduler, turns=turns)


class CompiledFit:
    """A module with everything that trains it. Make one with :func:`compile_fit`."""

    def __init__(self, module: nn.Module, options: Options, *, loss: Any, optimizer: Any, lr_scheduler: Any, turns: Any = None) -> None:
        if not isinstance(module, nn.Module):
            raise ModuleError(reject("module", _called(module), "a torch.nn.Module", "Give the module itself, not its class or its path."))
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
            came = repr(loss) if isinstance(loss, str) else _called(loss)
            raise ModuleError(reject("loss", came, "a function loss(output, target)", "E.g. loss=torch.nn.functional.cross_entropy."))
        if turns is not None and (not inspect.isgeneratorfunction(turns) or loss is not None):
            came = _called(turns) if loss is None else "one beside loss="
            wanted = "a generator function turns(module, batch, batch_idx) that yields the losses, and no loss="
            raise ModuleError(reject("turns", came, wanted, "Write it with yield."))
        self.options = options
        self.result: FitResult | None = None
        self._trainable = Trainable(module, loss=loss, optimizer=optimizer, lr_scheduler=lr_scheduler, turns=turns)
        _name_older_hooks(self._trainable)
        self._run: Run | None = None
        self._own_step: OwnLoop | None = None

    # -- what people call ---------------------------------------------------------------------------------------
    def fit(
        self,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        *,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> FitResult:
        """Train. ``ckpt_path``: "last", "best" or a checkpoint directory resumes exactly where it was written.

        ``train_dataloaders``: a loader, or several in a dict or a list, whose batches come in the same form (``CombinedLoader``).

        Returns what the run came to; ctrl-C ends the run after the present batch, writes a checkpoint, and raises
        KeyboardInterrupt (the result is then ``trainer.result``).

        Raises:
            ModuleError, DataError, OptionError, CheckpointError: before anything is compiled.
            NonFiniteError: a loss became inf or NaN (``nonfinite="raise"``), the weights as before that step.
        """
        self._trainable.check()
        with self._running("fit", datamodule) as run, _interruptible(run):
            prepare_training(run, train_dataloaders, val_dataloaders, datamodule, ckpt_path)
            started = time.perf_counter()
            run.display.start(run.facade)
            fit_loop(run)
            run.ledger.batches = run.facade.progress.batches_seen
            run.ledger.train_s = time.perf_counter() - started - run.ledger.compile_s - run.ledger.validate_s
            if run.interrupted and run.stopped_by != "interrupt":
                save_interrupted(run)  # it came between batches, when everything else was done
            run.display.stop()
            run.fire("on_fit_end")
            self.result = _result(run)
        if run.interrupted:
            raise KeyboardInterrupt
        return self.result

    def validate(
        self, dataloaders: Any = None, *, datamodule: Any = None, ckpt_path: str | os.PathLike[str] | None = None
    ) -> dict[str, float]:
        """Run ``validation_step`` over the loader(s); returns the metrics."""
        return self._evaluate("validate", dataloaders, datamodule, ckpt_path)

    def test(self, dataloaders: Any = None, *, datamodule: Any = None, ckpt_path: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Run ``test_step`` over the loader(s); returns the metrics."""
        return self._evaluate("test", dataloaders, datamodule, ckpt_path)

    def predict(self, dataloaders: Any = None, *, datamodule: Any = None, ckpt_path: str | os.PathLike[str] | None = None) -> list[Any]:
        """Run ``predict_step`` (or the module itself) over the loader(s); returns what it gave, a batch an entry."""
        with self._running("predict", datamodule) as run:
            sources = evaluation_sources(run, "predict", dataloaders, datamodule)
            resume.load_weights(run, ckpt_path)
            return predict(run, sources)

    def step(self, batch: Any) -> Tensor:
        """One captured micro-step for people who keep their own loop; the optimizer steps at every window's end.

        Returns the undivided loss ``[]``, detached; nothing is read on the host.
        """
        if self._own_step is None:
            self._trainable.check()
            self._run = make_run(self._trainable, self.options, "fit")
            self._own_step = OwnLoop(self._run)
        return self._own_step(batch)

    def explain(self) -> str:
        """What was captured, what was not, why, and what to change. Empty news before the first batch."""
        if self._run is None or self._run.step is None:
            return "nothing has been captured yet: the step is captured at the first batch of fit()."
        resume.complete_report(self._run)
        return explain(self._run.report)

    @property
    def module(self) -> nn.Module:
        return self._trainable.module

    # -- how ----------------------------------------------------------------------------------------------------
    def _evaluate(self, stage: str, dataloaders: Any, datamodule: Any, ckpt_path: Any) -> dict[str, float]:
        if not self._trainable.has(stage):
            name = {"validate": "validation_step", "test": "test_step"}[stage]
            raise ModuleError(f"{type(self.module).__name__} has no {name}: define it, or give compile_fit(..., loss=fn).")
        with self._running(stage, datamodule) as run:
            sources = evaluation_sources(run, stage, dataloaders, datamodule)
            resume.load_weights(run, ckpt_path)
            run.display.start(run.facade)
            view = evaluate(run, sources, stage)
            run.display.stop()
            return to_floats(view.callback)

    @contextmanager
    def _running(self, fn: str, datamodule: Any) -> Iterator[Run]:
        """Set up, hand over, tear down: whatever happens inside, hooks for it run and the module gets its own back."""
        with ExitStack() as stack:
            stack.enter_context(_alone())
            run = self._run = make_run(self._trainable, self.options, fn)
            run.facade.datamodule = datamodule
            stack.enter_context(attached(self._trainable, run.facade))
            stack.enter_context(settings(run.options))
            try:
                set_up(run, fn, datamodule)
                yield run
                tear_down(run, fn, datamodule, "success")
            except BaseException as error:
                run.display.stop()
                run.fire("on_exception", error)
                if overridden(datamodule, "on_exception") and not isinstance(datamodule, type):
                    datamodule.on_exception(error)
                tear_down(run, fn, datamodule, "failed")
                raise
            finally:
                if run.maker is not None and run.maker.ahead is not None:
                    run.maker.ahead.close()


_RUNNING = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """Torch's tracer, its settings and what we change of them within a trace are the process's, not a thread's."""
    if not _RUNNING.acquire(blocking=False):
        raise FasttrainError(
            "another thread of this process is training with fasttrain; settings of torch's that a run needs belong to the process. "
            "Train one after the other, or in processes of their own."
        )
    try:
        yield
    finally:
        _RUNNING.release()


def _name_older_hooks(trainable: Trainable) -> None:
    """One warning, with a line for each of the module's hooks that has another name today."""
    lines = [f"\n  {older}: today {present}" for older, present in OLDER_HOOKS.items() if older in trainable.hooks]
    if lines:
        message = f"{type(trainable.module).__name__} has hooks of older names, called at their old places. Rename them:{''.join(lines)}"
        warnings.warn(message, FasttrainWarning, stacklevel=4)


def _called(thing: object) -> str:
    """What came, for a message."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


@contextmanager
def _interruptible(run: Run) -> Iterator[None]:
    """The first ctrl-C ends the run after its batch; the second is a KeyboardInterrupt at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(signum: int, frame: Any) -> None:
        if run.interrupted or run.step is None:
            raise KeyboardInterrupt
        run.interrupted = True
        run.display.line("stopping after this batch (ctrl-C again: at once)")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _result(run: Run) -> FitResult:
    resume.complete_report(run)
    facade = run.facade
    best = next((c.best_model_path for c in facade.checkpoint_callbacks if c.best_model_path), None)
    return FitResult(
        metrics=to_floats(facade.callback_metrics),
        steps=facade.global_step,
        epochs=facade.current_epoch,
        best_checkpoint=best,
        stopped_by=run.stopped_by,
        ledger=run.ledger,
        capture=run.report,
    )
