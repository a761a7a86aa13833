"""What a format is, what a weight in its storage is, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from .errors import QuantizationError
from .layout import Layout

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class Format:
    """How weights are stored.

    Args:
        name: how plans and reports call it.
        block_size: values that share a scale, of 4-bit kinds.
        double_quantized: the scales of blocks are themselves stored in 8 bits.
        searched: scales that minimize the (weighted) error instead of the largest magnitudes.
        feedback: with scales searched, codes chosen column by column (needs statistics with a Hessian).
    """

    name: str
    kind: Literal["nf4", "fp4", "int8", "dense"]
    block_size: int = 64
    double_quantized: bool = True
    searched: bool = False
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4", "int8", "dense"):
            raise QuantizationError(f"no kind of storage: {self.kind!r}")
        if self.is_4bit and self.block_size not in BLOCK_SIZES:
            raise QuantizationError(f"a block size of {self.block_size} is none of {BLOCK_SIZES}")
        if (self.searched or self.feedback) and self.kind != "nf4":
            raise QuantizationError(f"scales are searched for nf4 only, not for {self.kind}")

    @property
    def is_4bit(self) -> bool:
        """Whether it is one of the two 4-bit kinds."""
        return self.kind in ("nf4", "fp4")


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            Format("nf4", "nf4"),
            Format("nf4-searched", "nf4", searched=True),
            Format("nf4-feedback", "nf4", searched=True, feedback=True),
            Format("fp4", "fp4"),
            Format("int8", "int8"),
            Format("16-bit", "dense"),
        )
    }
)
"""The formats with their usual options, by name."""


@dataclass(frozen=True)
class Stored:
    """A weight in its storage.

    ``tensors``: 4-bit ``packed``, ``absmax``, ``quant_map`` and, if the scales are quantized too, ``nested_absmax``,
    ``nested_code``, ``nested_offset`` (see :mod:`.layout`); int8 ``CB`` and ``SCB``; 16-bit ``weight``.
    """

    format: Format
    shape: torch.Size
    dtype: torch.dtype
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def to(self, device: torch.device | str) -> Stored:
        """The same on ``device``."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def operands(self) -> tuple[list[Tensor], Layout]:
        """A 4-bit weight in the form that weft's operators take; stacked matrices as one tall one.

        Raises:
            QuantizationError: it is stored in another kind.
        """
        kind = self.format.kind
        if kind not in ("nf4", "fp4"):
            raise QuantizationError(f"a weight stored as {self.format.name} has no 4-bit codes")
        names = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
        nested = NESTED_BLOCK_SIZE if self.format.double_quantized else 0
        rows, columns = prod(self.shape[:-1]), self.shape[-1]
        layout = Layout(kind, rows, columns, self.format.block_size, nested)
        return [self.tensors[n] for n in names if n in self.tensors], layout


def stored_bytes(format: Format, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes of all tensors that a weight of this shape and dtype takes in a format."""
    count = prod(shape)
    if format.kind == "dense":
        return count * dtype.itemsize
    if format.kind == "int8":
        return count + 4 * prod(shape[:-1])
    blocks = -(-count // format.block_size)
    codes, table = -(-count // 2), 16 * 4
    if not format.double_quantized:
        return codes + table + 4 * blocks
    return codes + table + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 256 * 4 + 4
