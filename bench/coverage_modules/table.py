"""Judges a case's sides against the reference, and writes all cases as one table, the losing ones on top."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LOSS = 1e-3  # relative, against Lightning or the own loop


def judged(case: dict[str, Any]) -> dict[str, Any]:
    """With each side's distance from the reference and its speed ratio (above 1: quicker than the reference)."""
    sides = case["sides"]
    reference = sides.get("reference", {})
    for name, side in sides.items():
        if name == "reference":
            continue
        early = case.get("early")
        side["losses_apart"] = _apart(reference.get("losses", [])[:early], side.get("losses", [])[:early])
        side["norms_apart"] = _apart(reference.get("norms"), side.get("norms"))
        side["start_apart"] = _apart(reference.get("losses", [])[:3], side.get("losses", [])[:3])
        side["mean_apart"] = _apart(_mean(reference.get("losses")), _mean(side.get("losses")))
        each = [a / b for a, b in zip(reference.get("us_each", []), side.get("us_each", []), strict=False)]
        side["ratio"] = statistics.median(each) if each else None  # round by round: the machine's moods last longer than one
    for side in sides.values():
        side.pop("norms", None)
        side["losses"] = [round(v, 6) for v in side.get("losses", [])[:8]]
    return case


def _mean(values: Sequence[float] | None) -> list[float]:
    return [sum(values) / len(values)] if values else []


def _apart(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> float | None:
    """The largest relative difference; None when there is nothing to compare."""
    if not ours or not theirs:
        return None
    if len(ours) != len(theirs):
        return float("inf")
    floor = 1e-3 * max(abs(v) for v in ours) + 1e-12
    return max(
        abs(a - b) / max(abs(a), floor) if a == a and b == b else float(a != b and (a == a or b == b))
        for a, b in zip(ours, theirs, strict=True)
    )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown table and, below, what stood in the way."""
    head = (
        "| module | beside | µs a batch there | eager: losses apart | eager | compile: losses apart "
        "| whole / pieces | compile | compile s | auto | auto: rung, why |"
    )
    lines = [head, "|" + "---|" * 11]
    lines += [_row(c) for c in sorted(results, key=_worst)]
    notes = [n for c in sorted(results, key=_worst) for n in _notes(c)]
    return "\n".join([*lines, "", *notes])


def _worst(case: Mapping[str, Any]) -> float:
    """Failures first, then the smallest ratio."""
    sides = [s for n, s in case["sides"].items() if n != "reference"]
    if any("error" in s for s in case["sides"].values()):
        return -1.0
    return min((s["ratio"] for s in sides if s.get("ratio")), default=0.0)


def _row(case: Mapping[str, Any]) -> str:
    s = case["sides"]
    reference, eager, compiled, auto = (s.get(n, {}) for n in ("reference", "eager", "compile", "auto"))
    capture, chosen = compiled.get("capture") or auto.get("capture", {}), auto.get("capture", {})
    cold = (compiled or auto).get("cold", {}).get("capture", {})
    shape = "whole" if capture.get("whole") else f"{capture['pieces']} pieces" if capture else "-"
    cells = [
        case["name"], reference.get("kind", "-"), _number(reference.get("us"), "{:.0f}"),
        _distance(eager), _number(eager.get("ratio"), "{:.2f}x"), _distance(compiled), shape, _number(compiled.get("ratio"), "{:.2f}x"),
        _number(cold.get("compile_s"), "{:.0f}"), _number(auto.get("ratio"), "{:.2f}x"),
        f"{chosen['rung']}: {chosen['why'][:60]}" if chosen else "-",
    ]  # fmt: skip
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


def _distance(side: Mapping[str, Any]) -> str:
    if "error" in side:
        return "FAILED" if "CaptureError" not in side["error"] else "refused"
    if not side:
        return "-"
    losses, norms, mean = (side.get(k) for k in ("losses_apart", "norms_apart", "mean_apart"))
    if losses is None:
        return f"weights {_number(norms, '{:.0e}')}"
    start = side.get("start_apart")
    return f"{losses:.0e}" if losses <= LOSS else f"**{losses:.0e}** (first 3: {_number(start, '{:.0e}')}, mean: {_number(mean, '{:.0e}')})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _notes(case: Mapping[str, Any]) -> list[str]:
    """What stood in the way, and errors, a line each."""
    found: dict[str, None] = {}
    for name, side in case["sides"].items():
        if "error" in side:
            found[
                f"- **{case['name']}**, {name}: {' / '.join(side['error'].split(chr(10)))[:700]} [{'; '.join(side.get('frames', [])[-3:])}]"
            ] = None
        for o in side.get("capture", {}).get("obstacles", []):
            if o.get("done") and not o["done"].startswith("it runs as it is"):
                continue  # dealt with, and the step is whole there
            cost = "" if o.get("cost_us") is None else f" ({o['cost_us']:.0f} us a step)"
            found[f"- {case['name']}: {o['where'] or '(no place)'}: {o['reason'].split(' (')[0]}{cost}"] = None
        found |= {f"- {case['name']}, the tracer stopped at {b}": None for b in side.get("breaks", [])}
    return list(found)
