"""Names of former years and of Lightning alone, of options and of hooks, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping

RETIRED: Mapping[str, str] = {
    "max_nb_epochs": "max_epochs", "min_nb_epochs": "min_epochs", "nb_sanity_val_steps": "num_sanity_val_steps",
    "train_percent_check": "limit_train_batches", "val_percent_check": "limit_val_batches",
    "test_percent_check": "limit_test_batches", "overfit_pct": "overfit_batches",
    "gpus": "accelerator='gpu', devices=n", "num_gpus": "accelerator='gpu', devices=n",
    "tpu_cores": "accelerator='tpu', devices=n", "num_processes": "devices", "ipus": "accelerator",
    "distributed_backend": "strategy", "use_amp": "precision", "amp_backend": "precision", "amp_level": "precision",
    "progress_bar_refresh_rate": "enable_progress_bar", "show_progress_bar": "enable_progress_bar",
    "weights_summary": "enable_model_summary", "weights_save_path": "default_root_dir",
    "default_save_path": "default_root_dir", "checkpoint_callback": "enable_checkpointing",
    "early_stop_callback": "callbacks=[EarlyStopping(...)]", "row_log_interval": "log_every_n_steps",
    "log_save_interval": "log_every_n_steps", "flush_logs_every_n_steps": "log_every_n_steps",
    "add_row_log_interval": "log_every_n_steps", "gradient_clip": "gradient_clip_val",
    "resume_from_checkpoint": "fit(..., ckpt_path=...)", "terminate_on_nan": "nonfinite='raise'",
    "accumulate_grad_batch": "accumulate_grad_batches", "stochastic_weight_avg": "callbacks",
    "process_position": "enable_progress_bar", "auto_scale_batch_size": "your DataLoader's batch_size",
    "auto_lr_find": "your optimizer's lr", "truncated_bptt_steps": "an attribute of the module",
    "multiple_trainloader_mode": "train_dataloaders=fasttrain.CombinedLoader(loaders, mode)",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs",
}  # fmt: skip

NOT_HERE: Mapping[str, str] = {
    "benchmark": "Set torch.backends.cudnn.benchmark yourself.", "profiler": "Wrap fit() in torch.profiler.profile.",
    "use_distributed_sampler": "It trains on one device: leave it out.", "sync_batchnorm": "It trains on one device: leave it out.",
    "plugins": "Leave it out.", "model_registry": "Leave it out.", "enable_autolog_hparams": "Leave it out.",
}  # fmt: skip

OLDER_HOOKS: Mapping[str, str] = {
    "on_batch_start": "on_train_batch_start", "on_batch_end": "on_train_batch_end",
    "on_epoch_start": "on_train_epoch_start", "on_epoch_end": "on_train_epoch_end",
    "on_pretrain_routine_start": "on_fit_start", "on_pretrain_routine_end": "on_fit_start",
    "training_step_end": "the end of training_step", "validation_step_end": "the end of validation_step",
    "test_step_end": "the end of test_step", "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end", "test_epoch_end": "on_test_epoch_end",
    "configure_sharded_model": "configure_model",
}  # fmt: skip
