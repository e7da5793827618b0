"""What a run returns, and how logged values become metrics: records in, reductions out, no host read on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.errors import ModuleError

FLUSH_EVERY = 256  # rows kept before they are summed: bounds memory, one reduction per 256 steps


class LogKey(NamedTuple):
    """What ``self.log`` was told about one value; constant while a capture lives."""

    name: str
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduce_fx: Any  # "mean" | "sum" | "min" | "max" | a function of the stacked values
    batch_size: int | None

    @property
    def step_name(self) -> str:
        return f"{self.name}_step" if self.on_epoch else self.name

    @property
    def epoch_name(self) -> str:
        return f"{self.name}_epoch" if self.on_step else self.name

    @property
    def how(self) -> tuple[Any, ...]:
        """What one hook may not change from one call to the next."""
        return self[1:6]

    def check_same(self, other: LogKey) -> None:
        """Raise ModuleError when ``other``, of the same name, was logged with other arguments."""
        if self.how != other.how:
            one, two = (", ".join(f"{n}={v!r}" for n, v in zip(LogKey._fields[1:6], k.how, strict=True)) for k in (self, other))
            raise ModuleError(
                f"self.log({self.name!r}): logged twice with other arguments, ({one}) and ({two}). Use the same arguments, or another name."
            )


@dataclass(frozen=True, eq=False, repr=False)
class Reduction:
    """A user's ``reduce_fx``. Two that one line of code made, a lambda in a step say, are the same."""

    function: Callable[[Tensor], Any]

    def __call__(self, values: Tensor) -> Any:
        return self.function(values)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))

    def __hash__(self) -> int:
        return hash(getattr(self.function, "__code__", self.function))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reduction):
            return False
        mine, theirs = self.function, other.function
        code = getattr(mine, "__code__", None)
        if mine is theirs or code is None or code != getattr(theirs, "__code__", None):
            return bool(mine == theirs)
        pairs = list(zip_longest(_bound(mine), _bound(theirs)))
        return all(a is b or (isinstance(a, (int, float, str)) and a == b) for a, b in pairs)


def _bound(function: Any) -> list[Any]:
    """What a function was made with: its defaults, its object and the variables around it."""
    cells = [c.cell_contents for c in function.__closure__ or ()]
    return [*(function.__defaults__ or ()), getattr(function, "__self__", None), *cells]


@dataclass
class _Column:
    """One logged value over an epoch: the running reduction and the last value."""

    key: LogKey
    total: Tensor | None = None
    weight: float = 0.0
    kept: list[Tensor] = field(default_factory=list)
    metric: Any = None  # a torchmetrics-like object logged as it is

    def fold(self, values: list[Any], weights: list[float]) -> None:
        if is_metric(values[-1]):
            self.metric = values[-1]
            return
        if not self.key.on_epoch:
            return
        stacked = _stacked(values)
        fx = self.key.reduce_fx
        if fx == "mean":
            w = torch.tensor(weights, dtype=torch.float64).to(stacked.device, non_blocking=True)
            part, self.weight = (stacked * w).sum(), self.weight + sum(weights)
        elif fx == "sum":
            part = stacked.sum()
        elif fx == "min":
            part = stacked.min()
        elif fx == "max":
            part = stacked.max()
        else:
            self.kept.append(stacked)
            return
        if self.total is None:
            self.total = part
        elif fx in ("min", "max"):
            self.total = torch.minimum(self.total, part) if fx == "min" else torch.maximum(self.total, part)
        else:
            self.total = self.total + part

    def value(self) -> Tensor | None:
        if self.metric is not None:
            return as_scalar(self.metric.compute())
        if self.kept:
            reduced = self.key.reduce_fx(torch.cat(self.kept).to(torch.get_default_dtype()))
            return as_scalar(reduced).detach()
        if self.total is None:
            return None
        value = self.total / self.weight if self.key.reduce_fx == "mean" else self.total
        return value.to(torch.get_default_dtype())


def _stacked(values: list[Any]) -> Tensor:
    """Logged values as one fp64 vector; 0-d tensors, which is what a captured step gives, go the short way."""
    if all(isinstance(v, Tensor) and v.dim() == 0 for v in values):
        return torch.stack(values).detach().to(torch.float64)
    return torch.stack([as_scalar(v) for v in values]).to(torch.float64)


def as_scalar(value: Any) -> Tensor:
    """A 0-d tensor of what was logged; shape ``[]``. Raises ModuleError for anything with more than one element."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModuleError(f"self.log: got a {type(value).__name__}; wanted one number, a 0-d tensor or a metric object.") from error
    if tensor.numel() != 1:
        raise ModuleError(f"self.log: got a value of shape {list(tensor.shape)}; wanted one number. Reduce it first, e.g. .mean().")
    return tensor.reshape(())


def is_metric(value: Any) -> bool:
    """A torchmetrics-like object: it gathers by itself and is asked for its value."""
    return hasattr(value, "compute") and hasattr(value, "update")


_Row = tuple[tuple[LogKey, ...], Sequence[Any], int]  # one step's keys, values and batch size


class MetricStore:
    """Logged values of one stage over one epoch. ``append`` is the only call a steady step makes."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], _Column] = {}  # by hook and name: each hook's values are reduced by themselves
        self._keys: dict[int, tuple[LogKey, ...]] = {}  # of the pending rows, by id: one tuple for each kind of step
        self._rows: list[_Row] = []
        self._last: dict[tuple[str, str], tuple[LogKey, Any]] = {}

    def append(self, keys: tuple[LogKey, ...], values: Sequence[Any], batch_size: int) -> None:
        """Keep one step's values (device tensors or numbers, in the order of ``keys``); reads nothing."""
        if id(keys) not in self._keys:
            for key in keys:
                self._column(key)
            self._keys[id(keys)] = keys
        self._rows.append((keys, values, batch_size))
        if len(self._rows) >= FLUSH_EVERY:
            self.flush()

    def log(self, key: LogKey, value: Any, batch_size: int, hook: str) -> None:
        """One value logged in ``hook``, outside the captured step."""
        if not is_metric(value):
            value = as_scalar(value)
        self._column(key, hook).fold([value], [float(key.batch_size or batch_size)])
        if key.on_step:
            self._last[hook, key.name] = (key, value)

    def _column(self, key: LogKey, hook: str = "") -> _Column:
        if not (key.on_step or key.on_epoch):
            raise ModuleError(f"self.log({key.name!r}, on_step=False, on_epoch=False): nobody would hear of it. Set one of them.")
        column = self._columns.setdefault((hook, key.name), _Column(key))
        column.key.check_same(key)
        return column

    def flush(self) -> None:
        """Fold the pending rows into the running reductions."""
        self._last |= self._pending()
        (rows, self._rows), (kinds, self._keys) = (self._rows, []), (self._keys, {})
        for keys in kinds.values():
            mine = rows if len(kinds) == 1 else [r for r in rows if r[0] is keys]
            for i, key in enumerate(keys):
                self._column(key).fold([r[1][i] for r in mine], [float(key.batch_size or r[2]) for r in mine])

    def _pending(self) -> dict[tuple[str, str], tuple[LogKey, Any]]:
        """The newest values (``on_step`` ones) among the pending rows: of the last row of each kind, the later one last."""
        newest: dict[int, _Row] = {}
        for row in reversed(self._rows):
            newest.setdefault(id(row[0]), row)
            if len(newest) == len(self._keys):
                break
        return {("", k.name): (k, v) for r in reversed(newest.values()) for k, v in zip(r[0], r[1], strict=True) if k.on_step}

    def _newest(self) -> Iterator[tuple[LogKey, Any]]:
        newest = self._last | self._pending()
        return (newest[at] for at in self._columns if at in newest)

    def at_step(self) -> MetricView:
        """The values of the newest step (``on_step`` ones)."""
        view = MetricView()
        for key, value in self._newest():
            if is_metric(value):
                value = getattr(value, "_forward_cache", None)
            if value is not None:
                view.add(key, key.step_name, as_scalar(value).clone())
        return view

    def at_epoch_end(self) -> MetricView:
        """The reductions over the epoch (``on_epoch`` ones), then everything is forgotten by ``reset``."""
        self.flush()
        view = MetricView()
        for column in self._columns.values():
            value = column.value() if column.key.on_epoch else None
            if value is not None:
                view.add(column.key, column.key.epoch_name, value)
        return view

    def reset(self) -> None:
        for column in self._columns.values():
            if column.metric is not None:
                column.metric.reset()
        self.__init__()  # type: ignore[misc]

    def state(self) -> dict[str, Any]:
        """What a checkpoint in mid-epoch needs of the running reductions, as tensors and plain data."""
        self.flush()
        out: dict[str, Any] = {}
        for (hook, name), c in self._columns.items():
            if callable(c.key.reduce_fx) or c.metric is not None:
                continue
            last = self._last.get((hook, name), (c.key, None))[1]
            out[str(len(out))] = {"hook": hook, "key": list(c.key), "total": c.total, "weight": c.weight, "last": last}
        return out

    def load(self, state: Mapping[str, Any]) -> None:
        for s in state.values():
            key = LogKey(*s["key"])
            self._columns[s["hook"], key.name] = _Column(key, total=s["total"], weight=s["weight"])
            if s["last"] is not None:
                self._last[s["hook"], key.name] = (key, s["last"])


@dataclass
class MetricView:
    """Metrics at one point, split by who hears of them."""

    callback: dict[str, Tensor] = field(default_factory=dict)
    logged: dict[str, Tensor] = field(default_factory=dict)
    bar: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: LogKey, full_name: str, value: Tensor) -> None:
        self.callback[key.name] = self.callback[full_name] = value
        if key.logger:
            self.logged[full_name] = value
        if key.prog_bar:
            self.bar[full_name] = value


@dataclass
class Ledger:
    """Where the seconds of a run went, and what it did."""

    compile_s: float = 0.0  # the dry look, measuring and compiling
    train_s: float = 0.0
    validate_s: float = 0.0
    checkpoint_s: float = 0.0
    batches: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Obstacle:
    """One thing that stands between a step and a capture of the whole of it."""

    reason: str
    where: str = ""  # file:line
    advice: str = ""  # the smallest change that would remove it
    done: str = ""  # what was done about it; "" where it kept the step from being captured
    cost_us: float | None = None  # microseconds that it takes of a step, measured; None where it has none of its own

    def __str__(self) -> str:
        cost = "" if self.cost_us is None else f" {self.cost_us:.0f} us a step."
        done = f"[{self.done}.{cost}]" if self.done else ""
        return " ".join(p for p in (f"{self.where}:" if self.where else "", self.reason, done, self.advice) if p)


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a step was compiled: what a later run must repeat to compute the same bits."""

    kernel_threads: int  # threads in each generated CPU kernel; matrix products and the update use torch's count
    cut: bool = False  # in compiled stretches, because the step cannot be traced whole
    cpp_wrapper: bool = False  # calls between kernels in C++ too: quicker to run, slower to compile
    loops: bool = False  # small matrix products as generated loops
    onednn: bool = False  # large ones by oneDNN
    joint: bool = False  # on a GPU, forward and backward traced as one graph before they are recorded


@dataclass
class CaptureReport:
    """How the step runs: its rung, whether it is whole, in how many pieces, and what stood in the way."""

    rung: str = "eager"
    whole: bool = False
    pieces: int = 0
    why: str = ""
    tail: str = ""
    threads: int = 0
    compile_s: float = 0.0
    traces: int = 0
    direct: bool = False  # steady steps call the graph past its guards
    why_guarded: str = ""
    guards_us: float = 0.0  # that evaluating the guards takes of a step that needs it; 0 where none was measured
    build: Build | None = None
    obstacles: list[Obstacle] = field(default_factory=list)
    timings_us: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What ``fit`` gives back. ``metrics`` are Python floats, read once, at the end."""

    metrics: dict[str, float]
    steps: int
    epochs: int
    best_checkpoint: str | None
    stopped_by: str  # "max_epochs" | "max_steps" | "max_time" | "early_stopping" | "callback" | "interrupt"
    ledger: Ledger
    capture: CaptureReport


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Host read: metrics as Python floats."""
    return {name: float(value) for name, value in metrics.items()}


def reduce_named(fx: Any) -> Any:
    """``reduce_fx`` as one of our four names, or the function itself."""
    names: dict[Callable[..., Any], str] = {
        torch.mean: "mean",
        torch.sum: "sum",
        torch.min: "min",
        torch.max: "max",
        sum: "sum",
        min: "min",
        max: "max",
    }
    fx = names.get(fx, fx)
    if isinstance(fx, str):
        fx = {"avg": "mean"}.get(fx, fx)
        if fx not in ("mean", "sum", "min", "max"):
            raise ModuleError(f"self.log: got reduce_fx={fx!r}; wanted 'mean', 'sum', 'min', 'max' or a function.")
    return Reduction(fx) if callable(fx) else fx
