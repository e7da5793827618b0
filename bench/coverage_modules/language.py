"""Hugging Face models with random weights: the output has ``.loss``, the own loop is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bench.coverage_modules.case import Case, Subject
from bench.coverage_modules.lightning_own import words


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _model(make: Callable[[Any], Any], batch: Callable[[Tensor], dict[str, Any]]) -> Subject:
    import transformers

    return Subject(module=make(transformers), batches=[batch(w) for w in words(200, 8, (8, 32))], optimizer=_adamw)


def _gpt2(t: Any) -> Any:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=200, n_positions=64, n_embd=64, n_layer=2, n_head=4))


def _llama(t: Any) -> Any:
    config = t.LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return t.LlamaForCausalLM(config)


def _bert(t: Any) -> Any:
    config = t.BertConfig(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=3)
    return t.BertForSequenceClassification(config)


def _t5(t: Any) -> Any:
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                                                   decoder_start_token_id=0))  # fmt: skip


def _vit() -> Subject:
    import transformers as t

    config = t.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
                         num_channels=1, num_labels=10)  # fmt: skip
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits)
    batches = [{"pixel_values": a, "labels": b} for a, b in zip(x.split(32)[:16], y.split(32)[:16], strict=True)]
    return Subject(module=t.ViTForImageClassification(config), batches=batches, optimizer=_adamw)


def _causal(w: Tensor) -> dict[str, Any]:
    return {"input_ids": w, "labels": w.clone()}


def _classes(w: Tensor) -> dict[str, Any]:
    return {"input_ids": w, "attention_mask": torch.arange(32)[None] < 16 + w[:, :1] % 16, "labels": w[:, 0] % 3}


CASES = (
    Case(name="hf-gpt2", needs=("transformers",), make=lambda: _model(_gpt2, _causal)),
    Case(name="hf-llama", needs=("transformers",), make=lambda: _model(_llama, _causal)),
    Case(name="hf-bert", needs=("transformers",), make=lambda: _model(_bert, _classes)),
    Case(name="hf-t5", needs=("transformers",), make=lambda: _model(_t5, _causal)),
    Case(name="hf-vit", needs=("transformers", "sklearn"), make=_vit),
)
