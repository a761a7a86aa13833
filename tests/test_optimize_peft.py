"""Adapters of an optimized model: several, switched, disabled, merged, saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

import weft

from .models import Nested, assert_same, batch, fill_adapters, llama, outcome, quickly, twin, with_lora


def two_adapters() -> PeftModel:
    """A Llama with two adapters of different ranks, the second on two of the linears only."""
    model = with_lora(llama(hidden_size=16, intermediate_size=24))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"], use_rslora=True))
    torch.manual_seed(2)
    fill_adapters(model)
    model.model.model.norm.weight.requires_grad_(True)  # something has a gradient when no adapter has
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[PeftModel, PeftModel]:
    """An optimized model with two adapters, one active, and its twin."""
    model = two_adapters()
    plain = twin(model)
    quickly(model)
    return model, plain  # type: ignore[return-value]


def disabled(model: PeftModel, inputs: Any) -> Any:
    with model.disable_adapter():
        return outcome(model, inputs)


def merged(model: PeftModel, inputs: Any) -> Any:
    model.merge_adapter()
    found = outcome(model, inputs)
    model.unmerge_adapter()
    return found


def both(model: PeftModel, inputs: Any) -> Any:
    model.base_model.set_adapter(["default", "second"])
    found = outcome(model, inputs)
    model.set_adapter("default")
    return found


def second(model: PeftModel, inputs: Any) -> Any:
    model.set_adapter("second")
    found = outcome(model, inputs)
    model.set_adapter("default")
    return found


STATES: dict[str, Callable[[PeftModel, Any], Any]] = {
    "one": outcome,
    "disabled": disabled,
    "merged": merged,
    "both": both,
    "second": second,
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_the_adapters(state: str, pair: tuple[PeftModel, PeftModel]) -> None:
    inputs = batch(2, 7, seed=1)
    model, plain = pair
    wanted = STATES[state](plain, inputs)
    assert_same(STATES[state](model, inputs), wanted)
    if state not in ("one", "merged"):
        assert not torch.allclose(wanted["loss"], outcome(plain, inputs)["loss"])
    assert_same(outcome(model, inputs), outcome(plain, inputs))


def test_both_adapters_are_rewritten() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    quickly(model)
    rules = [r for r in model.rewrite_report.rewrites if r.rule == "lora_linear"]
    assert len(rules) == 14 + 4, str(model.rewrite_report)


def test_weights_changed_by_hand_are_seen(pair: tuple[PeftModel, PeftModel]) -> None:
    inputs = batch(2, 7, seed=2)
    for model in pair:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.25)
    assert_same(outcome(pair[0], inputs), outcome(pair[1], inputs))


def test_saved_adapters_load_into_a_plain_model(tmp_path: Path) -> None:
    model = with_lora(llama(hidden_size=16, intermediate_size=24))
    quickly(model)
    inputs = batch(2, 7, seed=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(hidden_size=16, intermediate_size=24), str(tmp_path)).train()
    for p in loaded.parameters():
        p.requires_grad_(False)
    assert not any("weft" in str(m.__dict__.get("forward")) for m in loaded.modules())
    torch.testing.assert_close(model(**inputs).logits.float(), loaded(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_saved_model_loads_into_plain_transformers(tmp_path: Path) -> None:
    model = llama(hidden_size=16, intermediate_size=24).train()
    quickly(model)
    inputs = batch(2, 7, seed=4)
    model(**inputs).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    torch.testing.assert_close(model(**inputs).logits.float(), loaded(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_unloading_the_adapters_leaves_a_model_that_runs(pair: tuple[PeftModel, PeftModel]) -> None:
    """Last: it takes the adapters out of both."""
    inputs = batch(2, 7, seed=5)
    bases = [model.merge_and_unload() for model in pair]
    found, wanted = (base(**inputs).logits for base in bases)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-4)


def test_two_models_of_one_class_do_not_mix() -> None:
    first, second = Nested(), Nested(layers=3)
    plain = [twin(m) for m in (first, second)]
    quickly(first)
    inputs = batch(2, 7, seed=8)
    assert _installed(first) and not _installed(second)
    assert_same(outcome(second, inputs), outcome(plain[1], inputs))
    quickly(second)
    for ours, theirs in zip((first, second), plain, strict=True):
        assert_same(outcome(ours, inputs), outcome(theirs, inputs))
    weft.undo(first)
    assert not _installed(first) and _installed(second)
    for ours, theirs in zip((first, second), plain, strict=True):
        assert_same(outcome(ours, inputs), outcome(theirs, inputs))


def _installed(model: nn.Module) -> bool:
    return any("forward" in m.__dict__ for m in model.modules())
