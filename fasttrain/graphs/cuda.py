"""The graph rung: the whole optimizer step captured, not traced - compiled forward, ordinary backward, our gradients, fused update.

Not yet run on a GPU. What is decided when is checked without one, on a device that stands in (tests/graphs/fake_device.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fasttrain.errors import CaptureError, KernelError
from fasttrain.graphs.buckets import Buckets
from fasttrain.graphs.contract import copied
from fasttrain.graphs.device import Device, Graph
from fasttrain.graphs.device_tail import DeviceTail, Moved
from fasttrain.graphs.explain import obstacle_from
from fasttrain.graphs.launches import Launches
from fasttrain.graphs.plan import Plan
from fasttrain.graphs.program import REFUSED, StepOutput, StepSpec, keys_and_values, make_forward
from fasttrain.graphs.recorded import Moment, Recorded, Rest
from fasttrain.graphs.scale import LossScale
from fasttrain.graphs.staging import Staging
from fasttrain.graphs.tail import Tail, frozen, make_tail, owns_zero_grad, step_of, still_moved, trainable_params
from fasttrain.graphs.traced import TracedCall
from fasttrain.graphs.window import Present, WindowGradients
from fasttrain.module import Trainable
from fasttrain.options import Options
from fasttrain.results import Build, Obstacle


class GraphStep:
    """Forward and loss compiled, the backward pass autograd's own, all recorded; same signature as every rung.

    A window of one batch is one graph with its update. Else there is one for a window's first batch, which overwrites the
    gradients, one for the others, which adds, and one for the update. An update that no graph can hold follows as it is.
    """

    rung = "graph"
    takes_closure = False
    moved = (1,)  # one optimizer: update_step says it all
    _window: WindowGradients
    _fused: DeviceTail | None  # the tail, where a graph may hold it

    def __init__(
        self, trainable: Trainable, spec: StepSpec, optimizer: torch.optim.Optimizer, options: Options,
        scaler: LossScale | None, index: int = 0, *, build: Build, device: Device, staging: Staging | None = None,
        launches: Launches | None = None,
    ) -> None:  # fmt: skip
        self._trainable, self._spec, self._optimizer, self._options = trainable, spec, optimizer, options
        self._scaler, self._index, self._device, self._staging = scaler, index, device, staging
        self._launches = launches or Launches(1)
        self._launches.flushed = self.flush
        self.together = 1
        self._waiting: tuple[Recorded, Plan, Moment] | None = None  # whose steps wait
        self._waits = False  # does this one?
        self._earlier: list[StepOutput] = []  # of steps that were launched with this one
        self._divisor_value, self._divisor = 1, torch.tensor(1.0, device=spec.device)
        accumulates = max(options.accumulate_grad_batches.values()) > 1
        self.epoch = 0
        self.trial = False
        self.whole = True  # may a window of one batch be one graph? Not while somebody looks at gradients
        self.moment = Moment(True, ())
        self._finished = self._updated = False
        self._found: list[Obstacle] = []
        self._made: WeakSet[Recorded] = WeakSet()
        self.call = TracedCall(
            make_forward(trainable, spec, index), trainable, spec, build=build, stand_in=self._record, buckets=Buckets(),
            extra=(self._divisor if accumulates else None, None if scaler is None else scaler.tensor),
        )  # fmt: skip
        self.params = self._leaves = trainable_params(optimizer)
        self._bind()

    # -- one optimizer step in two calls ------------------------------------------------------------------------
    def micro_step(self, batch: Any, batch_idx: int, *, first: bool, last: bool, divisor: int, opened: int) -> StepOutput:
        """One batch forward and backward; a window of this one batch is updated too."""
        self._say_divisor(divisor)
        call = self.call
        if call.dirty:
            self._recheck()
        call.count += 1
        self._open(Moment(self.whole and self._fused is not None and first and last and divisor == opened == 1, self._before(first)))
        out = None
        if call.plan is not None and not call.dirty:
            self.together = self._launches.n if self._launches.open and call.plan.returned is None and not call.plan.work else 1
            out = call.plan(batch)
            self.together = 1
        if out is None:
            self._earlier += self.flush()
            # The module's own code may run on it and keep it: not on a slot's memory, which later batches overwrite.
            out = call.guarded(copied(batch) if self._staging is not None and self._staging.fixed else batch, batch_idx)
        if self._waits:
            return StepOutput(None, (), (), None, None)  # it is told with a later one
        out = out if self._finished else self._finish_here(out)
        if self._earlier:
            out, self._earlier = out._replace(earlier=self._earlier), []
        return out

    def flush(self) -> list[StepOutput]:
        """Steps that wait for others run now: what came of them."""
        if self._waiting is None:
            return []
        (recorded, plan, moment), self._waiting = self._waiting, None
        told = [_told(plan, outs) for outs in recorded.flush(moment)]
        self._finished = self._updated = False  # that was theirs
        return told

    def update_step(self, rescale: float) -> int:
        """The fused update, replayed where it can be: 1; REFUSED by an update that the host judges."""
        if self._updated:
            self._updated = False
            return 1
        window, fused = self._window, self._fused
        grads = window.given()
        if fused is None or window.present not in self._updates:
            moved = self.tail.step(grads, rescale, window.loss)
            if fused is not None:
                self._updates[window.present] = None  # one real update has been made: the next is recorded
        else:
            moved = self._replay_update(fused, rescale)
        window.close()
        return 1 if moved else REFUSED

    def refresh(self) -> None:
        """User code ran: check the guards, the addresses and the set of trainable parameters at the next step."""
        self.call.dirty = True

    @property
    def calls(self) -> Sequence[TracedCall]:
        return [self.call]

    @property
    def obstacles(self) -> Sequence[Obstacle]:
        return [*self.call.obstacles, *self._found]

    # -- what a recorded micro-step asks of its step --------------------------------------------------------------
    def finish(self, scaled: Tensor, loss: Tensor, moment: Moment, *, recording: bool) -> Rest:
        """The backward pass and where its gradients go; a whole step's update."""
        grads = self._gradients_of(scaled)
        if not moment.whole:
            return Rest(self._window.put(grads, loss.detach().reshape(()), moment.before), None)
        assert self._fused is not None
        if recording:
            return Rest((), self._fused.launch(grads, loss.detach()))
        self._fused.step(grads, 1.0, loss.detach())
        return Rest((), None)

    def before_replay(self, moment: Moment) -> None:
        if moment.whole:
            assert self._fused is not None
            self._fused.before_replay(1.0)

    def finished(self, moment: Moment, rest: Rest) -> None:
        self._finished, self._updated = True, moment.whole
        if not moment.whole:
            self._window.present = rest.present
        elif rest.moved is not None:
            assert self._fused is not None
            self._fused.after(rest.moved)

    def prepare(self, n: int) -> None:
        if self._fused is not None:
            self._fused.prepare(n)

    def waits(self, recorded: Recorded) -> None:
        assert self.call.plan is not None
        self._waiting, self._waits, self._updated = (recorded, self.call.plan, self.moment), True, True

    def launched(self, earlier: Sequence[list[Any]]) -> None:
        assert self.call.plan is not None
        self._waiting = None
        self._earlier += [_told(self.call.plan, outs) for outs in earlier]

    def refused(self, error: CaptureError) -> None:
        self._found.append(obstacle_from(error))

    # -- how ------------------------------------------------------------------------------------------------------
    def _before(self, first: bool) -> Present:
        return () if first else self._window.present or (False,) * len(self.params)

    def _open(self, moment: Moment) -> None:
        self.moment, self._finished, self._updated, self._waits = moment, False, False, False
        if not moment.whole:
            self._window.make()
            self._window.open = True

    def _finish_here(self, out: StepOutput) -> StepOutput:
        """A batch that ran op by op, or was traced just now: nobody has taken its gradients yet."""
        if self.call.op_by_op:  # the step itself may have frozen or unfrozen something
            self._see_who_trains()
            if self.moment.before:
                self.moment = self.moment._replace(before=self._before(False))
        scaled = out.grads[0] if out.grads else None
        if scaled is None or out.loss is None:  # a batch the module passed over
            if not self.moment.before:
                self._window.load([None] * len(self.params), None)
            return out
        if self.moment.whole:
            self._fused_step(scaled, out.loss)
        else:
            rest = self.finish(scaled, out.loss, self.moment, recording=False)
            self._window.present = rest.present
        values = [v.detach() if isinstance(v, Tensor) else v for v in out.values]
        return out._replace(grads=None, values=values)

    def _fused_step(self, scaled: Tensor, loss: Tensor) -> None:
        assert self._fused is not None
        self._fused.step(self._gradients_of(scaled), 1.0, loss)
        self._updated = True

    def _gradients_of(self, scaled: Tensor) -> list[Tensor | None]:
        leaves = [p for p in self.params if p.requires_grad]  # frozen ones may stand behind them
        found = torch.autograd.grad(scaled, leaves, allow_unused=True)
        if any(g is not None and g.layout is not torch.strided for g in found):
            raise CaptureError("a sparse gradient: the captured update takes dense ones")
        return [*found, *[None] * (len(self.params) - len(leaves))]

    def _record(self, run: Callable[..., Any], plan: Plan) -> Recorded:
        assert plan.differentiated is not None
        assert plan.loss is not None
        slots = [i for i, _ in plan.slots]
        recorded = Recorded(run, slots, plan.read_by_user, plan.differentiated, plan.loss, self, self._device)
        self._made.add(recorded)
        return recorded

    def _replay_update(self, fused: DeviceTail, rescale: float) -> bool:
        window = self._window
        update = self._updates[window.present]
        if update is None:
            grads, launched = window.given(), list[Moved]()
            try:
                graph = self._device.record(lambda: launched.append(fused.launch(grads, window.loss)))
                update = self._updates[window.present] = (graph, launched)
            except CaptureError as error:
                if self.trial:
                    raise
                self.refused(error)
                self._fused = None
                return fused.step(grads, rescale, window.loss)
        graph, launched = update
        fused.before_replay(rescale)
        graph.replay()
        return fused.after(launched[-1])

    def _say_divisor(self, divisor: int) -> None:
        if divisor != self._divisor_value:
            self._divisor_value = divisor
            self._divisor.fill_(divisor)

    def _bind(self) -> None:
        """What depends on which parameters train, and on where their state lies."""
        for recorded in self._made:
            recorded.forget()
        self._step_seen = step_of(self._optimizer)
        self.tail: Tail = make_tail(self._optimizer, self.params, self._options, self._scaler, self._spec.norms, self._spec.pending)
        tail = self.tail
        self._fused = tail if isinstance(tail, DeviceTail) and tail.captures else None
        self._updates: dict[Present, tuple[Graph, list[Moved]] | None] = {}
        self._window = WindowGradients(self.params, self._spec.device)

    def _see_who_trains(self) -> None:
        now, window = trainable_params(self._optimizer), self._window
        if [id(p) for p in now] != [id(p) for p in self._leaves]:
            if not now:
                raise frozen(self._optimizer, f"optimizer {self._index}")
            grads, old, self._leaves = window.given(), self.params, now
            self.params = [*now, *still_moved(old, grads)]
            self.call.bind(make_forward(self._trainable, self._spec, self._index))
            self._rebind(old)

    def _recheck(self) -> None:
        self._see_who_trains()
        if owns_zero_grad(self._optimizer):
            raise CaptureError("the zero_grad of the optimizer was replaced: a recorded step does not call it. Use capture='compile'.")
        self.call.forget_moved()
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.params):
            self.call.failed, self.call.plan = True, None  # only op by op are they called
        if step_of(self._optimizer) != self._step_seen:
            self._rebind(self.params)
        try:
            self.tail.refresh()
        except KernelError:  # another number of groups than was recorded, say
            self._rebind(self.params)

    def _rebind(self, old: Sequence[Tensor]) -> None:
        """Another tail and other gradients, with what an open window has gathered."""
        window = self._window
        by_id = {id(p): g for p, g in zip(old, window.given(), strict=True)}
        self._bind()
        if window.open:
            self._window.load([by_id.get(id(p)) for p in self.params], window.loss)

    # -- for those that try, compare and save ---------------------------------------------------------------------
    def tried(self, on: bool) -> None:
        """After a trial everything is put back, optimizer state too, which graphs have the addresses of: none is kept."""
        self.trial = on
        if not on:
            self._bind()

    def gradients(self) -> dict[str, Tensor]:
        """The open window's gradients by parameter name, for a checkpoint in mid-window."""
        given = self._window.given() if self._window.open else []
        return {n: g for n, g in zip(self.parameter_names(), given, strict=False) if g is not None and n}

    def load_gradients(self, gradients: dict[str, Tensor]) -> None:
        self._window.load([gradients.get(n) for n in self.parameter_names()], None)

    def held(self) -> tuple[Sequence[Tensor | None] | None, Tensor | None]:
        """Copies of the open window's gradients in parameter order, and of its losses' sum."""
        window = self._window
        if not window.open:
            return None, None
        return [None if g is None else g.clone() for g in window.given()], window.loss.clone()

    def hold(self, held: tuple[Sequence[Tensor | None] | None, Tensor | None]) -> None:
        grads, loss = held
        if grads is None:
            self._window.close()
        else:
            self._window.load(grads, loss)

    def parameter_names(self) -> list[str]:
        names = {id(p): n for n, p in self._trainable.module.named_parameters()}
        return [names.get(id(p), "") for p in self.params]

    def untraced(self, batch: Any, batch_idx: int, *, first: bool, divisor: int) -> StepOutput:
        """The same micro-step run op by op: what the captured one is compared with."""
        self._say_divisor(divisor)
        raw = self.call.untraced(batch, batch_idx)
        self._open(Moment(False, self._before(first)))
        return self._finish_here(StepOutput(raw.loss, *keys_and_values(raw.items), raw.returned, raw.grads))


def _told(plan: Plan, outs: Sequence[Any]) -> StepOutput:
    loss = None if plan.loss is None else outs[plan.loss]
    return StepOutput(loss, plan.keys, plan.values(outs), None, None, plan.batch_size)
