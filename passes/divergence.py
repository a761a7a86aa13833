"""How far a model's predictions are from what they were: the Kullback–Leibler divergence, in nats a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

VALUES = 2**25
"""Logits compared at a time: float32 copies of those of a large vocabulary are large."""


def logits_of(output: Any) -> Tensor:
    """The predictions in a model's output, (..., classes): ``logits`` where it names them, else the first floating tensor.

    Raises:
        ValueError: there is no floating-point tensor in the output.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    candidates = [named] if isinstance(named, Tensor) else tree_leaves(output)
    found = next((t for t in candidates if isinstance(t, Tensor) and t.is_floating_point() and t.dim()), None)
    if found is None:
        raise ValueError("the model's output holds no predictions to compare")
    return found


def predictions(logits: Tensor, mask: Tensor | None) -> int:
    """How many predictions :func:`divergence` sums over."""
    return logits[..., 0].numel() if mask is None else int((mask != 0).sum())


def divergence(before: Tensor, after: Tensor, mask: Tensor | None = None) -> float:
    """Sum over predictions of KL(before ‖ after), in nats.

    Args:
        before: logits (..., classes).
        after: logits of the same shape.
        mask: (...), nonzero where a prediction counts; None: everywhere.
    """
    before, after = (t.reshape(-1, t.shape[-1]) for t in (before, after))
    kept = None if mask is None else mask.reshape(-1) != 0
    count = max(1, VALUES // max(1, before.shape[-1]))
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    for i in range(0, before.shape[0], count):
        p, q = (t[i : i + count].float().log_softmax(-1) for t in (before, after))
        rows = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
        total += (rows if kept is None else rows[kept[i : i + count]]).sum(dtype=torch.float64)
    return float(total)


def mask_of(inputs: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """The predictions of a batch that count: those that ``attention_mask`` keeps, where it has their shape."""
    mask = inputs.get("attention_mask")
    same = isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]
    return mask.to(logits.device) if same and isinstance(mask, Tensor) else None


def is_finite(logits: Tensor) -> bool:
    """Whether no prediction is NaN or infinite upwards; −inf forbids a class, as masks of vocabularies do."""
    return not bool(torch.isnan(logits).any() or torch.isposinf(logits).any())
