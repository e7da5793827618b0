"""What a ModelCheckpoint may be asked for: checked when it is made, before anything trains."""

from __future__ import annotations

from datetime import timedelta

from fasttrain.errors import OptionError, reject


def check_settings(
    *,
    monitor: str | None,
    mode: str,
    save_top_k: int,
    save_last: bool | str | None,
    every_n_train_steps: int,
    every_n_epochs: int,
    train_time_interval: timedelta | None,
) -> None:
    """Raises OptionError when a setting is out of range or contradicts another."""
    if mode not in ("min", "max"):
        raise _refusal("mode", repr(mode), '"min" or "max"', "Say which way is better.")
    if save_top_k < -1:
        raise _refusal("save_top_k", save_top_k, "-1 (all), 0 (none) or a number", "Say how many to keep.")
    if save_last not in (None, True, False, "link"):
        raise _refusal("save_last", repr(save_last), 'True, False or "link"', "Say if a `last` is wanted.")
    for name, every in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
        if every < 0:
            raise _refusal(name, every, "0 or more", "Leave it out to switch it off.")
    if (every_n_train_steps > 0) + (every_n_epochs > 0) + (train_time_interval is not None) > 1:
        got = f"{every_n_train_steps=}, {every_n_epochs=}, {train_time_interval=}"
        raise _refusal("rhythm", got, "one of the three", "Use one ModelCheckpoint for each rhythm.")
    if monitor is None and save_top_k > 1:
        then = "Name a metric (monitor='checkpoint_on' for what a Result sets), or keep all with save_top_k=-1."
        raise _refusal("save_top_k", f"{save_top_k} without a monitor", "a monitor to rank by", then)


def _refusal(name: str, got: object, wanted: str, then: str) -> OptionError:
    return OptionError(reject(f"ModelCheckpoint({name})", got, wanted, then))
