"""The fused update of one torch optimizer on the CPU: gradient norm, clip and update in one native call."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttrain.errors import KernelError, reject
from fasttrain.kernels import library, native_rules, rules
from fasttrain.kernels.layout import in_order_of, same_order
from fasttrain.kernels.library import CHECK, DTYPES, INF, L2, MEASURE, STEPPED, ZERO_GRADS

_data_ptr = torch.Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous
_GONE = reject("optimizer", "one that no longer exists", "a live one", "Keep a reference to it beside its tail.")


class NativeTail:
    """Norm, clip and update of a torch SGD, Adam or AdamW, or a Lion, on the CPU in one native call a step.

    Reads and writes the parameters and the optimizer's own state where they lie: `optimizer.state_dict()` stays
    torch's. `params` are the parameters whose gradients `step` will be given, in that order: all of the optimizer's or
    some. `norm_type` is 2.0 or inf. `bump_versions` also marks the parameters as written in place for autograd (0.04 µs
    a tensor): needed only when a graph made before a step is run backward after it and should be refused.
    Refused with KernelError where `obstacle(optimizer)` names a reason. One thread at a time. The optimizer is held
    weakly: keep it.

        tail = NativeTail(optimizer, params)
        outcome = tail.step([p.grad for p in params], max_norm=1.0, check=True)   # tail.grad_norm holds the norm
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], *, norm_type: float = 2.0, bump_versions: bool = False) -> None:
        if norm_type not in (2.0, math.inf):
            raise KernelError(reject("norm_type", norm_type, "2.0 or inf", "Measure others with grad_norm."))
        rule = rules.rule_of(optimizer)
        if rule is None:
            raise KernelError(_refusal(optimizer))
        self.grad_norm = torch.full((), math.nan)  # 0-d fp32, written in place by every step that measures
        self._optimizer = ref(optimizer)
        self._rule = rule
        self._params = tuple(params)
        self._bump_versions = bump_versions
        self._call = library.Call(norm_kind=L2 if norm_type == 2.0 else INF, norm_out=self.grad_norm.data_ptr())
        self._call_address = ctypes.c_void_p(ctypes.addressof(self._call))
        self._addresses = array("Q", [0] * len(self._params))
        self._call.grads = self._addresses.buffer_info()[0]
        self._knobs: tuple[Any, ...] = ()
        self._loss_dtype: torch.dtype | None = None
        self.refresh()

    @classmethod
    def obstacle(cls, optimizer: Optimizer) -> str | None:
        """Why this optimizer cannot have a native tail, in one sentence; None when it can."""
        return native_rules.obstacle(optimizer)

    def refresh(self) -> None:
        """Reads anew where everything lies and every hyperparameter.

        To be called after an assignment to `p.data` or to one state tensor, a moved model: whatever makes `stale()`
        true. `load_state_dict` and a cleared state are noticed by the next step itself.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise KernelError(_GONE)
        if native_rules.obstacle(optimizer) is not None:
            raise KernelError(_refusal(optimizer))
        groups = optimizer.param_groups
        owner = {id(param): i for i, group in enumerate(groups) for param in group["params"]}
        for i, param in enumerate(self._params):
            if id(param) not in owner:
                got = f"parameter {i}, unknown to the optimizer"
                raise KernelError(reject("params", got, "the optimizer's own parameters", "Leave it out."))
        self._state, self._group_list = optimizer.state, groups
        self._held = self._members()
        self._group_of = [groups[owner[id(param)]] for param in self._params]
        live = {owner[id(param)] for param in self._params}
        self._groups = [(i, group) for i, group in enumerate(groups) if i in live]
        self._native_groups = (library.Group * len(groups))()
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._structure: dict[int, tuple[str, ...]] = {}
        for i, group in self._groups:
            self._write_group(i, group)
        self._write_rows(owner)
        self._call.rows = ctypes.addressof(self._rows)
        self._call.groups = ctypes.addressof(self._native_groups)
        self._plan = library.Plan([param.numel() for param in self._params], self._rule.code)
        self._step_native, self._plan_address = self._plan.library.fasttrain_step, self._plan.address

    def _write_rows(self, owner: Mapping[int, int]) -> None:
        self._rows = (library.Row * len(self._params))()
        self._kept: list[Tensor] = []  # what the rows point at stays alive, whatever happens to the optimizer
        self._missing: set[int] = set()  # rows whose state torch would make at the next step that has a gradient
        self._pending: dict[int, dict[str, Tensor]] = {}  # such state, made but not yet the optimizer's
        self._plain = all(param.is_contiguous() and param.numel() for param in self._params)
        self._checked = False
        for i, (row, param, group) in enumerate(zip(self._rows, self._params, self._group_of, strict=True)):
            row.param, row.numel, row.dtype = param.data_ptr(), param.numel(), DTYPES[param.dtype]
            row.group, row.grad_dtype = owner[id(param)], row.dtype
            self._kept.append(param.detach())
            state = self._state.get(param) or {}
            if rules.is_missing(state, self._rule, group):
                self._missing.add(i)
            else:
                self._kept += native_rules.write_row(row, state, self._rule, group, param)
        self._where, self._states = self._places(), len(self._state)

    def _members(self) -> list[list[int]]:
        """Which parameter is in which group."""
        optimizer = self._optimizer()
        return [] if optimizer is None else [[*map(id, group["params"])] for group in optimizer.param_groups]

    def _places(self) -> list[int]:
        places = [param.data_ptr() for param in self._params]
        for param, group in zip(self._params, self._group_of, strict=True):
            state = self._state.get(param) or {}
            if not rules.is_missing(state, self._rule, group):
                places += [state[name].data_ptr() for name in self._rule.slots(group)]
                places += [state["step"].data_ptr()] if self._rule.code == library.ADAM else []
        return places

    def moved(self, params: Sequence[Tensor]) -> bool:
        """Whether these are other parameters than `params` was, or lie elsewhere; costs about 0.1 µs a parameter."""
        return len(params) != len(self._params) or [param.data_ptr() for param in params] != self._where[: len(params)]

    def stale(self) -> bool:
        """Whether a parameter or its state has moved since the last refresh; costs about 0.5 µs a parameter."""
        optimizer = self._optimizer()
        return optimizer is None or optimizer.state is not self._state or self._places() != self._where or self._members() != self._held

    def step(
        self,
        grads: Sequence[Tensor | None],
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
        grad_scale: float = 1.0,
        loss: Tensor | None = None,
        check: bool = False,
        zero_grads: bool = False,
        norms_out: Tensor | None = None,
    ) -> int:
        """One optimizer step from these gradients; 0 when it was made, 1 when it was skipped as non-finite.

        `grads`: one a parameter, in the order of `params`; None leaves that parameter and its state alone. They are
        read, multiplied by `grad_scale` on the way, and never written, unless `zero_grads` asks for zeros afterwards
        (skipped or not).
        `max_norm`: clip to this norm as `clip_grad_norm_` does; inf only measures; None neither clips nor measures.
        `clip_value`: clamp each scaled gradient to +-this instead. `check`: when `loss` (0-d), or the norm where it is
        measured, is inf or NaN, write nothing: no parameter, no state, no step count. `grad_norm` holds a measured norm.
        `norms_out`: float32 of one element a parameter, filled with each scaled gradient's own norm from the same pass, 0
        where there is none; it has the norm measured. A float32 parameter may have a bfloat16 gradient.
        Shapes and dtypes are checked at the first step and after every refresh, memory layout at every step.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise KernelError(_GONE)
        state = optimizer.state
        if state is not self._state or len(state) != self._states or optimizer.param_groups is not self._group_list:
            self.refresh()
        read = self._rule.read
        for i, group in self._groups:
            seen = self._seen[i]
            if group["lr"] is not seen[0] or read(group) != seen[1]:
                self._reread(i, group)
        if norms_out is not None or self._call.norms_out:
            self._write_norms_out(norms_out)
        if norms_out is not None and max_norm is None:
            max_norm = math.inf
        knobs = (max_norm, clip_value, grad_scale, check, zero_grads)
        if knobs != self._knobs:
            self._write_knobs(*knobs)
        if check:
            self._write_loss(loss)
        copied = self._write_addresses(grads)
        if self._missing:
            self._make_missing()
        outcome: int = self._step_native(self._plan_address, self._call_address)
        if copied and zero_grads:
            for original, _ in copied:
                original.zero_()
        if outcome == STEPPED:
            if self._pending:
                self._install_pending()
            if self._bump_versions:
                torch.autograd.graph.increment_version(self._params)
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's lr schedulers look for
        return outcome

    def _write_addresses(self, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]] | None:
        """Where the gradients lie; gives back (original, copy) for those that had to be laid out anew."""
        if self._plain and self._checked and len(grads) == len(self._params):
            try:
                if all(map(_is_contiguous, grads)):  # type: ignore[arg-type]  # a None is caught below
                    self._addresses[:] = array("Q", map(_data_ptr, grads))  # type: ignore[arg-type]
                    return None
            except TypeError:
                pass
        return self._check_addresses(grads)

    def _check_addresses(self, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        if len(grads) != len(self._params):
            raise KernelError(reject("grads", f"{len(grads)} of them", f"{len(self._params)}", "Give one a parameter."))
        copied = []
        for i, (grad, param) in enumerate(zip(grads, self._params, strict=True)):
            if grad is None:
                self._addresses[i] = 0
                continue
            mixed = grad.dtype == torch.bfloat16 and param.dtype == torch.float32
            fits = grad.shape == param.shape and (grad.dtype == param.dtype or mixed)
            if not fits or not grad.is_cpu or grad.layout != torch.strided:
                got, wanted = _describe(grad), _describe(param)
                raise KernelError(reject(f"the gradient of parameter {i}", got, wanted, "Nothing was written."))
            if not same_order(grad, param):
                copied.append((grad, in_order_of(grad, param)))
                grad = copied[-1][1]
            self._rows[i].grad_dtype = DTYPES[grad.dtype]
            self._addresses[i] = grad.data_ptr() or 1  # an empty tensor has no address and yet a gradient
        self._checked = not any(grad is None for grad in grads)
        return copied

    def _write_knobs(self, max_norm: float | None, clip_value: float | None, grad_scale: float, check: bool, zero_grads: bool) -> None:
        for name, value in (("max_norm", max_norm), ("clip_value", clip_value)):
            if value is not None and not value >= 0:
                raise KernelError(reject(name, value, "a number >= 0 or None", "Use None not to clip."))
        if max_norm is not None and max_norm != math.inf and clip_value is not None:
            raise KernelError(reject("max_norm and clip_value", "both", "one of them", "Leave the other None."))
        call = self._call
        call.max_norm = math.inf if max_norm is None else max_norm
        call.clip_value = math.inf if clip_value is None else clip_value
        call.grad_scale = grad_scale
        call.flags = MEASURE * (max_norm is not None) | CHECK * check | ZERO_GRADS * zero_grads
        self._knobs = (max_norm, clip_value, grad_scale, check, zero_grads)

    def _write_norms_out(self, norms: Tensor | None) -> None:
        count = len(self._params)
        if norms is not None and not (norms.dtype == torch.float32 and norms.is_cpu and norms.numel() == count and norms.is_contiguous()):
            raise KernelError(reject("norms_out", _describe(norms), f"torch.float32 ({count},) on cpu", "Nothing was written."))
        self._call.norms_out = 0 if norms is None else norms.data_ptr()

    def _write_loss(self, loss: Tensor | None) -> None:
        if loss is None:
            self._call.loss = 0
            return
        if loss.dtype is not self._loss_dtype or not loss.is_cpu:
            if loss.dtype not in DTYPES or not loss.is_cpu or loss.numel() != 1:
                raise KernelError(reject("loss", _describe(loss), "one float on the CPU", "Give its 0-d value."))
            self._loss_dtype, self._call.loss_dtype = loss.dtype, DTYPES[loss.dtype]
        self._call.loss = loss.data_ptr()

    def _write_group(self, index: int, group: Mapping[str, Any]) -> None:
        native = self._native_groups[index]
        native_rules.write_group(native, self._rule, group)
        self._seen[index] = (group["lr"], self._rule.read(group))
        self._structure[index] = self._rule.slots(group)

    def _reread(self, index: int, group: Mapping[str, Any]) -> None:
        if self._rule.slots(group) != self._structure[index]:  # momentum or amsgrad was switched
            self.refresh()
        else:
            self._write_group(index, group)

    def _make_missing(self) -> None:
        """State for the rows that have a gradient for the first time; the optimizer gets it once the step is made."""
        for i in [i for i in self._missing if self._addresses[i]]:
            row, group, param = self._rows[i], self._group_of[i], self._params[i]
            state = rules.make_state(self._rule, group, param)
            self._kept += native_rules.write_row(row, state, self._rule, group, param)
            row.fresh = self._rule.code == library.SGD
            self._pending[i] = state
            self._missing.discard(i)

    def _install_pending(self) -> None:
        for i in [i for i in self._pending if self._addresses[i]]:
            state = self._pending.pop(i)
            self._state.setdefault(self._params[i], {}).update(state)
        self._where, self._states = self._places(), len(self._state)


def _refusal(optimizer: Optimizer) -> str:
    reason = native_rules.obstacle(optimizer)
    return reject("optimizer", type(optimizer).__name__, "one with a native update", f"{reason}.")


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype}{layout} {tuple(tensor.shape)} on {tensor.device}"
