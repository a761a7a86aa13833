"""Decides, call by call, whether an operator runs its Triton kernel or its reference.

CUDA tensors run the kernel. Everything else runs the reference, so that a CPU pays for nothing but the mathematics.
Tests force either with :func:`backend`; on the CPU a forced kernel needs ``TRITON_INTERPRET=1`` before import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.utils._triton import has_triton

Backend = Literal["triton", "reference"]

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True where ``triton.jit`` functions run in the interpreter. Its ``tl.dot`` on bfloat16 returns garbage: upcast there."""

_forced: list[Backend] = []


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force every operator called inside onto one implementation.

    A plain stack, not a context variable: autograd runs backward kernels on threads of its own.
    """
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def use_triton(x: Tensor) -> bool:
    """Whether the operator whose first tensor is ``x`` should launch its Triton kernel."""
    if _forced:
        return _forced[-1] == "triton"
    return x.is_cuda and has_triton()


def why_reference(device: torch.device) -> str:
    """Why operators on a GPU compute in plain torch, if they do; else nothing."""
    if device.type != "cuda" or has_triton():
        return ""
    return f"Triton is not installed, or does not support {device}: operators compute in plain torch there"


def records() -> bool:
    """Whether what is launched now is recorded for a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator does its arithmetic: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def owned() -> AbstractContextManager[None]:
    """Views made inside count as tensors of their own: for an operator that returns the one view of a buffer it made.

    A model may write into an operator's result, which autograd forbids for a view that a custom function returns.
    """
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))


def shaped(y: Tensor, *shape: int) -> Tensor:
    """``y`` in another shape, as a tensor of its own."""
    with owned():
        return y.view(shape)
