"""Example inputs made from a model's config: small, with distinct sizes, and such that every input matters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError

BATCH, LENGTH = 2, 16


def make_examples(model: nn.Module, mode: str) -> list[dict[str, Any]]:
    """Keyword arguments for the forward calls from which ``model`` is captured.

    Raises:
        ExampleInputsError: ``model`` has no transformers config to make them from.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None or not hasattr(config, "to_dict"):
        raise ExampleInputsError(
            f"{type(model).__name__} has no transformers config to make example inputs from: "
            "pass optimize(model, example_inputs={...}) with the keyword arguments of one forward call"
        )
    parameters = set(inspect.signature(model.forward).parameters)
    made = text_inputs(model, config)
    if mode == "train" and "labels" in parameters:
        made["labels"] = made["input_ids"].clone()
    if mode == "train" and "use_cache" in parameters:
        made["use_cache"] = False
    return [made]


def text_inputs(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Random token ids below the vocabulary size, the special ones left out where there is room."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if not vocabulary:
        raise ExampleInputsError(f"{type(config).__name__} names no vocab_size: pass optimize(model, example_inputs={{...}})")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    low = min(8, vocabulary // 2)
    return {"input_ids": torch.randint(low, vocabulary, (BATCH, LENGTH), generator=generator).to(device)}


def check_examples(inputs: Any) -> list[Mapping[str, Any]]:
    """``example_inputs`` as the user gave them: one mapping, or a sequence of them.

    Raises:
        ExampleInputsError: anything else, or an empty sequence.
    """
    given = [inputs] if isinstance(inputs, Mapping) else inputs
    if not isinstance(given, list | tuple) or not given or not all(isinstance(i, Mapping) for i in given):
        raise ExampleInputsError("example_inputs must be a dict of forward keyword arguments, or a list of such dicts")
    return list(given)
