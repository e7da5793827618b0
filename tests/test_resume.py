"""A run that was stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fasttrain import CheckpointError, EarlyStopping, FasttrainWarning, ModelCheckpoint, compile_fit
from fasttrain.callbacks.callback import Checkpoint
from tests.parity import modules as m
from tests.parity.harness import BARE


class Net(m.Base):
    """BatchNorm, dropout, Adam slots, a step scheduler, an epoch scheduler, a plateau, metrics over the epoch; notes what it saw."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(m.WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(self.kw["p"]), nn.Linear(16, m.CLASSES))
        self.trace: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.trace.append(("epoch", self.current_epoch, self.global_step, float(metrics["loss_epoch"]), float(metrics.get("val_loss", 0))))

    def configure_optimizers(self) -> Any:
        opt = torch.optim.AdamW(self.parameters(), lr=1e-2)
        by = torch.optim.lr_scheduler
        plateau = by.ReduceLROnPlateau(opt, patience=0, threshold=0.5)
        return [opt], [
            {"scheduler": by.ExponentialLR(opt, 0.98), "interval": "step"},
            by.ExponentialLR(opt, 0.9),
            {"scheduler": plateau, "monitor": "loss_epoch"},
        ]


class Saves(Checkpoint):
    """Writes a checkpoint at one moment of the run, after every other callback."""

    def __init__(self, path: Path | None, where: str, at: int) -> None:
        self.path, self.where, self.at, self.count = path, where, at, 0
        self.written = False

    def _here(self, where: str, trainer: Any) -> None:
        if where == self.where and not trainer.sanity_checking:
            self.count += 1
            if self.count == self.at and self.path is not None:
                trainer.save_checkpoint(self.path)
                self.written = True

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._here("batch", trainer)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._here("validation", trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._here("epoch", trainer)


class Rows(Dataset):
    """Rows with noise drawn from the global stream, as augmentation does."""

    def __init__(self) -> None:
        self.x, self.y = m.rows(44)

    def __len__(self) -> int:
        return 44

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.01 * torch.randn(m.WIDTH), self.y[i]


def loader(road: str) -> DataLoader:
    if road == "tensors":
        return m.labelled()
    return DataLoader(Rows(), batch_size=8, shuffle=True, num_workers=int(road == "workers"))


@dataclass
class Ended:
    """Everything two runs are compared by."""

    weights: dict[str, Tensor]
    slots: dict[Any, Any]
    lr: float
    trace: list[tuple[Any, ...]]
    metrics: dict[str, float]
    steps: int
    stream: Tensor


def train(road: str, p: float, *, saves: Saves | None = None, resume: Path | None = None, seed: int = 7, **options: Any) -> Ended:
    torch.manual_seed(0 if resume is None else 1)  # a resumed module starts from other weights: all must come from the checkpoint
    module = Net(p=p)
    settings = BARE | {"max_epochs": 3, "capture": "eager", "val_check_interval": 4, "enable_checkpointing": saves is not None} | options
    settings["callbacks"] = [*([saves] if saves is not None else ()), *settings.get("callbacks", ())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FasttrainWarning)
        trainer = compile_fit(module, **settings)
        torch.manual_seed(seed if resume is None else 99)
        result = trainer.fit(loader(road), m.labelled(24, shuffle=False, seed=9), ckpt_path=resume)
    opt = module.trainer.optimizers[0]
    return Ended(
        {k: v.clone() for k, v in module.state_dict().items()},
        opt.state_dict()["state"],
        opt.param_groups[0]["lr"],
        module.trace,
        result.metrics,
        result.steps,
        torch.get_rng_state(),
    )


def assert_same_end(ours: Ended, whole: Ended) -> None:
    """Weights, slots, learning rate, metrics, counts, what was seen after the resume, and the random stream."""
    assert ours.steps == whole.steps
    for name, value in whole.weights.items():
        assert torch.equal(ours.weights[name], value), name
    for i, slots in whole.slots.items():
        for name, value in slots.items():
            assert torch.equal(ours.slots[i][name], value), (i, name)
    assert ours.lr == whole.lr
    assert ours.trace == whole.trace[-len(ours.trace) :] if ours.trace else True
    assert ours.metrics == whole.metrics
    assert torch.equal(ours.stream, whole.stream)


MOMENTS = [
    ("batch", 2),
    ("batch", 6),
    ("batch", 8),
    ("validation", 1),
    ("validation", 2),
    ("epoch", 1),
    ("epoch", 2),
    ("batch", 4),
    ("batch", 12),
]
QUICK = {
    ("tensors", "batch", 2),
    ("tensors", "batch", 8),
    ("tensors", "validation", 2),
    ("tensors", "epoch", 1),
    ("loader", "batch", 8),
    ("loader", "epoch", 2),
    ("workers", "batch", 8),
}


def _points() -> list[Any]:
    out = []
    for road in ("tensors", "loader", "workers"):
        for where, at in MOMENTS:
            for p in (0.0, 0.5):
                for window in (1, 3):
                    for capture in ("eager", "compile"):
                        quick = (road, where, at) in QUICK and (capture == "eager" or (p, window) in ((0.0, 3), (0.5, 1)))
                        marks = () if quick else pytest.mark.slow
                        out.append(
                            pytest.param(
                                road, where, at, p, window, capture, marks=marks, id=f"{road}-{where}{at}-p{p}-window{window}-{capture}"
                            )
                        )
    return out


@pytest.mark.parametrize(("road", "where", "at", "p", "window", "capture"), _points())
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    tmp_path: Path, road: str, where: str, at: int, p: float, window: int, capture: str
) -> None:
    """Saved in a batch's end, a validation's end or an epoch's end, with an open window or without: the same end, bit for bit."""
    options = {"accumulate_grad_batches": window, "capture": capture}
    path = tmp_path / "saved"
    whole = train(road, p, saves=(saves := Saves(path, where, at)), **options)
    assert saves.written
    resumed = train(road, p, resume=path, saves=Saves(None, where, at), **options)
    assert_same_end(resumed, whole)


@pytest.mark.parametrize(("road", "capture"), [("tensors", "eager"), ("loader", "eager"), ("workers", "eager"), ("tensors", "compile")])
def test_two_runs_from_one_seed_are_equal(tmp_path: Path, road: str, capture: str) -> None:
    """The control: without it the law above says nothing. Saving changes nothing either."""
    once = train(road, 0.5, accumulate_grad_batches=3, capture=capture, saves=Saves(None, "batch", 8))
    again = train(road, 0.5, accumulate_grad_batches=3, capture=capture, saves=Saves(tmp_path / "saved", "batch", 8))
    assert_same_end(again, once)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "16-mixed"])
def test_every_precision_resumes(tmp_path: Path, precision: str) -> None:
    """The dtypes of weights and slots and the fp16 loss scale come back as they were."""
    path = tmp_path / "saved"
    whole = train("tensors", 0.5, saves=Saves(path, "batch", 8), precision=precision, accumulate_grad_batches=3)
    assert_same_end(
        train("tensors", 0.5, resume=path, saves=Saves(None, "batch", 8), precision=precision, accumulate_grad_batches=3), whole
    )


def test_a_run_stopped_by_max_steps_goes_on(tmp_path: Path) -> None:
    """Four steps, then a new run to the end from its last checkpoint: the same as all at once."""
    whole = train("tensors", 0.5, saves=Saves(None, "batch", 0))
    train(
        "tensors",
        0.5,
        max_steps=8,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(tmp_path / "c", save_last=True, every_n_train_steps=1)],
    )
    (last,) = [d for d in (tmp_path / "c").iterdir() if d.name.startswith("last")]
    assert_same_end(train("tensors", 0.5, resume=last, saves=Saves(None, "batch", 0)), whole)


def test_early_stopping_goes_on_counting(tmp_path: Path) -> None:
    """Its patience is part of the state: the resumed run stops where the whole one stops."""
    path = tmp_path / "saved"
    options = {"max_epochs": 8, "val_check_interval": 1.0}

    def stop() -> EarlyStopping:
        return EarlyStopping("loss_epoch", patience=3, min_delta=1.0)

    whole = train("tensors", 0.0, saves=Saves(path, "epoch", 2), callbacks=[stop()], **options)
    resumed = train("tensors", 0.0, resume=path, saves=Saves(None, "epoch", 2), callbacks=[stop()], **options)
    assert whole.steps < 48
    assert_same_end(resumed, whole)


def test_a_finished_run_resumed_trains_no_further(tmp_path: Path) -> None:
    """max_epochs is reached already: nothing moves."""
    path = tmp_path / "saved"
    whole = train("tensors", 0.0, saves=Saves(path, "epoch", 3))
    resumed = train("tensors", 0.0, resume=path)
    assert resumed.steps == whole.steps
    assert all(torch.equal(v, resumed.weights[k]) for k, v in whole.weights.items())


def test_more_epochs_than_before(tmp_path: Path) -> None:
    """A run that ended at two epochs, resumed with max_epochs=3, is a run of three."""
    path = tmp_path / "saved"
    whole = train("tensors", 0.5)
    train("tensors", 0.5, saves=Saves(path, "epoch", 2), max_epochs=2)
    assert_same_end(train("tensors", 0.5, resume=path), whole)


def test_an_epoch_that_a_hook_ended_is_over_after_a_resume(tmp_path: Path) -> None:
    """on_train_batch_start returned -1: a checkpoint of that epoch's end resumes at the next epoch's first batch."""
    seen: list[tuple[int, int]] = []

    class Ends(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else seen.append((self.current_epoch, batch_idx))

    def run(resume: Path | None, saves: Saves) -> list[tuple[int, int]]:
        seen.clear()
        torch.manual_seed(0)
        options = {"max_epochs": 3, "capture": "eager", "callbacks": [saves], "enable_checkpointing": True}
        trainer = compile_fit(Ends(p=0.0), **BARE | options)
        trainer.fit(m.labelled(), ckpt_path=resume)
        return list(seen)

    whole = run(None, Saves(tmp_path / "saved", "epoch", 1))
    assert run(tmp_path / "saved", Saves(None, "epoch", 1)) == whole[3:]


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    train("tensors", 0.0, saves=Saves(path, "epoch", 1), max_epochs=1)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    """One flipped byte: the file, and what to do."""
    path = saved(tmp_path)
    raw = bytearray((path / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / name).write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*older checkpoint"):
        train("tensors", 0.0, resume=path)


@pytest.mark.parametrize("spoil", ["remove", "garbage", "empty"])
def test_a_checkpoint_without_a_manifest_is_none(tmp_path: Path, spoil: str) -> None:
    """Missing, or unreadable: said as such."""
    path = saved(tmp_path)
    if spoil == "remove":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text("{" if spoil == "garbage" else "{}")
    with pytest.raises(CheckpointError, match=r"no manifest|cannot be read"):
        train("tensors", 0.0, resume=path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """Deleted from the directory."""
    path = saved(tmp_path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        train("tensors", 0.0, resume=path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path, 'last' with nothing saved, 'best' with nothing saved, a pickled file."""
    for path, words in ((tmp_path / "no", "does not exist"), ("last", "no checkpoint below"), ("best", "ModelCheckpoint")):
        with pytest.raises(CheckpointError, match=words):
            train("tensors", 0.0, resume=path, default_root_dir=tmp_path)  # type: ignore[arg-type]
    torch.save({}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"a file.*run code"):
        train("tensors", 0.0, resume=tmp_path / "x.ckpt")


def test_the_checkpoint_of_another_model_is_refused_whole(tmp_path: Path) -> None:
    """One table of what is missing, what is too much and which shapes differ; no weight is touched."""
    path = saved(tmp_path)
    other = m.Base()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        compile_fit(other, **BARE | {"capture": "eager", "max_epochs": 1}).fit(m.labelled(), ckpt_path=path)
    message = str(caught.value)
    for line in (
        "does not fit Base",
        "missing in the checkpoint: net.2.weight",
        "not in the module: net.4.weight",
        "not in the module: net.1.running_mean",
    ):
        assert line in message
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Parameter groups that do not fit: said, with what to do."""
    path = saved(tmp_path)

    class Other(Net):
        def configure_optimizers(self) -> Any:
            groups = [{"params": [p]} for p in self.parameters()]
            return torch.optim.AdamW(groups, lr=1e-2)

    with pytest.raises(CheckpointError, match=r"schedulers|optimizer does not fit"):
        compile_fit(Other(p=0.0), **BARE | {"capture": "eager", "max_epochs": 2}).fit(m.labelled(), ckpt_path=path)


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    """Four files: two of tensors, two of JSON, all in the manifest with their sums."""
    path = saved(tmp_path)
    assert sorted(f.name for f in path.iterdir()) == ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "state.json", "state.safetensors"}
    assert manifest["global_step"] == 6


def test_evaluation_from_a_checkpoint_uses_its_weights(tmp_path: Path) -> None:
    """validate(ckpt_path=...) gives what the saved module gives."""
    path = saved(tmp_path)
    torch.manual_seed(0)
    module = Net(p=0.0)
    trainer = compile_fit(module, **BARE | {"max_epochs": 1, "capture": "eager", "val_check_interval": 4})
    torch.manual_seed(7)
    trainer.fit(m.labelled(), m.labelled(24, shuffle=False, seed=9))
    expected = trainer.validate(m.labelled(24, shuffle=False))
    torch.manual_seed(5)
    fresh = compile_fit(Net(p=0.0), **BARE | {"capture": "eager"})
    assert fresh.validate(m.labelled(24, shuffle=False), ckpt_path=path) == expected
