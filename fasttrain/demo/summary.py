"""What is said at the end: the numbers of a run as rows of text, and a sample of what the model writes."""

from __future__ import annotations

import math

from fasttrain.demo.model import ByteGPT
from fasttrain.results import FitResult

MOST_SAMPLE_S = 5.0


def summary(result: FitResult, *, tokens_per_step: int, steps_before: int, val_loss: float, entropy: float) -> dict[str, str]:
    """Rows to print. ``val_loss`` is in nats a byte, ``entropy`` in bits a byte; ``steps_before`` were another run's."""
    ledger, capture = result.ledger, result.capture
    steps = result.steps - steps_before
    rate = steps * tokens_per_step / ledger.train_s if ledger.train_s > 0 else 0.0
    return {
        "steps": f"{result.steps:,} ({_ending(result.stopped_by)})",
        "tokens seen": f"{result.steps * tokens_per_step:,}, a token is a byte",
        "tokens/s": f"{rate:,.0f}",
        "rung": f"{capture.rung} ({capture.why}); update: {capture.tail}; {capture.threads} thread(s)",
        "time": f"compiling {ledger.compile_s:.1f} s, training {ledger.train_s:.1f} s, validation {ledger.validate_s:.1f} s",
        "val loss": f"{val_loss:.3f} nats a byte",
        "bits per byte": f"{val_loss / math.log(2):.2f}, where the best code without context needs {entropy:.2f} (order-0 entropy)",
    }


def sample_text(model: ByteGPT, count: int, seed: int) -> str:
    """``count`` bytes after "def ", as text without control characters."""
    text = model.generate(b"def ", count, seed=seed, max_seconds=MOST_SAMPLE_S).decode("utf-8", "replace")
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def _ending(stopped_by: str) -> str:
    words = {"max_steps": "as planned", "max_time": "the time was up", "interrupt": "ended by ctrl-C"}
    return words.get(stopped_by, stopped_by)
