"""A better NF4 in the same bytes: block scales that minimize the weighted squared error of the block.

    minimize over s    Σ_j h_j (w_j − s · nearest(w_j / s))²        h_j: how much an error in column j matters

bitsandbytes takes s = max |w_j|. The sum has many local minima: a grid of factors around that one finds the valley; then
codes and scale are improved by turns (for fixed codes c the best scale is Σ h w c / Σ h c²); then the neighbours of the
stored scale are tried. What is kept must be less in float64, in the dtype that it is dequantized to, under the scale as it
is stored: no block is ever worse than with the scale of the start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .encode import as_blocks, decode, encode, nearly_nearest
from .scales import Scales

FACTORS = (*(k / 100 for k in range(118, 74, -2)), 0.71, 0.66, 0.61, 0.55, 0.49, 0.42, 0.35)
FEW_FACTORS = (1.08, 1.02, 0.97, 0.92, 0.87, 0.82, 0.76, 0.69, 0.6, 0.48)
"""Of the largest magnitude of a block: the second where the start is good already."""

Encoded = tuple[Tensor, Tensor]
"""Codes of all values, uint8, flat, and the keys of all blocks' scales."""

_TURNS = 3
_STEPS = (-2, -1, 1, 2)
_AT_ONCE = {"cpu": 2**16}  # what stays in a core's cache
_AT_ONCE_ELSEWHERE = 2**24


@torch.no_grad()
def search_weight(weight: Tensor, importance: Tensor | None, scales: Scales, start: Tensor, size: int) -> Tensor:
    """Better keys for all blocks of a weight in row-major order.

    Args:
        weight: (..., out_features, in_features), of the dtype that it is dequantized to.
        importance: of each input channel, (in_features,), or of each channel of each matrix, (matrices, in_features).
        start: the keys to improve on.
        size: of a block.
    """
    flat = weight.reshape(-1)
    count = max(1, _AT_ONCE.get(weight.device.type, _AT_ONCE_ELSEWHERE) // size)
    keys = start.clone()
    for first in range(0, len(start), count):
        part = slice(first, min(first + count, len(start)))
        blocks = as_blocks(flat[part.start * size : part.stop * size], size)
        h = None if importance is None else _importance(weight, importance, part, size)
        keys[part] = search(blocks, h, scales[part], start[part], weight.dtype)
    return keys


@torch.no_grad()
def keep_better(
    weight: Tensor, importance: Tensor | None, scales: Scales, old: Encoded, new: Encoded, size: int
) -> Encoded:
    """Codes and keys, block by block those of ``new``, unless ``old`` errs less.

    The nearest code under a stored scale need not be the best: what it stands for is rounded to the weight's dtype.
    """
    flat, codes, keys = weight.reshape(-1), new[0].clone(), new[1].clone()
    count = max(1, _AT_ONCE_ELSEWHERE // size)
    for first in range(0, len(keys), count):
        part, values = slice(first, first + count), slice(first * size, (first + count) * size)
        blocks = as_blocks(flat[values], size)
        h = None if importance is None else _importance(weight, importance, slice(first, first + len(blocks)), size)
        before, after = (
            _error_of(blocks, h, _whole(c[values], size), scales[part].of(k[part]), weight.dtype) for c, k in (old, new)
        )
        worse = after > before
        keys[part] = torch.where(worse, old[1][part], keys[part])
        of_values = worse.repeat_interleave(size)[: codes[values].numel()]
        codes[values] = torch.where(of_values, old[0][values], codes[values])
    return codes, keys


def _whole(codes: Tensor, size: int) -> Tensor:
    """Codes by blocks, the last one filled up with zero's."""
    return F.pad(codes.int(), (0, -codes.numel() % size), value=7).view(-1, size)


def _importance(weight: Tensor, importance: Tensor, part: slice, size: int) -> Tensor:
    """That of every value of some blocks, (blocks, size), float32."""
    table = importance.to(weight.device, torch.float32).view(-1, weight.shape[-1])
    place = torch.arange(part.start * size, part.stop * size, device=weight.device).clamp_(max=weight.numel() - 1)
    matrix = place // (weight.numel() // len(table))
    return table.view(-1)[matrix * weight.shape[-1] + place % weight.shape[-1]].view(-1, size)


def search(
    blocks: Tensor,
    h: Tensor | None,
    scales: Scales,
    start: Tensor,
    dtype: torch.dtype,
    factors: tuple[float, ...] = FACTORS,
) -> Tensor:
    """Better keys for some blocks (blocks, size) of float32 values.

    Args:
        h: importance, of the shape of ``blocks`` or (size,); None: all count the same.
        scales: those that the storage of these blocks can hold.
        start: the keys to improve on.
        dtype: of the dequantized values.
        factors: of the largest magnitude of a block, tried first.
    """
    best = _Best(blocks, h, scales, start)
    largest = blocks.abs().amax(1)
    for factor in factors:
        best.offer(scales.nearest(largest * factor))
    for _ in range(_TURNS):
        best.offer(scales.nearest(_least_squares(blocks, h, scales.of(best.keys))))
    for steps in _STEPS:
        best.offer(scales.moved(best.keys, steps))
    before, after = (_exact_error(blocks, h, scales.of(k), dtype) for k in (start, best.keys))
    return torch.where(after < before, best.keys, start)


class _Best:
    """The best keys so far."""

    def __init__(self, blocks: Tensor, h: Tensor | None, scales: Scales, start: Tensor) -> None:
        self.blocks, self.h, self.scales = blocks, h, scales
        self.keys, self.error = start, self._error(start)

    def offer(self, keys: Tensor) -> None:
        """Take those keys that are better."""
        error = self._error(keys)
        better = error < self.error
        self.keys, self.error = torch.where(better, keys, self.keys), torch.where(better, error, self.error)

    def _error(self, keys: Tensor) -> Tensor:
        scales = self.scales.of(keys)
        difference = torch.addcmul(self.blocks, nearly_nearest(self.blocks, scales), scales.unsqueeze(1), value=-1)
        difference.square_()
        return difference.sum(1) if self.h is None else _weighted(difference, self.h)


def _weighted(values: Tensor, h: Tensor) -> Tensor:
    return values @ h if h.ndim == 1 else values.mul_(h).sum(1)


def _least_squares(blocks: Tensor, h: Tensor | None, scales: Tensor) -> Tensor:
    codes = nearly_nearest(blocks, scales)
    weighted = codes if h is None else codes * h
    below = (weighted * codes).sum(1)
    return torch.where(below > 0, (weighted * blocks).sum(1) / below, scales)


def _exact_error(blocks: Tensor, h: Tensor | None, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return _error_of(blocks, h, encode(blocks, scales), scales, dtype)


def _error_of(blocks: Tensor, h: Tensor | None, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    stored = decode(codes, scales, dtype)
    squares = (blocks.double() - stored.double()).square_()
    return squares.sum(1) if h is None else _weighted(squares, h.double())
