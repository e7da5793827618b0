"""The fused update of one optimizer on a GPU: gradient norm, verdict, clip and update, and nothing of it read on the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import rules
from fasttrain.kernels.device_scale import DeviceScale
from fasttrain.kernels.layout import in_order_of, same_order
from fasttrain.kernels.rules import ADAM_RULE, SGD_RULE
from fasttrain.kernels.triton_launch import Call, Cells, launches, on
from fasttrain.kernels.triton_plan import FLOATS, Binding, Kind, Row, Tables, alignment, cells_of, layout_of, make_binding, make_tables
from fasttrain.kernels.triton_rules import HYPER, KNOBS, check_call, check_grad, hyper_row, mode_of, obstacle, refusal
from fasttrain.kernels.wide_state import MASTER, keep_wide, make_master, make_slots

_GONE = reject("optimizer", "one that no longer exists", "a live one", "Keep a reference to it beside its tail.")


class TritonTail:
    """Norm, clip and update of a torch SGD, Adam or AdamW, or a Lion, on a GPU: three launches whatever the number of tensors.

    The surface of `NativeTail`, but nothing comes back to the host: `grad_norm` (0-d float32), `skipped` (0-d int32, of the last
    step) and `skips` (0-d int32, of all) are device tensors that every step writes in place. State lives in `optimizer.state` as
    torch makes it under `capturable=True`: `step` is on the device. `scale` is a loss scale that steps divide by and move on.
    `master_weights` keeps a float32 copy of every bfloat16 and float16 parameter, and float32 moments, in `optimizer.state`.
    Refused with KernelError where `obstacle(optimizer)` names a reason. The optimizer is held weakly: keep it.

        tail = TritonTail(optimizer, params)
        tail.step([p.grad for p in params], max_norm=1.0, check=True)

    In a CUDA graph: one real step with the same arguments first, so that state exists and kernels are loaded; `step` inside the
    capture; `sync()` before every replay, on its stream, which copies tables and hyperparameters only when they changed, and
    the first time. A captured step follows state that was loaded or moved; gradients must stay where they were.
    """

    def __init__(
        self, optimizer: Optimizer, params: Sequence[Tensor], *, norm_type: float = 2.0, bump_versions: bool = False,
        master_weights: bool = False, scale: DeviceScale | None = None,
    ) -> None:  # fmt: skip
        if norm_type not in (2.0, math.inf):
            raise KernelError(reject("norm_type", norm_type, "2.0 or inf", "Measure others with grad_norm."))
        rule = rules.rule_of(optimizer)
        if rule is None or not params or obstacle(optimizer) is not None:
            raise KernelError(refusal(optimizer))
        self._optimizer, self._rule, self._params = ref(optimizer), rule, tuple(params)
        self._inf, self._bump_versions, self._master_weights = norm_type == math.inf, bump_versions, master_weights
        self.scale = scale
        self.device = self._params[0].device
        make = functools.partial(torch.zeros, device=self.device)
        self.grad_norm = torch.full((), math.nan, device=self.device)
        self.skipped, self.skips = make((), dtype=torch.int32), make((), dtype=torch.int32)
        self._shared = Cells(
            record=make(len(self._params), 16), verdict=make(4), norm=self.grad_norm, skipped=self.skipped, skips=self.skips, scale=scale
        )
        self._counts = make(len(self._params))  # updates of momentum buffers that this tail made
        self._made: dict[int, Tensor] = {}
        self._knobs: tuple[float, ...] = (1.0, math.inf, math.inf)
        self._kept_captures: list[Binding] = []  # that graphs go on reading: they live as long as this tail
        self._captures: list[ref[Binding]] = []  # these, and those that somebody else keeps
        self._spares: list[Tables] = []
        self._transient = False
        self._loaded: set[tuple[Any, ...]] = set()  # kernels that have run: loading one inside a capture would end it
        self._table = torch.empty(0)
        self._hooks = keep_wide(optimizer) if master_weights else None
        self.launches = 0  # of the last step
        self.refresh()

    @classmethod
    def obstacle(cls, optimizer: Optimizer) -> str | None:
        """Why this optimizer cannot have a Triton tail, in one sentence; None when it can."""
        return obstacle(optimizer)

    # -- what lies where ----------------------------------------------------------------------------------------
    def refresh(self) -> None:
        """Reads anew where everything lies and every hyperparameter: after `p.data = ...` or a new state tensor."""
        optimizer = self._live()
        if obstacle(optimizer) is not None:
            raise KernelError(refusal(optimizer))
        groups = optimizer.param_groups
        owner = {id(param): i for i, group in enumerate(groups) for param in group["params"]}
        for i, param in enumerate(self._params):
            if id(param) not in owner:
                raise KernelError(
                    reject("params", f"parameter {i}, unknown to the optimizer", "the optimizer's own parameters", "Leave it out.")
                )
        self._state, self._group_list = optimizer.state, groups
        self._owner, self._held = [owner[id(param)] for param in self._params], self._members()
        if self._table.numel() != KNOBS + HYPER * len(groups):  # graphs read the one that is there
            if self._captured():
                raise KernelError(reject("optimizer", "another number of groups than was captured", "the same", "Capture the step again."))
            self._table = torch.zeros(KNOBS + HYPER * len(groups), dtype=torch.float64, device=self.device)
        self._sent: list[float] = []
        self._seen: list[tuple[Any, ...]] = []
        self._cells: dict[int, tuple[tuple[int, ...], Kind]] = {}
        self._kept: dict[int, list[Tensor]] = {}
        self._binding: Binding | None = None
        self._bound: list[Any] = []
        self._fresh: list[Tensor] = []  # gradients laid out anew, until the next step
        known = []
        for i, param in enumerate(self._params):
            state = self._state.get(param) or {}
            if not self._lacks(i):
                if self._made.get(i) is not state.get("momentum_buffer"):
                    known.append(i)
                self._place(i)
        if known and self._rule.code == SGD_RULE:
            self._counts.index_fill_(0, torch.tensor(known).to(self.device, non_blocking=True), 1.0)
        self._where, self._states = self._places(), len(self._state)
        self._make_spare()
        for binding in self._captured():
            self._follow(binding)

    def _make_spare(self, n: int = 1) -> None:
        """Tables for the next captures, made before them."""
        while len(self._spares) < n:
            self._spares.append(make_tables([param.numel() for param in self._params], self.device))

    def _follow(self, binding: Binding) -> None:
        """Has a captured graph read state where it lies now; its gradients stay where they were."""
        if binding.grads.keys() <= self._cells.keys():
            rows = [self._row(i, *grad) for i, grad in binding.grads.items()]
            if layout_of(rows) == binding.layout:
                binding.pending.append((binding.rows, cells_of(rows, len(self._params))))
                binding.held += [tensor for i in binding.grads for tensor in self._kept[i]]
                return
        raise KernelError(reject("optimizer", "state of another kind than was captured", "the same", "Capture the step again."))

    def _lacks(self, i: int) -> bool:
        """Whether the next step that has a gradient for this parameter must make state first."""
        param = self._params[i]
        state = self._state.get(param) or {}
        return (self._is_wide(param) and MASTER not in state) or rules.is_missing(state, self._rule, self._group_list[self._owner[i]])

    def _is_wide(self, param: Tensor) -> bool:
        return self._master_weights and param.dtype != torch.float32

    def _place(self, i: int) -> None:
        """Notes the addresses of a parameter and its state, which is moved to the device and into the parameter's order."""
        param, group = self._params[i], self._group_list[self._owner[i]]
        state = self._state.get(param) or {}
        slots = self._rule.slots(group)
        for name in slots:
            state[name] = in_order_of(state[name], param)
        kept = [param.detach(), *(state[name] for name in slots)]
        addresses = [tensor.data_ptr() for tensor in kept] + [0] * (3 - len(slots))
        master = state.get(MASTER)
        if master is not None:
            master = state[MASTER] = in_order_of(master, param)
            kept.append(master)
        step = 0
        if self._rule.code == ADAM_RULE:
            if state["step"].device != self.device or state["step"].dtype != torch.float32:
                state["step"] = state["step"].to(self.device, torch.float32, non_blocking=True).reshape(())
            kept.append(state["step"])
            step = state["step"].data_ptr()
        elif self._rule.code == SGD_RULE and slots:
            step = self._counts.data_ptr() + 4 * i
        addresses.append(0 if master is None else master.data_ptr())
        kind = Kind(
            grad=0, align=alignment(addresses), param=FLOATS.index(param.dtype), mode=mode_of(self._rule, group),
            state=FLOATS.index(state[slots[0]].dtype) if slots else 0, mastered=master is not None,
        )  # fmt: skip
        self._cells[i] = ((*addresses, step, self._owner[i]), kind)
        self._kept[i] = kept

    def _members(self) -> list[list[int]]:
        """Which parameter is in which group."""
        return [[*map(id, group["params"])] for group in self._live().param_groups]

    def _places(self) -> list[int]:
        places = [param.data_ptr() for param in self._params]
        for i, param in enumerate(self._params):
            group, state = self._group_list[self._owner[i]], self._state.get(param) or {}
            if not self._lacks(i):
                names = (
                    *self._rule.slots(group),
                    *(("step",) if self._rule.code == ADAM_RULE else ()),
                    *((MASTER,) if MASTER in state else ()),
                )
                places += [state[name].data_ptr() for name in names]
        return places

    def moved(self, params: Sequence[Tensor]) -> bool:
        """Whether these are other parameters than `params` was, or lie elsewhere."""
        return len(params) != len(self._params) or [param.data_ptr() for param in params] != self._where[: len(params)]

    def stale(self) -> bool:
        """Whether a parameter or its state has moved since the last refresh."""
        optimizer = self._optimizer()
        return optimizer is None or optimizer.state is not self._state or self._places() != self._where or self._members() != self._held

    # -- a step -------------------------------------------------------------------------------------------------
    def step(
        self, grads: Sequence[Tensor | None], *, max_norm: float | None = None, clip_value: float | None = None,
        grad_scale: float | Tensor = 1.0, loss: Tensor | None = None, check: bool = False, zero_grads: bool = False,
        norms_out: Tensor | None = None, sticky: bool = False, transient: bool = False,
    ) -> Binding:  # fmt: skip
        """One optimizer step from these gradients, the meaning of every argument `NativeTail.step`'s.

        `grad_scale` may be a 0-d tensor on the device; `max_norm`, `clip_value` and a number in `grad_scale` are device values
        too, taken over by the next `step` or `sync`. `check`: a step whose loss, or measured norm, is inf or NaN writes nothing
        but zeroed gradients, the loss scale and the skip counts. `norms_out`: float32 of one element a parameter, on the device,
        filled with each gradient's own norm from the same pass (0 where there is none). `sticky`: once a step was refused all
        that follow are, until `skips` is set to 0: what a host that hears of it later finds is what that step found.

        Gives back the tables it launched over. `transient`, in a capture: whoever keeps the graph keeps these too, and gradients
        made within the graph are its own, so that another graph of its pool may have their memory.
        """
        optimizer = self._live()
        check_call(self.device, len(self._params), max_norm, clip_value, grad_scale, loss, norms_out)
        by_number = 1.0 if isinstance(grad_scale, Tensor) else float(grad_scale)
        self._knobs = (by_number, math.inf if max_norm is None else max_norm, math.inf if clip_value is None else clip_value)
        capturing, self._transient = self._capturing(), transient
        self._reread(optimizer)
        binding, copied = self._bind(grads, capturing)
        if not capturing:
            self._upload()
            binding.upload()
        self._write_lr_tensors(optimizer)
        call = Call(
            rule=self._rule.code, inf=self._inf, measure=max_norm is not None or norms_out is not None, check=check, zero=zero_grads,
            rescale=grad_scale if isinstance(grad_scale, Tensor) else None, loss=loss if check else None, norms=norms_out,
            sticky=sticky and check,
        )  # fmt: skip
        self._launch(binding, call, capturing)
        if zero_grads:
            for original in copied:
                original.zero_()
        if self._bump_versions:
            torch.autograd.graph.increment_version(self._params)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's lr schedulers look for
        return binding

    def _captured(self) -> list[Binding]:
        """Of the graphs that are alive."""
        found = [(r, b) for r in self._captures if (b := r()) is not None]
        self._captures = [r for r, _ in found]
        return [b for _, b in found]

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def sync(self, *, captures: int = 1) -> None:
        """Takes over hyperparameters that changed and tables that a capture left to be written: before every replay.

        `captures`: so many steps may be captured before the next call.
        """
        self._reread(self._live())
        self._upload()
        self._make_spare(captures)
        for binding in self._captured():
            binding.upload()

    def _launch(self, binding: Binding, call: Call, capturing: bool) -> None:
        planned = list(launches(binding, self._table, self._shared, call))
        new = [launch for launch in planned if launch.key() not in self._loaded]
        if new and capturing:
            got = f"a kernel that has not run yet ({new[0].name})"
            raise KernelError(reject("capture", got, "all of them loaded", "Make one real step with the same arguments first."))
        with on(self.device):
            for launch in planned:
                launch.run()
        self._loaded.update(launch.key() for launch in new)
        self.launches = len(planned)

    # -- tables -------------------------------------------------------------------------------------------------
    def _bind(self, grads: Sequence[Tensor | None], capturing: bool) -> tuple[Binding, list[Tensor]]:
        """The tables for these gradients, and those of them that had to be copied into their parameter's order."""
        if len(grads) != len(self._params):
            raise KernelError(reject("grads", f"{len(grads)} of them", f"{len(self._params)}", "Give one a parameter."))
        same = [None if grad is None else _look_of(grad) for grad in grads]
        if self._binding is not None and same == self._bound and not capturing:
            return self._binding, []
        for i, (grad, param) in enumerate(zip(grads, self._params, strict=True)):
            if grad is not None:
                check_grad(i, grad, param)
        copied: list[Tensor] = []
        fresh: list[Tensor] = []
        rows = []
        self._make_missing([i for i, grad in enumerate(grads) if grad is not None and i not in self._cells], capturing)
        for i, (grad, param) in enumerate(zip(grads, self._params, strict=True)):
            if grad is not None:
                if not same_order(grad, param):
                    copied.append(grad)
                    grad = in_order_of(grad, param)
                    fresh.append(grad)
                rows.append(self._row(i, grad.data_ptr(), FLOATS.index(grad.dtype)))
        self._bound, self._fresh = [] if copied else same, fresh
        if self._binding is not None and not capturing and layout_of(rows) == self._binding.layout:
            self._binding.pending.append((self._binding.rows, cells_of(rows, len(self._params))))
        else:
            if not self._spares:
                raise KernelError(reject("capture", "a second one at once", "sync() between two", "Call sync() after each capture."))
            binding = make_binding(rows, self._spares.pop())
            if capturing:
                binding.held = [t for row in rows for t in self._kept[row.index]]
                if not self._transient:
                    binding.held += [*(g for g in grads if g is not None), *fresh]
                    self._kept_captures.append(binding)
                self._captures.append(ref(binding))
                return binding, copied
            self._binding = binding
            self._make_spare()
        return self._binding, copied

    def _row(self, i: int, address: int, dtype: int) -> Row:
        (param, *slots, step, group), kind = self._cells[i]
        kind = replace(kind, grad=dtype, align=min(kind.align, alignment([address])))
        return Row(index=i, numel=self._params[i].numel(), kind=kind, cells=(param, address, *slots, step, group))

    def _make_missing(self, rows: Sequence[int], capturing: bool) -> None:
        """State for parameters that have a gradient for the first time: zeros, which a skipped first step leaves zeros."""
        if rows and capturing:
            got = f"parameter {rows[0]} without optimizer state"
            raise KernelError(reject("capture", got, "all state made before", "Make one real step first."))
        for i in rows:
            param, group = self._params[i], self._group_list[self._owner[i]]
            state = self._state.get(param) or {}
            made: dict[str, Tensor] = {}
            if rules.is_missing(state, self._rule, group):
                made = make_slots(self._rule.slots(group), param, torch.float32 if self._is_wide(param) else param.dtype)
                if self._rule.code == ADAM_RULE:
                    made["step"] = torch.zeros((), device=self.device)
            if self._is_wide(param) and MASTER not in state:
                made[MASTER] = make_master(param)
            self._state.setdefault(param, {}).update(made)
            if "momentum_buffer" in made:
                self._counts[i].zero_()
                self._made[i] = made["momentum_buffer"]
            self._place(i)
        if rows:
            self._where, self._states = self._places(), len(self._state)

    def _reread(self, optimizer: Optimizer) -> None:
        """Notices changed state and hyperparameters; what changes which state a step needs makes everything be read anew."""
        if optimizer.state is not self._state or len(optimizer.state) != self._states or optimizer.param_groups is not self._group_list:
            self.refresh()
        seen = [(self._rule.read(group), self._rule.slots(group), mode_of(self._rule, group)) for group in self._group_list]
        if self._seen and [s[1:] for s in seen] != [s[1:] for s in self._seen]:
            self.refresh()
        self._seen = seen

    def _upload(self) -> None:
        values = [*self._knobs, *((2.0, 0.5, 2000.0) if self.scale is None else self.scale.rule), 0.0, 0.0]
        for group in self._group_list:
            values += hyper_row(self._rule, group)
        if values != self._sent:
            self._table.copy_(torch.tensor(values, dtype=torch.float64), non_blocking=True)
            self._sent = values

    def _write_lr_tensors(self, optimizer: Optimizer) -> None:
        for i, group in enumerate(optimizer.param_groups):
            if isinstance(lr := group["lr"], Tensor) and lr.device == self.device and lr.device.type != "cpu":
                self._table[KNOBS + HYPER * i].copy_(lr.detach().reshape(()))

    def _live(self) -> Optimizer:
        if (optimizer := self._optimizer()) is None:
            raise KernelError(_GONE)
        return optimizer


def _look_of(grad: Tensor) -> tuple[Any, ...]:
    return (grad.data_ptr(), grad.dtype, grad.shape, grad.stride()) if grad.layout == torch.strided and not grad.is_meta else (id(grad),)
