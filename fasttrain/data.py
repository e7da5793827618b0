"""Order, length, position and speed of any loader: the batches plain iteration gives, whatever road they take."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset
from torch.utils.data.dataloader import default_collate

from fasttrain.cadence import limited
from fasttrain.errors import DataError, reject

BLOCK_BYTES = 1 << 19  # rows gathered at once: in the cache, and small enough that malloc reuses pages instead of faulting new ones
BLOCK_BATCHES = 128


class Source:
    """One loader of one stage: how many batches, and a fresh pass over them."""

    def __init__(self, loader: Any, *, name: str, limit: int | float, limit_name: str) -> None:
        self.loader, self.name = loader, name
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
        return "tensors" if in_memory_tensors(self.loader) else "loader"

    def set_epoch(self, epoch: int) -> None:
        """Tell every sampler that wants to know."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        inner = getattr(batch_sampler, "sampler", None)
        parts: list[Any] = [self.loader, getattr(self.loader, "sampler", None), batch_sampler, inner, getattr(self.loader, "dataset", None)]
        for part in {id(p): p for p in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def _generators(self) -> list[torch.Generator]:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        parts = (self.loader, getattr(self.loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [g for p in parts if isinstance(g := getattr(p, "generator", None), torch.Generator)]
        return list({id(g): g for g in found}.values())

    def streams(self) -> dict[str, Any]:
        """The states of the loader's own generators, to be saved beside the global random streams."""
        return {"loader": [g.get_state() for g in self._generators()]}

    def set_streams(self, state: Mapping[str, Any]) -> None:
        """Put them back; a loader that has others now keeps them."""
        saved, mine = state.get("loader", []), self._generators()
        for generator, value in zip(mine, saved, strict=True) if len(saved) == len(mine) else ():
            generator.set_state(value.to(torch.uint8))

    def one_pass(self, skip: int = 0) -> Iterator[Any]:
        """One epoch's batches, in plain iteration's order under the same torch seed, from batch ``skip`` on.

        All that skipping draws from the random streams is drawn before this returns.
        """
        fast = in_memory_tensors(self.loader)  # looked at anew: rows may be exchanged between epochs
        if fast is not None:
            return _gathered(self.loader, fast, skip)
        with _no_interrupt():
            iterator = iter(self.loader)
        for _ in range(skip):
            if next(iterator, _END) is _END:
                break
        return self._guarded(iterator)

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
    if isinstance(loader, (str, bytes, Tensor, dict)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise DataError(
            reject(
                name,
                type(loader).__name__,
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
    """Sources of one loader or of a list of loaders; empty when there is none or the limit is 0."""
    if loaders is None or limit == 0:
        return []
    many = isinstance(loaders, (list, tuple)) and any(isinstance(x, DataLoader) or hasattr(x, "dataset") for x in loaders)
    each = list(loaders) if many else [loaders]
    return [Source(x, name=name if len(each) == 1 else f"{name}[{i}]", limit=limit, limit_name=limit_name) for i, x in enumerate(each)]


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


def _gathered(loader: Any, fast: tuple[Sequence[Tensor], Tensor | None], skip: int) -> Iterator[list[Tensor]]:
    """Rows gathered a block of batches at a time; draws from the random streams exactly as the loader would."""
    tensors, rows = fast
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the workers' base seed, drawn by iter(loader)
    order = _order(loader.sampler, len(loader.dataset))
    if rows is not None:
        order = rows if order is None else rows[order]
    return _blocks(loader, tensors, order, skip)


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
