"""A branch on data is followed as it went in the first step, and the graph asserts in every step that it goes so again."""

from __future__ import annotations

import dis
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fasttrain.graphs.checks import JUMPS, CheckFailed, asserted, handled, on_data, shape_of
from fasttrain.graphs.explain import place as place_of
from fasttrain.graphs.numbers import Hints, settled
from fasttrain.graphs.tracer import instead
from fasttrain.results import Obstacle

FOLLOWED = "a branch on data."
READ = frozenset(("__bool__", "item", "equal", "allclose", "is_nonzero"))  # what of torch's answers with a truth
KEEPING = {code: "TRUE" in name for name, code in dis.opmap.items() if re.match(r"JUMP_IF_(TRUE|FALSE)_OR_POP$", name)}  # Python 3.11
NUMBERS = frozenset(("item", "__int__", "__float__", "__index__"))  # with a number
PICKS = frozenset(("__getitem__", "nonzero", "masked_select", "argwhere"))  # with so many rows as the data has it
NOTED = "what came of "  # before a place where a number was read or rows were picked
LONGEST = 32  # answers at one place in one step, if they are not all the same: a loop over data is not rolled out further
WINDOW, MOST = 64, 4  # a place that fails more often than this in a window of steps is no longer followed

Place = str  # where in somebody's code a truth is asked for, from column to column; the same in every process
Outcomes = dict[Place, list[Any]]  # the answers of one step, in order; numbers and shapes where it is said so


def _place(module: str, code: CodeType, positions: Sequence[int | None]) -> Place:
    """Instructions are counted otherwise by Dynamo than by the interpreter; what they were made of is the same."""
    return ":".join(map(str, (module, code.co_qualname, *positions)))


class Watch(TorchFunctionMode):
    """Within: every truth of a tensor that somebody's Python asks for is noted, and every number and size that comes of one."""

    def __init__(self, outcomes: Outcomes) -> None:
        super().__init__()
        self._outcomes = outcomes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if torch.compiler.is_compiling():  # somebody compiles a part by himself
            return out
        name = getattr(func, "__name__", "")
        if type(out) is bool and name in READ:
            self._note("", out)
        elif type(out) in (int, float) and name in NUMBERS:
            self._note(NOTED, out)
        elif name in PICKS and isinstance(out, torch.Tensor):
            self._note(NOTED, tuple(out.shape))
        return out

    def _note(self, what: str, found: Any) -> None:
        frame = sys._getframe(2)
        positions = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
        notes = self._outcomes.setdefault(what + _place(frame.f_globals.get("__name__", ""), frame.f_code, positions), [])
        if not what or len(notes) < LONGEST:
            notes.append(found)


class Speculation:
    """What one captured function follows, how often that was wrong, and what it has given up."""

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes
        self._where: dict[Place, str] = {}  # file:line of what is followed
        self._given_up: set[Place] = set()
        self._recent: dict[Place, list[int]] = {}  # the calls of this window in which it failed
        self._failures: dict[Place, int] = {}
        self._before: tuple[dict[Place, list[int]], dict[Place, int]] | None = None  # while it is only tried
        self._loaded = False
        self.fickle: set[Place] = set()
        self._attempt: Any = None  # of Dynamo's at the function: what it meets is counted anew in each
        self._met: dict[Place, int] = {}
        self._hints = Hints()
        self._said: dict[str, Place] = {}  # what the compiler asserts of sizes by itself

    def __bool__(self) -> bool:
        """Is anything followed?"""
        return any(p not in self._given_up for p in self._where)

    def failed(self, error: CheckFailed, call: int) -> bool | None:
        """A captured call that failed: was it what is followed (None: no), and is something given up from now on?"""
        if not self:
            return None
        found = re.search(r"speculated branch (\d+)", str(error))
        # What is none of our assertions comes of the way that was followed: an index out of range, say.
        ours = [list(self._where)[int(found.group(1))]] if found else [p for said, p in self._said.items() if f" {said} " in f" {error} "]
        places = ours or [p for p in self._where if p not in self._given_up]
        for place in places:
            self._failures[place] = self._failures.get(place, 0) + 1
            self._recent[place] = [*(n for n in self._recent.get(place, ()) if n > call - WINDOW), call]
        often = {p for p in places if len(self._recent[p]) > MOST and self._before is None}
        self._given_up |= often
        return bool(often)

    def obstacles(self, calls: int) -> list[Obstacle]:
        """Each place, what was done about it and how often that failed."""
        found = []
        for place, where in self._where.items():
            failures = self._failures.get(place, 0)
            said = f"It went another way in {failures} of {calls} steps, which ran op by op." if failures else ""
            said += " It is no longer followed." if place in self._given_up else ""
            found.append(
                Obstacle(FOLLOWED, where=where, advice=said.strip(), done="followed as it went in the first step, checked in every step")
            )
        return found

    def tried(self, on: bool) -> None:
        """From True to False nothing counts; what failed more than once in a few steps of one batch is ``fickle``."""
        if on:
            self._before = ({p: list(r) for p, r in self._recent.items()}, dict(self._failures))
            return
        assert self._before is not None
        often = {p for p, n in self._failures.items() if n > self._before[1].get(p, 0) + 1} - self._given_up
        self.fickle = set() if self._loaded else often
        (self._recent, self._failures), self._before = self._before, None

    def forgo(self) -> None:
        """What is fickle is not followed in the first place."""
        self._given_up |= self.fickle
        self._where, self.fickle = {}, set()

    def state(self) -> dict[str, Any]:
        """As a checkpoint keeps it: a resumed run follows what the saved one did, whatever its own first step does."""
        return {"outcomes": self._outcomes, "given_up": sorted(self._given_up), "recent": self._recent, "failures": self._failures}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._outcomes = {p: list(o) for p, o in state["outcomes"].items()}
        self._given_up, self._failures = set(state["given_up"]), dict(state["failures"])
        self._recent, self._loaded = {p: list(r) for p, r in state["recent"].items()}, True

    # -- while Dynamo traces ------------------------------------------------------------------------------------
    @contextmanager
    def following(self) -> Iterator[None]:
        """Within a trace: the truth of a tensor is what it was, where that is known, and asserted."""
        from torch._dynamo.variables import BuiltinVariable, ConstantVariable, TensorVariable, TorchInGraphFunctionVariable

        torchs: Any = TorchInGraphFunctionVariable.call_function
        builtins: Any = BuiltinVariable.call_function
        methods: Any = TensorVariable.call_method

        def answered(tx: Any, condition: Any) -> Any:
            answer = self._followed(tx, condition, 0)
            return None if answer is None else ConstantVariable.create(answer)

        def call_torch(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            name = NAMES.get(this.value)
            said = answered(tx, _compared(tx, name, args, kwargs)) if name and self._known(tx, 0) else None
            return said or self._learnt(tx, torchs(this, tx, args, kwargs))

        def call_builtin(this: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            asks = this.fn is bool and len(args) == 1 and self._known(tx, 0)
            return (answered(tx, args[0]) if asks else None) or self._learnt(tx, builtins(this, tx, args, kwargs))

        def call_method(this: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
            said = None
            if name in READ and self._known(tx, 0):
                asks = name in ("__bool__", "is_nonzero") or (name == "item" and this.dtype is torch.bool)
                said = answered(tx, this if asks else _compared(tx, name, [this, *args], kwargs))
            return said or self._learnt(tx, methods(this, tx, name, args, kwargs))

        def jump(handler: Callable[..., Any], code: int) -> Callable[..., Any]:
            def follow(tx: Any, inst: Any) -> None:
                answer = self._followed(tx, tx.stack[-1], *range(4))
                answer = self._computed(tx, tx.stack[-1]) if answer is None else answer
                if answer is None:
                    handler(tx, inst)
                    return
                if answer != KEEPING.get(code):
                    tx.pop()
                if code == NOT:
                    tx.push(ConstantVariable.create(not answer))
                elif answer == JUMPS.get(code, KEEPING.get(code)):
                    tx.jump(inst)

            return follow

        with (
            instead(TorchInGraphFunctionVariable, "call_function", call_torch),
            instead(BuiltinVariable, "call_function", call_builtin),
            instead(TensorVariable, "call_method", call_method),
            handled([*JUMPS, *KEEPING, NOT], jump),
        ):
            yield

    def _known(self, tx: Any, back: int) -> Place | None:
        """The place of the instruction that is traced (or so many before it), if its answers are known."""
        place = _here(tx, back)
        return place if place in self._outcomes and place not in self._given_up else None

    def _nth(self, tx: Any, place: Place) -> int:
        """How often has this trace been there before?"""
        if self._attempt is not tx.output:
            self._attempt, self._met, self._hints = tx.output, {}, Hints()
        self._met[place] = self._met.get(place, -1) + 1
        return self._met[place]

    def _learnt(self, tx: Any, variable: Any) -> Any:
        """What was just traced; it is remembered what came of it in the first look."""
        place = NOTED + (_here(tx, 0) or "")
        if place in self._outcomes and (nth := self._nth(tx, place)) < len(self._outcomes[place]):
            self._hints.learn(variable, self._outcomes[place][nth])
        return variable

    def _computed(self, tx: Any, asked: Any) -> bool | None:
        """The answer to a comparison of numbers, by what they were in the first look, asserted; None where there is none."""
        from torch._dynamo.variables.tensor import SymNodeVariable

        place, asked = _here(tx, 0), asked.realize() if hasattr(asked, "realize") else asked
        if place is None or place in self._given_up or not isinstance(asked, SymNodeVariable) or self._attempt is not tx.output:
            return None
        if self._nth(tx, "at " + place) > LONGEST:
            return None
        try:
            answer = bool(self._hints.value(asked.as_proxy().node))
        except (LookupError, ArithmeticError):
            return None
        condition = on_data(asked, tx)
        if condition is None:
            return None
        self._asserted(tx, place, condition, answer)
        if said := settled(asked, answer, tx):
            self._said[said] = place
        return answer

    def _followed(self, tx: Any, asked: Any, *back: int) -> bool | None:
        """The answer that is followed from here, asserted; None where there is none. ``back``: so many instructions before a jump
        may stand the ``bool(x)`` that only it asks for, and that has been left to it."""
        place = next(filter(None, (self._known(tx, n) for n in back if n == 0 or _asks(tx, n))), None)
        condition = None if place is None or asked is None else on_data(asked, tx)
        if place is None or condition is None:
            return None
        outcomes, nth = self._outcomes[place], self._nth(tx, place)
        same = len(set(outcomes)) == 1
        if not same and (nth >= len(outcomes) or len(outcomes) > LONGEST):
            return None
        return self._asserted(tx, place, condition, outcomes[0] if same else outcomes[nth])

    def _asserted(self, tx: Any, place: Place, condition: Any, answer: bool) -> bool:
        """Follow this answer."""
        if place not in self._where:
            self._where[place] = place_of(_frames(tx)) or f"{tx.f_code.co_filename}:{tx.lineno}"
        message = f"speculated branch {list(self._where).index(place)}"
        asserted(condition if answer else condition.call_method(tx, "logical_not", [], {}), tx, message)
        return answer


NOT = dis.opmap["UNARY_NOT"]
NAMES = {torch.equal: "equal", torch.allclose: "allclose", torch.is_nonzero: "__bool__"}


def _here(tx: Any, back: int) -> Place | None:
    """Where the instruction that is traced (or so many before it) stands; None for one of the tracer's own, or apart."""
    at = (tx.instruction_pointer or 0) - 1 - back  # none once its code has come to an end
    if at < 0 or tx.instructions[at].positions is None or _apart(tx):
        return None
    return _place(tx.f_globals.get("__name__", ""), tx.f_code, tx.instructions[at].positions)


def _frames(tx: Any) -> list[tuple[str, int]]:
    """File and line of what is traced, from the outermost call in."""
    frames: list[tuple[str, int]] = []
    while tx is not None:
        frames.insert(0, (tx.f_code.co_filename, tx.lineno))
        tx = getattr(tx, "parent", None)
    return frames


def _apart(tx: Any) -> bool:
    """Is this a part of the graph that is traced by itself, or under a transform of torch.func's?"""
    return tx.output.current_tracer.parent is not None or torch._C._functorch.peek_interpreter_stack() is not None


def _asks(tx: Any, back: int) -> bool:
    """Is there nothing but asking for a truth between the instruction so far back and this one?"""
    names = [inst.opname for inst in tx.instructions[max(0, tx.instruction_pointer - 1 - back) : tx.instruction_pointer - 1]]
    return bool(names) and names[0].startswith("CALL") and all(n in ("TO_BOOL", "CACHE", "NOP") for n in names[1:])


def _compared(tx: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A comparison of whole tensors as a tensor of one element; None for what cannot be had so."""
    from torch._dynamo.variables import TorchInGraphFunctionVariable

    if name in ("__bool__", "is_nonzero"):
        return args[0]
    shapes = [shape_of(a) for a in args[:2]]
    if len(shapes) < 2 or None in shapes or (name == "equal" and shapes[0] != shapes[1]):
        return None
    if name == "equal":
        same = args[0].call_method(tx, "eq", [args[1]], {})
    else:
        same = TorchInGraphFunctionVariable(torch.isclose).call_function(tx, [*args], {**kwargs})
    return same.call_method(tx, "all", [], {})
