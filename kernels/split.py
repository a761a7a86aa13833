"""Products of a bfloat16 matrix with a narrow float32 one, as float32 would compute them, on bfloat16's matrix units.

    f = hi + mid + lo        hi = bfloat16(f), mid = bfloat16(f - hi), lo = bfloat16(f - hi - mid)

8 bits each: the sum is a float32 exactly, unless it is so small that bits of lo fall under the smallest bfloat16. The parts
stand side by side in one product with float32 results, so that the wide matrix is read once, in 16 bits, and never cast.
Adapters in float32 over bfloat16 activations, which PEFT keeps outside of autocast, would else cast the activations, and
multiply on the ordinary cores: at 8192 rows of 4096 to 14336 features an H200 takes 693 µs for dy · B, and 66 µs in parts.

The matrix units round a sum towards zero at every step: 4.5e-6 of the result over 4096 terms, where float32 is off by 0.8e-6.
So no sum is longer than :data:`TERMS`; what the sums amount to is added in float32.

Where the result is rounded to bfloat16 anyway, two parts and three of their four products are enough: the relative error of
2⁻¹⁶ is far below that of the rounding.
"""

# Pyright knows Triton's static loops only as what they are outside of a kernel.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import use_triton
from .rows import rounded
from .toolchain import tl, triton

TERMS = 512
BLOCK = 1024
EXACT, LEFT, RIGHT = (0, 1, 2), (0, 1, 0), (0, 0, 1)
"""Which part, 0 for hi, stands where: of a factor of an exact product, and of the two factors of a rounded one."""


def serves(wide: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of ``wide`` that is to be computed in ``dtype`` is computed in parts.

    Not for float16, whose range would cut off the smaller parts, nor on a CPU, which has no product of 16 bits that
    returns 32.
    """
    return wide.is_cuda and wide.dtype == torch.bfloat16 and dtype == torch.float32


def parts_reference(factor: Tensor, order: tuple[int, ...]) -> Tensor:
    """:func:`parts` in plain torch."""
    hi = factor.bfloat16()
    # What is infinite or no number is so in hi alone; in a difference it would make an infinity no number.
    rest = (factor - hi).nan_to_num_(0.0, 0.0, 0.0)
    mid = rest.bfloat16()
    lo = (rest - mid).bfloat16()
    return torch.stack([(hi, mid, lo)[part] for part in order])


@triton.jit
def _parts(factor, out, count, cols, row_stride, col_stride, FIRST: tl.constexpr, SECOND: tl.constexpr,
           THIRD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    value = tl.load(factor + (at // cols) * row_stride + (at % cols) * col_stride, mask=there, other=0.0)
    hi = rounded(value, tl.bfloat16)
    finite = tl.abs(hi.to(tl.float32)) < float("inf")
    rest = tl.where(finite, value - hi.to(tl.float32), 0.0)
    mid = rounded(rest, tl.bfloat16)
    lo = rounded(rest - mid.to(tl.float32), tl.bfloat16)
    for i in tl.static_range(3):
        part = FIRST if i == 0 else (SECOND if i == 1 else THIRD)
        tl.store(out + i * count + at, hi if part == 0 else (mid if part == 1 else lo), mask=there)


def parts(factor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Three parts of a float32 matrix in bfloat16, (3, rows, columns), contiguous.

    Args:
        factor: any strides.
        order: which part comes where; 0, 1 and 2 are hi, mid and lo.
    """
    if not use_triton(factor):
        return parts_reference(factor, order)
    out = factor.new_empty((3, *factor.shape), dtype=torch.bfloat16)
    kernel: Any = _parts
    if factor.numel():
        first, second, third = order
        sizes = (factor.numel(), factor.shape[1], *factor.stride())
        with torch.cuda.device_of(factor):
            kernel[(triton.cdiv(factor.numel(), BLOCK),)](
                factor, out, *sizes, FIRST=first, SECOND=second, THIRD=third, BLOCK=BLOCK
            )
    return out


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """The products of bfloat16 matrices in float32; a CPU has none but those of float32."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _pieces(matrix: Tensor) -> list[Tensor]:
    """The columns of a matrix in batches of TERMS, and what is left over: views, (pieces, rows, columns)."""
    whole = matrix.shape[1] // TERMS * TERMS
    even, rest = matrix[:, :whole], matrix[:, whole:]
    found = [even.unflatten(1, (whole // TERMS, TERMS)).transpose(0, 1)] if whole else []
    return [*found, rest.unsqueeze(0)] if rest.shape[1] else found


def product(wide: Tensor, factor: Tensor, *, turned: bool = False) -> Tensor:
    """wide · factor in float32, or its transpose, contiguous.

    Args:
        wide: (m, k) in bfloat16, any strides; nothing is copied if one of them is 1.
        factor: (k, n) in float32, any strides; n is small.
        turned: return (n, m) instead of (m, n).
    """
    (m, k), n = wide.shape, factor.shape[1]
    side = parts(factor.t(), EXACT).view(3 * n, k)
    total = None
    for left, right in zip(_pieces(wide), _pieces(side), strict=True):
        # The narrow side comes first, so that the sum runs over whole matrices.
        found = _bmm(right, left.transpose(1, 2)).view(3 * len(left), n, m).sum(0)
        total = found if total is None else total.add_(found)
    total = factor.new_zeros((n, m)) if total is None else total
    return total if turned else total.t().contiguous()


def pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices whose product is left · right within 2⁻¹⁶: (m, 3 k) and (3 k, n) for (m, k) and (k, n)."""
    (m, k), n = left.shape, right.shape[1]
    return parts(left.t(), LEFT).view(3 * k, m).t(), parts(right, RIGHT).view(3 * k, n)
