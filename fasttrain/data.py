"""Order, length, position and speed of any loader: the batches plain iteration gives, whatever road they take."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate

from fasttrain.cadence import limited
from fasttrain.combined import CombinedLoader, as_combined
from fasttrain.errors import DataError, reject
from fasttrain.state import rng_state, set_rng_state

BLOCK_BYTES = 1 << 19  # rows gathered at once: in the cache, and small enough that malloc reuses pages instead of faulting new ones
BLOCK_BATCHES = 128


class Source:
    """One loader of one stage, or several as one: how many batches, and a fresh pass over them."""

    total: float  # batches in a pass, inf when nobody can say
    batches: float  # of them, those within the limit
    workers: int

    def __init__(self, loader: Any, *, name: str, limit: int | float, limit_name: str) -> None:
        self.loader, self.name = loader, name
        self.parts: list[Source] = [self]  # the plain loaders it is made of
        self._restarts: dict[int, tuple[int, dict[str, Any]]] = {}  # of this pass: how often part i began anew, and the streams before
        if isinstance(loader, CombinedLoader):
            named = zip(loader.loaders, loader.paths, strict=True)
            self.parts = [Source(x, name=name + path, limit=limit, limit_name=limit_name) for x, path in named]
            self.total, self.batches = loader.size([p.total for p in self.parts]), loader.size([p.batches for p in self.parts])
            self.workers = sum(p.workers for p in self.parts)
            return
        check_loader(loader, name)
        self.total = length_of(loader)
        if self.total == 0:
            raise DataError(
                reject(name, "an empty loader", "at least one batch", "Look at the dataset's length, batch_size and drop_last.")
            )
        self.batches = limited(limit_name, self.total, limit)
        self.workers = int(getattr(loader, "num_workers", 0) or 0)

    @property
    def road(self) -> str:
        """ "tensors" when rows are gathered straight from memory, else "loader"."""
        return "tensors" if all(in_memory_tensors(p.loader) for p in self.parts) else "loader"

    def set_epoch(self, epoch: int) -> None:
        """Tell every sampler that wants to know."""
        self._restarts = {}
        pieces = [piece for p in self.parts for piece in (*_pieces(p.loader), getattr(p.loader, "dataset", None))]
        for piece in {id(p): p for p in pieces}.values():
            if callable(getattr(piece, "set_epoch", None)):
                piece.set_epoch(epoch)

    def _generators(self) -> list[torch.Generator]:
        pieces = [piece for p in self.parts for piece in _pieces(p.loader)]
        found = [g for p in pieces if isinstance(g := getattr(p, "generator", None), torch.Generator)]
        return list({id(g): g for g in found}.values())

    def streams(self) -> dict[str, Any]:
        """The states of the loaders' own generators, to be saved beside the global random streams, and where loaders began anew."""
        return self._own_streams() | ({"restarts": [[i, *r] for i, r in self._restarts.items()]} if self._restarts else {})

    def _own_streams(self) -> dict[str, Any]:
        return {"loader": [g.get_state() for g in self._generators()]}

    def set_streams(self, state: Mapping[str, Any]) -> None:
        """Put them back; a loader that has others now keeps them."""
        saved, mine = state.get("loader", []), self._generators()
        for generator, value in zip(mine, saved, strict=True) if len(saved) == len(mine) else ():
            generator.set_state(value.to(torch.uint8))

    def one_pass(self, skip: int = 0, resumed: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """One epoch's batches, in plain iteration's order under the same torch seed, from batch ``skip`` on.

        All that skipping draws from the random streams is drawn before this returns. ``resumed``: the ``streams`` of the
        pass of which this is the rest.
        """
        if isinstance(self.loader, CombinedLoader):
            iterator = self._combined(self.loader, (resumed or {}).get("restarts", []))
        elif (fast := in_memory_tensors(self.loader)) is not None:  # looked at anew: rows may be exchanged between epochs
            return _gathered(self.loader, fast, skip)
        else:
            iterator = self._guarded(self._begun())
        for _ in range(skip):
            if next(iterator, _END) is _END:
                break
        return iterator

    def _combined(self, loader: CombinedLoader, restarts: Sequence[Any]) -> Iterator[Any]:
        known = {i: (count, state) for i, count, state in restarts}
        self._restarts = {}

        def again(i: int) -> Iterator[Any]:
            count = self._restarts[i][0] + 1 if i in self._restarts else 1
            if i in known and known[i][0] == count:  # it began in the saved run, after draws that are not made again
                set_rng_state(known[i][1])
                self.set_streams(known[i][1])
            self._restarts[i] = (count, rng_state() | self._own_streams())
            return self.parts[i].beside_others()

        return loader.batches(lambda i: self.parts[i].beside_others(), again, [p.batches for p in self.parts], self.total)

    def beside_others(self) -> Iterator[Any]:
        """A pass that draws its order with its first batch, as a DataLoader does, so that other loaders may draw before."""
        fast = None if self._generators() else in_memory_tensors(self.loader)
        return self._guarded(self._begun()) if fast is None else _gathered(self.loader, fast, 0, late=True)

    def _begun(self) -> Iterator[Any]:
        with _no_interrupt():
            return iter(self.loader)

    def _guarded(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
                    raise DataError(
                        f"{self.name}: a loader worker died ({error}). Out of memory is the usual cause: "
                        "lower num_workers or the batch size, or try num_workers=0 to see the error."
                    ) from error
                raise
            yield batch


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started within never hear of ctrl-C, which a terminal sends to all: the run still wants their batches."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_END = object()


class Lookahead:
    """An iterator that knows whether the batch it just gave was the last; reads ahead only where no length tells."""

    def __init__(self, batches: Iterator[Any], limit: float, total: float, start: int = 0) -> None:
        self._batches, self._limit, self._total = batches, limit, total
        self._known = known = total != math.inf
        self.given = start
        self._next = _END if known or start >= limit else next(batches, _END)

    def __call__(self) -> Any:
        """The next batch, or ``END``."""
        if self.given >= self._limit:
            if self._limit == self._total:
                next(self._batches, _END)  # a plain loop exhausts its iterator too: workers end, generators advance
            return END
        batch = next(self._batches, _END) if self._known else self._next
        if batch is _END:
            return END
        self.given += 1
        if not self._known:
            self._next = next(self._batches, _END) if self.given < self._limit else _END
        return batch

    @property
    def last(self) -> bool:
        return self.given >= self._limit or (not self._known and self._next is _END)


END: Any = _END


def _pieces(loader: Any) -> list[Any]:
    """The loader, and what may order its rows."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def in_order(loader: Any) -> Any:
    """The loader without its shuffling: the same in every other respect."""
    if isinstance(loader, CombinedLoader):
        return loader.with_loaders([in_order(x) for x in loader.loaders])
    if not is_shuffled(loader):
        return loader
    new, sampler = copy.copy(loader), SequentialSampler(loader.dataset)
    vars(new).update(sampler=sampler, _iterator=None)  # DataLoader.__setattr__ forbids it once it is made
    if type(loader.batch_sampler) is BatchSampler:
        vars(new)["batch_sampler"] = BatchSampler(sampler, loader.batch_size, loader.drop_last)
    return new


def is_shuffled(loader: Any) -> bool:
    """Does it draw the rows of a dataset in another order than theirs? Of several: does one?"""
    if isinstance(loader, CombinedLoader):
        return any(map(is_shuffled, loader.loaders))
    rows = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return rows and not isinstance(loader.sampler, SequentialSampler)


def check_loader(loader: Any, name: str) -> None:
    """Raise DataError for what is not an iterable of batches, a dataset above all."""
    if isinstance(loader, Dataset):
        raise DataError(
            reject(
                name,
                f"a dataset ({type(loader).__name__})",
                "an iterable of batches",
                f"Wrap it: torch.utils.data.DataLoader({name.split('_')[0]}_set, batch_size=32).",
            )
        )
    if isinstance(loader, (str, bytes, Tensor, Mapping)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise DataError(
            reject(
                name,
                "an empty dict" if isinstance(loader, Mapping) and not loader else type(loader).__name__,
                "a DataLoader or another iterable of batches",
                "For tensors: DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True).",
            )
        )
    if isinstance(loader, Iterator):
        raise DataError(
            reject(
                name,
                f"a one-time iterator ({type(loader).__name__})",
                "something each epoch can iterate again",
                "Give the DataLoader itself, or a list of batches.",
            )
        )


def length_of(loader: Any) -> float:
    """Batches in one pass, ``inf`` when the loader cannot say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError, AttributeError):
        return math.inf


def as_sources(loaders: Any, *, name: str, limit: int | float, limit_name: str) -> list[Source]:
    """Sources of one loader, or of each of several that follow one another; empty when there is none or the limit is 0."""
    if loaders is None or limit == 0:
        return []
    source = Source(as_combined(loaders, "sequential"), name=name, limit=limit, limit_name=limit_name)
    return source.parts if isinstance(source.loader, CombinedLoader) and source.loader.mode == "sequential" else [source]


def in_memory_tensors(loader: Any) -> tuple[list[Tensor], Tensor | None] | None:
    """The tensors behind a plain DataLoader over a TensorDataset (and a Subset's rows), or None when anything is custom."""
    if type(loader) is not DataLoader or loader.num_workers or loader.pin_memory or loader.collate_fn is not default_collate:
        return None
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:  # a batch_sampler was given: the order is its own
        return None
    if type(loader.sampler) not in (SequentialSampler, RandomSampler):
        return None
    if isinstance(loader.sampler, RandomSampler) and (loader.sampler.replacement or loader.sampler._num_samples is not None):
        return None
    dataset, rows, sampler = loader.dataset, None, cast(Any, loader.sampler)
    while type(dataset) is Subset:
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        rows = indices if rows is None else indices[rows]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or sampler.data_source is not loader.dataset:
        return None
    plain = all(t.device.type == "cpu" and t.layout == torch.strided and not t.requires_grad and type(t) is Tensor for t in dataset.tensors)
    return (list(dataset.tensors), rows) if plain and dataset.tensors else None


def _gathered(loader: Any, fast: tuple[Sequence[Tensor], Tensor | None], skip: int, *, late: bool = False) -> Iterator[list[Tensor]]:
    """Rows gathered a block of batches at a time; draws from the random streams exactly as the loader would.

    ``late``: the order is drawn with the first batch, not now.
    """
    tensors, rows = fast
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the workers' base seed, drawn by iter(loader)

    def blocks() -> Iterator[list[Tensor]]:
        order = _order(loader.sampler, len(loader.dataset))
        if rows is not None:
            order = rows if order is None else rows[order]
        return _blocks(loader, tensors, order, skip)

    def later() -> Iterator[list[Tensor]]:
        yield from blocks()

    return later() if late else blocks()


def _blocks(loader: Any, tensors: Sequence[Tensor], order: Tensor | None, skip: int) -> Iterator[list[Tensor]]:
    size, n = loader.batch_size, len(loader.dataset)
    end = n - n % size if loader.drop_last else n
    row_bytes = max(1, sum(t[0].numel() * t.element_size() for t in tensors))
    block = size * max(1, min(BLOCK_BATCHES, BLOCK_BYTES // (row_bytes * size)))
    take = _taker(order)
    for start in range(skip * size, end, block):
        stop = min(start + block, end)
        parts = [torch.split(take(t, start, stop), size) for t in tensors]
        for batch in zip(*parts, strict=True):
            yield list(batch)
    if getattr(loader.sampler, "generator", None) is not None:
        torch.randperm(n, generator=loader.sampler.generator)  # RandomSampler draws an empty tail when it is exhausted


def _order(sampler: Any, n: int) -> Tensor | None:
    """The epoch's order as the sampler draws it: seed from the global stream, permutation from a generator of its own."""
    if isinstance(sampler, SequentialSampler):
        return None
    generator = sampler.generator
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return torch.randperm(n, generator=generator)


def _taker(order: Tensor | None) -> Callable[[Tensor, int, int], Tensor]:
    if order is None:
        return lambda t, start, stop: t[start:stop].clone(memory_format=torch.contiguous_format)
    return lambda t, start, stop: t.index_select(0, order[start:stop])
