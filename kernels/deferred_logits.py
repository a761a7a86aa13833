"""Logits that exist when somebody reads them.

A fused loss needs no logits, but models return them. ``deferred_logits(x, W, …)`` is a tensor of the right shape, dtype and
device that computes x·Wᵀ (scaled and capped) on first use, with gradients if those were on, and is free if nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from weft.errors import WeftError

from .operator import most_at_once

_FREE = {
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "is_cuda",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "is_nested",
    )
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
}
"""What can be answered without the values."""


class OverwrittenLogitsError(WeftError, RuntimeError):
    """Logits were read for the first time after what they are computed from had been overwritten."""


class DeferredLogits(Tensor):
    """A tensor whose values are computed when first needed."""

    compute: Callable[[], Tensor]
    values: Tensor | None

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> DeferredLogits:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.compute, made.values = compute, None
        return made

    def materialize(self) -> Tensor:
        """The values, computed once."""
        if self.values is None:
            self.values = self.compute()
        return self.values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        dtype = _cast_target(func, args, kwargs)
        if dtype is not None:
            return _converted(args[0], dtype)
        args, kwargs = tree_map(_materialized, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_materialized, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialize().__deepcopy__(memo)


def _materialized(x: Any) -> Any:
    return x.materialize() if isinstance(x, DeferredLogits) else x


_CASTS = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}


def _cast_target(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype that a mere conversion of a deferred tensor asks for."""
    if not args or not isinstance(args[0], DeferredLogits) or args[0].values is not None or kwargs:
        return None
    if func in _CASTS and len(args) == 1:
        return _CASTS[func]
    return args[1] if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype) else None


def _converted(logits: DeferredLogits, dtype: torch.dtype) -> DeferredLogits:
    if dtype == logits.dtype:
        return logits
    return DeferredLogits(lambda: logits.materialize().to(dtype), logits.shape, dtype, logits.device)


OVERWRITTEN = (
    "these logits are computed when they are first read, and what they are computed from has been overwritten since, by an "
    'optimizer\'s step, say: read them before, or keep them with optimize(model, passes=default_passes("train", logits="keep"))'
)


def _version(x: Tensor) -> int | None:
    """How often ``x`` was written to; None where nobody counts: no tensor made in inference mode can be written to outside."""
    return None if x.is_inference() else x._version


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float, tracked: bool) -> Tensor:
    with torch.set_grad_enabled(tracked):
        logits = F.linear(x, weight, bias)
        logits = logits * scale if scale != 1.0 else logits
        return torch.tanh(logits / softcap) * softcap if softcap else logits


@most_at_once(0)
def deferred_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, logit_scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """softcap · tanh(scale · (x Wᵀ + b) / softcap), computed when read.

    Args:
        x: (..., hidden); weight: (vocab, hidden); bias: (vocab,) or None; all kept alive until the result is read.
        logit_scale: factor before the cap. softcap: bound of the logits; 0 for none.

    Returns:
        (..., vocab) in x's dtype, autocast's where it is on.

    Raises:
        OverwrittenLogitsError: on the first read, if x, the weight or the bias was overwritten since, by an optimizer's
            step, say: what the logits were cannot be computed any more.
    """
    if isinstance(x, FakeTensor):
        return _logits(x, weight, bias, logit_scale, softcap, torch.is_grad_enabled())
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    autocast = partial(torch.autocast, kind, dtype=dtype, enabled=torch.is_autocast_enabled(kind))
    tracked = torch.is_grad_enabled()

    read = [t for t in (x, weight, bias) if t is not None]
    versions = [_version(t) for t in read]

    def compute() -> Tensor:
        if versions != [_version(t) for t in read]:
            raise OverwrittenLogitsError(OVERWRITTEN)
        with autocast():
            return _logits(x, weight, bias, logit_scale, softcap, tracked)

    return DeferredLogits(compute, (*x.shape[:-1], weight.shape[0]), dtype, x.device)


@most_at_once(0)
def dropped_logits(x: Tensor, weight: Tensor, error: type[Exception]) -> Tensor:
    """What stands for logits that nobody wants: their shape, dtype and device, and no values.

    Args:
        x: (..., hidden); weight: (vocab, hidden).
        error: what reading the values raises, with an explanation.

    Returns:
        (..., vocab) in x's dtype.
    """
    if isinstance(x, FakeTensor):
        return F.linear(x, weight)

    def explain() -> Tensor:
        raise error(
            "the logits of this call were dropped: the loss was computed without them, as "
            'default_passes(logits="drop") asks; use logits="defer" (the default) to compute them when they are read'
        )

    return DeferredLogits(explain, (*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
