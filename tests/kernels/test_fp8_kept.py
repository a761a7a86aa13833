"""Weights kept in FP8: what is kept is what would be made, made once, and anew when the weight changes."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.kernels import fp8, fp8_kept
from weft.kernels.quant_linear import product, x_gradient
from weft.quant.layout import Layout

from .drawing import among
from .linear_cases import cases, normal, packed_weight

KINDS = ("rows", "columns", "nf4", "fp4")
ROWS = Layout("rows", 32, 64, fp8=True, kept=True)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Before each test."""
    with patch.object(fp8_kept, "_KEPT", {}):
        yield


def layout_of(kind: str, kept: bool) -> Layout:
    """32 x 64."""
    blocks = (64, 256) if kind in ("nf4", "fp4") else (0, 0)
    return Layout(kind, 32, 64, *blocks, fp8=True, kept=kept)  # pyright: ignore[reportArgumentType]


def weight_of(layout: Layout, seed: int) -> list[Tensor]:
    """Drawn."""
    if layout.is_4bit:
        return packed_weight(layout, seed)
    shape = (32, 64) if layout.kind == "rows" else (64, 32)
    return [normal(seed, shape, torch.bfloat16)]


@cases
@given(kind=among(KINDS), seed=st.integers(0, 99), changed=st.booleans())
def test_products_are_those_of_a_weight_quantized_anew(kind: str, seed: int, changed: bool) -> None:
    """Bit for bit, also after a change in place."""
    weight = weight_of(layout_of(kind, True), seed)
    x, dy = normal(seed + 1, (24, 64), torch.bfloat16), normal(seed + 2, (24, 32), torch.bfloat16)
    for _ in range(2):
        for _ in range(2):
            found = product(x, weight, layout_of(kind, True), None), x_gradient(dy, weight, layout_of(kind, True))
            wanted = product(x, weight, layout_of(kind, False), None), x_gradient(dy, weight, layout_of(kind, False))
            for ours, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, other, rtol=0, atol=0)
        if changed:
            weight[0].copy_(weight_of(layout_of(kind, True), seed + 3)[0])


def test_a_weight_is_quantized_once_each_way() -> None:
    weight, x = [normal(0, (32, 64), torch.bfloat16)], normal(1, (24, 64), torch.bfloat16)
    with patch.object(fp8, "quantize_rows", wraps=fp8.quantize_rows) as quantize:
        for _ in range(3):
            product(x, weight, ROWS, None)
            x_gradient(x[:, :32], weight, ROWS)
    assert quantize.call_count == 3 * 2 + 2
    assert fp8_kept.kept_bytes() == 2 * 32 * 64 + 4 * (32 + 64)


def test_a_changed_weight_is_written_where_the_former_lay() -> None:
    """For a recording reads it there."""
    weight = [normal(0, (32, 64), torch.bfloat16)]
    first = fp8_kept.quantized(weight, ROWS, torch.bfloat16)
    weight[0].mul_(3)
    second = fp8_kept.quantized(weight, ROWS, torch.bfloat16)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    for ours, other in zip(second, fp8.quantize_rows(weight[0]), strict=True):
        torch.testing.assert_close(ours.float(), other.float(), rtol=0, atol=0)


def test_copies_go_with_their_weight_or_when_told() -> None:
    parameter = nn.Parameter(normal(0, (32, 64), torch.bfloat16))
    kept = normal(1, (32, 64), torch.bfloat16)
    for weight in (parameter, kept):
        fp8_kept.quantized([weight], ROWS, torch.bfloat16)
    fp8_kept.forget([parameter])
    one = fp8_kept.kept_bytes()
    assert one == 32 * 64 + 4 * 32
    del kept, weight
    fp8_kept.quantized([parameter], ROWS, torch.bfloat16)
    assert fp8_kept.kept_bytes() == one, "the other's storage is gone"


def test_layouts_say_whether_it_is_kept() -> None:
    for kept in (False, True):
        layout = layout_of("nf4", kept)
        assert Layout.decode(layout.encode()) == layout
