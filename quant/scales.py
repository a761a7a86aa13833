"""The scales that the storage of 4-bit blocks can hold.

    plain                  any float32
    double quantization    code[k] · nested_absmax[block / 256] + offset,  k = 0 … 255

Choices are kept as *keys*: the float32 scale itself, or the index k. ``offset`` and ``nested_absmax`` stay those that
bitsandbytes stored: a key that it chose stays possible, so that a search over keys is never worse than its start, block by
block and after all rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor


class Scales(Protocol):
    """The scales of some blocks; indexing gives those of fewer."""

    def __getitem__(self, blocks: slice) -> Scales: ...

    def nearest(self, target: Tensor) -> Tensor:
        """The keys of the scales nearest to ``target``, one a block."""
        ...

    def of(self, keys: Tensor) -> Tensor:
        """The scales, float32, as they are dequantized."""
        ...

    def moved(self, keys: Tensor, steps: int) -> Tensor:
        """The keys of scales a little larger (or smaller)."""
        ...


@dataclass(frozen=True)
class FreeScales:
    """Any float32."""

    def __getitem__(self, blocks: slice) -> Self:
        return self

    def nearest(self, target: Tensor) -> Tensor:
        """``target`` itself."""
        return target

    def of(self, keys: Tensor) -> Tensor:
        """``keys`` themselves."""
        return keys

    def moved(self, keys: Tensor, steps: int) -> Tensor:
        """Half a percent a step."""
        return keys * (1 + 0.005 * steps)


@dataclass(frozen=True)
class NestedScales:
    """One of 256 for each block; ``nested_absmax``: one a block."""

    offset: Tensor
    nested_absmax: Tensor
    code: Tensor
    midpoints: Tensor
    units: Tensor

    @classmethod
    def stored(cls, blocks: int, nested_absmax: Tensor, code: Tensor, offset: Tensor, size: int) -> NestedScales:
        """The scales of ``blocks`` blocks, from the tensors of a double quantization in groups of ``size``."""
        each = nested_absmax.repeat_interleave(size)[:blocks]
        # where all scales of a group are the offset, every key gives that one
        units = each.masked_fill(each == 0, 1.0)
        return cls(offset, each, code, (code[:-1] + code[1:]) / 2, units)

    def __getitem__(self, blocks: slice) -> NestedScales:
        return replace(self, nested_absmax=self.nested_absmax[blocks], units=self.units[blocks])

    def nearest(self, target: Tensor) -> Tensor:
        """Indices into the code, uint8."""
        return torch.bucketize((target - self.offset) / self.units, self.midpoints, out_int32=True).to(torch.uint8)

    def of(self, keys: Tensor) -> Tensor:
        """code · nested_absmax + offset, each rounded."""
        return self.code[keys.int()] * self.nested_absmax + self.offset

    def moved(self, keys: Tensor, steps: int) -> Tensor:
        """The neighbours in the code."""
        return (keys.int() + steps).clamp(0, 255).to(torch.uint8)
