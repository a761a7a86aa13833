"""What the tests of the linears draw: weights of every layout, leading shapes, memory layouts, adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from weft.kernels import dequantize_4bit, quant_matvec
from weft.kernels.dispatch import Backend, backend
from weft.kernels.quant_matvec import Tile
from weft.quant.layout import Layout

from .drawing import among, drawn

BACKENDS: tuple[Backend, ...] = ("reference", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEADS = ((), (0,), (1,), (3,), (9,), (2, 4), (1, 1), (3, 0), (2, 1, 3))
MEMORY = ("plain", "sliced", "columns", "expanded")

cases = settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "300")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def lay(x: Tensor, memory: str) -> Tensor:
    """A tensor like ``x``, contiguous, in another memory layout; where that would not differ, ``x``."""
    if memory == "sliced":
        return x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)[..., 1:-2].copy_(x)
    if memory == "columns" and x.dim() > 1:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    if memory == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


def packed_weight(layout: Layout, seed: int) -> list[Tensor]:
    """Random codes and scales of about 1 / sqrt(in_features), in the form of a bitsandbytes ``QuantState``."""
    generator = torch.Generator().manual_seed(seed)
    count = layout.out_features * layout.in_features
    blocks, spread = -(-count // layout.block_size), layout.in_features**-0.5
    packed = torch.randint(0, 256, ((count + 1) // 2, 1), dtype=torch.uint8, generator=generator)
    if not layout.nested_block_size:
        statistics = [torch.rand(blocks, generator=generator) * 2 * spread]
    else:
        nested = -(-blocks // layout.nested_block_size)
        index = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        table, absmax = torch.linspace(-1, 1, 256), torch.rand(nested, generator=generator) * spread
        statistics = [index, absmax, table, torch.tensor(spread)]
    return [t.to(DEVICE) for t in (packed, *statistics)]


@contextmanager
def running(name: Backend) -> Iterator[None]:
    """Operators on one backend, with a few large programs where the kernels of 4-bit weights have many.

    Triton's interpreter takes its time for each; the borders between them have cases in the tests of those kernels.
    """
    tile = Tile(32, 32, 4)
    whole = patch.multiple(dequantize_4bit, UNROLL=1, WARPS=16)
    with backend(name), whole, patch.multiple(quant_matvec, ONE_ROW=tile, NARROW=tile):
        yield


@drawn
def layouts(draw: st.DrawFn, kinds: tuple[str, ...], in_features: int) -> Layout:
    """Up to 40 outputs; blocks of a few sizes, also ones that do not divide a row."""
    kind, outs = draw(among(kinds)), draw(st.integers(1, 40))
    if kind in ("rows", "columns"):
        return Layout(kind, outs, in_features)
    return Layout(kind, outs, in_features, draw(among((32, 64, 128))), draw(among((0, 2, 256))))


def in_features(whole: bool) -> st.SearchStrategy[int]:
    """Any number of columns, or with ``whole`` one that blocks of 32, 64 or 128 may divide."""
    return among((32, 64, 96, 128)) if whole else st.integers(1, 40)


@drawn
def weights(draw: st.DrawFn, layout: Layout, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a layout; a dense weight may need a gradient."""
    seed = draw(st.integers(0, 2**20))
    if layout.is_4bit:
        return packed_weight(layout, seed)
    shape = (layout.out_features, layout.in_features)
    shape = shape if layout.kind == "rows" else shape[::-1]
    return [normal(seed, shape, dtype, layout.in_features**-0.5).requires_grad_(draw(st.booleans()))]


@drawn
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A tensor in any memory layout that needs a gradient more often than not."""
    values = lay(normal(draw(st.integers(0, 2**20)), shape, dtype, scale), draw(among(MEMORY)))
    return values.requires_grad_(draw(among((True, True, False))))


@drawn
def adapters(draw: st.DrawFn, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of one rank, each in ``dtype``."""
    rank = draw(st.integers(1, 8))
    a = draw(tensors((rank, layout.in_features), dtype, layout.in_features**-0.5))
    return a, draw(tensors((layout.out_features, rank), dtype, rank**-0.5))


@drawn
def precisions(draw: st.DrawFn, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype | None, torch.dtype]:
    """Dtypes of A and B, of their products, and of what enters them: as PEFT has them without and under autocast."""
    wide = torch.float32
    return draw(among(((dtype, None, dtype), (wide, wide, wide), (wide, wide, dtype), (wide, None, dtype))))


def terms(*groups: Any) -> float:
    """The largest product of two numbers that meet in a matrix product, gradients up to 5 included."""
    flat = [t for group in groups for t in (group if isinstance(group, list) else [group]) if isinstance(t, Tensor)]
    sizes = [float(t.detach().abs().max()) for t in flat if t.is_floating_point() and t.numel()]
    return max([5.0, *sizes]) ** 2


def checkpointed(function: Callable[..., Any], use_reentrant: bool, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of ``inputs`` for the sum of squares of all results, through a checkpoint."""
    results = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    for tensor in inputs:
        tensor.grad = None
    sum(r.square().sum() for r in (results if isinstance(results, list | tuple) else (results,))).backward()
    return [tensor.grad for tensor in inputs]


class Results(TorchDispatchMode):
    """Records what every call of one operator was given, and what it returned."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.arguments, self.results = name, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == self.name:
            self.arguments.append(args)
            self.results.append(result)
        return result


def opcheck_backward(name: str, results: Tensor | Sequence[Tensor]) -> None:
    """``torch.library.opcheck`` of the operator that the backward of ``results`` calls, with what it calls it with."""
    loss = sum(r.square().sum() for r in ([results] if isinstance(results, Tensor) else results))
    with Results(name) as record:
        loss.backward()
    assert record.arguments
    with torch.no_grad():
        for arguments in record.arguments:
            given = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, arguments)
            torch.library.opcheck(getattr(torch.ops.weft, name.removeprefix("weft::")).default, given)
