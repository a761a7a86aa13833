"""A loop of one's own around an optimized model: the losses of the untouched twin, step by step."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from ..models import assert_same, batch, llama, outcome, quickly, twin, with_lora
from .runs import CLOSE, KINDS, SMALL, adapted, adapted_pair, as_before, assert_same_losses, loop, pair

BATCHES = [batch(2, 12, seed=i, padded=i % 2 == 1) for i in range(5)]


@pytest.fixture(scope="module", params=KINDS)
def both(request: Any) -> tuple[str, Any, Any]:
    """What the weights are, an optimized model, and its twin."""
    return request.param, *adapted_pair(request.param)


def test_losses(both: tuple[str, Any, Any]) -> None:
    kind, *models = both
    with as_before(*models):
        assert_same_losses(*(loop(m, BATCHES) for m in models), kind)


def test_bfloat16_autocast(both: tuple[str, Any, Any]) -> None:
    _, *models = both
    with as_before(*models):
        assert_same_losses(*(loop(m, BATCHES, autocast=torch.bfloat16) for m in models), "bfloat16")


def test_float16_with_loss_scaling(both: tuple[str, Any, Any]) -> None:
    """The first scale overflows: steps are skipped, the same ones, until it fits."""
    kind, *models = both
    runs, scales = [], []
    with as_before(*models):
        for model in models:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)
            runs.append(loop(model, BATCHES * 2, autocast=torch.float16, scaler=scaler))
            scales.append(scaler.get_scale())
    assert_same_losses(*runs, "bfloat16")
    assert scales[0] == scales[1] < 2.0**24, kind


def test_eight_bit_adamw(both: tuple[str, Any, Any]) -> None:
    """Its rounding of the moments turns a difference in the last place into one of a step of its code."""
    kind, *models = both
    with as_before(*models):
        runs = [loop(m, BATCHES, lambda p: bnb.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=16)) for m in models]
    assert runs[0] == pytest.approx(runs[1], rel=max(1e-3, CLOSE[kind])) and len(set(runs[1])) == len(runs[1])


def test_gradients_accumulate(both: tuple[str, Any, Any]) -> None:
    kind, *models = both
    with as_before(*models):
        for model in models:
            for inputs in BATCHES[:3]:
                model(**inputs).loss.backward()
        found, wanted = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            off = float((found[name] - gradient).norm() / gradient.norm())
            assert off < CLOSE[kind], f"{name}: off by {off}"


def test_all_weights_are_trained() -> None:
    """Full fine-tuning: a gradient for embeddings, norms, linears and the head."""
    model, plain = pair(llama(**SMALL).train(), "gated_mlp")
    assert_same(outcome(model, BATCHES[0]), outcome(plain, BATCHES[0]))
    assert_same_losses(*(loop(m, BATCHES) for m in (model, plain)))


@pytest.mark.parametrize("saved", [("lm_head",), ("embed_tokens", "norm", "input_layernorm")])
def test_modules_to_save_are_trained(saved: tuple[str, ...]) -> None:
    model = with_lora(llama(**SMALL), modules_to_save=list(saved), target_modules=["q_proj", "v_proj", "down_proj"])
    model, plain = pair(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert trained and all("modules_to_save" in n for n in trained)
    assert_same_losses(*(loop(m, BATCHES) for m in (model, plain)))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert set(trained) <= changed
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_compiled_on_top() -> None:
    """torch.compile around an optimized model: it breaks its graph at our regions, which run as ever."""
    model, plain = pair(adapted("float32"))
    compiled: Any = torch.compile(model, backend="eager")
    assert_same_losses(loop(compiled, BATCHES), loop(plain, BATCHES))
    assert any("forward" in m.__dict__ for m in model.modules())


def test_compiled_in_place_on_top() -> None:
    """As Trainer's ``torch_compile`` and ``Module.compile`` do."""
    model, plain = pair(adapted("float32"))
    model.compile(backend="eager")
    assert_same_losses(loop(model, BATCHES), loop(plain, BATCHES))


def test_compiled_before_is_refused() -> None:
    """With the remedy, and nothing is changed."""
    model = adapted("float32")
    plain = twin(model)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        quickly(compiled)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert_same(outcome(model, BATCHES[0]), outcome(plain, BATCHES[0]))
