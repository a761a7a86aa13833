"""Small training steps, recorded as CUDA graphs: equal to those of the untouched model whatever happens between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from weft.rewrite import recorded_calls, whole

from ..models import assert_same, batch, outcome, twin
from ..rewrite.recorded import DEVICE, ON_GPU, Stand
from .held import adapted

WIDE = {"hidden_size": 64, "intermediate_size": 128}
LATER = 2 if ON_GPU else 0
"""Steps by which backwards are recorded later than forwards: on a GPU attention in float32 is torch's, whose backward is another
call once the forward is recorded."""


@pytest.fixture(autouse=True)
def _recorded_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_calls, "bound_by_host", lambda *_: True)
    if not ON_GPU:
        monkeypatch.setattr(whole, "on_gpu", lambda _: True)
        monkeypatch.setattr(whole, "Recordings", lambda parameters: Stand(parameters, DEVICE))


def batch_of(seed: int, padded: bool = False) -> dict[str, Any]:
    """A batch where the model is."""
    return {name: value.to(DEVICE) for name, value in batch(2, 24, padded=padded, seed=seed).items()}


def both(**options: Any) -> tuple[Any, Any]:
    """A model of four blocks, optimized, and its twin."""
    model = adapted(4, **WIDE).to(DEVICE)
    plain = twin(model)
    return weft.optimize(model, verify=False, memory="8GB", **options), plain


def test_steps_of_a_trained_model() -> None:
    pair = both()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in pair]
    for seed in range(7):
        for m in pair:
            m(**batch_of(seed)).loss.backward()
        same_gradients(*pair)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    recordings = pair[0].rewrite_report.steps.recordings
    assert recordings.count == 8 and recordings.replays >= 4 * 8 - LATER * 4, recordings.notes
    assert "8 recordings" in str(pair[0].rewrite_report)
    weft.undo(pair[0])
    assert_same(*(outcome(m, batch_of(9)) for m in pair), rounding=1e-3)


def same_gradients(model: Any, plain: Any) -> None:
    """Of all parameters that have one."""
    found, wanted = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, plain))
    assert_same(found, wanted, rounding=1e-3)


def test_accumulated_gradients_padding_and_evaluation() -> None:
    model, plain = both()
    for seed in range(6):
        for m in (model, plain):
            m.zero_grad(set_to_none=True)
            for i in range(3):
                m(**batch_of(3 * seed + i, padded=i == 2)).loss.backward()
        same_gradients(model, plain)
        with torch.no_grad():
            losses = [m(**batch_of(100 + seed)).loss for m in (model, plain)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    recordings = model.rewrite_report.steps.recordings
    assert recordings.replays > 20, recordings.notes


def test_they_are_made_anew_when_a_frozen_weight_has_changed() -> None:
    """An operator may have kept something made of it, which they read."""
    model, plain = both()
    counts = list[int]()
    for seed in range(10 + 2 * LATER):
        for m in (model, plain):
            m.zero_grad(set_to_none=True)
            if seed == 5 + LATER:
                with torch.no_grad():
                    m.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.1)
            m(**batch_of(seed)).loss.backward()
        same_gradients(model, plain)
        counts.append(model.rewrite_report.steps.recordings.count)
    assert (counts[4 + LATER], counts[5 + LATER], counts[-1]) == (8, 0, 8)
    assert not model.rewrite_report.steps.recordings.given_up


def test_not_if_it_is_not_wanted() -> None:
    model = weft.optimize(adapted(2).to(DEVICE), example_inputs=batch_of(0), memory="8GB", cuda_graphs=False)
    assert model.rewrite_report.steps.recordings is None


def test_none_where_memory_is_all_that_counts() -> None:
    model = weft.optimize(adapted(2).to(DEVICE), example_inputs=batch_of(0), memory="min")
    assert model.rewrite_report.steps.recordings is None


def test_none_where_a_limit_leaves_no_room_for_them() -> None:
    model, plain = both()
    steps = model.rewrite_report.steps
    for seed in range(8 + LATER):
        for m in (model, plain):
            m.zero_grad(set_to_none=True)
            m(**batch_of(seed)).loss.backward()
        same_gradients(model, plain)
        steps.limit = steps.plan.predicted if seed < 5 else "free"
        assert seed > 6 or not steps.recordings.count
    assert steps.recordings.count == 8, "all is recorded as soon as there is room"


def test_those_of_other_sizes_are_given_up_for_memory() -> None:
    """The limit leaves room for one size; what is pending when the recordings go is right, too."""
    model, plain = both()
    for seed in range(4 + LATER):
        for m in (model, plain):
            m.zero_grad(set_to_none=True)
            m(**batch_of(seed)).loss.backward()
    steps = model.rewrite_report.steps
    assert steps.recordings.replays
    steps.limit = steps.plan.resident + steps.plan.working
    for seed in range(4, 8):
        short = {name: value[:, :12] for name, value in batch_of(seed + 1).items()}
        for m in (model, plain):
            m.zero_grad(set_to_none=True)
            first, second = m(**batch_of(seed)).loss, m(**short).loss
            second.backward()
            first.backward()
        same_gradients(model, plain)
    assert sum(steps.recordings.given_up.values()) >= 8
    assert any("given up for their memory" in remark for remark in model.rewrite_report.remarks)
