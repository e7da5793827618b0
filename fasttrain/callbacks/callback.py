"""The callback: every moment of a run, as a method that does nothing until overridden.

Names and argument lists are Lightning 2.6's, so a callback written for either works with both. A method that
nobody overrides is never called (see `hooks.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Callback:
    """Override the moments you need; `trainer` and `pl_module` are handed to each.

    Example::

        class Shout(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                print(trainer.current_epoch, trainer.callback_metrics)
    """

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; two callbacks with state need two keys."""
        return type(self).__qualname__

    def _generate_state_key(self, **settings: Any) -> str:
        return f"{type(self).__qualname__}{settings!r}"

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart; empty when nothing must."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written; `checkpoint` may be added to."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read, before its state is handed out."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """fit, validate, test or predict begins."""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """fit, validate, test or predict ends, also after an error."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """An error or an interrupt ends the run."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fit begins; the optimizers exist."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit ends."""

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """The few validation batches before training begin."""

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """The few validation batches before training are done."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first epoch is about to begin."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch is done."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An epoch begins."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch is done, validation included."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch is on its device, before its step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch is done; `outputs` is what `training_step` returned."""

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Gradients are about to be cleared."""

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """The loss, scaled under fp16, is about to go backward."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Gradients are there, still scaled under fp16."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Gradients are unscaled and not yet clipped."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation begins."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Validation is done and its metrics are in `trainer.callback_metrics`."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The pass over the validation loaders begins."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass over the validation loaders is done."""

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A validation batch begins."""

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch is done."""

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Test begins."""

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Test is done."""

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The pass over the test loaders begins."""

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass over the test loaders is done."""

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A test batch begins."""

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A test batch is done."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Predict begins."""

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Predict is done."""

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The pass over the predict loaders begins."""

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The pass over the predict loaders is done."""

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A predict batch begins."""

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A predict batch is done."""


class Checkpoint(Callback):
    """A callback that writes checkpoints: it is always called after every other one."""


HOOKS: tuple[str, ...] = tuple(name for name, value in vars(Callback).items() if callable(value) and name[0] != "_")
"""Every method of `Callback` that a callback may override."""
