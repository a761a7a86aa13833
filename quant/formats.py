"""The formats that a weight can be stored in, and the way in and out of each. All are those of bitsandbytes.

==============  ===================================================================================================
nf4, fp4        4-bit codes and one scale a block (QLoRA, arXiv:2305.14314)
nf4-searched    the same storage, scales that minimize the weighted error (:mod:`.nf4_search`)
nf4-feedback    the same storage, codes too chosen to make good each other's errors (:mod:`.feedback`)
int8            one scale a row (LLM.int8, arXiv:2208.07339)
16-bit          the weight as it is
==============  ===================================================================================================

Plain codes and scales are bitsandbytes' own work, on every device. Weights of three dimensions, such as stacked experts
(experts, out_features, in_features), are stored as one row of blocks, as ``bitsandbytes.nn.parametrize`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn

from . import four_bit
from .encode import encode_weight, pack, unpack
from .errors import QuantizationError
from .feedback import damping_for, feedback_weight
from .nf4_search import keep_better, search_weight
from .scales import FreeScales, NestedScales, Scales
from .statistics import Statistics
from .stored import BLOCK_SIZES, FORMATS, NESTED_BLOCK_SIZE, Format, Stored, stored_bytes

__all__ = [
    "BLOCK_SIZES",
    "FORMATS",
    "Calibration",
    "Format",
    "Stored",
    "as_parameter",
    "dequantize",
    "quant_state",
    "quantize",
    "stored_bytes",
]

_bnb_nn: Any = bnb.nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Calibration = Statistics | Sequence[Statistics]
"""Of a linear's input; for stacked experts, also one for each."""


@torch.no_grad()
def quantize(weight: Tensor, format: Format, statistics: Calibration | None = None) -> Stored:
    """Store a weight, on the device where it is.

    Args:
        weight: (out_features, in_features), or matrices of that shape stacked; float32, bfloat16 or float16.
        statistics: of the input; weigh the errors of searched scales. Without (or where stacked matrices have one each,
            and one saw no input) all channels count the same, and feedback is left out for that matrix.

    Raises:
        QuantizationError: NaN or inf in the weight, values or scales beyond the format's range, no values at all, a dtype or
            shape that the format does not have, feedback without a Hessian.
    """
    weight = _checked(weight.detach(), format).contiguous()
    if format.kind == "dense":
        return Stored(format, weight.shape, weight.dtype, {"weight": weight})
    if format.kind == "int8":
        return _int8(weight, format)
    stored = _plain_4bit(weight, format)
    return _improved(weight, stored, statistics) if format.searched or format.feedback else stored


def _checked(weight: Tensor, format: Format) -> Tensor:
    if weight.dtype not in DTYPES:
        raise QuantizationError(
            f"a weight of dtype {weight.dtype} cannot be stored as {format.name}: quantized already?"
        )
    if weight.ndim not in (2, 3) or not weight.numel():
        raise QuantizationError(f"a weight of shape {tuple(weight.shape)} cannot be stored as {format.name}")
    if weight.is_meta:
        raise QuantizationError("the weight holds no values: it is on the meta device")
    if not torch.isfinite(weight).all():
        raise QuantizationError("NaN or inf in the weight: it would spoil its whole block")
    return weight


def _int8(weight: Tensor, format: Format) -> Stored:
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        raise QuantizationError("values beyond float16, which int8 storage goes through: at most 65504")
    codes, scales, _ = bnb_functional.int8_vectorwise_quant(half.view(-1, weight.shape[-1]))
    return Stored(format, weight.shape, weight.dtype, {"CB": codes.view(weight.shape), "SCB": scales})


def _plain_4bit(weight: Tensor, format: Format) -> Stored:
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=format.block_size, compress_statistics=format.double_quantized, quant_type=format.kind
    )
    tensors = {"packed": packed, "absmax": state.absmax, "quant_map": state.code}
    if state.state2 is not None:
        tensors |= {
            "nested_absmax": state.state2.absmax,
            "nested_code": state.state2.code,
            "nested_offset": state.offset,
        }
    stored = Stored(format, weight.shape, weight.dtype, tensors)
    if not (four_bit.block_scales(*stored.operands()).abs() <= torch.finfo(weight.dtype).max).all():
        raise QuantizationError(f"values so large that a block's scale, as it is stored, is beyond {weight.dtype}")
    return stored


def _improved(weight: Tensor, stored: Stored, statistics: Calibration | None) -> Stored:
    """Better scales, and with feedback better codes, in the same storage."""
    size, start = stored.format.block_size, stored.tensors["absmax"]
    scales = _scales(stored)
    each = _of_each_matrix(weight, statistics)
    if stored.format.feedback:
        _check_feedback(weight, each, size)
    importance = _importance(each)
    keys = search_weight(weight, importance, scales, start, size)
    plain = unpack(stored.tensors["packed"], weight.numel()), start
    found = encode_weight(weight, scales.of(keys), size), keys
    codes, keys = keep_better(weight, importance, scales, plain, found, size)
    if stored.format.feedback:
        codes, keys = _with_feedback(weight, codes, keys, scales, each, size)
    tensors = stored.tensors | {"packed": pack(codes), "absmax": keys}
    return Stored(stored.format, stored.shape, stored.dtype, tensors)


def _scales(stored: Stored) -> Scales:
    """Those that the tensors of its double quantization leave room for."""
    if not stored.format.double_quantized:
        return FreeScales()
    blocks = stored.tensors["absmax"].numel()
    nested_absmax, code, offset = (stored.tensors[n] for n in ("nested_absmax", "nested_code", "nested_offset"))
    return NestedScales.stored(blocks, nested_absmax, code, offset, NESTED_BLOCK_SIZE)


def _of_each_matrix(weight: Tensor, statistics: Calibration | None) -> list[Statistics | None]:
    """One for each matrix, or one for all; None where nothing is known."""
    if statistics is None:
        return [None]
    several = [statistics] if isinstance(statistics, Statistics) else list(statistics)
    matrices = weight.shape[0] if weight.ndim == 3 else 1
    if len(several) not in (1, matrices):
        raise QuantizationError(f"statistics of {len(several)} inputs for {matrices} matrices")
    for s in several:
        if s.in_features != weight.shape[-1]:
            raise QuantizationError(f"statistics of {s.in_features} channels for a weight of {tuple(weight.shape)}")
    return list(several) if len(several) == 1 else [s if s.count else None for s in several]


def _importance(each: list[Statistics | None]) -> Tensor | None:
    """Mean squares, (matrices or 1, in_features), of each matrix divided by a power of two: float32 holds them."""
    known = [s.mean_square for s in each if s is not None]
    if not known:
        return None
    table = torch.stack([torch.ones_like(known[0]) if s is None else s.mean_square.to(known[0].device) for s in each])
    return torch.ldexp(table, -torch.frexp(table.amax(1, keepdim=True)).exponent.double())


def _check_feedback(weight: Tensor, each: list[Statistics | None], size: int) -> None:
    if weight.shape[-1] % size:
        raise QuantizationError(f"feedback needs in_features divisible by the block: {weight.shape[-1]} and {size}")
    known = [s for s in each if s is not None]
    if not known or not all(s.keeps_hessian for s in known):
        raise QuantizationError("feedback needs statistics with a Hessian: Statistics(in_features, hessian=True)")


def _with_feedback(
    weight: Tensor, codes: Tensor, keys: Tensor, scales: Scales, each: list[Statistics | None], size: int
) -> tuple[Tensor, Tensor]:
    """Codes and keys of all matrices, one after the other; of those without statistics as they are."""
    matrices = weight.unsqueeze(0) if weight.ndim == 2 else weight
    codes, keys = codes.view_as(matrices).clone(), keys.view(len(matrices), -1)
    per_matrix = keys.shape[1]
    for i, matrix in enumerate(matrices):
        s = each[i % len(each)]
        if s is None or s.hessian is None:
            continue
        blocks = scales[slice(i * per_matrix, (i + 1) * per_matrix)]
        damping = damping_for(s.count, s.in_features)
        codes[i], keys[i] = feedback_weight(matrix, s.hessian, blocks, keys[i], size, damping)
    return codes, keys.view(-1)


@torch.no_grad()
def dequantize(stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that a storage stands for, in its shape; in the dtype that it had, or in ``dtype``."""
    dtype = dtype or stored.dtype
    if stored.format.kind == "dense":
        return stored.tensors["weight"].to(dtype)
    if stored.format.kind == "int8":
        codes = stored.tensors["CB"].view(-1, stored.shape[-1])
        return bnb_functional.int8_vectorwise_dequant(codes, stored.tensors["SCB"]).to(dtype).view(stored.shape)
    return four_bit.dequantize(*stored.operands(), dtype).view(stored.shape)


def quant_state(stored: Stored) -> bnb_functional.QuantState:
    """What bitsandbytes keeps beside the codes of a 4-bit weight; shares the tensors of ``stored``."""
    t, size = stored.tensors, stored.format.block_size
    state: dict[str, Any] = {"absmax": t["absmax"], "code": t["quant_map"], "blocksize": size}
    if stored.format.double_quantized:
        nested = bnb_functional.QuantState(
            t["nested_absmax"], code=t["nested_code"], blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
        )
        state |= {"offset": t["nested_offset"], "state2": nested}
    return bnb_functional.QuantState(shape=stored.shape, dtype=stored.dtype, quant_type=stored.format.kind, **state)


def as_parameter(stored: Stored) -> nn.Parameter:
    """The frozen parameter that ``Linear4bit``, ``Linear8bitLt`` or ``Linear`` keeps; shares the tensors of ``stored``.

    ``Params4bit`` of stacked matrices too: its codes and ``quant_state`` are what ``bitsandbytes.nn.parametrize`` takes.

    Raises:
        QuantizationError: stacked matrices in int8, which nothing reads.
    """
    tensors, format = stored.tensors, stored.format
    if format.kind == "dense":
        return nn.Parameter(tensors["weight"], requires_grad=False)
    if format.kind == "int8":
        if len(stored.shape) != 2:
            raise QuantizationError("bitsandbytes has no module that reads stacked matrices in int8")
        return _bnb_nn.Int8Params(tensors["CB"], requires_grad=False, CB=tensors["CB"], SCB=tensors["SCB"])
    return _bnb_nn.Params4bit(
        tensors["packed"],
        quant_state=quant_state(stored),
        blocksize=format.block_size,
        compress_statistics=format.double_quantized,
        quant_type=format.kind,
        bnb_quantized=True,
    )
