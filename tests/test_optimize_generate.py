"""Greedy generation gives the same tokens after optimize(), whatever the cache, the batch and the mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache

import weft

from .models import assert_same, batch, llama, outcome, quickly, twin, with_lora


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A Llama with adapters, optimized for inference, and its twin."""
    model = with_lora(llama(num_hidden_layers=3)).eval()
    plain = twin(model)
    weft.optimize(model, mode="inference")
    return model, plain


def padded_left() -> dict[str, torch.Tensor]:
    """Two prompts of different lengths."""
    inputs = batch(2, 6, labels=False, padded=True)
    return {"input_ids": inputs["input_ids"].flip(-1), "attention_mask": inputs["attention_mask"].flip(-1)}


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {**batch(1, 5, labels=False)},
    "longer": {**batch(1, 11, seed=1, labels=False), "max_new_tokens": 9},
    "left-padded batch": padded_left(),
    "static cache": {**batch(1, 5, labels=False), "cache_implementation": "static"},
    "no cache": {**batch(1, 5, labels=False), "use_cache": False},
    "beams": {**batch(1, 5, labels=False), "num_beams": 2},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_same_tokens(call: str, pair: tuple[Any, Any]) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, **CALLS[call]}
    found, wanted = (model.generate(**options) for model in pair)
    assert wanted.shape[1] > options["input_ids"].shape[1] and torch.equal(found, wanted)


def test_sampling_draws_the_same_tokens(pair: tuple[Any, Any]) -> None:
    tokens = []
    for model in pair:
        torch.manual_seed(3)
        tokens.append(model.generate(**batch(2, 5, labels=False), do_sample=True, max_new_tokens=6))
    assert torch.equal(*tokens)


def test_one_graph_serves_all_layers_of_a_decoding_step(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    blocks = [r for r in model.rewrite_report.regions if any(".layers." in p for p in r.paths)]
    assert blocks and all(len(r.paths) == 3 for r in blocks), [r.paths for r in blocks]


def test_the_cache_that_comes_back_is_the_one_that_went_in(pair: tuple[Any, Any]) -> None:
    ids, results = batch(1, 6, labels=False)["input_ids"], []
    for model in pair:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            first = model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
            assert first.past_key_values is cache and cache.get_seq_length() == 4
            second = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
        assert type(second.past_key_values) is DynamicCache and cache.get_seq_length() == 6
        results.append({"logits": second.logits, "keys": cache.layers[1].keys, "values": cache.layers[2].values})
    assert_same(*results)


def test_a_model_optimized_for_training_generates() -> None:
    model = with_lora(llama(hidden_size=16, intermediate_size=24))
    plain = twin(model)
    quickly(model)
    assert model.training
    model.eval(), plain.eval()
    options = {**batch(1, 5, labels=False), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options), plain.generate(**options))
    model.train(), plain.train()
    assert_same(outcome(model, batch(2, 6)), outcome(plain, batch(2, 6)))


def test_an_encoder_and_a_decoder() -> None:
    """Its cache is a pair of caches."""
    config = BartConfig(
        vocab_size=61, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    plain = twin(model)
    weft.optimize(model, mode="inference", verify=False)
    assert any(r.rule == "layer_norm" for r in model.rewrite_report.rewrites)
    options = {**batch(2, 5, labels=False), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), plain.generate(**options))


def test_evaluation_under_inference_mode(pair: tuple[Any, Any]) -> None:
    with torch.inference_mode():
        found, wanted = (model(**batch(2, 7, seed=9, labels=False)).logits for model in pair)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_autocast(pair: tuple[Any, Any]) -> None:
    inputs = batch(2, 7, seed=9, labels=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (model(**inputs).logits for model in pair)
    with torch.no_grad():
        exact = pair[1](**inputs).logits
    assert found.dtype == wanted.dtype
    own = (wanted.float() - exact).abs().max()
    assert (found.float() - exact).abs().max() <= 2 * own


def test_zz_undo_after_generation(pair: tuple[Any, Any]) -> None:
    """Last of the tests that share the pair."""
    model, plain = pair
    weft.undo(model)
    with torch.no_grad():
        inputs = batch(2, 7, labels=False)
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
