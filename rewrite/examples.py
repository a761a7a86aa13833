"""Example inputs made from a model's config and its forward's signature: small, and of distinct sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError
from .example_labels import SMALL, Scale, padded_call, special_ids, targets
from .example_layouts import find_setting
from .example_media import Media, Offer, describe_failure, media_for, summary, trial

BEFORE = 3
"""Words before the first placeholder."""
SECOND_TEXTS = frozenset(("qformer_input_ids",))
"""Texts that the encoder of an image reads, too."""


def make_examples(model: nn.Module, mode: str, scale: Scale = SMALL) -> list[dict[str, Any]]:
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
    parameters = inspect.signature(model.forward).parameters
    known = frozenset(parameters)
    made = _inputs(model, config, known, scale)
    _check_complete(model, parameters, made)
    if mode != "train":
        return [made]
    if "use_cache" in known:
        made["use_cache"] = False
    made |= targets(model, config, known, made, scale)
    padded = padded_call(config, known, made, scale)
    return [made, padded] if padded else [made]


def _check_complete(model: nn.Module, parameters: Mapping[str, inspect.Parameter], made: Mapping[str, Any]) -> None:
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [n for n in needed if n not in made]:
        raise ExampleInputsError(
            f"{type(model).__name__}.forward needs {', '.join(missing)}, which its config does not describe: "
            "pass optimize(model, example_inputs={...})"
        )


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
    special = special_ids(config)
    plain = [i for i in range(min(size, 1000)) if i not in special] or [0]
    drawn = torch.randint(0, len(plain), (batch, length), generator=generator)
    return torch.tensor(plain)[drawn].to(next(model.parameters()).device)


def check_examples(inputs: Any) -> list[Mapping[str, Any]]:
    """``example_inputs`` as the user gave them: one mapping, or a sequence of them.

    Raises:
        ExampleInputsError: anything else, or an empty sequence.
    """
    given = [inputs] if isinstance(inputs, Mapping) else inputs
    if not isinstance(given, list | tuple) or not given or not all(_is_keywords(i) for i in given):
        raise ExampleInputsError("example_inputs must be a dict of forward keyword arguments, or a list of such dicts")
    return list(given)


def _is_keywords(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs)
