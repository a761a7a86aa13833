"""A key-value cache as one block sees it: its own layer, and everything else of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache

from weft.rewrite.cache import LayerOfCache, layer_number, narrow_caches, widen_caches

CONFIG = LlamaConfig(
    hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3, intermediate_size=8, vocab_size=9
)


def states(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of two tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, 2, 8, generator=generator), torch.randn(1, 2, 2, 8, generator=generator)


@pytest.mark.parametrize("make", [
    lambda: DynamicCache(), lambda: DynamicCache(config=CONFIG), lambda: StaticCache(CONFIG, max_cache_len=8),
], ids=["lazy", "dynamic", "static"])  # fmt: skip
def test_updates_through_the_layer_are_updates_of_the_whole(make: Any) -> None:
    ours, plain = make(), make()
    for step in range(2):
        for layer in range(3):
            keys, values = states(10 * step + layer)
            narrow = narrow_caches({"past_key_values": ours}, layer)["past_key_values"]
            assert isinstance(narrow, LayerOfCache) and narrow.whole is ours
            found, wanted = narrow.update(keys, values, layer), plain.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert int(narrow.get_seq_length(layer)) == int(plain.get_seq_length(layer))
    assert len(ours.layers) == len(plain.layers) and int(ours.get_seq_length()) == 4
    for a, b in zip(ours.layers, plain.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_what_is_not_about_the_layer_the_whole_answers() -> None:
    cache = DynamicCache(config=CONFIG)
    narrow = narrow_caches({"cache": cache}, 1)["cache"]
    assert narrow.is_compileable == cache.is_compileable and len(narrow.layers) == 3
    with pytest.raises(AttributeError):
        _ = narrow.nonsense


def test_caches_with_methods_of_their_own_stay_whole() -> None:
    class Own(DynamicCache):
        """Updates in its own way."""

        def update(self, *args: Any, **kwargs: Any) -> Any:
            return super().update(*args, **kwargs)

    both = EncoderDecoderCache(DynamicCache(config=CONFIG), DynamicCache(config=CONFIG))
    for cache in (Own(), both):
        assert narrow_caches({"cache": cache}, 0)["cache"] is cache
    others = {"x": torch.ones(2), "flag": True}
    assert narrow_caches(others, 0) is others
    eager = StaticCache(CONFIG, max_cache_len=8)
    assert narrow_caches({"cache": eager}, 7)["cache"] is eager  # a layer that it does not have


def test_results_hold_the_whole_cache_again() -> None:
    cache = DynamicCache(config=CONFIG)
    narrow = narrow_caches({"cache": cache}, 2)["cache"]
    x = torch.ones(1)
    assert widen_caches(narrow) is cache and widen_caches(x) is x
    widened = widen_caches((x, (narrow, None)))
    assert widened[0] is x
    assert widen_caches((x, narrow))[1] is cache
    untouched = (x, None)
    assert widen_caches(untouched) is untouched


def test_the_layer_that_a_block_names() -> None:
    class Attention(nn.Module):
        """Knows its layer."""

        def __init__(self, layer: int | None) -> None:
            super().__init__()
            self.layer_idx = layer

    assert layer_number(nn.Sequential(Attention(3), nn.ReLU())) == 3
    assert layer_number(nn.Sequential(Attention(3), Attention(3))) == 3
    assert layer_number(nn.Sequential(Attention(1), Attention(2))) is None  # two layers: the cache stays whole
    assert layer_number(nn.Sequential(Attention(None))) is None and layer_number(nn.ReLU()) is None


def test_a_cache_is_a_cache_for_whoever_asks() -> None:
    """A block that looks at the type of what it was given sees that it is no plain cache: it must not depend on that."""
    narrow = narrow_caches({"cache": DynamicCache(config=CONFIG)}, 0)["cache"]
    assert not isinstance(narrow, Cache)
