"""4-bit weights that bitsandbytes repacks in place for a CPU kernel of its own, when a model runs in evaluation mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import weft
from weft.rewrite.errors import UnsupportedModelError

from .models import VOCABULARY, assert_same, batch, in_four_bits, llama, outcome, quickly, twin, with_lora

on_avx512 = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks only where the CPU has AVX512-BF16")
PROMPT = batch(2, 7, seed=1, labels=False)
ROUNDING = 2e-2
"""bitsandbytes' kernel computes in bfloat16."""


def model_in_four_bits() -> nn.Module:
    """A Llama of one layer in NF4 with adapters."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 1}
    return with_lora(in_four_bits(llama(**sizes)))


def packed(model: nn.Module) -> list[bool]:
    """For each 4-bit weight, whether it is repacked."""
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert states
    return [bool(getattr(s, "packing_format_for_cpu", False)) for s in states]


def repack(model: nn.Module) -> None:
    """What bitsandbytes does in its forward."""
    for p in model.parameters():
        if hasattr(p, "quant_state"):
            p.data, p.quant_state = _convert_weight_packed_for_cpu(p.data, p.quant_state)


def storage(model: nn.Module) -> dict[str, Any]:
    """Every 4-bit weight with all that says how it is stored."""
    found = {n: p for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    return {n: (p.data.clone(), dict(vars(p.quant_state)), p.quant_state) for n, p in found.items()}


def assert_stored_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same bits, and the same objects around them."""
    assert found.keys() == wanted.keys()
    for name, (data, attributes, state) in wanted.items():
        assert torch.equal(found[name][0], data) and found[name][2] is state, name
        assert found[name][1].keys() == attributes.keys(), name
        assert all(found[name][1][k] is v for k, v in attributes.items()), name


def logits(model: nn.Module) -> Tensor:
    """In evaluation mode, without gradients: where bitsandbytes repacks."""
    model.eval()
    with torch.no_grad():
        return model(**PROMPT).logits.float()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for what bfloat16 makes of another rounding before it."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING * float(wanted.abs().max()))


@on_avx512
def test_optimizing_for_inference_leaves_the_weights_as_they_were() -> None:
    model = model_in_four_bits().eval()
    plain, before = twin(model), storage(model)
    weft.optimize(model, mode="inference")
    assert not any(packed(model))
    assert_stored_alike(storage(model), before)
    weft.undo(model)
    assert_stored_alike(storage(model), before)
    assert torch.equal(logits(model), logits(plain)) and all(packed(model))


@on_avx512
def test_a_classifier_whose_labels_are_found_by_trying_is_trained_with_its_weights_as_they_were() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, num_labels=3, pad_token_id=0, **sizes)
    model = LlamaForSequenceClassification(config)
    in_four_bits(model.model)
    model = with_lora(model, task_type="SEQ_CLS")
    plain, before = twin(model), storage(model)
    weft.optimize(model)
    assert_stored_alike(storage(model), before)
    inputs = batch(2, 7, labels=False) | {"labels": torch.tensor([0, 2])}
    assert_same(outcome(model, inputs), outcome(plain, inputs))


@on_avx512
def test_evaluation_between_training_steps() -> None:
    """Repacked weights are repacked weights for the optimized model too: what it computes stays what the plain one does."""
    model = model_in_four_bits()
    plain = twin(model)
    quickly(model)
    assert_same(outcome(model, batch(2, 7)), outcome(plain, batch(2, 7)))
    for _ in range(2):
        assert_close(logits(model), logits(plain))
        assert all(packed(model)) and all(packed(plain))
    model.train(), plain.train()
    with torch.no_grad():
        assert_close(model(**PROMPT).logits.float(), plain(**PROMPT).logits)
    unpacked = [each.state_dict() for each in (model, plain)]  # bitsandbytes packs back to save
    assert not any(packed(model)) and all(torch.equal(v, unpacked[1][k]) for k, v in unpacked[0].items())
    assert_same(outcome(model, batch(2, 7)), outcome(plain, batch(2, 7)))


@on_avx512
def test_weights_repacked_behind_the_back_of_the_optimized_model() -> None:
    model = model_in_four_bits()
    quickly(model)
    wanted = outcome(model, PROMPT)["logits"]
    repack(model)
    with torch.no_grad():
        assert_close(model(**PROMPT).logits.float(), wanted)
    refused = [r for r in model.rewrite_report.refusals if r.rule == "quant_linear"]
    assert len(refused) == 7 and all("repacked the weight" in r.reason for r in refused), str(model.rewrite_report)


@on_avx512
def test_undone_generated_with_and_optimized_again() -> None:
    model = model_in_four_bits().eval()
    plain = twin(model)
    weft.optimize(model, mode="inference")
    weft.undo(model)
    options = {**batch(1, 5, labels=False), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**options), plain.generate(**options))
    before = storage(model)
    quickly(model, mode="inference")
    assert_close(logits(model), logits(plain))
    reasons = {r.reason for r in model.rewrite_report.refusals if r.rule == "quant_linear"}
    assert reasons == {"bitsandbytes repacked the weight for a CPU kernel of its own"}
    weft.undo(model)
    assert_stored_alike(storage(model), before)
    assert torch.equal(logits(model), logits(plain))


def test_repacked_weights_are_not_trained_through() -> None:
    """On any CPU: the weight says of itself that it is repacked."""
    model = model_in_four_bits()
    repack(model)
    before = storage(model)
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.base_layer\.weight when .*state_dict\(\)"):
        weft.optimize(model, mode="train")
    assert_stored_alike(storage(model), before)
    assert not any("forward" in vars(m) for m in model.modules()) and not hasattr(model, "rewrite_report")
    model.state_dict()
    quickly(model)
    assert sum(r.rule == "lora_linear" for r in model.rewrite_report.rewrites) == 7
