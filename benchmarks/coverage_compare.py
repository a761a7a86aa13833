"""How far two runs of one model are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FORWARD_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3
FLOOR = 1e-5
"""Gradients are measured against their own largest entry, or this share of the model's largest, where that is larger:
what should be zero (a key bias under softmax, say) is only rounding, and has no relative error."""


class Excluded(Exception):
    """The type does not run, with or without weft."""


@dataclass
class Run:
    """One call: its logits and loss, and the gradients of all that is trained."""

    logits: Tensor | None
    loss: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """Largest difference over largest entry: of logits, of the loss, and of the gradient where it is worst."""

    logits: float
    loss: float
    gradient: float
    worst: str

    @property
    def fits(self) -> bool:
        """Whether all are within their limits."""
        return self.logits <= FORWARD_LIMIT and self.loss <= FORWARD_LIMIT and self.gradient <= GRADIENT_LIMIT


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Run:
    """One forward and backward, always with the same random numbers."""
    torch.manual_seed(11)
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    logits, loss = getattr(outputs, "logits", None), getattr(outputs, "loss", None)
    if loss is None and isinstance(logits, Tensor):
        loss = logits.float().pow(2).mean()
    if loss is None:
        raise Excluded("its outputs hold neither loss nor logits")
    if not loss.requires_grad:
        raise Excluded("its loss depends on nothing that is trained")
    loss.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(logits.detach().clone() if isinstance(logits, Tensor) else None, loss.detach().clone(), gradients)


def finite(one: Run) -> bool:
    """Whether no result is NaN or infinite."""
    return all(bool(torch.isfinite(t).all()) for t in (one.loss, one.logits, *one.gradients.values()) if t is not None)


def distance(reference: Run, got: Run) -> Distance:
    """How far ``got`` is from ``reference``; both have the same gradients."""
    top = max((float(g.abs().max()) for g in reference.gradients.values() if g.numel()), default=0.0)
    errors = {n: relative(g, got.gradients[n], FLOOR * top) for n, g in reference.gradients.items()}
    worst = max(errors, key=lambda n: errors[n], default="")
    logits, loss = relative(reference.logits, got.logits), relative(reference.loss, got.loss)
    return Distance(logits, loss, errors.get(worst, 0.0), worst)


def identical(a: Run, b: Run) -> bool:
    """Whether logits, loss and gradients are bit for bit the same."""
    pairs = [(a.logits, b.logits), (a.loss, b.loss), *((g, b.gradients.get(n)) for n, g in a.gradients.items())]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def relative(reference: Tensor | None, got: Tensor | None, floor: float = 0.0) -> float:
    """Largest difference over the reference's largest entry; infinite where the two do not correspond."""
    if reference is None or got is None:
        return 0.0 if reference is got else float("inf")
    if reference.shape != got.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    if not reference.numel():
        return 0.0
    size = max(float(reference.abs().max()), floor, torch.finfo(torch.float32).tiny)
    return float((reference.double() - got.double()).abs().max()) / size


def is_rounding(exact: Run, plain: Run, got: Run) -> bool:
    """Whether ``got`` is nowhere more than twice as far from the float64 run as ``plain`` is, beyond the limits.

    Where a gradient vanishes, both are noise: what is below one rounding of the model's largest gradient is passed over.
    """
    top = max(float(g.abs().max()) for g in exact.gradients.values())
    noise = torch.finfo(torch.float32).eps * top
    triples = [(exact.logits, plain.logits, got.logits, FORWARD_LIMIT, 0.0)]
    triples.append((exact.loss, plain.loss, got.loss, FORWARD_LIMIT, 0.0))
    for name, gradient in exact.gradients.items():
        if float((gradient.double() - got.gradients[name].double()).abs().max()) > noise:
            triples.append((gradient, plain.gradients[name], got.gradients[name], GRADIENT_LIMIT, FLOOR * top))
    return all(relative(e, g, f) <= max(limit, 2 * relative(e, p, f)) for e, p, g, limit, f in triples)
