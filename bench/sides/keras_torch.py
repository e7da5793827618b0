"""Keras 3 on torch: the same torch module in a ``TorchModuleWrapper``, Keras's own optimizer, loss and ``fit``."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from bench.rounds import Stopped
from bench.sides.job import TRAIN_SEED, Job


def _optimizer(keras: Any, own: torch.optim.Optimizer) -> Any:
    """The Keras optimizer that is this torch one; epsilon too, whose default is another there."""
    g, made = own.param_groups[0], keras.optimizers
    if isinstance(own, torch.optim.SGD):
        return made.SGD(g["lr"], momentum=float(g["momentum"]), weight_decay=g["weight_decay"] or None)
    betas = {"beta_1": g["betas"][0], "beta_2": g["betas"][1], "epsilon": g["eps"]}
    if isinstance(own, torch.optim.AdamW):
        return made.AdamW(g["lr"], weight_decay=g["weight_decay"], **betas)
    return made.Adam(g["lr"], **betas)


def keras_torch(job: Job) -> None:
    """``fit`` over the loader, a round's epochs at a time in its callback."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.disable_interactive_logging()
    rounds, passes = job.rounds, job.size.passes

    class Wrapped(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = keras.layers.TorchModuleWrapper(job.model)
            self.built = True

        def call(self, x: Tensor, training: bool | None = None) -> Tensor:
            return self.inner(x, training=training)

    class Watch(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch % passes == 0 and not rounds.start():
                raise Stopped
            if epoch == 0:  # building the model has drawn random numbers
                torch.manual_seed(TRAIN_SEED)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            rounds.epoch(float(logs["loss"]))
            if (epoch + 1) % passes == 0:
                rounds.finish()

    def loss(wanted: Tensor, out: Tensor) -> Tensor:
        return job.model.score(out, (wanted, wanted.long() if job.w.make.__name__ in INTEGER_TARGETS else wanted))

    model = Wrapped()
    model.compile(optimizer=_optimizer(keras, job.model.optimizer()), loss=loss)
    pairs = job.loader
    if job.w.make.__name__ == "Autoencoder":  # Keras wants the target in the second place
        x = job.loader.dataset.tensors[0]
        pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), batch_size=job.size.batch, shuffle=True)
    with contextlib.suppress(Stopped):
        model.fit(pairs, epochs=10**6, verbose=0, callbacks=[Watch()])


INTEGER_TARGETS = ("LogisticRegression", "SmallTensors", "ResNet18", "ViT", "GPT")  # Keras hands targets over as floats
