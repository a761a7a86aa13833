"""What a training call has beside its inputs: labels that fit the head, and padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError
from .example_layouts import config_parts, find_setting
from .example_media import trial

IGNORED = -100
"""The label that losses leave out."""


@dataclass(frozen=True)
class Scale:
    """How large the examples are, and what they are drawn from. All sizes differ: equal ones would be traced as one."""

    batch: int = 2
    length: int = 19
    target_length: int = 13
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A fresh source of random numbers."""
        return torch.Generator().manual_seed(self.seed)


SMALL = Scale()


def targets(
    model: nn.Module, config: Any, known: frozenset[str], made: Mapping[str, Any], scale: Scale
) -> dict[str, Tensor]:
    """Labels as the head wants them: the ids for a language model, else by the shape of its logits.

    If no id has a meaning of its own, they are the ids themselves, as in a loop that calls ``model(input_ids=ids,
    labels=ids)``: to Dynamo one tensor for both is another call than two. Where a collator makes them, there is padding, and
    they are two.
    """
    if "start_positions" in known and "end_positions" in known:
        edge = torch.ones(scale.batch, dtype=torch.long, device=next(model.parameters()).device)
        return {"start_positions": edge, "end_positions": 2 * edge}
    if "labels" not in known:
        return {}
    if "decoder_input_ids" in made:
        return {"labels": made["decoder_input_ids"].clone()}
    if "input_ids" in made and _is_language_model(model):
        special = [token for token in special_ids(config) if (made["input_ids"] == token).any()]
        if not special:
            return {"labels": made["input_ids"]}
        labels = made["input_ids"].clone()
        for token in special:
            labels[labels == token] = IGNORED
        return {"labels": labels}
    return {"labels": _class_labels(model, config, made)}


def _is_language_model(model: nn.Module) -> bool:
    """Whether the logits are over the vocabulary: the model has output embeddings."""
    head = getattr(model, "get_output_embeddings", lambda: None)
    return head() is not None


def _class_labels(model: nn.Module, config: Any, made: Mapping[str, Any]) -> Tensor:
    """Zeros of the shape that the logits ask for; found out by one forward."""
    outcome = trial(model, lambda: model(**made))
    logits: Any = getattr(outcome, "logits", None)
    if not isinstance(logits, Tensor):
        raise ExampleInputsError(
            f"cannot tell which labels {type(model).__name__} takes ({outcome}): "
            "pass optimize(model, example_inputs={...})"
        )
    kind = getattr(config, "problem_type", None)
    if kind == "multi_label_classification":
        return torch.zeros_like(logits)
    shape = logits.shape[:-1]
    regression = kind == "regression" or (kind is None and logits.ndim == 2 and logits.shape[-1] == 1)
    return torch.zeros(shape, dtype=logits.dtype if regression else torch.long, device=logits.device)


def padded_call(config: Any, known: frozenset[str], made: Mapping[str, Any], scale: Scale) -> dict[str, Any] | None:
    """``made`` with the last words of the last row padded; None where nothing takes a mask."""
    ids = made.get("input_ids")
    if "attention_mask" not in known or ids is None or ids.ndim != 2:
        return None
    cut = ids.shape[1] - max(2, scale.length // 4)
    padded = dict(made) | {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][-1, cut:] = 0
    padded["input_ids"][-1, cut:] = _pad_id(config)
    if "labels" in made and made["labels"].shape == ids.shape and "decoder_input_ids" not in made:
        padded["labels"] = made["labels"].clone()
        padded["labels"][-1, cut:] = IGNORED
    return padded


def _pad_id(config: Any) -> int:
    """The padding token, where one of the vocabulary is named."""
    size = find_setting(config, "vocab_size")
    named = (getattr(part, "pad_token_id", None) for part in config_parts(config))
    return next((i for i in named if isinstance(i, int) and 0 <= i < size), 0)


def special_ids(config: Any) -> set[int]:
    """Every id that the config, or a config in it, gives a meaning."""
    found: set[int] = set()
    for name, setting in config.to_dict().items():
        if isinstance(setting, dict):
            part = getattr(config, name, None)
            found |= special_ids(part) if hasattr(part, "to_dict") else set()
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            found |= {i for i in (setting if isinstance(setting, list) else [setting]) if isinstance(i, int)}
    return found
