"""Tiny, randomly initialized models of any transformers type: the default config, shrunk field by field.

A field's name says what it counts (heads, layers, experts, ...); the first pattern of ``SIZES`` that fits gives its
new value. Fields that a config class derives from others are left for it to derive again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .coverage_sizes import MOST_LAYERS, OVERRIDES, PREREQUISITES, RANDOM, SIZES, VOCABULARY

MAPPINGS = {
    "decoder": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}


def types(kinds: Mapping[str, str] = MAPPINGS) -> list[tuple[str, str, str]]:
    """(kind, type, class name) of everything the installed transformers lists, each class of a type once."""
    found: dict[tuple[str, str], str] = {}
    for kind, mapping in kinds.items():
        for name, classes in getattr(modeling_auto, mapping).items():
            for each in (classes,) if isinstance(classes, str) else classes:
                found.setdefault((name, each), kind)
    return [(kind, name, each) for (name, each), kind in found.items()]


def tiny_model(name: str, class_name: str) -> PreTrainedModel:
    """A randomly initialized model of class ``class_name`` with the shrunk default config of type ``name``."""
    model_class = getattr(transformers, class_name)
    overrides = OVERRIDES.get(class_name, OVERRIDES.get(name, {}))
    # not .get(): the mapping loads config classes when they are indexed, and only then
    config_class = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else model_class.config_class  # noqa: SIM401
    config = _shrink(config_class(**PREREQUISITES.get(name, {})), {}, overrides)
    if not isinstance(config, model_class.config_class):
        parts = [c for c in vars(config).values() if isinstance(c, model_class.config_class)]
        config = parts[0] if parts else _shrink(model_class.config_class(), {}, overrides)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id = 0
    return model_class(config)


def _shrink(config: PreTrainedConfig, tokens: dict[int, int], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """``config`` rebuilt with small numbers; ``tokens`` keeps equal token ids equal in all its parts."""
    kept = _kept_layers(config)
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = _value(config, field.name)
        if isinstance(value, PreTrainedConfig):
            chosen[field.name] = _shrink(value, tokens, overrides.get(field.name, {}))
        elif _per_layer(config, value):
            chosen[field.name] = [value[i] for i in kept]
        elif field.name == "image_grid_pinpoints" and value:
            chosen[field.name] = [[32, 64], [64, 32], [64, 64]]
        elif field.default is not None or value is None:
            chosen[field.name] = _resize(config, field.name, value, tokens)
    chosen |= _rotation(config, chosen.get("head_dim") or 16)
    if kept:
        chosen[_layer_field(config)] = len(kept)
    parts = {k for k, v in chosen.items() if isinstance(v, PreTrainedConfig)}
    return type(config)(**chosen | {k: v for k, v in overrides.items() if k not in parts})


def _rotation(config: PreTrainedConfig, head_dim: int) -> dict[str, Any]:
    """Rotary settings with three sections, where there are any, that add up to half of the rotated part of a head."""
    found = dict(_value(config, "rope_parameters") or {})
    if "mrope_section" not in {*type(config).ignore_keys_at_rope_validation, *found}:
        return {}
    half = int(head_dim * found.get("partial_rotary_factor", 1.0)) // 2
    side = half * 3 // 8
    return {"rope_parameters": found | {"mrope_section": [half - 2 * side, side, side]}}


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field as stored: ``getattr`` refuses fields that vary by layer."""
    return vars(config).get(config.attribute_map.get(name, name))


def _layer_field(config: PreTrainedConfig) -> str:
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def _per_layer(config: PreTrainedConfig, value: Any) -> bool:
    return isinstance(value, list) and len(value) > 3 and len(value) == vars(config).get(_layer_field(config))


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """The first layer of each kind, by the lists with one entry a layer; at least two layers; [] without such lists."""
    fields = {f.name for f in dataclasses.fields(config)}
    lists = [v for k, v in vars(config).items() if k in fields and _per_layer(config, v)]
    kinds = list(map(repr, zip(*lists, strict=True)))
    first = sorted({kinds.index(k) for k in kinds})[:MOST_LAYERS]
    return first if len(first) != 1 else [first[0], first[0] + 1]


def _resize(config: PreTrainedConfig, name: str, value: Any, tokens: dict[int, int]) -> Any:
    if isinstance(value, list | tuple) and re.search(r"index(es|s)?$|indices$|^vision_feature_layers?$", name):
        return [1]
    if isinstance(value, list | tuple) and re.search(r"(image|patch|crop)_size$", name):
        return type(value)(_resize(config, name, v, tokens) for v in value)
    if isinstance(value, float) and re.search(RANDOM, name):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.search(r"token_(id|index)$|_id$", name):
        return value if value < 200 else tokens.setdefault(value, VOCABULARY - 1 - len(tokens))
    if re.search(r"(key_value|kv)(_n)?_heads$|^num_query_groups$", name):
        return min(value, 2 if value < (vars(config).get("num_attention_heads") or 0) else 4)
    size = next((size for pattern, size in SIZES if re.search(pattern, name)), value)
    return min(size, value)
