"""What transformers calls a quantized model: a ``BitsAndBytesConfig``, and where one cannot say what is stored, why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import base as quantizers
from transformers.quantizers.quantizers_utils import should_convert_module

_bnb_nn: Any = bnb.nn
_WRAPPED = (".base_layer", ".original_module")
"""Where adapters keep the linear that they stand before."""


@dataclass(frozen=True)
class Storage:
    """What a transformers model's weights are stored in, by the paths that they have without adapters.

    Attributes:
        kinds: of each quantized linear: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        dtypes: in which each quantized linear computes.
        double: whether the scales of each 4-bit linear are quantized too.
        foreign: quantized linears that transformers would not replace by bitsandbytes'.
        kept: linears in 16 or 32 bits that it would replace.
        parameters: quantized parameters of other modules.
    """

    kinds: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    double: Mapping[str, bool]
    foreign: Sequence[str]
    kept: Sequence[str]
    parameters: Sequence[str]


def storage_of(root: PreTrainedModel) -> Storage:
    """What the weights of ``root`` are stored in."""
    linears = dict(_without_adapters(root))
    four: dict[str, Any] = {n: m for n, m in linears.items() if isinstance(m, _bnb_nn.Linear4bit)}
    eight: dict[str, Any] = {n: m for n, m in linears.items() if isinstance(m, _bnb_nn.Linear8bitLt)}
    quantized = four | eight
    return Storage(
        {n: "int8" if n in eight else m.weight.quant_state.quant_type for n, m in quantized.items()},
        {n: m.weight.quant_state.dtype for n, m in four.items()},
        {n: m.weight.quant_state.nested for n, m in four.items()},
        [n for n, m in quantized.items() if not _converted(getattr(m, "source_cls", nn.Linear))],
        [n for n, m in linears.items() if _converted(type(m))],
        [f"{n}.{key}" for n, m in root.named_modules() if parametrize.is_parametrized(m) for key in _quantized(m)],
    )


def _without_adapters(root: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules by path; what adapters add is left out."""
    names = [n for n, _ in root.named_modules()]
    adapted = tuple(n.removesuffix(w.lstrip(".")) for w in _WRAPPED for n in names if n.endswith(w))
    for name, module in root.named_modules():
        plain = name
        for wrapped in _WRAPPED:
            plain = plain.replace(wrapped, "")
        if plain != name or not name.startswith(adapted):
            yield plain, module


def _converted(kind: type) -> bool:
    """Whether transformers replaces a module of this class by bitsandbytes' linear."""
    return kind is nn.Linear or issubclass(kind, Conv1D)


def _quantized(module: nn.Module) -> list[str]:
    kept: Any = module.parametrizations
    return [key for key, each in kept.items() if any(hasattr(p, "quant_state") for p in each)]


def config_for(
    kinds: Mapping[str, str], kept: Sequence[str], dtype: torch.dtype, double: bool = True
) -> BitsAndBytesConfig:
    """The config under which transformers replaces the linears in ``kinds`` and none of ``kept``.

    Where linears are stored in several kinds it names the commonest: a checkpoint says of each weight which it is.
    """
    skip = _skipped(kinds, kept)
    if set(kinds.values()) == {"int8"}:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    counted = Counter(k for k in kinds.values() if k != "int8").most_common(1)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=counted[0][0] if counted else "nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _skipped(kinds: Mapping[str, str], kept: Sequence[str]) -> list[str]:
    """``kept``, as it is to be written: transformers reads names as expressions, and as endings of longer names."""
    plain = list(kept)
    exact = all(should_convert_module(name, [key]) for key in plain for name in kinds)
    return plain if exact else [rf"\A{re.escape(key)}\Z" for key in plain]


def why_not_loadable(root: PreTrainedModel, storage: Storage, config: BitsAndBytesConfig) -> list[str]:
    """Why plain transformers could not load what ``root`` stores; empty if it can."""
    reasons = []
    kinds = {kind: [n for n, k in storage.kinds.items() if k == kind] for kind in sorted(set(storage.kinds.values()))}
    if "int8" in kinds and len(kinds) > 1:
        reasons.append(
            f"{_some(kinds['int8'])} in int8 stand beside linears in 4 bits, which one bitsandbytes config cannot say: "
            'plan with formats=("nf4", "nf4-feedback", "16-bit")'
        )
    if storage.parameters:
        reasons.append(
            f"{_some(storage.parameters)} in 4 bits are no linears' weights, which transformers alone stores so"
        )
    if len(set(storage.dtypes.values())) > 1:
        dtypes = ", ".join(sorted({str(d).removeprefix("torch.") for d in storage.dtypes.values()}))
        reasons.append(f"the quantized linears compute in several dtypes ({dtypes}), the config names one")
    return reasons + unreachable(root, storage.kinds, storage.foreign, config)


def unreachable(
    root: PreTrainedModel, kinds: Iterable[str], foreign: Sequence[str], config: BitsAndBytesConfig
) -> list[str]:
    """Why transformers, under ``config``, would not put bitsandbytes' linears where ``kinds`` are."""
    reasons = []
    if foreign:
        reasons.append(f"{_some(foreign)} are linears of a class of their own, which transformers leaves as they are")
    spared = [*(config.llm_int8_skip_modules or ()), *(root._keep_in_fp32_modules or ())]
    missed = [name for name in kinds if not should_convert_module(name, spared)]
    if missed:
        reasons.append(f"{_some(missed)} are among the modules that transformers keeps in float32")
    patched = getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    exchanged = [n for n, m in root.named_modules() if config.quant_method in _methods(patched, m)]
    if exchanged:
        reasons.append(f"{_some(exchanged)} are exchanged for other modules when transformers loads a quantized model")
    return reasons


def _methods(patched: Mapping[str, Any], module: nn.Module) -> Sequence[Any]:
    return patched.get(type(module).__name__, {}).get("quantization_methods", ())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
