"""What ``self.log`` takes, and where: the hooks in which a value of a step, of an epoch or none at all can be logged."""

from __future__ import annotations

from typing import Any

from fasttrain.errors import ModuleError, reject

OF_AN_EPOCH = frozenset(
    (
        "on_train_start", "on_train_epoch_start", "on_train_epoch_end",
        "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end",
        "on_test_start", "on_test_epoch_start", "on_test_epoch_end",
        "on_epoch_start", "on_epoch_end", "training_epoch_end", "validation_epoch_end", "test_epoch_end",
    )
)  # fmt: skip
OF_NOTHING = frozenset(
    (
        "configure_callbacks", "prepare_data", "setup", "teardown", "configure_model", "configure_sharded_model", "configure_optimizers",
        "on_fit_start", "on_fit_end", "on_pretrain_routine_start", "on_pretrain_routine_end",
        "on_sanity_check_start", "on_sanity_check_end", "on_train_end", "on_validation_end", "on_test_end",
        "on_predict_start", "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end",
        "on_predict_batch_start", "on_predict_batch_end", "predict_step",
        "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "lr_scheduler_step",
        "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
        "on_exception", "state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint",
        "on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train",
        "on_test_model_eval", "on_test_model_train", "on_predict_model_eval",
    )
)  # fmt: skip


def check_entry(name: Any, value: Any, add_dataloader_idx: bool) -> None:
    """Raise ModuleError for a name or a value that cannot be logged anywhere."""
    if not isinstance(name, str):
        raise ModuleError(reject("self.log(name)", repr(name), "a string", "Give the metric a name."))
    if value is None:
        raise ModuleError(reject(f"self.log({name!r})", None, "a number, a 0-d tensor or a metric object", "Return or compute the value."))
    if add_dataloader_idx and "/dataloader_idx_" in name:
        then = "Leave it out, or give add_dataloader_idx=False and name every loader's metric yourself."
        raise ModuleError(reject("self.log(name)", repr(name), "a name without the loader's index, which is added to it", then))


def check_place(name: str, hook: str, *, on_step: bool, on_epoch: bool) -> None:
    """Raise ModuleError where nobody would hear of the value: in a hook of no epoch, or a step's value in the hook of an epoch."""
    if hook in OF_NOTHING:
        raise ModuleError(
            f"self.log({name!r}): got a value in {hook}, where nobody would hear of it; wanted a step or a hook of an epoch, such as "
            "on_train_epoch_end or on_validation_epoch_end. Log it there, or hand it to the logger: self.logger.log_metrics({...})."
        )
    if hook in OF_AN_EPOCH and (on_step or not on_epoch):
        got = f"on_step={on_step}, on_epoch={on_epoch} in {hook}"
        raise ModuleError(reject(f"self.log({name!r})", got, "on_epoch=True alone, because no step runs there", "Leave both out."))
