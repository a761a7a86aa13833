"""NF4 with error feedback: what rounding one column breaks, the columns after it make good (GPTQ, arXiv:2210.17323).

    minimize over codes and scales    tr(D H Dᵀ),   D = W − Q,   H = mean of x xᵀ over the calibration

Columns are rounded in the order of storage. The error of column j, divided by U_jj, is spread over the columns after it in
proportion to row j of U, where U is upper triangular and Uᵀ U = (H + damping)⁻¹. A block's scale is searched when its first
column is due, on the weights as they are by then, with importance 1 / U_jj²: what an error in column j costs after all later
columns have made good what they can. Where that leaves a row worse than rounding it without feedback, the row stays so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encode import as_blocks, decode, encode, encode_scaled, nearest_value, reciprocal
from .error_measures import energy
from .errors import QuantizationError
from .nf4_search import FEW_FACTORS, search
from .scales import Scales

DAMPING = 0.01
"""Added to the diagonal of H, as a part of its mean, however many tokens it comes from."""

_DAMPING_BY_TOKENS = 0.1

_COLUMNS = 128
_VALUES_AT_ONCE = 2**26


def damping_for(tokens: int, in_features: int) -> float:
    """The damping for a matrix that comes from ``tokens`` tokens.

    The fewer, the less of what goes together in them does so elsewhere: with a hundredth of the mean, and no more tokens
    than channels, inputs that were not seen come out worse than with ten times that. Measured on held-out inputs.
    """
    return min(DAMPING + _DAMPING_BY_TOKENS * in_features / max(tokens, 1), 1.0)


@torch.no_grad()
def feedback_weight(
    weight: Tensor, hessian: Tensor, scales: Scales, start: Tensor, size: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (out_features, in_features), and keys of the scales (out_features · in_features / size,).

    Args:
        weight: (out_features, in_features), of the dtype that it is dequantized to.
        hessian: (in_features, in_features), symmetric; its unit does not matter.
        start: the keys to improve on: those of rows that feedback does not make better.
        size: of a block, a divisor of in_features.

    Raises:
        QuantizationError: a block would run over the end of a row, or the matrix is of another size or not usable.
    """
    out_features, in_features = weight.shape
    if in_features % size:
        raise QuantizationError(f"error feedback needs in_features divisible by the block: {in_features} and {size}")
    if hessian.shape != (in_features, in_features):
        raise QuantizationError(f"a second-moment matrix {tuple(hessian.shape)} for {in_features} in_features")
    hessian = hessian.to(weight.device, torch.float32)
    spread = inverse_factor(hessian, damping)
    per_row = in_features // size
    codes, keys = [], []
    rows_at_once = max(1, _VALUES_AT_ONCE // in_features)
    for first in range(0, out_features, rows_at_once):
        part = slice(first, min(first + rows_at_once, out_features))
        blocks = slice(part.start * per_row, part.stop * per_row)
        some = _Rows(weight[part], spread, scales[blocks], start[blocks], size)
        for result, kept in zip(some.better(hessian), (codes, keys), strict=True):
            kept.append(result)
    return torch.cat(codes), torch.cat(keys)


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular, with Uᵀ U = (H + damping · mean of the diagonal)⁻¹, of H scaled to a mean diagonal of 1.

    H = R Rᵀ with R upper triangular is the Cholesky decomposition from the last column to the first; U = R⁻¹.

    Raises:
        QuantizationError: the matrix is zero, holds NaN or inf, or is far from positive definite.
    """
    mean = hessian.diagonal().mean()
    if not (torch.isfinite(mean) and mean > 0):
        raise QuantizationError(f"the inputs' second-moment matrix has a mean diagonal of {mean.item()}")
    damped = hessian / mean
    damped.diagonal().add_(damping)
    damped = damped.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped  # each of these matrices may take a gigabyte
    if failed.item():
        raise QuantizationError(f"the inputs' second-moment matrix is not positive definite with damping {damping}")
    identity = torch.eye(len(hessian), device=hessian.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


class _Rows:
    """Some rows of a weight, rounded from the first column to the last. ``work``: what is still to be rounded."""

    def __init__(self, weight: Tensor, spread: Tensor, scales: Scales, start: Tensor, size: int) -> None:
        self.weight, self.scales, self.start, self.size = weight, scales, start, size
        self.per_row = weight.shape[1] // size
        self.work = weight.float().clone()
        self.importance = spread.diagonal().square().reciprocal()
        self.spread = spread / spread.diagonal().unsqueeze(1)
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        self.keys = start.clone()

    def better(self, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and keys, row by row those with feedback or those of the start, whichever errs less."""
        for first in range(0, self.work.shape[1], _COLUMNS):
            self._round_columns(first, min(first + _COLUMNS, self.work.shape[1]))
        old = encode(as_blocks(self.weight, self.size), self.scales.of(self.start)).to(torch.uint8).view_as(self.codes)
        is_better = self._error(self.codes, self.keys, hessian) < self._error(old, self.start, hessian)
        of_blocks = is_better.repeat_interleave(self.per_row)
        return torch.where(is_better[:, None], self.codes, old), torch.where(of_blocks, self.keys, self.start)

    def _error(self, codes: Tensor, keys: Tensor, hessian: Tensor) -> Tensor:
        stored = decode(codes.int().view(-1, self.size), self.scales.of(keys), self.weight.dtype)
        return energy(self.weight.float() - stored.view_as(self.weight).float(), hessian)

    def _round_columns(self, first: int, last: int) -> None:
        """Round some columns one by one; what they owe to the columns after ``last`` is paid at the end, in one product.

        They are turned into rows, contiguous ones: the loop is five small operations a column. A column stays as it was
        when it was rounded, so that the codes of all can be read off at the end.
        """
        columns = self.work[:, first:last].T.contiguous()
        errors, inverses = torch.empty_like(columns), torch.empty_like(columns)
        owed = self.spread[first:last, first:last].neg()
        step = min(self.size, last - first)
        for start in range(0, last - first, step):
            scale = self._scale_at(first + start, columns[start : start + step])
            inverse = inverses[start : start + step] = reciprocal(scale)
            for j in range(start, start + step):
                value = nearest_value(columns[j] * inverse)
                torch.addcmul(columns[j], value, scale, value=-1, out=errors[j])
                columns[j + 1 :].addr_(owed[j, j + 1 :], errors[j])
        self.codes[:, first:last] = encode_scaled(columns.mul_(inverses)).T
        self.work[:, last:].addmm_(errors.T, self.spread[first:last, last:], alpha=-1)

    def _scale_at(self, column: int, up_to_date: Tensor) -> Tensor:
        """The scales of all rows' block that ``column`` is in, searched if it is the first column of it."""
        blocks = slice(column // self.size, None, self.per_row)
        scales = self.scales[blocks]
        if column % self.size == 0:
            values = up_to_date.T if self.size <= _COLUMNS else self.work[:, column : column + self.size]
            h = self.importance[column : column + self.size]
            self.keys[blocks] = search(
                values.contiguous(), h, scales, self.keys[blocks], self.weight.dtype, FEW_FACTORS
            )
        return scales.of(self.keys[blocks])
