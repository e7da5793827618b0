"""When a monitoring callback acts: at the end of the epoch or of validation, now or after what follows."""

from __future__ import annotations

from fasttrain.callbacks.trainer_view import TrainerView


def is_idle(trainer: TrainerView) -> bool:
    """Nothing is monitored or saved outside a fit, during the sanity check, or in a fast dev run."""
    return bool(trainer.fast_dev_run) or trainer.state.fn != "fit" or trainer.sanity_checking


def validates_once_per_epoch(trainer: TrainerView) -> bool:
    """Whether each epoch ends with its only validation."""
    if getattr(trainer, "val_every_n_steps", None) is not None:
        return False
    return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1


def has_validation(trainer: TrainerView) -> bool:
    """Whether there is a batch to validate on."""
    return trainer.val_enabled and sum(trainer.num_val_batches) > 0


def validation_follows(trainer: TrainerView) -> bool:
    """Whether validation is due right after the batch that just ended; False where only the loop can know."""
    every_n_epochs = trainer.check_val_every_n_epoch
    if not has_validation(trainer) or (every_n_epochs and (trainer.current_epoch + 1) % every_n_epochs):
        return False
    every_n_steps = getattr(trainer, "val_every_n_steps", None)
    if every_n_steps is not None:
        return trainer.global_step % int(every_n_steps) == 0
    interval, done, total = trainer.val_check_interval, trainer.batch_idx + 1, trainer.num_training_batches
    if isinstance(interval, float) and total != float("inf"):
        return done % max(1, int(total * interval)) == 0
    if isinstance(interval, int) and every_n_epochs is not None:
        return done % interval == 0
    return False
