"""The batches: in plain iteration's order, whatever road they take, and the random streams left as it leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset, TensorDataset

from fasttrain import DataError
from fasttrain.data import END, Lookahead, Source, in_memory_tensors


def tensors(n: int, *, dims: int = 2) -> TensorDataset:
    x = torch.arange(n * 3, dtype=torch.float32).reshape(n, 3) if dims == 2 else torch.arange(n, dtype=torch.float32)
    return TensorDataset(x, torch.arange(n))


def source(loader: Any, limit: int | float = 1.0) -> Source:
    return Source(loader, name="train_dataloaders", limit=limit, limit_name="limit_train_batches")


def drain(batches: Any) -> list[Any]:
    return [[t.clone() for t in b] if isinstance(b, (list, tuple)) else b for b in batches]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        type(a) is type(b) and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def through(loader: Any, epochs: int = 2) -> list[Any]:
    """All batches as the loop takes them."""
    made, out = source(loader), []
    for _ in range(epochs):
        ahead = Lookahead(made.one_pass(), made.batches, made.total)
        while (batch := ahead()) is not END:
            out.append([t.clone() for t in batch])
    return out


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(1, 9),
    shuffle=st.booleans(),
    drop=st.booleans(),
    dims=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    own=st.booleans(),
    subset=st.booleans(),
    epochs=st.integers(1, 3),
)
def test_the_fast_road_is_plain_iteration(
    n: int, size: int, shuffle: bool, drop: bool, dims: int, seed: int, own: bool, subset: bool, epochs: int
) -> None:
    """Same batches, same types, same state of the global stream and of a generator of its own, for any loader over tensors."""

    def make() -> DataLoader:
        data: Any = tensors(n, dims=dims)
        if subset:
            data = Subset(Subset(data, list(range(n))[::-1]), list(range(0, n, 2)))
        generator = torch.Generator().manual_seed(seed + 1) if own else None
        return DataLoader(data, batch_size=size, shuffle=shuffle, drop_last=drop, generator=generator)

    if len(make()) == 0:
        return
    assert source(make()).road == "tensors"
    plain, fast = make(), make()
    torch.manual_seed(seed)
    expected = [b for _ in range(epochs) for b in drain(plain)]
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    assert same(through(fast, epochs), expected)
    assert torch.equal(torch.get_rng_state(), after)
    if own:
        assert torch.equal(plain.generator.get_state(), fast.generator.get_state())


@pytest.mark.parametrize("skip", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", ["tensors", "dataset", "workers"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_pass_that_skips_gives_the_rest_of_the_same_pass(kind: str, shuffle: bool, skip: int) -> None:
    """one_pass(skip) is what was left: no batch twice, none lost."""
    loader = DataLoader(tensors(17) if kind == "tensors" else Rows(17), batch_size=3, shuffle=shuffle, num_workers=int(kind == "workers"))
    made = source(loader)
    torch.manual_seed(4)
    whole = drain(made.one_pass())
    torch.manual_seed(4)
    assert same(drain(made.one_pass(skip)), whole[skip:])


class Rows(Dataset):
    """Like the tensors, but a dataset of its own."""

    def __init__(self, n: int) -> None:
        self.data = tensors(n)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.data[i]


class Noisy(Rows):
    """A dataset that draws from the global stream, as augmentation does."""

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.data[i][0] + torch.rand(()), self.data[i][1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [Rows, Noisy])
def test_other_loaders_are_iterated_as_they_are(make: type, workers: int) -> None:
    """Any DataLoader gives what plain iteration gives, with workers and with augmentation, the stream left as it leaves it."""

    def loader() -> DataLoader:
        return DataLoader(make(11), batch_size=4, shuffle=True, num_workers=workers)

    assert source(loader()).road == "loader"
    torch.manual_seed(2)
    plain = loader()
    expected = [b for _ in range(2) for b in drain(plain)]
    after = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(through(loader()), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("limit", [1, 3, 6])
@pytest.mark.parametrize("make", [tensors, Rows, Noisy])
def test_a_limit_cuts_the_pass_and_nothing_else(make: Any, limit: int) -> None:
    """A pass ended early gives the first batches, and leaves the stream as a plain loop that breaks leaves it."""

    def loader() -> DataLoader:
        return DataLoader(make(17), batch_size=3, shuffle=True)

    torch.manual_seed(2)
    expected = []
    for _ in range(2):
        for i, batch in enumerate(loader()):
            if i >= limit:
                break
            expected.append(batch)
            if i + 1 == limit < 6:
                break
    after = torch.get_rng_state()
    torch.manual_seed(2)
    out = []
    for _ in range(2):
        made = source(loader(), limit)
        ahead = Lookahead(made.one_pass(), made.batches, made.total)
        while (batch := ahead()) is not END:
            out.append(batch)
    assert same(out, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_batches_are_the_users_to_write_into() -> None:
    """Writing into a batch changes neither the dataset nor the next batch."""
    for shuffle in (True, False):
        data = tensors(12)
        before = data.tensors[0].clone()
        for batch in source(DataLoader(data, batch_size=4, shuffle=shuffle)).one_pass():
            batch[0].fill_(-1.0)
            batch[1].zero_()
        assert torch.equal(data.tensors[0], before)


def _custom_sampler() -> DataLoader:
    return DataLoader(tensors(12), batch_size=4, sampler=[3, 1, 2, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(tensors(12), batch_size=4, collate_fn=lambda rows: [torch.stack([r[0] for r in rows])]),
        lambda: DataLoader(tensors(12), batch_size=4, num_workers=1),
        _custom_sampler,
        lambda: DataLoader(tensors(12), batch_sampler=BatchSampler(SequentialSampler(range(12)), 4, False)),
        lambda: DataLoader(tensors(12), batch_size=None),
        lambda: DataLoader(tensors(12), batch_size=4, sampler=RandomSampler(range(12), replacement=True)),
        lambda: DataLoader(tensors(12), batch_size=4, sampler=RandomSampler(range(12), num_samples=6)),
        lambda: DataLoader(
            type("Doubled", (TensorDataset,), {"__getitem__": lambda s, i: tuple(2 * t[i] for t in s.tensors)})(*tensors(12).tensors),
            batch_size=4,
        ),
        lambda: DataLoader(Subset(Rows(12), [1, 2]), batch_size=2),
        lambda: DataLoader(
            type("Mine", (Subset,), {"__getitem__": lambda s, i: s.dataset[0], "__getitems__": None})(tensors(12), [1, 2]), batch_size=2
        ),
        lambda: DataLoader(type("Loader", (DataLoader,), {})(tensors(12), batch_size=4).dataset, batch_size=4, worker_init_fn=print),
        lambda: type("Loader", (DataLoader,), {"__iter__": lambda s: iter([[torch.zeros(1)]])})(tensors(12), batch_size=4),
    ],
)
def test_whatever_is_not_plain_takes_the_plain_road(make: Any) -> None:
    """A collate function, workers, samplers, subclasses with their own rows: the user's code is called, whatever the road."""
    torch.manual_seed(1)
    expected = drain(make())
    torch.manual_seed(1)
    loader = make()
    assert same(drain(source(loader).one_pass()), expected)


def test_the_fast_road_asks_for_plain_cpu_tensors() -> None:
    """Rows that carry a gradient or are sparse stay with the loader."""
    assert in_memory_tensors(DataLoader(TensorDataset(torch.zeros(4, 2, requires_grad=True)), batch_size=2)) is None
    assert in_memory_tensors(DataLoader(TensorDataset(torch.eye(4).to_sparse()), batch_size=2)) is None
    assert in_memory_tensors(DataLoader(tensors(4), batch_size=2)) is not None


def test_set_epoch_reaches_every_sampler() -> None:
    """A sampler with set_epoch hears of the epoch before its pass."""

    class Sampler(SequentialSampler):
        epochs: list[int] = []  # noqa: RUF012 - shared on purpose

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    made = source(DataLoader(tensors(4), batch_size=2, sampler=Sampler(range(4))))
    made.set_epoch(3)
    assert Sampler.epochs == [3]


class Endless(IterableDataset):
    """A stream without a length that ends after n rows."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        return iter(torch.arange(self.n).float())


@pytest.mark.parametrize(("n", "limit", "given"), [(6, 1.0, 3), (6, 2, 2), (6, 3, 3), (6, 9, 3), (5, 1.0, 3), (0, 1.0, 0)])
def test_the_last_batch_of_a_stream_is_known_as_the_last(n: int, limit: int | float, given: int) -> None:
    """Whether it is the limit or the stream that ends: .last is True at the last batch and only there."""
    made = source(DataLoader(Endless(n), batch_size=2), limit)
    ahead = Lookahead(made.one_pass(), made.batches, made.total)
    lasts = []
    while ahead() is not END:
        lasts.append(ahead.last)
    assert lasts == [False] * (given - 1) + [True] * bool(given)


def test_a_stream_limited_to_n_is_read_no_further() -> None:
    """limit_train_batches=2 of an endless stream pulls two batches, not three."""
    pulled = []

    def stream() -> Any:
        for i in range(10):
            pulled.append(i)
            yield torch.zeros(1)

    class Again:
        def __iter__(self) -> Any:
            return stream()

    made = source(Again(), 2)
    ahead = Lookahead(made.one_pass(), made.batches, made.total)
    while ahead() is not END:
        pass
    assert pulled == [0, 1]


def test_a_dead_worker_is_named() -> None:
    """A worker that is killed ends the run with a DataError that says what to do."""

    class Dies(Rows):
        def __getitem__(self, i: int) -> Any:
            import os

            os._exit(1)

    made = source(DataLoader(Dies(4), batch_size=2, num_workers=1))
    with pytest.raises(DataError, match=r"worker died.*num_workers"):
        list(made.one_pass())


def test_rows_exchanged_between_passes_are_seen() -> None:
    """Another dataset.tensors or Subset.indices, set between two epochs, is what the next pass gives."""
    data = tensors(8)
    chosen = Subset(data, [0, 1, 2, 3])
    made = source(DataLoader(chosen, batch_size=4))
    list(made.one_pass())
    chosen.indices = [4, 5, 6, 7]
    assert next(iter(made.one_pass()))[1].tolist() == [4, 5, 6, 7]
    data.tensors = tuple(t + 1 for t in data.tensors)
    assert next(iter(made.one_pass()))[1].tolist() == [5, 6, 7, 8]
