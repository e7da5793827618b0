"""What self.log refuses: names and values that are none, and places where nobody would hear of them."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl

from fasttrain import Callback, ModuleError, compile_fit
from fasttrain.entries import OF_AN_EPOCH, OF_NOTHING
from fasttrain.retired import OLDER_HOOKS
from tests.parity import modules as m
from tests.parity.harness import BARE, Case, fast_fit, lightning_fit
from tests.parity.test_cadence import two

FX = pl.trainer.connectors.logger_connector.fx_validator._FxValidator.functions


def test_the_table_is_lightnings() -> None:
    """Every hook it knows is in the same class; what it does not know is a hook of former years, or of predictions."""
    nothing = {name for name, levels in FX.items() if levels is None}
    an_epoch = {name for name, levels in FX.items() if levels is not None and levels["allowed_on_step"] == (False,)}
    assert nothing <= OF_NOTHING
    assert an_epoch <= OF_AN_EPOCH
    assert OF_AN_EPOCH - an_epoch <= OLDER_HOOKS.keys()
    assert OF_NOTHING - nothing <= {*OLDER_HOOKS, "predict_dataloader", "on_predict_model_eval"}


@pytest.mark.parametrize(("how", "message"), [(("x", None), "self.log.'x'.: got None"), (("x/dataloader_idx_0", 1.0), "loader's index")])
@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end", "validation_step"])
def test_what_is_no_entry_is_refused(hook: str, how: tuple[str, Any], message: str) -> None:
    """None, and a name with the index that is added to it, in a step and in a hook; as in Lightning."""

    class Logs(m.Base):
        pass

    def in_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log(*how)
        return getattr(m.Base, hook)(self, batch, batch_idx)

    setattr(Logs, hook, in_step if hook.endswith("step") else lambda self, *args: self.log(*how))
    with pytest.raises((ValueError, pl.utilities.exceptions.MisconfigurationException)):
        lightning_fit(Case(Logs, m.labelled, two))
    with pytest.raises(ModuleError, match=message):
        fast_fit(Case(Logs, m.labelled, two))


def test_a_name_with_an_index_of_its_own() -> None:
    """Where no index is added it may be said."""

    class Logs(m.Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("x/dataloader_idx_0", 1.0, add_dataloader_idx=False)

    assert fast_fit(Case(Logs, m.labelled, two)).metrics["x/dataloader_idx_0"] == 1.0


@pytest.mark.parametrize("hook", ["predict_step", "on_predict_batch_end", "on_predict_start"])
def test_nothing_is_logged_in_a_prediction(hook: str) -> None:
    """As in Lightning."""
    body = {"predict_step": lambda self, batch, batch_idx: batch[0], hook: lambda self, *args: self.log("x", 1.0)}
    with pytest.raises(ModuleError, match=f"self.log.'x'.: got a value in {hook}"):
        compile_fit(type("Logs", (m.Base,), body)(), **BARE).predict(m.labelled())


@pytest.mark.parametrize("base", [Callback, pl.Callback])
def test_a_callback_logs_as_the_module_does(base: type) -> None:
    """``self.log`` in a callback: the same values in the same places, and refused in the same."""

    class Logs(base):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, *_: Any) -> None:
            self.log("batch", 2.0, on_epoch=True)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.log_dict({"epoch": float(trainer.current_epoch)})

    ours = fast_fit(Case(m.Base, options={"max_epochs": 2}), callbacks=[Logs()])
    theirs = lightning_fit(Case(m.Base, options={"max_epochs": 2}), callbacks=[type("Theirs", (pl.Callback,), dict(vars(Logs)))()])
    assert ours.metrics == pytest.approx(theirs.metrics)
    early = type("Early", (base,), {"on_sanity_check_start": lambda self, trainer, module: self.log("x", 1.0)})
    with pytest.raises(ModuleError, match="on_sanity_check_start"):
        fast_fit(Case(m.Base, m.labelled, two), callbacks=[early()])
