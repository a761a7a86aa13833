"""How the weight of a linear is stored, in a form that fits an operator's signature: a list of tensors and one string.

================  =============================================================================================
kind              tensors
================  =============================================================================================
``rows``          ``[weight]``, shape (out_features, in_features), as ``nn.Linear`` keeps it
``columns``       ``[weight]``, shape (in_features, out_features), as GPT-2's ``Conv1D`` and a plain ``x @ W`` keep it
``nf4``, ``fp4``  ``[packed, absmax]``, or with double quantization ``[packed, absmax, nested_absmax, nested_code,
                  nested_offset]``: the tensors of a bitsandbytes ``QuantState`` (QLoRA, arXiv:2305.14314)
================  =============================================================================================

``packed`` is uint8 with two 4-bit codes a byte, the first in the high nibble, in row-major order of the
(out_features, in_features) weight. ``absmax`` holds one scale for ``block_size`` weights: float32, or uint8 indices into
``nested_code`` (float32[256]) that are scaled by ``nested_absmax`` (float32, one for ``nested_block_size`` scales) and
shifted by ``nested_offset`` (float32 scalar).

How the weight is multiplied is part of the string too: ``fp8`` at its end says that products with it are computed in FP8
(:mod:`weft.kernels.fp8`), from the same tensors; ``fp8_kept``, that its numbers in FP8 are kept between products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["rows", "columns", "nf4", "fp4"]


@dataclass(frozen=True)
class Layout:
    """Storage of one linear's weight: its kind, its logical shape, and for 4-bit kinds the block sizes.

    ``fp8``: products with it are computed in FP8; ``kept``: what they read of it is, too.
    """

    kind: Kind
    out_features: int
    in_features: int
    block_size: int = 0
    nested_block_size: int = 0
    fp8: bool = False
    kept: bool = False

    @property
    def is_4bit(self) -> bool:
        """Whether the weight must be dequantized before a matrix product can read it."""
        return self.kind in ("nf4", "fp4")

    def encode(self) -> str:
        """The string that an operator takes, for example ``nf4:4096:14336:64:256`` or ``rows:4096:4096:0:0:fp8``."""
        sizes = (self.out_features, self.in_features, self.block_size, self.nested_block_size)
        word = ("fp8_kept" if self.kept else "fp8",) if self.fp8 else ()
        return ":".join((self.kind, *map(str, sizes), *word))

    @staticmethod
    @lru_cache(maxsize=4096)
    def decode(text: str) -> Layout:
        """Inverse of :meth:`encode`.

        Raises:
            ValueError: ``text`` is not an encoded layout.
        """
        kept = text.endswith(":fp8_kept")
        kind, *sizes = text.removesuffix("_kept").removesuffix(":fp8").split(":")
        if kind not in ("rows", "columns", "nf4", "fp4") or len(sizes) != 4:
            raise ValueError(f"not a weight layout: {text!r}")
        rows, columns, block, nested = map(int, sizes)
        return Layout(kind, rows, columns, block, nested, kept or text.endswith(":fp8"), kept)
