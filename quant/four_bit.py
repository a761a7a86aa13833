"""NF4 and FP4: the two 4-bit codes of bitsandbytes, and the dequantization that every kernel must match bit for bit.

    w[i] = round(code[q[i]] · scale[i / block_size])
    scale[j] = absmax[j]                                                             plain
    scale[j] = nested_code[absmax[j]] · nested_absmax[j / nested_block_size] + nested_offset      double quantization

q[2k] is the high and q[2k + 1] the low nibble of packed[k], in row-major order of the whole weight: a block may run
over the end of a row. Each product and sum is rounded to float32 (no fused multiply-add), then to the result's dtype.
Source: QLoRA (arXiv:2305.14314), appendix E, for NF4; the tables and the order are those of bitsandbytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a standard normal distribution, scaled to [-1, 1]; code 7 is an exact zero."""

_FP4_POSITIVE = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4_POSITIVE, *(0.0 - value for value in _FP4_POSITIVE))
"""Sign, two exponent bits and one mantissa bit, divided by the largest, 12; both zeros are positive."""


@cache
def code_table(kind: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 16 values of a code, shape (16,): the float32 numbers of bitsandbytes, in ``dtype``."""
    values = {"nf4": NF4, "fp4": FP4}[kind]
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32).to(device, dtype)


@cache
def _pair_table(kind: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values behind each byte, shape (256, 2): half as many look-ups as nibbles."""
    codes = code_table(kind, device, dtype)
    return torch.stack((codes.repeat_interleave(16), codes.repeat(16)), dim=1)


def packed_bytes(weight: list[Tensor]) -> Tensor:
    """The packed codes as flat uint8, whatever dtype they are stored in (FSDP stores them as bfloat16)."""
    return weight[0].reshape(-1).view(torch.uint8)


def block_scales(weight: list[Tensor], layout: Layout) -> Tensor:
    """One scale a block, shape (blocks,), float32; float64 if the stored statistics are float64."""
    if len(weight) == 2:
        return weight[1].reshape(-1).to(torch.promote_types(weight[1].dtype, torch.float32))
    index, nested_absmax, nested_code, nested_offset = (t.reshape(-1) for t in weight[1:])
    scales = nested_code[index.int()]
    whole = scales.numel() // layout.nested_block_size
    cut = whole * layout.nested_block_size
    scales[:cut].view(-1, layout.nested_block_size).mul_(nested_absmax[:whole, None])
    scales[cut:].mul_(nested_absmax[whole:])
    return scales.add_(nested_offset)


def dequantize(weight: list[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layout in plain torch, shape (out_features, in_features), contiguous.

    Args:
        weight: the tensors of ``layout`` (see :mod:`weft.quant.layout`).
        dtype: of the result.

    Raises:
        ValueError: ``layout`` is not a 4-bit one.
    """
    if not layout.is_4bit:
        raise ValueError(f"{layout.encode()} is not a 4-bit layout: nothing to dequantize")
    scales = block_scales(weight, layout)
    pairs = _pair_table(layout.kind, scales.device, scales.dtype)
    values = F.embedding(packed_bytes(weight).int(), pairs).view(-1)
    values = values[: layout.out_features * layout.in_features]
    whole = values.numel() // layout.block_size
    cut = whole * layout.block_size
    values[:cut].view(-1, layout.block_size).mul_(scales[:whole, None])
    values[cut:].mul_(scales[whole:])
    return values.to(dtype).view(layout.out_features, layout.in_features)


def from_quant_state(packed: Tensor, state: Any) -> tuple[list[Tensor], Layout]:
    """A bitsandbytes 4-bit weight and its ``QuantState`` in the form that weft's operators take.

    Args:
        packed: the stored codes, ``Params4bit.data``.
        state: a ``bitsandbytes.functional.QuantState``, of a 2-dimensional weight.

    Raises:
        ValueError: bitsandbytes has repacked the codes for its own CPU product.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "the codes are in the order of bitsandbytes' CPU product; state_dict() of the module restores them"
        )
    rows, columns = state.shape
    nested = state.state2 if state.nested else None
    weight = [packed, state.absmax]
    if nested is not None:
        weight += [nested.absmax, nested.code, state.offset]
    nested_block_size = nested.blocksize if nested is not None else 0
    return weight, Layout(state.quant_type, rows, columns, state.blocksize, nested_block_size)
