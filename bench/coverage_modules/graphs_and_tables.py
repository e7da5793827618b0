"""Graph nets, tables, single cells, recommenders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.coverage_modules.case import Case, Subject, handed_to_trainer
from bench.coverage_modules.vision import adamw


def _nodes(name: str) -> Subject:
    """A GCN or a GAT on one graph of 200 nodes, with another mask each step."""
    import torch_geometric.nn as geometric
    from torch_geometric.data import Data

    net = getattr(geometric, name)(in_channels=16, hidden_channels=32, num_layers=2, out_channels=4, dropout=0.5)
    edges, x, y = torch.randint(0, 200, (2, 1200)), torch.randn(200, 16), torch.randint(0, 4, (200,))
    batches = [Data(x=x, edge_index=edges, y=y, train_mask=torch.rand(200) < 0.5) for _ in range(8)]

    def loss(model: nn.Module, data: Any) -> Tensor:
        out = model(data.x, data.edge_index)
        return F.cross_entropy(out[data.train_mask], data.y[data.train_mask])

    return Subject(module=net, batches=batches, loss=loss, optimizer=adamw)


def _whole_graphs() -> Subject:
    """A GIN over batches of small graphs of irregular sizes, pooled."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GIN, global_mean_pool

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = GIN(in_channels=8, hidden_channels=32, num_layers=2), nn.Linear(32, 2)

        def forward(self, data: Any) -> Tensor:
            return self.head(global_mean_pool(self.body(data.x, data.edge_index), data.batch))

    def graph() -> Any:
        n = int(torch.randint(5, 20, ()))
        return Data(x=torch.randn(n, 8), edge_index=torch.randint(0, n, (2, 3 * n)), y=torch.randint(0, 2, (1,)))

    batches = [Batch.from_data_list([graph() for _ in range(16)]) for _ in range(8)]
    return Subject(module=Classifier(), batches=batches, loss=lambda model, data: F.cross_entropy(model(data), data.y), optimizer=adamw)


def _tabular() -> Subject:
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig
    from sklearn.datasets import load_wine

    frame = load_wine(as_frame=True).frame
    frame["colour"] = (frame["color_intensity"] > 5).map({True: "deep", False: "light"})
    columns = [c for c in frame.columns if c not in ("target", "colour")]
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=columns, categorical_cols=["colour"], num_workers=0),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="64-32", dropout=0.1),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=32, accelerator="cpu", progress_bar="none", checkpoints=None, early_stopping=None,
                                     load_best=False),
        verbose=False,
    )  # fmt: skip
    return handed_to_trainer("pytorch_lightning", lambda: model.fit(train=frame), batches=4)


def _scvi() -> Subject:
    import anndata
    import numpy as np
    import scvi

    scvi.settings.seed = 1  # its split takes no other
    cells = anndata.AnnData(np.random.poisson(2.0, (256, 60)).astype("float32"))
    cells.obs["batch"] = ["a", "b"] * 128
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(cells, n_hidden=64, n_latent=8)
    return handed_to_trainer(
        "lightning.pytorch", lambda: model.train(max_epochs=4, batch_size=64, train_size=1.0, accelerator="cpu"), batches=4
    )


class _Counts:
    """What RecBole models ask their dataset for: how many users and items there are."""

    def num(self, name: str) -> int:
        return 100 if name == "user_id" else 80


def _recbole(folder: str, name: str, **settings: Any) -> Subject:
    from importlib import import_module

    known = {
        "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "NEG_PREFIX": "neg_", "device": "cpu", "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": 20, **settings,
    }  # fmt: skip
    module: Any = getattr(import_module(f"recbole.model.{folder}"), name)(known, _Counts())
    batches = [
        {"user_id": torch.randint(0, 100, (64,)), "item_id": torch.randint(1, 80, (64,)), "neg_item_id": torch.randint(1, 80, (64,)),
         "item_id_list": torch.randint(1, 80, (64, 20)), "item_length": torch.randint(2, 20, (64,))} for _ in range(8)
    ]  # fmt: skip
    return Subject(module=module, batches=batches, loss=lambda model, batch: model.calculate_loss(batch), optimizer=adamw)


_SAS = dict(n_layers=2, n_heads=2, hidden_size=32, inner_size=64, hidden_dropout_prob=0.2, attn_dropout_prob=0.2, hidden_act="gelu",
            layer_norm_eps=1e-12, initializer_range=0.02, loss_type="CE")  # fmt: skip

CASES = (
    Case(name="pyg-gcn", needs=("torch_geometric",), make=lambda: _nodes("GCN")),
    Case(name="pyg-gat", needs=("torch_geometric",), make=lambda: _nodes("GAT")),
    Case(name="pyg-gin-batches", needs=("torch_geometric",), make=_whole_graphs),
    Case(name="pytorch-tabular", needs=("pytorch_tabular", "sklearn"), make=_tabular),
    Case(name="scvi-vae", needs=("scvi", "anndata"), make=_scvi),
    Case(name="recbole-bpr", needs=("recbole",), make=lambda: _recbole("general_recommender", "BPR", embedding_size=32)),
    Case(name="recbole-sasrec", needs=("recbole",), make=lambda: _recbole("sequential_recommender", "SASRec", **_SAS)),
    Case(name="recbole-gru4rec", needs=("recbole",), make=lambda: _recbole("sequential_recommender", "GRU4Rec", embedding_size=32,
                                                                         hidden_size=32, num_layers=1, dropout_prob=0.2, loss_type="CE")),
)  # fmt: skip
