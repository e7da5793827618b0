"""Truncated backpropagation through time: a batch in splits, hidden state handed on detached, an update a split."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fasttrain
from fasttrain import TrainResult
from tests.forms.pairs import BOTH, ROUNDING, Endless, assert_resumes, both, close, made, same_weights, slow, trained

SIZE, LENGTH = 5, 3


def sequences(n: int = 6, steps: int = 7, seed: int = 5) -> list[Tensor]:
    """float[4, 7, 4] each: two splits of three time steps and one of one."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, steps, 4, generator=g) for _ in range(n)]


class Cell(nn.Module):
    """A recurrent cell written out, so that it can be traced."""

    truncated_bptt_steps = LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(4 + SIZE, SIZE), nn.Linear(SIZE, 1)
        self.seen: list[Any] = []

    def through(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = x.new_zeros(x.shape[0], SIZE) if hidden is None else hidden
        for t in range(x.shape[1]):
            hidden = torch.tanh(self.cell(torch.cat([x[:, t], hidden], 1)))
        return hidden, (self.out(hidden) - x.mean((1, 2))[:, None]).square().mean()

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        hidden, loss = self.through(batch, hiddens)
        return {"loss": loss, "hiddens": hidden}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-2)


def by_hand(make: Any, data: Any, *, window: int = 1, clip: float | None = None, splits: Any = None) -> tuple[Any, int]:
    """The loop: splits of a batch in turn; in the last batch of a window every split has its own update."""
    module, steps, data = made(make), 0, list(data)
    optimizer = module.configure_optimizers()
    torch.manual_seed(7)
    cut = splits or (lambda x: [x[:, s : s + LENGTH] for s in range(0, x.shape[1], LENGTH)])
    for _ in range(2):
        for i, batch in enumerate(data):
            length, last, hidden = min(window, len(data) - i // window * window), i % window == window - 1 or i == len(data) - 1, None
            for n, part in enumerate(cut(batch)):
                if (i % window == 0 and n == 0) or (last and n > 0):
                    optimizer.zero_grad()
                hidden, loss = module.through(part, hidden)
                hidden = hidden.detach()
                (loss / length if length > 1 else loss).backward()
                if last:
                    if clip is not None:
                        nn.utils.clip_grad_norm_(module.parameters(), clip)
                    optimizer.step()
                    steps += 1
    return module, steps


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_splits_are_the_loop_by_hand(window: int, clip: float | None) -> None:
    """An uneven last split, windows, clipping: bit for bit, and every update counts."""
    ours = trained(Cell, sequences(), accumulate_grad_batches=window, gradient_clip_val=clip)
    theirs, steps = by_hand(Cell, sequences(), window=window, clip=clip)
    same_weights(ours, theirs)
    assert ours.result.steps == steps


@pytest.mark.parametrize("window", [pytest.param(1, marks=slow), 4])
def test_captured_splits_are_the_loop_by_hand(window: int) -> None:
    """A graph for the first split, one for those behind it, and the short one."""
    ours = trained(Cell, sequences(), "compile", accumulate_grad_batches=window, gradient_clip_val=0.5)
    theirs, steps = by_hand(Cell, sequences(), window=window, clip=0.5)
    assert ours.result.capture.rung == "compile"
    assert ours.result.capture.traces <= 3
    assert ours.result.steps == steps
    same_weights(ours, theirs, ROUNDING)


class OwnSplit(Cell):
    """Four steps, then three."""

    def tbptt_split_batch(self, batch: Tensor, split_size: int) -> list[Tensor]:
        self.seen.append(split_size)
        return [batch[:, :4], batch[:, 4:]]


@pytest.mark.parametrize("capture", BOTH)
def test_a_module_may_split_by_itself(capture: str) -> None:
    """tbptt_split_batch(batch, split_size) decides."""
    ours = trained(OwnSplit, sequences(), capture)
    same_weights(ours, by_hand(Cell, sequences(), splits=lambda x: [x[:, :4], x[:, 4:]])[0], close(capture))
    assert ours.seen == [LENGTH] * 12


@pytest.mark.parametrize("capture", BOTH)
def test_hidden_state_in_a_train_result(capture: str) -> None:
    """TrainResult(minimize=..., hiddens=...) hands it on as a dict does."""

    class Results(Cell):
        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
            hidden, loss = self.through(batch, hiddens)
            return TrainResult(minimize=loss, hiddens=hidden)

    same_weights(trained(Results, sequences(), capture), by_hand(Cell, sequences())[0], close(capture))


class Nested(Cell):
    """An LSTM's state in a dict in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, SIZE, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        self.seen.append(hiddens is None or not any(t.requires_grad for t in hiddens[0]["state"]))
        y, state = self.lstm(batch, None if hiddens is None else hiddens[0]["state"])
        return {"loss": (self.out(y) - 1).square().mean(), "hiddens": ({"state": state}, 1)}


@pytest.mark.parametrize("capture", ["eager", "captured"])
def test_nested_hidden_state_is_detached(capture: str) -> None:
    """Tuples and dicts of tensors come back as they were, cut from their graph."""
    ours = trained(Nested, sequences(), capture)
    module = made(Nested)
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for batch in sequences():
            state = None
            for s in range(0, 7, LENGTH):
                optimizer.zero_grad()
                y, state = module.lstm(batch[:, s : s + LENGTH], state)
                state = tuple(t.detach() for t in state)
                (module.out(y) - 1).square().mean().backward()
                optimizer.step()
    assert all(ours.seen)
    same_weights(ours, module, close("eager" if capture == "eager" else "compile"))


# -- several optimizers -----------------------------------------------------------------------------------------------
class Two(Cell):
    """The cell under one optimizer, a second head under another."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SIZE, 1)

    def losses(self, x: Tensor, hidden: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, loss = self.through(x, hidden)
        return hidden, loss, (self.head(hidden.detach()) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        mine = [*self.cell.parameters(), *self.out.parameters()]
        return [torch.optim.Adam(mine, lr=2e-2), torch.optim.SGD(self.head.parameters(), lr=0.1)]


class TwoIndexed(Two):
    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int, hiddens: Any) -> Any:
        if not torch.compiler.is_compiling():  # a list that grows is another graph
            self.seen.append(hiddens is not None)
        hidden, first, second = self.losses(batch, hiddens)
        return {"loss": (first, second)[optimizer_idx], "hiddens": hidden}


class TwoYielding(Two):
    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        if not torch.compiler.is_compiling():  # a list that grows is another graph
            self.seen.append(hiddens is not None)
        hidden, loss = self.through(batch, hiddens)
        yield {"loss": loss, "hiddens": hidden}
        hidden, loss = self.through(batch, hiddens)
        yield {"loss": (self.head(hidden.detach()) - 1).square().mean(), "hiddens": hidden}


def two_by_hand(window: int) -> tuple[Any, int]:
    module, steps = made(Two), 0
    optimizers = module.configure_optimizers()
    for _ in range(2):
        for i, batch in enumerate(sequences()):
            hidden, length = None, min(window, 6 - i // window * window)
            last = i % window == length - 1
            for n, s in enumerate(range(0, 7, LENGTH)):
                for k, optimizer in enumerate(optimizers):
                    if (i % window == 0 and n == 0) or (last and n > 0):
                        optimizer.zero_grad()
                    after, *losses = module.losses(batch[:, s : s + LENGTH], hidden)
                    (losses[k] / length).backward()
                    if last:
                        optimizer.step()
                steps += last
                hidden = after.detach()
    return module, steps


SEVERAL = {"indexed": TwoIndexed, "generator": TwoYielding}


@pytest.mark.parametrize("form", SEVERAL)
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("capture", BOTH)
def test_several_optimizers_over_splits(form: str, window: int, capture: str) -> None:
    """The last turn's hidden state is handed on; an update a split and optimizer; a window counts batches."""
    ours = trained(SEVERAL[form], sequences(), capture, accumulate_grad_batches=window)
    theirs, steps = two_by_hand(window)
    assert any(ours.seen) or capture == "compile"
    same_weights(ours, theirs, close(capture))
    assert ours.result.steps == steps


@pytest.mark.parametrize("form", SEVERAL)
@pytest.mark.parametrize("at", [2, 3, 5])
def test_several_optimizers_over_splits_resume(form: str, at: int, tmp_path: Path) -> None:
    """In mid-window too."""
    assert_resumes(SEVERAL[form], [at], tmp_path, data=sequences, accumulate_grad_batches=4)


class Closing(Cell):
    """The update is the module's own call."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("capture", BOTH)
def test_a_closure_over_splits(window: int, capture: str) -> None:
    """A closure weighs a split by the batches of its window."""
    ours = trained(Closing, sequences(), capture, accumulate_grad_batches=window)
    theirs, steps = by_hand(Cell, sequences(), window=window)
    same_weights(ours, theirs, close(capture))
    assert ours.result.steps == steps


# -- windows ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capture", BOTH)
@pytest.mark.parametrize("make", [Cell, Closing, TwoIndexed, TwoYielding])
def test_a_stream_closes_its_last_window(make: Any, capture: str) -> None:
    """Six batches in windows of four, of a loader without a length: every split of the last one weighs fully."""
    data = torch.utils.data.DataLoader(Endless(sequences()), batch_size=None)
    ours = trained(make, data, capture, accumulate_grad_batches=4)
    theirs, steps = two_by_hand(4) if issubclass(make, Two) else by_hand(Cell, sequences(), window=4)
    same_weights(ours, theirs, max(1e-6, close(capture)))  # divided by 4 and multiplied by 2, not divided by 2
    assert ours.result.steps == steps


@pytest.mark.parametrize("window", [1, 4])
def test_a_run_over_splits_resumes(window: int, tmp_path: Path) -> None:
    """At any batch, in mid-window too."""
    assert_resumes(Cell, range(1, 12), tmp_path, data=sequences, accumulate_grad_batches=window)


@slow
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("at", [2, 4, 9])
def test_a_captured_run_over_splits_resumes(at: int, window: int, tmp_path: Path) -> None:
    """Bit for bit: what ran captured before the save runs captured after it, and what did not does not."""
    assert_resumes(Cell, [at], tmp_path, "compile", data=sequences, accumulate_grad_batches=window)


# -- batches ----------------------------------------------------------------------------------------------------------
def test_what_is_cut_and_what_is_not() -> None:
    """Dim 1 of every tensor with one, the rows of lists; numbers a sample and texts go whole into every split."""

    class Looks(Cell):
        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
            self.seen.append(
                (batch["x"].shape[1], batch["y"].shape[1], batch["n"].shape[0], batch["text"], [len(r) for r in batch["rows"]])
            )
            return super().training_step(batch["x"], batch_idx, hiddens)

    batch = {"x": torch.randn(4, 7, 4), "y": torch.randn(4, 7), "n": torch.ones(4), "text": "a", "rows": [[0] * 7 for _ in range(4)]}
    assert trained(Looks, [batch], max_epochs=1).seen[-3:] == [(n, n, 4, "a", [n] * 4) for n in (3, 3, 1)]


def test_outputs_of_every_split_reach_the_end_of_a_batch() -> None:
    """A list, in order."""

    class Ends(Cell):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append([sorted(o) for o in outputs])

    assert trained(Ends, sequences(1), max_epochs=1).seen == [[["hiddens", "loss"]] * 3]


def test_every_split_logs() -> None:
    """The epoch's mean is over all of them."""

    class Logs(Cell):
        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
            self.log("steps", float(batch.shape[1]), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx, hiddens)

    assert trained(Logs, sequences(2), max_epochs=1).result.metrics["steps"] == pytest.approx((3 + 3 + 1) / 3)


# -- what is refused --------------------------------------------------------------------------------------------------
class NoArgument(Cell):
    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return self.through(batch, None)[1]


class NotReturned(Cell):
    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
        return self.through(batch, hiddens)[1]


class NoLength(Cell):
    truncated_bptt_steps = 0


class OddLength(Cell):
    truncated_bptt_steps = 2.5  # type: ignore[assignment]


class ByHand(Cell):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (NoArgument, "takes no 'hiddens'"),
        (NotReturned, r"3 splits and no hiddens"),
        (NoLength, "truncated_bptt_steps is not set"),
        (OddLength, "an integer >= 1"),
        (ByHand, "automatic_optimization=False. Split the batch"),
    ],
)
def test_modules_that_do_not_go_with_splits(make: Any, words: str) -> None:
    """Said before anything is trained."""
    with pytest.raises(fasttrain.ModuleError, match=words):
        trained(make, sequences())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.randn(4, 7, 4), torch.randn(4, 5, 2)), r"\[5, 7\]"),
        ((torch.randn(4),), "none"),
        (torch.randn(4, 0, 4), "none"),
    ],
)
def test_batches_that_cannot_be_split(batch: Any, words: str) -> None:
    """Times that differ, no time at all: with the batch's shapes, and what to define."""
    with pytest.raises(fasttrain.DataError, match=rf"(?s){words}.*tbptt_split_batch"):
        trained(Cell, [batch])


def test_a_later_batch_that_cannot_be_split() -> None:
    """The same sentence in mid-run."""

    class First(Cell):
        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
            return super().training_step(batch[0], batch_idx, hiddens)

    good, bad = (torch.randn(4, 7, 4), torch.randn(4, 7, 2)), (torch.randn(4, 7, 4), torch.randn(4, 5, 2))
    with pytest.raises(fasttrain.DataError, match=r"\[5, 7\]"):
        trained(First, [good, good, bad])


# -- variable lengths, without splits ---------------------------------------------------------------------------------
class Packed(Cell):
    """A PackedSequence in the place of a batch."""

    truncated_bptt_steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, SIZE)

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return (self.out(self.lstm(batch)[1][0]) - 1).square().mean()


class Listed(Cell):
    """A list of sequences of every length in the place of a batch."""

    truncated_bptt_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        rows = [torch.tanh(self.cell(torch.cat([x.mean(0), x.new_zeros(SIZE)]))) for x in batch]
        return (self.out(torch.stack(rows)) - 1).square().mean()


def ragged(packed: bool) -> list[Any]:
    g, lengths = torch.Generator().manual_seed(2), random.Random(3)
    out = []
    for _ in range(6):
        rows = [torch.randn(n, 4, generator=g) for n in sorted((lengths.randint(1, 5) for _ in range(3)), reverse=True)]
        out.append(pack_sequence(rows) if packed else rows)
    return out


@pytest.mark.parametrize("make", [Packed, pytest.param(Listed, marks=slow)])
def test_sequences_of_every_length(make: Any) -> None:
    """A plain loop's weights, eagerly and captured."""
    packed = make is Packed
    ours, _ = both(make, lambda: ragged(packed), capture="captured")
    module = made(make)
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for batch in ragged(packed):
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
    same_weights(ours, module)
