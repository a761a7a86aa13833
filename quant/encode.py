"""NF4 codes under given scales, bit for bit those of bitsandbytes where the scale is the block's largest magnitude.

bitsandbytes itself takes no scales: this is the encoder for those that it would not choose.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .four_bit import code_table

_SMALLEST = 1e-38  # below it bitsandbytes divides by this: a block of zeros stays finite
_CELLS = 8192
_VALUES_AT_ONCE = 2**24


@cache
def _midpoints(device: torch.device) -> Tensor:
    codes = code_table("nf4", device)
    with torch.inference_mode(False):
        return (codes[:-1] + codes[1:]) / 2


@cache
def _nearest(device: torch.device) -> Tensor:
    """Of each of ``_CELLS`` equal parts of [-1, 1], the code's value nearest to its middle."""
    with torch.inference_mode(False):
        middles = (torch.arange(_CELLS, device=device) + 0.5) * (2 / _CELLS) - 1
        return code_table("nf4", device)[torch.bucketize(middles, _midpoints(device))]


def as_blocks(values: Tensor, size: int) -> Tensor:
    """``values`` in row-major order as float32 blocks (blocks, size), the last one filled up with zeros."""
    flat = values.reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def reciprocal(scales: Tensor) -> Tensor:
    """1 / scales, finite also for zero."""
    return divisor(scales).reciprocal()


def divisor(scales: Tensor) -> Tensor:
    """``scales``, or 1e-38 for those that are next to zero."""
    return scales.masked_fill(scales.abs() < _SMALLEST, _SMALLEST)


def encode(blocks: Tensor, scales: Tensor) -> Tensor:
    """The index of the nearest code of every value, int32, in the shape of ``blocks`` (..., size); one scale a block."""
    return encode_scaled(blocks * reciprocal(scales).unsqueeze(-1))


def encode_scaled(scaled: Tensor) -> Tensor:
    """The index of the nearest code of every value of a block that was divided by its scale; a tie goes down."""
    return torch.bucketize(scaled.clamp(-1, 1), _midpoints(scaled.device), out_int32=True)


def nearest_value(scaled: Tensor) -> Tensor:
    """The nearest code's value of every value of a block that was divided by its scale."""
    table = code_table("nf4", scaled.device)
    return table.index_select(0, torch.bucketize(scaled, _midpoints(scaled.device), out_int32=True))


def nearly_nearest(blocks: Tensor, scales: Tensor) -> Tensor:
    """The nearest code's value of every value, or, within 1/8192 of the middle between two, perhaps the other one.

    By a table: 15 times faster on a CPU than :func:`encode`, and as good for comparing scales.
    """
    # not one product with both factors: it overflows for the smallest scales
    cells = (blocks * reciprocal(scales).unsqueeze(-1)).mul_(_CELLS / 2).add_(_CELLS / 2).clamp_(0, _CELLS - 1)
    table = _nearest(blocks.device)
    return table.index_select(0, cells.to(torch.int32).view(-1)).view(blocks.shape)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes (..., size) stand for, as it is dequantized to ``dtype``."""
    return (code_table("nf4", codes.device)[codes] * scales.unsqueeze(-1)).to(dtype)


def encode_weight(weight: Tensor, scales: Tensor, size: int) -> Tensor:
    """The codes of a whole weight, uint8, flat: one scale a block, in row-major order; the last block may be cut."""
    flat, count = weight.reshape(-1), max(1, _VALUES_AT_ONCE // size)
    parts = zip(flat.split(count * size), scales.split(count), strict=True)
    codes = torch.cat([encode(as_blocks(v, size), s).to(torch.uint8).view(-1) for v, s in parts])[: flat.numel()]
    cut = flat.numel() % size
    if cut and weight.device.type != "cuda":
        # bitsandbytes divides a cut block by its scale there, where all others are multiplied with the reciprocal
        codes[-cut:] = encode_scaled(
            flat[-cut:].float() / torch.where(scales[-1].abs() < _SMALLEST, _SMALLEST, scales[-1])
        )
    return codes


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble, (bytes, 1) as bitsandbytes keeps them; an odd end is filled up."""
    zero = 7
    even = F.pad(codes.view(-1), (0, codes.numel() % 2), value=zero)
    return ((even[::2] << 4) | even[1::2]).unsqueeze(1)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` codes, uint8, flat: inverse of :func:`pack`."""
    pairs = packed.reshape(-1).view(torch.uint8)
    return torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[:count]
