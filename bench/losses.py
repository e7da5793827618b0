"""The gate before every speed: two sides that do not train to the same losses are not compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.workloads import Agreement

FIRST, LAST = 8, 4  # how many of a run's first and last losses are kept and compared
KINDS = {"losses": "logged loss", "means": "epoch's mean loss"}


def trail(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """A side's first and last losses, of all its rounds in order, for each kind that it gave."""
    kinds = {kind: [float(v) for r in records for v in r[kind]] for kind in KINDS}
    return {kind: {"first": values[:FIRST], "last": values[-LAST:]} for kind, values in kinds.items() if values}


def disagreement(reference: str, theirs: Mapping[str, Any], side: str, ours: Mapping[str, Any], agree: Agreement) -> str:
    """One sentence naming the two sides and the numbers, or nothing when they trained alike.

    A gap counts as a share of the reference's loss there, or of a tenth of its first loss where that is larger: a loss near
    zero has no share that means anything.
    """
    kinds = [kind for kind in KINDS if kind in theirs and kind in ours]
    if not kinds:
        return f"{side} and {reference} gave no loss of the same kind: nothing shows that they trained alike."
    for kind in kinds:
        floor = 0.1 * abs(theirs[kind]["first"][0])
        for when, ratio in (("first", agree.first), ("last", agree.last)):
            a, b = theirs[kind][when], ours[kind][when]
            if len(a) != len(b):
                return f"{reference} gave {len(a)} {when} losses and {side} {len(b)}: not the same training."
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                if not abs(x - y) <= ratio * max(abs(x), floor):
                    return (
                        f"{side} and {reference} do not train alike: {KINDS[kind]} {i + 1} of the {len(a)} {when} is {y:.6g} of {side} and "
                        f"{x:.6g} of {reference}, further apart than {ratio:g} of it ({agree.why})."
                    )
    return ""
