"""Fake quantization: a tensor as its storage in fewer bits would give it back, and its gradient as if nothing were lost.

    forward    w ↦ dequantize(quantize(w))          backward    dw = dout

The straight-through estimator (arXiv:1308.3432): rounding has no useful gradient, the identity's is used. Weights go
through the storage itself, so that converting them later changes no bit. Activations are rounded row by row to int8
(LLM.int8, arXiv:2208.07339), but for the columns in which a value reaches ``OUTLIER``: those stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant.formats import dequantize, quantize
from ..quant.stored import Format

OUTLIER = 6.0
"""Magnitude from which LLM.int8 computes a column in 16 bits."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lossy: Tensor) -> Tensor:
        """``lossy``, as a function of ``x``."""
        return lossy.view_as(lossy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of ``x`` is that of the result."""
        return grads[0], None


def fake_quantize(weight: Tensor, format: Format) -> Tensor:
    """A weight (..., out_features, in_features) as ``format`` stores it, in its dtype.

    Raises:
        QuantizationError: the weight holds NaN or infinity, or has a shape or dtype that the format does not store.
    """
    with torch.no_grad():
        lossy = dequantize(quantize(weight.detach(), format), weight.dtype)
    return _StraightThrough.apply(weight, lossy)  # pyright: ignore[reportReturnType]


def fake_quantize_rows(x: Tensor) -> Tensor:
    """Activations (..., features) as row-wise int8 gives them back, but for columns with outliers."""
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        outlier = (rows.abs() >= OUTLIER).any(0)
        kept = rows.float().masked_fill(outlier, 0)
        step = kept.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        lossy = torch.where(outlier, rows, ((kept / step).round() * step).to(x.dtype)).view(x.shape)
    return _StraightThrough.apply(x, lossy)  # pyright: ignore[reportReturnType]
