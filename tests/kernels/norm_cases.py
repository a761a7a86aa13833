"""What the tests of the norms draw: shapes, memory layouts, dtypes, and which inputs need a gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weft.kernels import rows
from weft.kernels.dispatch import Backend, backend

from .drawing import among, drawn

BACKENDS: tuple[Backend, ...] = ("reference", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

cases = settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "300")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

LEADS = ((), (0,), (1,), (2,), (5,), (2, 2), (1, 4), (3, 1), (2, 0, 3), (2, 2, 2), (2, 1, 2, 2))
LAYOUTS = ("plain", "sliced", "transposed", "reversed", "columns", "expanded")


def lay(x: Tensor, layout: str) -> Tensor:
    """A tensor like ``x``, contiguous, in another memory layout; where that would not differ, ``x``."""
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        return wide[..., 1:-2].copy_(x)
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "reversed":
        order = [*range(x.dim() - 2, -1, -1), x.dim() - 1]
        return x.permute(order).contiguous().permute(order)
    if layout == "columns" and x.dim() > 1:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@drawn
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """A few rows under up to four leading dimensions, or none; mostly odd lengths."""
    return (*draw(among(LEADS)), draw(st.integers(1, 70)))


@drawn
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    grads: st.SearchStrategy[bool],
    mean: tuple[int, ...] = (0,),
) -> Tensor:
    """A tensor in any layout, with a spread from 1 to 100 around one of ``mean``, that needs a gradient or not."""
    values = normal(draw(st.integers(0, 2**20)), shape, dtype) * draw(among((1, 1, 10, 100)))
    return lay(values + draw(among(mean)), draw(among(LAYOUTS))).requires_grad_(draw(grads))


@drawn
def vectors(draw: st.DrawFn, size: int, dtype: torch.dtype) -> Tensor | None:
    """A weight or bias in the dtype of x or in float32, or none."""
    kind = draw(among(("none", "same", "same", "float32", "strided")))
    if kind == "none":
        return None
    values = normal(draw(st.integers(0, 2**20)), (size,), torch.float32 if kind == "float32" else dtype)
    if kind == "strided":
        values = torch.stack([values, values], 1)[:, 0]
    return values.requires_grad_(draw(st.booleans()))


@drawn
def block_sizes(draw: st.DrawFn) -> dict[str, int]:
    """As they are, or so small that a row is walked in blocks and a program takes several blocks of rows."""
    few = {"TILE": 64, "TALL": 64, "RESIDENT_WARPS": 2}
    return draw(among(({}, {}, {"LONGEST": 32}, few, {"LONGEST": 32, **few})))


@contextmanager
def running(name: Backend, sizes: dict[str, int]) -> Iterator[None]:
    """Operators of the norms on one backend, with other block sizes."""
    with backend(name), patch.multiple(rows, **sizes) if sizes else backend(name):
        yield


def checkpointed(function: Callable[..., Any], use_reentrant: bool, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``inputs`` for the sum of squares of all results, through a checkpoint."""
    results = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    loss = sum(r.square().sum() for r in (results if isinstance(results, tuple) else (results,)))
    for tensor in inputs:
        tensor.grad = None
    loss.backward()
    return tuple(tensor.grad for tensor in inputs)


class Calls(TorchDispatchMode):
    """Records the arguments of every call of one operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = name, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == self.name:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))
