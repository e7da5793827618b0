"""Forecasters of three packages, each with the batches its own loader makes of a few waves."""

from __future__ import annotations

import math
from typing import Any

from bench.coverage_modules.case import Case, Subject, handed_to_trainer


def _frame(ids: int = 4, n: int = 80) -> Any:
    import pandas as pd

    rows = [(str(i), t, math.sin(t / 5 + i) + 0.05 * t + 3, (t % 7) / 7) for i in range(ids) for t in range(n)]
    return pd.DataFrame(rows, columns=["group", "time", "value", "day"])


def _pytorch_forecasting(name: str) -> Subject:
    import pytorch_forecasting as pf

    own: dict[str, Any] = dict(time_varying_unknown_reals=["value"])
    if name != "NBeats":
        own |= dict(time_varying_known_reals=["day"], static_categoricals=["group"])
    if name == "TemporalFusionTransformer":
        own |= dict(add_relative_time_idx=True, add_target_scales=True)
    scale = pf.data.GroupNormalizer(groups=["group"])
    data = pf.TimeSeriesDataSet(_frame(), time_idx="time", target="value", group_ids=["group"], max_encoder_length=20,
                                max_prediction_length=5, min_encoder_length=20, target_normalizer=scale, **own)  # fmt: skip
    settings: dict[str, Any] = {
        "TemporalFusionTransformer": dict(hidden_size=16, attention_head_size=2, hidden_continuous_size=8, dropout=0.1, log_interval=-1),
        "NBeats": dict(widths=[32, 64], backcast_loss_ratio=0.1, log_interval=-1),
        "DeepAR": dict(hidden_size=16, rnn_layers=2, dropout=0.1, log_interval=-1),
    }[name]
    module = getattr(pf, name).from_dataset(data, learning_rate=0.01, **settings)
    source = data.to_dataloader(train=True, batch_size=32, num_workers=0)
    return Subject(module=module, batches=[b for b, _ in zip(source, range(8), strict=False)], options={"gradient_clip_val": 0.1})


def _darts(name: str, **settings: Any) -> Subject:
    import darts
    import darts.models

    frame = _frame(1, 200)
    series = darts.TimeSeries.from_values(frame["value"].to_numpy(dtype="float32"))
    model = getattr(darts.models, name)(input_chunk_length=20, output_chunk_length=5, batch_size=32, n_epochs=1,
                                        pl_trainer_kwargs={"accelerator": "cpu", "enable_progress_bar": False}, **settings)  # fmt: skip
    return handed_to_trainer("pytorch_lightning", lambda: model.fit(series), batches=4)


def _neuralforecast(name: str, **settings: Any) -> Subject:
    import pandas as pd
    from neuralforecast import NeuralForecast, models

    frame = _frame().rename(columns={"group": "unique_id", "value": "y"})[["unique_id", "time", "y"]]
    frame["ds"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("time"), unit="D")
    model = getattr(models, name)(
        h=5, input_size=20, max_steps=10, windows_batch_size=64, accelerator="cpu", enable_progress_bar=False, **settings
    )
    return handed_to_trainer("pytorch_lightning", lambda: NeuralForecast(models=[model], freq="D").fit(frame), batches=4)


def _gluonts() -> Subject:
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    frame = _frame(4, 120)
    data = ListDataset([{"start": "2020-01-01", "target": g["value"].to_numpy()} for _, g in frame.groupby("group")], freq="D")
    estimator = DeepAREstimator(freq="D", prediction_length=5, context_length=20, hidden_size=16, batch_size=32, num_batches_per_epoch=8)
    return handed_to_trainer("lightning.pytorch", lambda: estimator.train(data), batches=8)


CASES = (
    Case(name="pf-tft", needs=("pytorch_forecasting", "pandas"), make=lambda: _pytorch_forecasting("TemporalFusionTransformer")),
    Case(name="pf-nbeats", needs=("pytorch_forecasting", "pandas"), make=lambda: _pytorch_forecasting("NBeats")),
    Case(name="pf-deepar", needs=("pytorch_forecasting", "pandas"), make=lambda: _pytorch_forecasting("DeepAR")),
    Case(name="darts-nbeats", needs=("darts", "pandas"), make=lambda: _darts("NBEATSModel", num_stacks=2, num_blocks=1, layer_widths=32)),
    Case(name="darts-tft", needs=("darts", "pandas"), make=lambda: _darts("TFTModel", hidden_size=16, add_relative_index=True)),
    Case(name="neuralforecast-nhits", needs=("neuralforecast", "pandas"), make=lambda: _neuralforecast("NHITS", mlp_units=3 * [[32, 32]])),
    Case(name="neuralforecast-lstm", needs=("neuralforecast", "pandas"), make=lambda: _neuralforecast("LSTM", encoder_hidden_size=16)),
    Case(name="gluonts-deepar", needs=("gluonts", "pandas"), make=_gluonts),
)
