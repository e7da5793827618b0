"""Several loaders as one, and loaders asked for anew: batch for batch what Lightning gives, resumed bit for bit."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.fetchers import _PrefetchDataFetcher
from pytorch_lightning.utilities.combined_loader import CombinedLoader as Theirs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from fasttrain import CombinedLoader, DataError, FasttrainWarning, OptionError, compile_fit
from fasttrain.callbacks.callback import Checkpoint
from fasttrain.combined import as_combined
from fasttrain.data import END, Lookahead, Source, in_order
from fasttrain.state import rng_state, set_rng_state
from tests.parity import modules as m
from tests.parity.harness import BARE, Case, Outcome, assert_same_metrics, assert_same_weights, fast_fit, lightning_fit

MODES = ["max_size_cycle", "min_size", "max_size", "sequential"]
TOGETHER = MODES[:3]  # those Lightning trains with
Pair = namedtuple("Pair", "first second")


class Noisy(Dataset):
    """Rows with noise drawn from the global stream, as augmentation does."""

    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = m.rows(n, seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.01 * torch.randn(m.WIDTH), self.y[i]


class Stream(IterableDataset):
    """Rows one by one, without a length."""

    def __init__(self, n: int, seed: int = 5) -> None:
        self.x, self.y = m.rows(n, seed)

    def __iter__(self) -> Any:
        return iter(list(zip(self.x, self.y, strict=True)))


def short(kind: str = "tensors") -> DataLoader:
    """Three batches, shuffled."""
    return _loader(kind, 11, 4, 21)


def long(kind: str = "tensors") -> DataLoader:
    """Seven batches, shuffled."""
    return _loader(kind, 20, 3, 22)


def _loader(kind: str, n: int, size: int, seed: int) -> DataLoader:
    if kind == "stream":
        return DataLoader(Stream(n, seed), size)
    data = Noisy(n, seed) if kind in ("dataset", "workers") else TensorDataset(*m.rows(n, seed))
    generator = torch.Generator().manual_seed(seed) if kind == "own" else None
    return DataLoader(data, size, shuffle=True, num_workers=int(kind == "workers"), generator=generator)


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda a, b: {"b": b, "a": a},  # not in the order of the alphabet
    "list": lambda a, b: [a, b],
    "one": lambda a, b: [b],
    "nested": lambda a, b: {"first": [a, {"x": b}], "second": (a, b)},
    "named": lambda a, b: Pair(a, b),
    "ordered": lambda a, b: OrderedDict(b=b, a=a),
}


def source(loader: Any, limit: int | float = 1.0) -> Source:
    return Source(loader, name="train_dataloaders", limit=limit, limit_name="limit_train_batches")


def passes(made: Source, epochs: int = 2) -> list[Any]:
    """All batches as the loop takes them."""
    out = []
    for epoch in range(epochs):
        made.set_epoch(epoch)
        ahead = Lookahead(made.one_pass(), made.batches, made.total)
        while (batch := ahead()) is not END:
            out.append(batch)
    return out


def form(batch: Any) -> Any:
    """The batch with sizes in the tensors' places."""
    if isinstance(batch, Tensor):
        return float(batch.double().sum())
    if isinstance(batch, dict):
        return type(batch)((k, form(v)) for k, v in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(form, batch))
    return type(batch)(map(form, batch)) if isinstance(batch, (list, tuple)) else batch


# -- the batches ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["tensors", "dataset", "own"])
def test_iterating_gives_lightnings_batches(kind: str, name: str, mode: str) -> None:
    """In every mode and form, from one seed: the same batches, length and random stream after two passes."""
    ours, theirs = CombinedLoader(FORMS[name](short(kind), long(kind)), mode), Theirs(FORMS[name](short(kind), long(kind)), mode)
    torch.manual_seed(3)
    expected = [form(batch) for _ in range(2) for batch, _, _ in theirs]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert [form(batch) for _ in range(2) for batch in ours] == expected
    assert torch.equal(torch.get_rng_state(), after)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize(
    ("mode", "length", "limited"), [("max_size_cycle", 7, 3), ("min_size", 3, 1), ("max_size", 7, 3), ("sequential", 10, 4)]
)
def test_lengths_and_limits_are_lightnings(mode: str, length: int, limited: int) -> None:
    """Longest, shortest or sum; a share is taken of each loader, an int caps each."""
    loader = CombinedLoader([short(), long()], mode)
    assert source(loader).batches == length
    assert source(loader, 0.5).batches == limited
    assert source(loader, 2).batches == (4 if mode == "sequential" else 2)
    assert [p.batches for p in source(loader, 5).parts] == [3, 5]
    assert source(loader).workers == 0
    assert source(CombinedLoader([short("workers"), long("workers")], mode)).workers == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tensors", "dataset", "own", "stream"])
@pytest.mark.parametrize("limit", [1.0, 2])
def test_a_source_of_several_gives_what_lightnings_fetcher_gives(kind: str, mode: str, limit: int | float) -> None:
    """Through the fast road too: the order of every loader, cycled ones included, and the stream after each pass."""
    made, theirs = source(CombinedLoader([short(kind), long(kind)], mode), limit), Theirs([short(kind), long(kind)], mode)
    theirs.limits = [p.batches for p in made.parts]
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(theirs)
    torch.manual_seed(3)
    expected = [form(batch) for _ in range(2) for batch, _, _ in fetcher]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert [form(b) for b in passes(made)] == expected
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("skip", [0, 1, 2, 3, 5, 6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tensors", "dataset", "own", "stream"])
def test_a_pass_that_skips_gives_the_rest_of_the_same_pass(kind: str, mode: str, skip: int) -> None:
    """Also where loaders began anew in the part that is skipped, after draws of others that are not made again."""

    def through(batches: Any, state: dict[str, Any] | None = None) -> list[Any]:
        given = []
        if state is not None:
            set_rng_state(state)
        for batch in batches:
            given.append((form(batch), float(torch.rand(7).sum())))
            states.append(rng_state() | made.streams())
        return given

    torch.manual_seed(4)
    made = source(CombinedLoader([short(kind), long(kind)], mode))
    begun = made.streams()
    pass_ = made.one_pass()
    states = [rng_state() | made.streams()]
    whole = through(pass_)
    if skip >= len(whole):
        return
    state, made = states[skip], source(CombinedLoader([short(kind), long(kind)], mode))
    torch.manual_seed(4)
    made.set_streams(begun)
    rest = made.one_pass(skip, state)
    made.set_streams(state)
    assert through(rest, state) == whole[skip:]


def test_what_is_several_loaders_and_what_is_a_list_of_batches() -> None:
    """A list that holds loaders is several; one that holds batches is one loader, of that many batches."""
    x, y = m.rows(4)
    for batches in ([(x, y), (x, y)], [x, y], ((x, y),), [{"x": x}, {"x": x}], [x.numpy()], [[x], [y]], []):
        assert as_combined(batches, "min_size") is batches
    for several in ([short()], (short(), [(x, y)]), {"a": [(x, y)]}, [range(3)], [{"a": short()}], Theirs([short()])):
        assert isinstance(as_combined(several, "min_size"), CombinedLoader)
    assert [form(b) for b in CombinedLoader({"a": [x, y], "b": [y]}, "min_size")] == [{"a": form(x), "b": form(y)}]
    assert as_combined(Theirs([short()], "max_size"), "min_size").mode == "max_size"


def test_set_epoch_reaches_every_loader() -> None:
    """Each loader's sampler hears of it, once where two loaders share it."""

    class Sampler(SequentialSampler):
        def __init__(self, rows: Any) -> None:
            super().__init__(rows)
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = TensorDataset(*m.rows(4))
    samplers = [Sampler(data), Sampler(data)]
    loaders = [DataLoader(data, 2, sampler=s) for s in samplers] + [DataLoader(data, 4, sampler=samplers[0])]
    source(CombinedLoader(loaders)).set_epoch(3)
    assert [s.epochs for s in samplers] == [[3], [3]]


def test_without_shuffling_a_loader_is_the_same_in_all_else() -> None:
    """Its class, workers, collate function and batch size stay; a loader in order, and what is no DataLoader, is given back."""

    class Mine(DataLoader):
        pass

    def collate(rows: Any) -> Tensor:
        return torch.stack([x for x, _ in rows])

    made = Mine(TensorDataset(*m.rows(10)), 4, shuffle=True, drop_last=True, collate_fn=collate, timeout=0)
    new = in_order(made)
    assert type(new) is Mine
    assert (new.collate_fn, new.batch_size, len(new)) == (collate, 4, 2)
    assert torch.equal(next(iter(new)), m.rows(10)[0][:4])
    assert not isinstance(made.sampler, SequentialSampler)
    assert in_order(new) is new
    batches = [torch.zeros(1)]
    assert in_order(batches) is batches
    both = in_order(CombinedLoader({"a": made, "b": batches}, "min_size"))
    assert (type(both.loaders[0].sampler), both.mode, both.paths) == (SequentialSampler, "min_size", ["['a']", "['b']"])


# -- a fit of several -------------------------------------------------------------------------------------------------
class Many(m.Base):
    """Learns from whatever loaders' pairs (x, y) are in the batch; notes what it saw."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(m.WIDTH, 16), nn.Tanh(), nn.Dropout(self.kw.get("p", 0.0)), nn.Linear(16, m.CLASSES))
        self.seen: list[Any] = []

    def pairs(self, batch: Any) -> list[Tensor]:
        if isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[0], Tensor):
            return [F.cross_entropy(self(batch[0]), batch[1])]
        parts = batch.values() if isinstance(batch, dict) else batch
        return [loss for part in parts if part is not None for loss in self.pairs(part)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((batch_idx, [float(t.double().sum()) for t in tree_leaves(batch) if t is not None]))
        loss = torch.stack(self.pairs(batch)).sum()
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        self.seen.append(("val", dataloader_idx, batch_idx))
        self.log("val_loss", torch.stack(self.pairs(batch)).sum())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch_idx, dataloader_idx, self(batch[0]).sum()


def both(train: Callable[[], Any], val: Callable[[], Any] | None = None, **options: Any) -> tuple[Outcome, Outcome]:
    case = Case(Many, train, val, {"max_epochs": 3, "num_sanity_val_steps": 0} | options)
    return fast_fit(case), lightning_fit(case)


def assert_same_run(ours: Outcome, theirs: Outcome, *, stream: bool = True) -> None:
    """Every batch, validation batch, weight, count and the random stream."""
    assert ours.module.seen == theirs.module.seen
    assert_same_weights(ours.weights, theirs.weights)
    assert_same_metrics(ours.metrics, theirs.metrics, 1e-6)
    assert (ours.steps, ours.epochs, ours.validated) == (theirs.steps, theirs.epochs, theirs.validated)
    assert not stream or torch.equal(ours.rng, theirs.rng)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["tensors", "dataset"])
def test_a_fit_of_several_loaders_is_lightnings(name: str, kind: str) -> None:
    """Given as they stand: as long as the longest, the others cycled, the batch in the form of the loaders."""
    assert_same_run(*both(lambda: FORMS[name](short(kind), long(kind))))


@pytest.mark.parametrize("mode", TOGETHER)
@pytest.mark.parametrize("kind", ["tensors", "dataset", "stream", "workers"])
def test_a_fit_of_lightnings_combined_loader_is_lightnings(kind: str, mode: str) -> None:
    """Its own class, in every mode that it trains with, taken as it is."""
    assert_same_run(*both(lambda: Theirs({"a": short(kind), "b": long(kind)}, mode)))


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 2},
        {"limit_train_batches": 5},
        {"limit_train_batches": 0.5},
        {"accumulate_grad_batches": 3, "limit_train_batches": 6},
        {"max_steps": 10, "max_epochs": -1},
        {"fast_dev_run": 2},
        {"val_check_interval": 3},
        {"val_check_interval": 0.4},
        {"overfit_batches": 2},
        {"overfit_batches": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", TOGETHER)
def test_options_count_the_batches_of_several_as_lightning_does(mode: str, options: dict[str, Any]) -> None:
    """Limits, windows, cadences and overfitting over a combined epoch, with several shuffled validation loaders beside it."""
    if mode == "min_size" and options in ({"val_check_interval": 3}, {"limit_train_batches": 0.5}):
        options = {k: 2 if k == "val_check_interval" else 0.9 for k in options}
    ours, theirs = both(
        lambda: Theirs([short(), long()], mode), lambda: {"x": m.labelled(10, 5, seed=8), "y": m.labelled(9, 4, seed=9)}, **options
    )
    assert_same_run(ours, theirs)
    assert ours.module.trainer.num_training_batches == theirs.module.trainer.num_training_batches
    assert ours.module.trainer.num_val_batches == theirs.module.trainer.num_val_batches


@pytest.mark.parametrize("none", [[], {}, ()], ids=str)
def test_no_validation_loaders_are_no_validation(none: Any) -> None:
    """An empty list, dict or tuple; as in Lightning."""
    ours, theirs = (fit(Case(m.Base, m.labelled, lambda: none, {"max_epochs": 1})) for fit in (fast_fit, lightning_fit))
    assert_same_weights(ours.weights, theirs.weights)
    assert ours.metrics.keys() == theirs.metrics.keys() == {"train_loss"}


def test_one_loader_after_the_other_in_training() -> None:
    """[ours] "sequential" trains too: each batch is one loader's, an epoch is the sum."""
    ours = fast_fit(Case(Many, lambda: CombinedLoader([short(), long()], "sequential"), None, {"max_epochs": 2}))
    assert ours.steps == 20
    assert [len(values) for _, values in ours.module.seen] == [2] * 20


def test_the_trainer_shows_the_loaders_as_they_were_given() -> None:
    """trainer.train_dataloader and val_dataloaders are the user's collections."""
    train, val = {"a": short(), "b": long()}, [short(), long()]
    ours = fast_fit(Case(Many, lambda: train, lambda: val, {"max_epochs": 1}))
    assert ours.module.trainer.train_dataloader is train
    assert ours.module.trainer.val_dataloaders is val
    ours = fast_fit(Case(Many, lambda: CombinedLoader(train, "min_size"), lambda: Theirs(val, "sequential"), {"max_epochs": 1}))
    assert (ours.module.trainer.train_dataloader, ours.module.trainer.val_dataloaders) == (train, val)


@pytest.mark.parametrize("mode", TOGETHER)
def test_several_loaders_are_captured(mode: str) -> None:
    """A compiled step takes such batches, None in a loader's place included, and trains to the eager step's weights."""

    class Quiet(Many):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.stack(self.pairs(batch)).sum()

    def loaders() -> CombinedLoader:
        return CombinedLoader({"a": m.labelled(24, 8, seed=1), "b": m.labelled(40, 8, seed=2)}, mode)

    case = Case(Quiet, loaders, None, {"max_epochs": 2})
    eager, captured = fast_fit(case), fast_fit(case, capture="compile")
    assert captured.rung == "compile"
    assert eager.steps == captured.steps
    assert_same_weights(captured.weights, eager.weights, 1e-5)


# -- evaluation of several --------------------------------------------------------------------------------------------
EVALUATED: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"z": m.labelled(10, 5, shuffle=False), "a": m.labelled(9, 4, shuffle=False)},
    "nested": lambda: {"z": [m.labelled(10, 5, shuffle=False)], "a": m.labelled(9, 4, shuffle=False)},
    **{mode: lambda mode=mode: Theirs([m.labelled(10, 5, shuffle=False), m.labelled(9, 4, shuffle=False)], mode) for mode in MODES},
}


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("limit", [1.0, 1, 0.5])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_several_is_lightnings(stage: str, limit: int | float, name: str) -> None:
    """One after the other with their index, or together as one, in the order given."""
    ours, theirs = Many(), Many()
    theirs.load_state_dict(ours.state_dict())
    options = {f"limit_{'val' if stage == 'validate' else stage}_batches": limit}
    got = getattr(compile_fit(ours, **BARE, **options), stage)(EVALUATED[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected: dict[str, float] = {}
        for one in getattr(pl.Trainer(**BARE, **options), stage)(theirs, EVALUATED[name](), verbose=False):
            expected |= one
    assert ours.seen == theirs.seen
    assert_same_metrics(got, expected, 1e-6)


@pytest.mark.parametrize("name", ["dict", "nested", "sequential"])
def test_predicting_several_is_lightnings(name: str) -> None:
    """A list of predictions for each loader."""
    module = Many()
    ours = compile_fit(module, **BARE).predict(EVALUATED[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pl.Trainer(**BARE).predict(module, EVALUATED[name]())
    assert [[(i, d, float(v)) for i, d, v in one] for one in ours] == [[(i, d, float(v)) for i, d, v in one] for one in theirs]


@pytest.mark.parametrize("name", EVALUATED)
@pytest.mark.parametrize("sanity", [0, 1, 2])
def test_validating_several_within_a_fit_is_lightnings(name: str, sanity: int) -> None:
    """The sanity check and every validation, their metrics under Lightning's names."""
    assert_same_run(*both(m.labelled, EVALUATED[name], num_sanity_val_steps=sanity))


def test_samplers_hear_of_the_epoch_when_lightnings_do() -> None:
    """Loaders that shuffle by the epoch do so: each train loader at its epoch's start, validation loaders at every validation."""

    class Sampler(SequentialSampler):
        def __init__(self, rows: Any, name: str) -> None:
            super().__init__(rows)
            self.name = name

        def set_epoch(self, epoch: int) -> None:
            heard.append((self.name, epoch))

    def loader(name: str) -> DataLoader:
        data = TensorDataset(*m.rows(8))
        return DataLoader(data, 4, sampler=Sampler(data, name))

    heard: list[tuple[str, int]] = []
    case = Case(Many, lambda: [loader("a"), loader("b")], lambda: loader("val"), {"max_epochs": 3, "val_check_interval": 1})
    fast_fit(case)
    ours, heard = heard, []
    lightning_fit(case)
    assert ours == heard


# -- a resume ---------------------------------------------------------------------------------------------------------
class Saves(Checkpoint):
    """Writes a checkpoint in the end of the n-th batch, or of the n-th epoch."""

    def __init__(self, path: Path | None, where: str, at: int) -> None:
        self.path, self.where, self.at, self.count = path, where, at, 0

    def _here(self, where: str, trainer: Any) -> None:
        self.count += where == self.where
        if where == self.where and self.count == self.at and self.path is not None:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._here("batch", trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._here("epoch", trainer)


def train(make: Callable[[], Any], saves: Saves, resume: Path | None = None, **options: Any) -> tuple[Any, ...]:
    """What a run saw, its weights, its steps and its random stream at the end."""
    torch.manual_seed(0 if resume is None else 1)
    module = options.pop("module", Many)(p=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FasttrainWarning)
        saving = {"callbacks": [saves], "enable_checkpointing": True}
        trainer = compile_fit(module, **BARE | {"max_epochs": 3, "capture": "eager"} | saving | options)
        torch.manual_seed(7 if resume is None else 99)
        fed = make()
        fed = {"datamodule": fed} if hasattr(fed, "train_dataloader") else {"train_dataloaders": fed}
        result = trainer.fit(**fed, ckpt_path=resume)
    return module.seen, {k: v.clone() for k, v in module.state_dict().items()}, result.steps, torch.get_rng_state()


def assert_resumes(tmp_path: Path, make: Callable[[], Any], where: str, at: int, **options: Any) -> None:
    """The resumed run sees what was left for the whole one to see, and ends where it ended."""
    path = tmp_path / "saved"
    whole = train(make, Saves(path, where, at), **options)
    again = train(make, Saves(None, where, at), resume=path, **options)
    assert again[0] == whole[0][len(whole[0]) - len(again[0]) :]
    assert len(again[0]) < len(whole[0])
    assert_same_weights(again[1], whole[1])
    assert again[2] == whole[2]
    assert torch.equal(again[3], whole[3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tensors", "dataset", "own", "stream"])
@pytest.mark.parametrize(("where", "at"), [("batch", 1), ("batch", 4), ("batch", 6), ("batch", 8), ("epoch", 1)])
def test_a_resumed_fit_of_several_is_the_one_never_stopped(tmp_path: Path, kind: str, mode: str, where: str, at: int) -> None:
    """Dropout draws between the batches, loaders that began anew before the checkpoint: bit for bit, in every mode."""
    assert_resumes(tmp_path, lambda: CombinedLoader({"a": short(kind), "b": long(kind)}, mode), where, at, accumulate_grad_batches=2)


@pytest.mark.parametrize("at", [4, 11])
def test_workers_resume_too(tmp_path: Path, at: int) -> None:
    """Batches that other processes make: the seeds they get are the whole run's."""
    assert_resumes(tmp_path, lambda: [short("workers"), long("workers")], "batch", at)


def test_a_loader_cycled_many_times_resumes(tmp_path: Path) -> None:
    """Only its newest beginning matters, and only that is kept."""
    make = lambda: [_loader("dataset", 4, 4, 1), _loader("dataset", 4, 2, 2), long("dataset")]  # noqa: E731
    for at in (5, 13):
        assert_resumes(tmp_path / str(at), make, "batch", at)
    made = source(CombinedLoader(make()))
    list(made.one_pass())
    assert [(i, count) for i, count, _ in made.streams()["restarts"]] == [(0, 6), (1, 3)]


def test_a_sampler_that_shuffles_by_the_epoch_resumes_in_its_epoch(tmp_path: Path) -> None:
    """set_epoch is called on the way back into an open epoch too."""

    class ByEpoch(SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter(torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def make() -> DataLoader:
        data = TensorDataset(*m.rows(20))
        return DataLoader(data, 4, sampler=ByEpoch(data))

    assert_resumes(tmp_path, make, "batch", 8)


# -- loaders asked for anew -------------------------------------------------------------------------------------------
class Asked(pl.LightningDataModule):
    """Notes in which epoch each hook was called; every call gives other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def train_dataloader(self) -> Any:
        self.calls.append(("train", self.trainer.current_epoch))
        return m.labelled(20 + 8 * self.trainer.current_epoch, 4, shuffle=False, seed=self.trainer.current_epoch)

    def val_dataloader(self) -> Any:
        self.calls.append(("val", self.trainer.current_epoch))
        return m.labelled(8, 4, shuffle=False, seed=self.trainer.current_epoch)


class Owned(Many):
    """The same hooks on the module."""

    def build(self) -> None:
        super().build()
        self.calls: list[tuple[str, int]] = []

    train_dataloader, val_dataloader = Asked.train_dataloader, Asked.val_dataloader


def reloaded(fit: Callable[..., Outcome], owned: bool, **options: Any) -> tuple[list[Any], Outcome]:
    made: list[Any] = []

    def data() -> Asked:
        made.append(Asked())
        return made[-1]

    case = Case(Owned if owned else Many, lambda: None, None, {"max_epochs": 7} | options, None if owned else data)
    outcome = fit(case)
    calls = (outcome.module if owned else made[-1]).calls
    return [[epoch for name, epoch in calls if name == which] for which in ("train", "val")], outcome


@pytest.mark.parametrize("owned", [False, True], ids=["datamodule", "module"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 3, "val_check_interval": 4},
        {"val_check_interval": 11, "check_val_every_n_epoch": None},
    ],
    ids=str,
)
def test_loaders_are_asked_for_in_lightnings_epochs(n: int, options: dict[str, Any], owned: bool) -> None:
    """Train loaders at an epoch's start, validation loaders when they are due; lengths and everything counted by them follow."""
    (ours, got), (theirs, expected) = (
        reloaded(f, owned, reload_dataloaders_every_n_epochs=n, **options) for f in (fast_fit, lightning_fit)
    )
    assert ours == theirs
    assert_same_run(got, expected, stream=n in (0, 9))  # Lightning iterates a loader it has asked for anew twice
    assert got.module.trainer.num_training_batches == expected.module.trainer.num_training_batches


def test_validation_loaders_never_needed_before_are_asked_for_at_the_first_validation() -> None:
    """Without a sanity check Lightning asks first when it validates; ours has asked once before, to check them."""
    options = {"reload_dataloaders_every_n_epochs": 2, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    (ours, got), (theirs, expected) = (reloaded(f, False, **options) for f in (fast_fit, lightning_fit))
    assert ours[1] == [0, *theirs[1]]
    assert_same_run(got, expected, stream=False)


def test_reloading_draws_as_a_plain_loop_draws() -> None:
    """[ours] A shuffled loader made anew is iterated once: the order is that of a loop that makes it in every second epoch."""

    class Shuffled(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return m.labelled(20, 4, seed=self.trainer.current_epoch)

    ours = fast_fit(Case(Many, None, None, {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 2}, Shuffled))
    torch.manual_seed(7)
    expected = []
    for epoch in range(5):
        if epoch % 2 == 0:
            loader = m.labelled(20, 4, seed=epoch)
        expected += [(i, [float(t.double().sum()) for t in batch]) for i, batch in enumerate(loader)]
    assert ours.module.seen == expected
    assert torch.equal(ours.rng, torch.get_rng_state())


def test_loaders_given_to_fit_are_taken_anew_as_they_are() -> None:
    """There is no hook to ask: the same objects, their length looked at again."""

    class Grows(list):
        pass

    def lengths(fit: Callable[..., Outcome]) -> list[int]:
        loader = Grows(m.labelled(20, 4, shuffle=False))

        class Mine(Many):
            def on_train_epoch_end(self) -> None:
                loader.append(loader[0])

        options = {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 2}
        return [i for i, _ in fit(Case(Mine, lambda: loader, None, options)).module.seen]

    assert lengths(fast_fit) == lengths(lightning_fit) == [i for n in (5, 5, 7, 7, 9) for i in range(n)]


def test_a_reloaded_loader_may_be_several() -> None:
    """Another number of validation loaders, and train loaders that become a dict."""

    class Changes(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return m.labelled(12, 4) if self.trainer.current_epoch < 1 else {"a": short(), "b": long()}

        def val_dataloader(self) -> Any:
            return m.labelled(8, 4) if self.trainer.current_epoch < 1 else [m.labelled(8, 4), m.labelled(4, 4)]

    options = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    ours = fast_fit(Case(Many, None, None, options, Changes))
    assert ours.steps == 3 + 7
    assert {"val_loss", "val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= ours.metrics.keys()


class Drawn(pl.LightningDataModule):
    """Draws its rows in the hook, from the global stream: which they are depends on when it is asked."""

    def train_dataloader(self) -> Any:
        rows = torch.randperm(40)[:20]
        x, y = m.rows(40)
        return {"a": DataLoader(TensorDataset(x[rows], y[rows]), 4, shuffle=True), "b": short()}


@pytest.mark.parametrize("where", [("batch", 3), ("batch", 12), ("batch", 17), ("epoch", 1), ("epoch", 2), ("epoch", 3)], ids=str)
def test_a_resumed_fit_has_the_loaders_it_had(tmp_path: Path, where: tuple[str, int]) -> None:
    """In an epoch that asked, one that did not, and between two: the loaders come from the same draws."""

    class First(Drawn):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)  # the first asking is the process's own, as without reloading

    assert_resumes(tmp_path, First, *where, reload_dataloaders_every_n_epochs=2, max_epochs=5)


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (dict, ["train_dataloaders: got an empty dict", "DataLoader"]),
        (lambda: {"a": short(), "b": {}}, [r"train_dataloaders\['b'\]: got an empty dict"]),
        (lambda: {"a": TensorDataset(*m.rows(4))}, [r"train_dataloaders\['a'\]: got a dataset \(TensorDataset\)", "DataLoader"]),
        (lambda: [short(), TensorDataset(*m.rows(4))], [r"train_dataloaders\[1\]: got a dataset"]),
        (lambda: {"a": short(), "b": "path"}, [r"train_dataloaders\['b'\]: got str"]),
        (lambda: {"a": short(), "b": torch.zeros(3)}, [r"train_dataloaders\['b'\]: got Tensor"]),
        (lambda: {"a": short(), "b": None}, [r"train_dataloaders\['b'\]: got NoneType"]),
        (lambda: {"a": [short(), iter(short())]}, [r"train_dataloaders\['a'\]\[1\]: got a one-time iterator"]),
        (lambda: {"a": short(), "b": m.labelled(4, 8, drop_last=True)}, [r"train_dataloaders\['b'\]: got an empty loader", "drop_last"]),
        (lambda: CombinedLoader([]), ["train_dataloaders: got an empty loader"]),
        (lambda: {"a": CombinedLoader([short()])}, [r"\['a'\]: got a CombinedLoader", "one collection"]),
        (lambda: {"a": Theirs([short()])}, [r"\['a'\]: got a CombinedLoader"]),
    ],
)
def test_what_is_no_collection_of_loaders(make: Callable[[], Any], words: list[str]) -> None:
    """Said before anything is captured, with the place in the collection."""
    for word in words:
        with pytest.raises(DataError, match=word):
            compile_fit(Many(), **BARE, max_epochs=1).fit(make())


def test_an_unknown_mode() -> None:
    """The modes there are, and the nearest."""
    with pytest.raises(DataError, match=r"got 'max_size_cycled'.*'min_size'.*Did you mean 'max_size_cycle'"):
        CombinedLoader([short()], "max_size_cycled")


def test_a_share_of_a_stream_among_several() -> None:
    """The option is named, as for one loader."""
    with pytest.raises(OptionError, match=r"limit_train_batches.*no length"):
        compile_fit(Many(), **BARE, limit_train_batches=0.5, max_epochs=1).fit([short(), long("stream")])


def test_predictions_belong_to_one_loader() -> None:
    """As in Lightning: no mode but one after the other."""
    with pytest.raises(DataError, match=r"predict_dataloaders: got CombinedLoader\(mode='min_size'\)"):
        compile_fit(Many(), **BARE).predict(CombinedLoader([short(), long()], "min_size"))


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_a_wrong_number_of_epochs_to_reload(value: Any) -> None:
    """An integer from 0 on."""
    with pytest.raises(OptionError, match=r"reload_dataloaders_every_n_epochs: got .*an integer >= 0"):
        compile_fit(Many(), reload_dataloaders_every_n_epochs=value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("multiple_trainloader_mode", r"fasttrain\.CombinedLoader\(loaders, mode\)"),
        ("reload_dataloaders_every_epoch", "reload_dataloaders_every_n_epochs"),
    ],
)
def test_older_names_say_what_replaces_them(name: str, words: str) -> None:
    """Both say what to write."""
    with pytest.raises(OptionError, match=words):
        compile_fit(Many(), **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("takes", [True, False])
def test_a_datamodule_is_shown_its_trainer(takes: bool) -> None:
    """As in Lightning, so that its hooks can ask for the epoch; an object that takes no attribute goes without."""

    class Bare:
        __slots__ = () if not takes else ("trainer",)

        def train_dataloader(self) -> Any:
            return m.labelled(8, 4)

    data = Bare()
    ours = fast_fit(Case(Many, None, None, {"max_epochs": 1}, lambda: data))
    assert getattr(data, "trainer", None) is (ours.module.trainer if takes else None)
