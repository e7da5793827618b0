"""When is something due: pure functions of counts, never of objects."""

from __future__ import annotations

import math

from fasttrain.errors import OptionError, reject

INF = math.inf


def limited(name: str, total: float, limit: int | float) -> float:
    """Batches to run of ``total`` (``inf`` when the loader has no length): an int caps, a float is a share.

    Raises OptionError when a share of an endless loader, or a share that comes to nothing, is asked for.
    """
    if isinstance(limit, int):
        return min(limit, total)
    if limit in (0.0, 1.0):
        return total * limit if limit else 0
    if total == INF:
        raise OptionError(reject(name, limit, "an integer or 1.0, because the loader has no length", "Give a number of batches."))
    count = int(total * limit)
    if count == 0:
        least = 1.0 / total if total else 1.0
        raise OptionError(reject(name, limit, f"at least {least:.4g} for {int(total)} batches", "It comes to no batch at all."))
    return count


def validation_interval(total: float, interval: int | float, *, across_epochs: bool) -> float:
    """Batches between validations; ``inf`` means at the end of an epoch whose length is not known.

    Raises OptionError when an integer interval is longer than the epoch it restarts in.
    """
    if isinstance(interval, int):
        if not across_epochs and interval > total:
            raise OptionError(reject("val_check_interval", interval, f"at most the epoch's {int(total)} batches",
                                     "Or count across epochs with check_val_every_n_epoch=None."))  # fmt: skip
        return interval
    if total == INF:
        if interval == 1.0:
            return INF
        raise OptionError(
            reject("val_check_interval", interval, "an integer or 1.0, because the loader has no length", "Give a number of batches.")
        )
    return max(1, int(total * interval))


def window_length(batch_idx: int, k: int, total: float) -> int:
    """Batches in the accumulation window that holds ``batch_idx`` (from 0): the last window may be short."""
    start = batch_idx - batch_idx % k
    return int(min(k, total - start)) if total != INF else k


def epoch_done(epochs_done: int, max_epochs: int) -> bool:
    return max_epochs != -1 and epochs_done >= max_epochs


def steps_done(steps: int, max_steps: int) -> bool:
    return max_steps != -1 and steps >= max_steps
