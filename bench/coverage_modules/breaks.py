"""Where the tracer ended a graph, in whoever's code: read from torch's own log of graph breaks."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import fasttrain

LIBRARIES = tuple(str(Path(m.__file__).parent) + os.sep for m in (torch, fasttrain) if m.__file__)
LOGGERS = ("torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame.__graph_breaks")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def graph_breaks() -> Iterator[list[str]]:
    """Within: a list that fills with ``file:line: source: reason``, each place once, the line the one outside torch."""
    torch._logging.set_logs(graph_breaks=True)
    kept, found = _Kept(), []
    for name in LOGGERS:
        logging.getLogger(name).addHandler(kept)
    try:
        yield found
    finally:
        found += dict.fromkeys(filter(None, map(_sentence, kept.said)))


def _sentence(message: str) -> str:
    """One line of a graph break's page; empty for what is no new break."""
    if "Graph break in user code at" not in message:
        return ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s+(.+)', message)
    outside = [f for f in frames if not f[0].startswith(LIBRARIES)] or frames
    reason = re.search(r"Graph Break Reason: (.+)", message)
    explanation = re.search(r"Explanation: (.+)", message)
    inner = f" (in {frames[-1][0].split('site-packages/')[-1]}:{frames[-1][1]})" if frames and outside[-1] != frames[-1] else ""
    said = " ".join(m.group(1).strip() for m in (reason, explanation) if m)
    place = f"{outside[-1][0].split('site-packages/')[-1]}:{outside[-1][1]}: `{outside[-1][2].strip()}`" if outside else "?"
    return f"{place}{inner}: {said}"
