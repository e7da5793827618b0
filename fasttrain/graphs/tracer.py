"""The tracer as we use it: our settings are in force while it traces, and cost nothing when it does not."""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

# Ints on a module (counters) become symbols at their second value; a step that still changes is given up early. A number
# read out of a tensor (``.item()`` for a log line) is read between the kernels.
DYNAMO = {"trace_autograd_ops": True, "allow_unspec_int_on_nn_module": True, "recompile_limit": 5, "verbose": False}
DYNAMO |= {"capture_scalar_outputs": True, "allow_rnn": True, "use_numpy_random_stream": True}  # or numpy's numbers would be torch's
DYNAMO |= {"skip_nnmodule_hook_guards": False}  # a hook that comes or goes on the way is a guard's business

VALIDATION = "_tensor_validation"  # how torchmetrics names them

FACTORIES = frozenset((torch.arange, torch.tensor, torch.zeros, torch.ones, torch.full))

_NUMBERS = itertools.count()


def compiled(
    function: Callable[..., Any], backend: Callable[..., Any], settings: dict[str, Any], *, whole: bool, dynamic: bool | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[..., Any]:  # fmt: skip
    """``torch.compile`` of a function under these settings of Dynamo, and within ``around()``."""
    assert isinstance(function, FunctionType)
    with unvalidated():  # the first use in a process switches the validation off for good
        context: Any = torch._dynamo.optimize(backend=_Weakly(backend), nopython=whole, dynamic=dynamic, **_apart())
    if hasattr(context, "callback"):  # there is none where the tracer is switched off
        context.callback = _Within(context.callback, settings, _Weakly(around) if hasattr(around, "__self__") else around)
    made: Callable[..., Any] = context(numbered(function))
    return made


@functools.cache
def _apart() -> dict[str, bool]:
    """What keeps the graphs of one fit from counting against the recompile limit of the next; torch 2.11 has nothing of the kind."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch._dynamo.eval_frame._optimize).parameters else {}


class _Weakly:
    """A method that keeps nothing alive. Dynamo keeps backends and what they give back, and a callback that has raised, for as
    long as the process: they may not keep a fit."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        method = self._method()
        assert method is not None
        return method(*args)


class _Within:
    """What the interpreter calls when no traced code fits."""

    def __init__(self, callback: Callable[..., Any], settings: dict[str, Any], around: Callable[[], AbstractContextManager[Any]]) -> None:
        self._torchdynamo_orig_backend = callback  # by which Dynamo knows whose code is whose
        self._settings, self._around = settings, around

    def __call__(self, *args: Any) -> Any:
        with torch._dynamo.config.patch(self._settings), said_before(), known(), found_below(), unvalidated(), quiet(), self._around():
            return self._torchdynamo_orig_backend(*args)


def numbered(function: FunctionType) -> FunctionType:
    """The function with a code object and a name of its own: Dynamo's cache and recompile limit belong to the code, and
    what it has learnt of changing sizes to the code's name and place, not to the closure."""
    code = function.__code__.replace(co_name=f"step_{next(_NUMBERS)}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


@contextmanager
def quiet() -> Iterator[None]:
    """Dynamo logs what we report in a sentence ourselves; its errors still come as exceptions."""
    log = logging.getLogger("torch._dynamo")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def said_before() -> Iterator[None]:
    """Within a trace: a logger's call that says nothing - its level is off, or it speaks once and has spoken in the dry look -
    is left out, and so is what only validates. Any other ends the trace there."""
    from torch._dynamo.variables import ConstantVariable, misc

    once = {f for f in vars(logging.Logger).values() if isinstance(f, functools._lru_cache_wrapper)}
    before: Any = misc.LoggingLoggerVariable.call_method

    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        level = getattr(logging, name.upper(), None)
        if isinstance(level, int) and not self.value.isEnabledFor(level):
            return ConstantVariable.create(None)
        return before(self, tx, name, args, kwargs)

    ignored = torch._dynamo.config.ignore_logger_methods | once | _validations()
    with instead(misc.LoggingLoggerVariable, "call_method", call_method), torch._dynamo.config.patch(ignore_logger_methods=ignored):
        yield


def _validations() -> set[Any]:
    """torchmetrics' functions that look at their arguments' values and give nothing back. The dry look called them."""
    loaded = [m for n, m in list(sys.modules.items()) if n.startswith("torchmetrics.functional.")]
    return {f for m in loaded for n, f in vars(m).items() if n.endswith(VALIDATION)}


@contextmanager
def known() -> Iterator[None]:
    """Within a trace: ``torch.arange(2, x.ndim).tolist()`` and its like, made of constants alone, are constants."""
    from torch._dynamo.variables import TensorVariable
    from torch._dynamo.variables.base import VariableTracker

    before: Any = TensorVariable.method_tolist

    def method_tolist(this: Any, tx: Any, *args: Any) -> Any:
        node = this.as_proxy().node
        if node.op == "call_function" and node.target in FACTORIES and not node.all_input_nodes:
            return VariableTracker.build(tx, node.target(*node.args, **node.kwargs).tolist())
        return before(this, tx, *args)

    with instead(TensorVariable, "method_tolist", method_tolist):
        yield


@contextmanager
def found_below() -> Iterator[None]:
    """Within a trace: a submodule whose name is also a property that raises is found where ``nn.Module.__getattr__`` finds it."""
    from torch._dynamo.variables import ConstantVariable, nn_module

    kind = nn_module.UnspecializedNNModuleVariable
    method = "var_getattr" if hasattr(kind, "var_getattr") else "tp_getattro_impl"  # as from torch 2.15 on
    before: Any = getattr(kind, method)

    def var_getattr(this: Any, tx: Any, name: str) -> Any:
        below = this.value.__dict__.get("_modules", {}).get(name)
        if below is not None and hasattr(type(this.value), name) and getattr(this.value, name, None) is below:
            return before(this, tx, "_modules").call_method(tx, "__getitem__", [ConstantVariable.create(name)], {})
        return before(this, tx, name)

    with instead(kind, method, var_getattr):
        yield


@contextmanager
def optimizers_alone() -> Iterator[None]:
    """Within a trace: an optimizer that is looked into stays as it is - Dynamo would have it ``capturable``, on a CPU too - and one
    that is written on ends the trace: Dynamo drops what is written, in silence."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.side_effects import SideEffects
    from torch._dynamo.variables.optimizer import OptimizerVariable

    before: Any = SideEffects.store_attr

    def store_attr(this: Any, item: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(item, OptimizerVariable):
            raise Unsupported(f"{name} is written on an optimizer")
        before(this, item, name, *args, **kwargs)

    with instead(OptimizerVariable, "_set_capturable", lambda this, tx: None), instead(SideEffects, "store_attr", store_attr):
        yield


@contextmanager
def faithful() -> Iterator[None]:
    """Within a trace: ``p.data = ...`` ends it, for in the graph that is another tensor than the one whose gradient is taken; and
    a deque that was there has its greatest length, which Dynamo forgets."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.variables import ConstantVariable, builtin
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.lists import DequeVariable

    kind: Any = getattr(builtin, "SetAttrBuiltinVariable", builtin.BuiltinVariable)
    method = "_call_setattr" if hasattr(kind, "_call_setattr") else "call_setattr"  # until torch 2.11
    sets, wraps = getattr(kind, method), VariableBuilder._wrap

    def call_setattr(this: Any, tx: Any, on: Any, attribute: Any, value: Any) -> Any:
        on = on.realize() if hasattr(on, "realize") else on
        if on.is_tensor() and attribute.is_python_constant() and attribute.as_python_constant() == "data":
            raise Unsupported("the .data of a tensor is replaced")
        return sets(this, tx, on, attribute, value)

    def wrap(this: Any, value: Any) -> Any:
        made = wraps(this, value)
        if type(value) is collections.deque and isinstance(made, DequeVariable):
            made.maxlen = ConstantVariable.create(value.maxlen)
        return made

    with instead(kind, method, call_setattr), instead(VariableBuilder, "_wrap", wrap):
        yield


@contextmanager
def chance_apart() -> Iterator[None]:
    """Within a trace: Python's own random numbers are drawn outside of it: in a graph they are others, or none (torch 2.13)."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.variables import misc, user_defined

    def drawn(*_: Any, **__: Any) -> Any:
        raise Unsupported("random: a number that Python draws")

    with instead(misc, "call_random_fn", drawn), instead(user_defined, "call_random_fn", drawn):
        yield


@contextmanager
def lengths_asked_gently() -> Iterator[None]:
    """Within a trace: a sequence that may not be asked how long it is (e3nn's ``Irreps``) is known by what it is."""
    from torch._dynamo.guards import GuardBuilder

    before: Any = GuardBuilder.SEQUENCE_LENGTH

    @functools.wraps(before)
    def length(this: Any, guard: Any) -> None:
        try:
            len(this.get(guard))
        except NotImplementedError:
            this.ID_MATCH(guard)
        else:
            before(this, guard)

    with instead(GuardBuilder, "SEQUENCE_LENGTH", length):
        yield


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Within a trace: ``torch.inference_mode`` is ``no_grad``, which computes the same; no graph takes its tensors apart."""
    from torch._dynamo.variables.ctx_manager import GradModeVariable, InferenceModeVariable

    before: Any = InferenceModeVariable.create

    def create(tx: Any, target_value: Any, **kwargs: Any) -> Any:
        if target_value is True:
            return GradModeVariable.create(tx, False, initialized=False)
        return before(tx, target_value, **kwargs)

    with instead(InferenceModeVariable, "create", staticmethod(create)):
        yield


@contextmanager
def passing() -> Iterator[None]:
    """Within a trace: an object of ours that stands in for another passes for it with ``isinstance``, as it does outside."""
    from torch._dynamo.variables import BuiltinVariable, ConstantVariable, UserDefinedObjectVariable

    before: Any = BuiltinVariable.call_isinstance

    def call_isinstance(this: Any, tx: Any, arg: Any, kinds: Any) -> Any:
        arg = arg.realize() if hasattr(arg, "realize") else arg
        kind = getattr(arg.value, "__dict__", {}).get("passes_for") if isinstance(arg, UserDefinedObjectVariable) else None
        if kind is not None and issubclass(kind, kinds.as_python_constant()):
            return ConstantVariable.create(True)
        return before(this, tx, arg, kinds)

    with instead(BuiltinVariable, "call_isinstance", call_isinstance):
        yield


@contextmanager
def instead(kind: Any, name: str, method: Any) -> Iterator[None]:
    """Within: a class (or module) of Dynamo's with another method."""
    own = kind.__dict__.get(name)  # None: inherited, in some versions of torch
    setattr(kind, name, method)
    try:
        yield
    finally:
        delattr(kind, name) if own is None else setattr(kind, name, own)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Within a trace: torch.distributions does not look at its arguments' values. The dry look did."""
    kind = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(before)


def _said_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


_FORWARD = nn.TransformerEncoder.forward
_NESTED = "nn.TransformerEncoder makes padded rows zero in eval mode, which a trace does not; with enable_nested_tensor=False it never does"
_APART: dict[str, Any] = {}  # functions that the tracer is kept out of


def _encoded(self: nn.TransformerEncoder, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    padded = kwargs.get("src_key_padding_mask") is not None or (len(args) > 1 and args[1] is not None)
    nested = padded and self.use_nested_tensor and not self.layers[0].training
    out: Tensor = (_APART["nested"] if nested else _FORWARD)(self, src, *args, **kwargs)
    return out


@contextmanager
def transformers() -> Iterator[None]:
    """Within a trace: nn.Transformer does not read a mask to find out whether it is the causal one - applied as it stands it
    gives the same result - and an encoder that would take its nested road in eval mode is left out."""
    if not _APART:
        _APART["nested"] = torch._dynamo.disable(_FORWARD, reason=_NESTED)  # type: ignore[no-untyped-call]
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = _said_causal
    nn.TransformerEncoder.forward = _encoded  # type: ignore[method-assign]
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before
        nn.TransformerEncoder.forward = _FORWARD  # type: ignore[method-assign]
