"""What is trained: the models people measure trainers with, unchanged for every framework, in sizes for each device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.models.dense import Autoencoder, LogisticRegression, SmallTensors
from bench.models.text import GPT, CharLSTM
from bench.models.vision import DCGAN, ResNet18, UNet, ViT


@dataclass(frozen=True)
class Size:
    """How much of a workload makes one measured round."""

    batch: int
    batches: int  # of an epoch
    passes: int = 1  # epochs in a round: long enough that waking up is not what is measured
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """How far two sides' losses may be apart, as a share of the reference's, before no speed is printed."""

    first: float = 2e-3
    last: float = 2e-2
    why: str = "float32 in another order of additions; the last losses stand thousands of rounded steps later"


FLOAT32 = Agreement()
BF16 = Agreement(2e-2, 5e-2, "bfloat16 keeps 8 bits, and the sides round at other places")
FP16 = Agreement(1e-2, 5e-2, "float16 keeps 11 bits, and a scaler may skip another step")
GAN = Agreement(5e-3, 3e-1, "two networks that play amplify rounding; how well each stands is compared, not the play")

KERAS = Agreement(1e-2, 2e-2, "Keras's Adam adds epsilon before the second moment's bias is corrected, and its SGD decays weights apart")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A module, its data, and what the step does besides."""

    name: str
    make: Callable[..., Any]
    cpu: Size | None  # None: too large for a CPU
    cuda: Size
    quick: Size
    form: str = "one"  # "one" loss and optimizer, optimizers taking "turns", or batches in "splits" along time
    precision: str = "32-true"
    window: int = 1  # batches of one optimizer step
    clip: float | None = None
    log_every: int = 0  # 0: about four times an epoch; n: three more values every n steps
    loader: str = "memory"
    agree: Agreement = FLOAT32
    sides: tuple[str, ...] = ()  # only these, where that many copies would not fit beside each other on one device

    @property
    def variant(self) -> bool:
        """Of another workload: fewer sides are measured on it."""
        return "+" in self.name

    def size(self, device: str, quick: bool) -> Size:
        size = self.quick if quick else self.cpu if device == "cpu" else self.cuda
        assert size is not None
        return size


def _vary(base: Workload, name: str, **changes: Any) -> Workload:
    return replace(base, name=f"{base.name}+{name}", **changes)


_GPT2 = {"vocabulary": 50257, "width": 768, "layers": 12, "heads": 12, "context": 1024}
LOGISTIC = Workload(
    name="logistic_regression", make=LogisticRegression, cpu=Size(32, 400, 3), cuda=Size(32, 800, 2), quick=Size(32, 40)
)  # fmt: skip
AUTOENCODER = Workload(name="autoencoder", make=Autoencoder, cpu=Size(32, 200, 2), cuda=Size(32, 800), quick=Size(32, 16))
SMALL_TENSORS = Workload(
    name="small_tensors", make=SmallTensors, cpu=Size(32, 60), cuda=Size(32, 200), quick=Size(32, 8, model={"layers": 12})
)  # fmt: skip
LSTM = Workload(
    name="lstm_tbptt", make=CharLSTM, form="splits", cpu=Size(16, 32), cuda=Size(32, 60), quick=Size(4, 8, model={"width": 16})
)  # fmt: skip
GAN_LOAD = Workload(
    name="dcgan", make=DCGAN, form="turns", agree=GAN, cpu=Size(16, 80), cuda=Size(32, 200, model={"width": 64}),
    quick=Size(8, 8, model={"width": 4}),
)  # fmt: skip
RESNET = Workload(
    name="resnet18", make=ResNet18, cpu=Size(16, 16, model={"width": 16}), cuda=Size(32, 100),
    quick=Size(4, 8, model={"width": 4, "blocks": 1}),
)  # fmt: skip
VIT = Workload(
    name="vit", make=ViT, cpu=Size(16, 20), cuda=Size(64, 100, model={"width": 192, "layers": 6, "heads": 3}),
    quick=Size(4, 8, model={"width": 16, "layers": 1, "heads": 2}),
)  # fmt: skip
UNET = Workload(
    name="unet", make=UNet, cpu=Size(8, 16), cuda=Size(32, 100, model={"width": 32}), quick=Size(2, 8, model={"width": 4, "levels": 1})
)  # fmt: skip
CHAR_GPT = Workload(
    name="char_gpt", make=GPT, cpu=Size(12, 16), cuda=Size(64, 100), quick=Size(4, 8, model={"width": 32, "layers": 1, "context": 16})
)  # fmt: skip
GPT2 = Workload(
    name="gpt2_124m", make=GPT, precision="bf16-mixed", agree=BF16, cpu=None, cuda=Size(8, 16, model=_GPT2),
    quick=Size(2, 4, model=_GPT2 | {"context": 128}),
    sides=("fasttrain", "fasttrain-graph", "plain", "plain-fused", "plain-compiled", "captured-by-hand", "lightning-compile"),
)  # fmt: skip

WORKLOADS = {
    w.name: w
    for w in (
        LOGISTIC, AUTOENCODER, SMALL_TENSORS, LSTM, GAN_LOAD, RESNET, VIT, UNET, CHAR_GPT, GPT2,
        _vary(AUTOENCODER, "accumulate+clip", window=4, clip=0.01),
        _vary(SMALL_TENSORS, "clip", clip=0.1),
        _vary(AUTOENCODER, "logging", log_every=10),
        _vary(CHAR_GPT, "bf16", precision="bf16-mixed", agree=BF16),
        _vary(AUTOENCODER, "fp16", precision="16-mixed", agree=FP16),
        _vary(AUTOENCODER, "worker", loader="worker", cpu=Size(32, 60)),
        _vary(AUTOENCODER, "slow", loader="slow", cpu=Size(32, 100)),
    )
}  # fmt: skip
