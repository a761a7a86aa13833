"""A key-value cache as one block sees it: its own layer.

A block reads and writes the cache at its own layer number, a constant of its module, so that Dynamo would capture every
layer anew. Given only its layer, the number selects nothing, and one graph serves all layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import Cache


class LayerOfCache:
    """Stands for a transformers ``Cache`` in one block; whatever is not about the layer, the whole cache answers."""

    def __init__(self, whole: Cache, layer: Any) -> None:
        self.whole = whole
        self.layer = layer

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As ``Cache.update``, for the layer that this block owns."""
        return self.layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """As ``Cache.get_seq_length``."""
        return self.layer.get_seq_length()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def layer_number(block: nn.Module) -> int | None:
    """The layer that all attention modules of ``block`` name when they call the cache; None if they name none or several."""
    numbers = {m.__dict__.get("layer_idx") for m in block.modules()} - {None}
    return numbers.pop() if len(numbers) == 1 else None


def narrow_caches(kwargs: dict[str, Any], number: int) -> dict[str, Any]:
    """``kwargs`` with every plain cache narrowed to layer ``number``; caches with methods of their own stay whole."""
    found = {name: _narrow(value, number) for name, value in kwargs.items() if isinstance(value, Cache)}
    return {**kwargs, **found} if found else kwargs


def _narrow(cache: Cache, number: int) -> Any:
    if type(cache).update is not Cache.update or "layers" not in vars(cache) or cache.offloading:
        return cache  # its own way of updating, or a pair of caches
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= number:
            cache.layers.append(cache.layer_class_to_replicate())
    return LayerOfCache(cache, cache.layers[number]) if number < len(cache.layers) else cache


def widen_caches(outputs: Any) -> Any:
    """``outputs`` of a block with the whole cache in place of a layer of it."""
    if isinstance(outputs, LayerOfCache):
        return outputs.whole
    if type(outputs) is tuple and any(isinstance(o, LayerOfCache) for o in outputs):
        return tuple(widen_caches(o) for o in outputs)
    return outputs
