"""Weights to quantize, drawn by hypothesis: sizes that no block divides, blocks of zeros, subnormal and huge values."""

from __future__ import annotations

import copy
import os
from typing import Any

import bitsandbytes.functional as B
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

many = settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "300")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def as_bitsandbytes_reads(packed: Tensor, state: Any) -> Tensor:
    """Shown a matrix with a block a row: its CPU kernel reads wrong scales where a block runs over a row's end (0.50.2)."""
    count, size = state.shape.numel(), state.blocksize
    blocks = -(-count // size)
    padded = torch.zeros(blocks * size // 2, dtype=torch.uint8, device=packed.device)
    padded[: packed.numel()] = packed.view(-1)
    by_block = copy.copy(state)
    by_block.shape = torch.Size((blocks, size))
    with torch.compiler.set_stance("force_eager"):
        return B.dequantize_4bit(padded, by_block).view(-1)[:count].view(state.shape)


def equal_where_normal(one: Tensor, other: Tensor) -> bool:
    """Equal, but for subnormal numbers: by the CPU, bitsandbytes' conversion to 16 bits rounds them or makes them zero."""
    smallest = torch.finfo(one.dtype).tiny
    subnormal = (one.abs() <= smallest) & (other.abs() <= smallest)
    return bool(((one == other) | subnormal).all()) and one.dtype == other.dtype


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """A matrix, or three of them stacked."""
    return st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 300)),
        st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 150)),
    )


@st.composite
def weights(draw: Any, dtype: torch.dtype, sizes: st.SearchStrategy[tuple[int, ...]] | None = None) -> Tensor:
    """A weight whose rows are of very different sizes, with some zeros."""
    shape = draw(shapes() if sizes is None else sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    w = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(("normal", "rounded", "constant", "zeros", "outlier")))
    if kind == "rounded":
        w = (w * 4).round() / 4
    elif kind == "constant":
        w = torch.full(shape, 0.25)
    elif kind == "zeros":
        w = torch.where(torch.rand((*shape[:-1], 1), generator=generator) < 0.5, torch.zeros(()), w)
    elif kind == "outlier":
        w.view(-1)[0] = 100
    limit = {torch.float32: 1e35, torch.bfloat16: 1e35, torch.float16: 100.0}[dtype]
    small = {torch.float32: 1e-40, torch.bfloat16: 1e-39, torch.float16: 1e-7}[dtype]
    return (w.double() * draw(st.sampled_from((small, 1e-5, 0.02, 1.0, limit)))).to(dtype)
