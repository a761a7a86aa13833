"""How far a stored weight is from the one it stands for. All relative, all summed in float64.

weight error    ‖W − Q‖ / ‖W‖
output error    ‖x (W − Q)ᵀ‖ / ‖x Wᵀ‖   over the calibration: tr(D H Dᵀ) with the second-moment matrix H of the
                inputs, or with its diagonal alone where only that was kept
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import QuantizationError
from .statistics import Statistics

_AT_ONCE = 2**24


def relative(error: Tensor, whole: Tensor) -> Tensor:
    """sqrt(error / whole), elementwise: 0 where both are 0."""
    return torch.where(error > 0, error / whole, torch.zeros_like(error)).sqrt()


def weight_error(weight: Tensor, approximation: Tensor) -> float:
    """Relative error of the whole weight, of any shape."""
    error, whole = _energies(weight, approximation, None)
    return relative(error.sum(), whole.sum()).item()


def output_error(weight: Tensor, approximation: Tensor, statistics: Statistics | Sequence[Statistics]) -> float:
    """Relative error of the product with the calibration's inputs, for a weight (out_features, in_features).

    Args:
        statistics: of the input; for matrices of that shape stacked, of one that all share, or of each one's.
    """
    if isinstance(statistics, Statistics):
        error, whole = _energies(weight, approximation, second_moment(statistics))
        return relative(error.sum(), whole.sum()).item()
    triples = [t for t in zip(weight, approximation, statistics, strict=True) if t[2].count]
    sums = [torch.stack([e.sum() for e in _energies(w, a, second_moment(s))]) * s.count for w, a, s in triples]
    error, whole = sum(sums, torch.zeros(2, dtype=torch.float64, device=weight.device))
    return relative(error, whole).item()


def output_error_by_channel(weight: Tensor, approximation: Tensor, statistics: Statistics) -> Tensor:
    """Relative error of each output feature, (out_features,), float64."""
    return relative(*_energies(weight, approximation, second_moment(statistics)))


def error_by_input_channel(weight: Tensor, approximation: Tensor, statistics: Statistics) -> Tensor:
    """The share of each input channel in the squared error of the output, (in_features,), float64, sums to 1 (or is 0).

    Products between channels are left out: it says which columns of the weight the error comes from.
    """
    columns = torch.zeros(weight.shape[-1], dtype=torch.float64, device=weight.device)
    for w, q in zip(_rows(weight), _rows(approximation), strict=True):
        columns += (w.double() - q.double()).square_().sum(0)
    columns *= statistics.mean_square.to(columns.device)
    return columns / columns.sum().clamp_min(torch.finfo(torch.float64).tiny)


def second_moment(statistics: Statistics) -> Tensor:
    """The matrix where it is kept, else its diagonal."""
    return statistics.mean_square if statistics.hessian is None else statistics.hessian


def energy(rows: Tensor, moment: Tensor | None) -> Tensor:
    """r H rᵀ of each row: H a matrix, or its diagonal, or None for the identity. float64, never negative."""
    if moment is None:
        return rows.double().square_().sum(-1)
    if moment.ndim == 1:
        return rows.double().square_() @ moment.to(rows.device, torch.float64)
    projected = rows.float() @ moment.to(rows.device, torch.float32)
    return (projected.double() * rows).sum(-1).clamp_min_(0)


def _energies(weight: Tensor, approximation: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight.shape != approximation.shape:
        raise QuantizationError(f"shapes differ: {tuple(weight.shape)} and {tuple(approximation.shape)}")
    if moment is not None and len(moment) != weight.shape[-1]:
        raise QuantizationError(f"statistics of {len(moment)} channels for a weight of shape {tuple(weight.shape)}")
    pairs = list(zip(_rows(weight), _rows(approximation), strict=True))
    error = torch.cat([energy(w.double() - q.double(), moment) for w, q in pairs])
    return error, torch.cat([energy(w.double(), moment) for w, _ in pairs])


def _rows(weight: Tensor) -> tuple[Tensor, ...]:
    rows = weight.detach().reshape(-1, weight.shape[-1])
    return rows.split(max(1, _AT_ONCE // rows.shape[-1]))
