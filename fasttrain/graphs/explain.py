"""Reasons as data and as text: what was captured, what was not, where in the user's code, and what to change."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fasttrain.results import CaptureReport, Obstacle

_FASTTRAIN, _TORCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(torch.__file__))

EARLIER = "the loss goes back into the graph of an earlier step"
ADVICE = (
    (r"[Dd]ata.dependent", "A Python branch on a tensor's value: use torch.where, or move the check out of training_step."),
    (r"\.item\(\)|Tensor\.item|scalar_tensor|_local_scalar_dense", "Log the tensor itself; it is read later, off the step."),
    (r"pack\w*_sequence", "Packed sequences and the layer over them run as they are, between compiled stretches."),
    (EARLIER + "|external grad_fn|consumed returned", "Keep it with .detach() where it is only a value."),
    (r"torchmetrics|Metric", "Update metrics in on_train_batch_end, or log the tensor and let self.log take the mean."),
    (r"operator `print`", "Move the print to on_train_batch_end."),
    (r"logging|Logger", "Move the message out of the step, e.g. to on_train_batch_end."),
    (r"random: a number that Python draws", "Draw it with torch.rand or in the dataset."),
    (r"numpy|pandas", "Move the lookup into the dataset."),
)


# Hooks that stand around a captured forward and backward pass, and see what they would see eagerly.
AROUND = frozenset(
    ("on_before_zero_grad", "optimizer_zero_grad", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")
) | {"optimizer_step"}
# Hooks in its middle: the step is cut there.
BETWEEN = frozenset(("on_before_backward", "backward"))


def obstacle_from(error: BaseException) -> Obstacle:
    """One obstacle out of a tracing error: the first sentence, the user's file and line, and what to change."""
    inner = getattr(error, "inner_exception", None)  # what our own backend said, not that a backend raised
    said = str(inner or error)
    frames = [(f.filename, f.lineno or 0) for f in list(getattr(error, "real_stack", None) or [])]
    frames = frames or [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    return obstacle_of(said or type(error).__name__, frames)


def obstacle_of(said: str, frames: Sequence[tuple[str, int]], done: str = "") -> Obstacle:
    """The obstacle that the tracer speaks of; ``frames`` lead to it, outermost first."""
    if through := re.search(r"inputs with external grad_fn: \[(.+)\]", said):
        said = f"{EARLIER}, through {_names(through.group(1))}"
    elif "through the graph a second time" in said:
        said = EARLIER
    advice = next((a for pattern, a in ADVICE if re.search(pattern, said)), "")
    return Obstacle(reason=_first_line(said).rstrip(".") + ".", where=place(frames), advice=advice, done=done)


def _names(sources: str) -> str:
    """Dynamo's names of what hangs on the module, as its author writes them."""
    return re.sub(r"\"|L\[.*?\]\.(?:__closure__\[\d+\]\.cell_contents\.|__self__\.)*", "", sources)


def _first_line(text: str) -> str:
    """Dynamo's own one-sentence reason, without its developer notes."""
    if "data-dependent expression" in text:
        return "a branch on a value that only the data decides"
    explanation = re.search(r"Explanation: (.+)", text)
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{first} ({explanation.group(1).strip()})" if explanation else first


def traced_place() -> str:
    """Where in the user's code the tracer stands."""
    return place([(f.filename, f.lineno or 0) for f in torch._guards.TracingContext.extract_stack()])


def place(frames: Sequence[tuple[str, int]]) -> str:
    """The innermost line of the user's, and the library's below it; torch's and ours are nobody's to change."""
    outside = [f for f in frames if not _is_machinery(f[0])]
    mine = [f for f in outside if is_user_file(f[0])]
    if not outside:
        return ""
    (innermost, line), user = outside[-1], mine[-1] if mine else outside[-1]
    inside = "" if user == outside[-1] else f" (in {innermost.split('site-packages' + os.sep)[-1]}:{line})"
    return f"{user[0]}:{user[1]}{inside}"


def _is_machinery(filename: str) -> bool:
    """Torch's, ours, or generated: no place to point at."""
    return filename.startswith("<") or _lies_in(filename, _FASTTRAIN, _TORCH)


def is_user_file(filename: str) -> bool:
    """Code the user can change: not torch's, not ours, not Python's own, not an installed package's."""
    lightning = [os.path.dirname(f) for n in ("pytorch_lightning", "lightning") if (f := getattr(sys.modules.get(n), "__file__", None))]
    inside = _lies_in(filename, os.path.dirname(os.__file__), *lightning) or "site-packages" in filename
    return not inside and not _is_machinery(filename)


def _lies_in(filename: str, *folders: str) -> bool:
    return os.path.abspath(filename).startswith(tuple(f + os.sep for f in folders))


def hook_obstacles(module: nn.Module, live: Iterable[str]) -> list[Obstacle]:
    """What cannot stand around a captured piece: hooks between the forward and the backward pass, and hooks on modules."""
    found = [Obstacle(f"the hook {name} runs inside the step", advice="It is honoured; the step runs eagerly for it.") for name in live]
    for name, m in module.named_modules():
        if m._backward_hooks or m._backward_pre_hooks:
            found.append(
                Obstacle(f"a backward hook on module {name or type(m).__name__}", advice="Module backward hooks are honoured only eagerly.")
            )
    return found


def gradient_hooks(module: nn.Module) -> list[str]:
    """Parameters with hooks of their own: called on the captured gradients."""
    return [
        n for n, p in module.named_parameters()
        if getattr(p, "_backward_hooks", None) or getattr(p, "_post_accumulate_grad_hooks", None)
    ]  # fmt: skip


def explain(report: CaptureReport) -> str:
    """The report as a page of text."""
    lines = [one_line(report)]
    if report.rung != "eager":
        what, cut = "the step" if report.whole else "forward + backward", report.build is not None and report.build.cut
        lines.append(
            f"  {what}: {'one whole graph' if report.pieces == 1 and not cut else f'{report.pieces} piece(s)'}, "
            f"traced {report.traces} time(s), compiled in {report.compile_s:.1f} s"
        )
        why = f" ({report.why_guarded})" if report.why_guarded else ""
        why += f", {report.guards_us:.0f} us" if report.guards_us else ""
        lines.append(f"  steady steps: {'called past the guards' if report.direct else f'guards are evaluated every step{why}'}")
    lines.append(f"  update: {report.tail}")
    if report.timings_us:
        lines.append("  measured: " + ", ".join(f"{k} {v:.0f} us a step" for k, v in report.timings_us.items()))
    for title, dealt in (("in the way", False), ("dealt with", True)):
        some = [f"    - {o}" for o in report.obstacles if bool(o.done) is dealt]
        lines += [f"  {title}:", *some] if some else []
    return "\n".join(lines)


def one_line(report: CaptureReport) -> str:
    """The line a run starts with."""
    return f"rung: {report.rung} ({report.why}); update: {report.tail}; {report.threads} thread(s)"
