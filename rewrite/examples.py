"""Example inputs made from a model's config and its forward's signature: small, and of distinct sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError
from .example_layouts import find_setting
from .example_media import Media, Offer, describe_failure, media_for, summary, trial

IGNORED = -100
BEFORE = 3
"""Words before the first placeholder."""
SECOND_TEXTS = frozenset(("qformer_input_ids",))
"""Texts that the encoder of an image reads, too."""


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


def make_examples(model: nn.Module, mode: str, scale: Scale = Scale()) -> list[dict[str, Any]]:
    """Keyword arguments for the forward calls from which ``model`` is captured.

    For ``"train"`` two calls with labels, one without and one with padding; for ``"inference"`` one prefill.

    Raises:
        ExampleInputsError: ``model`` has no transformers config to make them from, or takes nothing that it suggests.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name") or not hasattr(config, "to_dict"):
        raise ExampleInputsError(
            f"{type(model).__name__} has no transformers config to make example inputs from: "
            "pass optimize(model, example_inputs={...}) with the keyword arguments of one forward call"
        )
    known = frozenset(inspect.signature(model.forward).parameters)
    made = _inputs(model, config, known, scale)
    if mode != "train":
        return [made]
    if "use_cache" in known:
        made["use_cache"] = False
    made |= _targets(model, config, known, made, scale)
    padded = _padded(config, known, made, scale)
    return [made, padded] if padded else [made]


def _inputs(model: nn.Module, config: Any, known: frozenset[str], scale: Scale) -> dict[str, Any]:
    """Everything but labels and masks, with the images or sounds in the first layout that ``model`` takes."""
    beside = {}
    for name in SECOND_TEXTS & known:
        beside[name] = _draw_ids(model, config, scale.batch, scale.target_length, scale.generator())
    choices = media_for(Offer(model, known, scale.batch, beside), scale.generator())
    made = [_with_text(model, config, known, media, scale) for media in choices]
    made = [m for i, m in enumerate(made) if not any(_same_shapes(m, other) for other in made[:i])]
    if len(made) == 1:
        return made[0]
    reasons = []
    for inputs in made:
        outcome = trial(model, lambda inputs=inputs: model(**inputs))
        if not isinstance(outcome, Exception):
            return inputs
        reasons.append(describe_failure(inputs, outcome))
    raise ExampleInputsError(
        f"{type(model).__name__} takes none of the example inputs that its config suggests ({summary(reasons)}): "
        "pass optimize(model, example_inputs={...})"
    )


def _same_shapes(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return {k: getattr(v, "shape", v) for k, v in a.items()} == {k: getattr(v, "shape", v) for k, v in b.items()}


def _with_text(model: nn.Module, config: Any, known: frozenset[str], media: Media, scale: Scale) -> dict[str, Any]:
    made = {name: value for name, value in media.inputs.items() if name in known}
    if "input_ids" in known:
        made["input_ids"] = _token_ids(model, config, media, scale)
        made |= {name: make(made, media) for name, make in ALONGSIDE.items() if name in known and media.inputs}
    if bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in known:
        made["decoder_input_ids"] = _draw_ids(model, config, scale.batch, scale.target_length, scale.generator())
    if not made:
        raise ExampleInputsError(
            f"{type(model).__name__}.forward takes neither token ids nor images nor sounds that its config describes: "
            f"pass optimize(model, example_inputs={{{model.main_input_name!r}: ...}})"
        )
    return made


def _marks(made: Mapping[str, Any], media: Media) -> Tensor:
    """1 where a placeholder stands."""
    marks = torch.zeros_like(made["input_ids"])
    start = BEFORE + len(media.opening)
    marks[:, start : start + media.count] = 1
    return marks


def _boxes(made: Mapping[str, Any], media: Media) -> Tensor:
    """A place on the page for every token."""
    return torch.ones_like(made["input_ids"])[..., None].expand(-1, -1, 4).contiguous()


def _sees_all(*trailing: str) -> Callable[[Mapping[str, Any], Media], Tensor]:
    """A mask by which every token sees every image (and every tile of it)."""

    def make(made: Mapping[str, Any], media: Media) -> Tensor:
        tiles = media.inputs.get("aspect_ratio_mask")
        shape = (*made["input_ids"].shape, 1, *(tiles.shape[2:] if "tiles" in trailing and tiles is not None else ()))
        return torch.ones(shape, dtype=torch.long, device=made["input_ids"].device)

    return make


ALONGSIDE: dict[str, Callable[[Mapping[str, Any], Media], Tensor]] = {
    "token_type_ids": _marks,
    "mm_token_type_ids": _marks,
    "image_embeds_position_mask": _marks,
    "bbox": _boxes,
    "image_attention_mask": _sees_all(),
    "cross_attention_mask": _sees_all("tiles"),
}
"""Parameters that say, token by token, where the images are and who sees them."""


def _token_ids(model: nn.Module, config: Any, media: Media, scale: Scale) -> Tensor:
    """Random ids, with the placeholders of the images or sounds after the first few."""
    ids = _draw_ids(model, config, scale.batch, scale.length, scale.generator())
    if not media.count:
        return ids
    inner = [*media.opening, *[media.token] * media.count, *media.closing]
    marks = torch.tensor(inner, device=ids.device).expand(scale.batch, -1)
    return torch.cat([ids[:, :BEFORE], marks, ids[:, BEFORE:]], dim=1)


def _draw_ids(model: nn.Module, config: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    size = find_setting(config, "vocab_size")
    if not isinstance(size, int) or size < 2:
        raise ExampleInputsError(
            f"{type(config).__name__} names no vocab_size: pass optimize(model, example_inputs={{...}})"
        )
    special = _special_ids(config)
    plain = [i for i in range(min(size, 1000)) if i not in special] or [0]
    drawn = torch.randint(0, len(plain), (batch, length), generator=generator)
    return torch.tensor(plain)[drawn].to(next(model.parameters()).device)


def _special_ids(config: Any) -> set[int]:
    """Every id that the config, or a config in it, gives a meaning."""
    found: set[int] = set()
    for name, setting in config.to_dict().items():
        if isinstance(setting, dict):
            part = getattr(config, name, None)
            found |= _special_ids(part) if hasattr(part, "to_dict") else set()
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            found |= {i for i in (setting if isinstance(setting, list) else [setting]) if isinstance(i, int)}
    return found


# labels and padding -------------------------------------------------------------------------------------------------
def _targets(
    model: nn.Module, config: Any, known: frozenset[str], made: Mapping[str, Any], scale: Scale
) -> dict[str, Tensor]:
    """Labels as the head wants them: the ids for a language model, else by the shape of its logits."""
    if "start_positions" in known and "end_positions" in known:
        edge = torch.ones(scale.batch, dtype=torch.long, device=next(model.parameters()).device)
        return {"start_positions": edge, "end_positions": 2 * edge}
    if "labels" not in known:
        return {}
    if "decoder_input_ids" in made:
        return {"labels": made["decoder_input_ids"].clone()}
    if "input_ids" in made and _is_language_model(model):
        labels = made["input_ids"].clone()
        for token in _special_ids(config):
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


def _padded(config: Any, known: frozenset[str], made: Mapping[str, Any], scale: Scale) -> dict[str, Any] | None:
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
    """The padding token, where it is one of the vocabulary."""
    found = getattr(config.get_text_config(), "pad_token_id", None)
    found = find_setting(config, "pad_token_id") if found is None else found
    return found if isinstance(found, int) and 0 <= found < find_setting(config, "vocab_size") else 0


def check_examples(inputs: Any) -> list[Mapping[str, Any]]:
    """``example_inputs`` as the user gave them: one mapping, or a sequence of them.

    Raises:
        ExampleInputsError: anything else, or an empty sequence.
    """
    given = [inputs] if isinstance(inputs, Mapping) else inputs
    if not isinstance(given, list | tuple) or not given or not all(isinstance(i, Mapping) for i in given):
        raise ExampleInputsError("example_inputs must be a dict of forward keyword arguments, or a list of such dicts")
    return list(given)
