"""Example images and sounds: the model itself says which layout it takes, and how many placeholder tokens one fills.

Configs of vision and audio towers agree on a few names (``patch_size``, ``image_size``, ``num_mel_bins``), not on how
the numbers are laid out. So every layout that the forward's parameters allow is offered, and the first that the tower
(or, where it has no method of its own, the whole model) takes is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExampleInputsError
from .example_layouts import BINS, Draw, Inputs, find_setting, image_layouts, sound_layouts, vision_part
from .state import evaluating


@dataclass(frozen=True)
class Media:
    """Forward arguments for one image or sound a row, and the token ids that stand for it in the text."""

    inputs: Inputs = field(default_factory=dict)
    token: int = 0
    count: int = 0
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sort:
    """Images or sounds: the forward's parameters, the method that encodes them, the settings that name their tokens."""

    parameters: tuple[str, ...]
    encode: str
    token: tuple[str, ...]
    opening: tuple[str, ...]
    closing: tuple[str, ...]


IMAGES = Sort(
    ("pixel_values", "flattened_patches"),
    "get_image_features",
    ("image_token_id", "image_token_index", "image_patch_id"),
    ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
    ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
)
SOUNDS = Sort(
    ("input_features", "input_values"),
    "get_audio_features",
    ("audio_token_id", "audio_token_index"),
    ("audio_start_token_id", "audio_bos_token_id"),
    ("audio_end_token_id", "audio_eos_token_id"),
)
COUNTS = ("image_seq_length", "num_image_tokens", "latent_query_num", "num_query_tokens")
"""Settings that hold the number of placeholders, asked where no method encodes an image by itself."""


@dataclass(frozen=True)
class Offer:
    """Whom media are made for: the model, its forward's parameters, and how many rows.

    ``beside`` is what the forward takes along with a medium, and what the medium's encoder may ask for, too.
    """

    model: nn.Module
    known: frozenset[str]
    batch: int
    beside: Inputs


def media_for(offer: Offer, generator: torch.Generator) -> list[Media]:
    """What the model may be given besides text: one entry where that is certain, several where only a forward can tell.

    Sounds in an unknown layout are left out where the text goes without: their tower is then captured when they come.
    """
    config, known = offer.model.config, offer.known
    draw = Draw(next((p for p in offer.model.parameters() if p.is_floating_point()), torch.empty(0)), generator)
    if known & set(IMAGES.parameters) and vision_part(config) is not None:
        return _accepted(offer, IMAGES, image_layouts(config, known, offer.batch, draw), [])
    optional = "input_ids" in known
    described = find_setting(config, *BINS) and find_setting(config, *SOUNDS.token) is not None
    if known & set(SOUNDS.parameters) and (described or not optional):
        layouts = sound_layouts(config, known, offer.batch, draw)
        return _accepted(offer, SOUNDS, layouts, [Media()] if optional else [])
    return [Media()]


def _accepted(offer: Offer, sort: Sort, layouts: Iterator[Inputs], otherwise: list[Media]) -> list[Media]:
    """The first layout that the encoder takes, or all where there is no encoder to ask; then ``otherwise``."""
    model = offer.model
    encode = next((getattr(m, sort.encode) for m in model.modules() if hasattr(m, sort.encode)), None)
    offered = [{k: v for k, v in layout.items() if k in offer.known} | offer.beside for layout in layouts]
    offered = [layout for layout in offered if set(layout) & set(sort.parameters)]
    if encode is None:
        count = find_setting(model.config, *COUNTS) or 1
        return [*(_media(offer, sort, layout, count) for layout in offered), *otherwise]
    reasons: list[str] = []
    for layout in offered:
        for given in _arguments(encode, layout):
            outcome = trial(model, lambda given=given: encode(**given))
            if not isinstance(outcome, Exception):
                return [_media(offer, sort, layout, _rows(outcome) // offer.batch), *otherwise]
            reasons.append(describe_failure(given, outcome))
    if otherwise:
        return otherwise
    raise ExampleInputsError(
        f"{type(model).__name__} takes none of the example {sort.parameters[0]} that its config suggests "
        f"({summary(reasons)}): pass optimize(model, example_inputs={{...}})"
    )


def _arguments(function: Callable[..., Any], layout: Inputs) -> list[Inputs]:
    """What ``function`` names of ``layout``; and all of it, where it hands on what it does not name."""
    parameters = inspect.signature(function).parameters
    named = {k: v for k, v in layout.items() if k in parameters}
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [named, layout] if hands_on and len(named) < len(layout) else [named]


def _media(offer: Offer, sort: Sort, layout: Inputs, count: int) -> Media:
    config = offer.model.config
    token = find_setting(config, *sort.token)
    if token is None:
        return Media(layout, 0, count if "image_embeds_position_mask" in offer.known else 0)
    marks = (find_setting(config, *sort.opening), find_setting(config, *sort.closing))
    return Media(layout, token, count, *(() if mark is None else (mark,) for mark in marks))


def _rows(encoded: Any) -> int:
    """How many feature vectors an encoder returned, however they are packed."""
    if isinstance(encoded, Tensor):
        return prod(encoded.shape[:-1])
    if isinstance(encoded, list | tuple):
        return sum(_rows(e) for e in encoded)
    pooled = getattr(encoded, "pooler_output", None)
    return _rows(pooled if pooled is not None else encoded[0])


# asking ------------------------------------------------------------------------------------------------------------
def describe_failure(given: Inputs, error: Exception) -> str:
    """One line: the shapes that were offered, and what came back."""
    shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.items() if isinstance(v, Tensor))
    lines = str(error).strip().splitlines() or [""]
    return f"{shapes}: {type(error).__name__}: {lines[0][:120]}"


def summary(reasons: Iterable[str], most: int = 3) -> str:
    """The first few distinct reasons."""
    distinct = list(dict.fromkeys(reasons))
    return "; ".join(distinct[:most]) + (f"; and {len(distinct) - most} more" if len(distinct) > most else "")


def trial(model: nn.Module, run: Callable[[], Any]) -> Any:
    """What ``run`` returns, or the exception it raises; nothing of ``model`` is touched, nor how its weights are stored."""
    with evaluating(model):
        try:
            return run()
        except Exception as error:  # any: the answer to the question asked
            return error
