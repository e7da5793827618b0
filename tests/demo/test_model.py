"""Laws of the demo's model: it sees the past only, ties its weights, decays its matrices, and draws what its seed says."""

from __future__ import annotations

import math

import torch

from fasttrain.demo.model import ByteGPT, GPTConfig

TINY = GPTConfig(layers=2, heads=2, width=16, block=8, warmup_steps=4, steps=20)


def test_it_sees_the_past_only() -> None:
    """Changing a byte changes no logit before it."""
    torch.manual_seed(0)
    model, tokens = ByteGPT(TINY), torch.randint(256, (2, 8))
    other = tokens.clone()
    other[:, 5] += 1
    other %= 256
    same = torch.isclose(model(tokens), model(other), atol=1e-6).all(-1).all(0)
    assert same.tolist() == [True] * 5 + [False] * 3


def test_a_new_model_knows_nothing() -> None:
    """Its loss is about that of a uniform guess, log 256: within a fifth, logits being small and not zero."""
    torch.manual_seed(0)
    loss = ByteGPT(TINY).loss(torch.randint(256, (64, 9), dtype=torch.uint8)).item()
    assert abs(loss - math.log(256)) < 0.2 * math.log(256)


def test_every_parameter_is_optimized_once() -> None:
    """The tied matrix is in one group; matrices are decayed, norms are not."""
    model = ByteGPT(TINY)
    groups = model.configure_optimizers()["optimizer"].param_groups
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert model.head.weight is model.bytes.weight
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    """Up in a line over the warm-up, down to a tenth at the end, and never up again."""
    model = ByteGPT(TINY)
    factors = [model.lr_factor(step) for step in range(30)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert math.isclose(factors[20], 0.1)
    assert math.isclose(factors[29], 0.1)


def test_a_sample_is_what_its_seed_says() -> None:
    """The same seed gives the same bytes, the global stream is not touched, the mode is put back."""
    torch.manual_seed(0)
    model = ByteGPT(TINY)
    before = torch.get_rng_state()
    first = model.generate(b"def ", 20, seed=1)
    assert first == model.generate(b"def ", 20, seed=1)
    assert first != model.generate(b"def ", 20, seed=2)
    assert first.startswith(b"def ")
    assert len(first) == 24
    assert len(model.generate(b"def ", 20, max_seconds=0.0)) == 5
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
