"""Small training steps on a GPU: recorded as CUDA graphs, equal to those of the untouched model whatever happens between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft

from ..models import assert_same, batch, outcome, twin
from .held import adapted

pytestmark = pytest.mark.gpu
WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}


def on_gpu(seed: int, padded: bool = False) -> dict[str, Any]:
    """A batch where the model is."""
    return {name: value.cuda() for name, value in batch(2, 24, padded=padded, seed=seed).items()}


def both(**options: Any) -> tuple[Any, Any]:
    """A model of four blocks, optimized, and its twin."""
    model = adapted(4, **WIDE).cuda()
    plain = twin(model)
    return weft.optimize(model, verify=False, **options), plain


def test_steps_of_a_trained_model() -> None:
    pair = both()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in pair]
    for seed in range(7):
        for m in pair:
            m(**on_gpu(seed)).loss.backward()
        same_gradients(*pair)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    recordings = pair[0].rewrite_report.steps.recordings
    assert recordings.count == 8 and recordings.replays >= 4 * 8
    assert "8 recordings" in str(pair[0].rewrite_report)


def same_gradients(model: Any, plain: Any) -> None:
    """Of all parameters that have one."""
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_gradients_padding_and_evaluation() -> None:
    model, plain = both()
    for seed in range(6):
        for m in (model, plain):
            m.zero_grad(set_to_none=True)
            for i in range(3):
                m(**on_gpu(3 * seed + i, padded=i == 2)).loss.backward()
        same_gradients(model, plain)
        with torch.no_grad():
            losses = [m(**on_gpu(100 + seed)).loss for m in (model, plain)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert model.rewrite_report.steps.recordings.replays > 20


def test_not_if_it_is_not_wanted() -> None:
    model, plain = both(cuda_graphs=False)
    for seed in range(4):
        assert_same(*(outcome(m, on_gpu(seed)) for m in (model, plain)), rounding=1e-3)
    assert model.rewrite_report.steps.recordings is None


def test_undo_gives_the_memory_back() -> None:
    model, plain = both()
    for seed in range(5):
        outcome(model, on_gpu(seed))
    weft.undo(model)
    assert_same(*(outcome(m, on_gpu(9)) for m in (model, plain)), rounding=1e-3)
