"""Linears that compute with the adapter beside the weight: the same numbers in one product, and chosen only where it pays."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from weft.kernels import split, widened
from weft.kernels.dequantize_4bit import dequantize_into
from weft.kernels.dispatch import Backend, backend
from weft.kernels.parallel_linears import parallel_linears, reference
from weft.quant import four_bit
from weft.quant.layout import Layout

from .linear_cases import BACKENDS, DEVICE, normal, packed_weight

LAYOUTS = (Layout("nf4", 96, 64, 64, 256), Layout("rows", 8, 64), Layout("fp4", 80, 64, 32))


def arguments(dtype: torch.dtype, kept: torch.dtype, own: bool) -> dict[str, Any]:
    """Two 4-bit linears and a dense one, whose ranks differ, one with a bias."""
    ranks = (4, 3, 17)
    pairs = list(zip(LAYOUTS, ranks, strict=True))
    x = normal(0, (2, 9, 64), dtype).requires_grad_()
    return {
        "x": x,
        "weights": [packed_weight(LAYOUTS[0], 1), [normal(2, (8, 64), dtype, 0.1)], packed_weight(LAYOUTS[2], 3)],
        "layouts": [layout.encode() for layout in LAYOUTS],
        "biases": [normal(4, (96,), dtype), None, None],
        "a": [normal(5 + i, (rank, 64), kept, 0.1).requires_grad_() for i, (_, rank) in enumerate(pairs)],
        "b": [normal(8 + i, (at.out_features, rank), kept, 0.3).requires_grad_() for i, (at, rank) in enumerate(pairs)],
        "scales": [0.5, 2.0, 3.0],
        "x_adapters": [normal(11, (2, 9, 64), dtype) if own else None, None, None],
        "adapter_dtype": kept,
    }


def doubled(value: Any) -> Any:
    """Floating-point tensors in float64; packed weights stay as they are."""
    if isinstance(value, list):
        return [doubled(v) for v in value]
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_one_product_is_two(name: Backend, own: bool, kept: torch.dtype) -> None:
    given = arguments(torch.bfloat16, kept, own)
    exact = reference(**{k: doubled(v) if k != "weights" else v for k, v in given.items()} | wide(given))
    plain = reference(**given)
    with (
        backend(name),
        patch.object(widened, "serves", lambda *_: True),
        patch.object(split, "serves", lambda x, dtype: x.dtype != dtype),
    ):
        found = parallel_linears(**given)
    for got, eager, true in zip(found, plain, exact, strict=True):
        assert got.dtype == torch.bfloat16 and got.is_contiguous()
        error, allowed = (float((y.double() - true).norm() / true.norm()) for y in (got, eager))
        assert error <= 1.1 * allowed + 1e-4


def wide(given: dict[str, Any]) -> dict[str, Any]:
    """The dense weights of ``given``, in float64, as rows."""
    pairs = zip(given["weights"], LAYOUTS, strict=True)
    dense = [four_bit.dequantize(w, at, torch.bfloat16) if at.is_4bit else w[0] for w, at in pairs]
    layouts = [Layout("rows", at.out_features, at.in_features).encode() for at in LAYOUTS]
    return {"weights": [[w.double()] for w in dense], "layouts": layouts, "adapter_dtype": torch.float64}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("columns", [1, 8, 16, 30, 64])
@pytest.mark.parametrize("gap", [0, 1, 16, 48])
def test_dequantizes_into_the_left_of_a_buffer(name: Backend, columns: int, gap: int) -> None:
    layout = Layout("nf4", 11, columns, 32, 2)
    weight = packed_weight(layout, 7)
    buffer = torch.full((11, columns + gap), 7.0, dtype=torch.bfloat16, device=DEVICE)
    with backend(name):
        dequantize_into(buffer[:, :columns], weight, layout)
    assert torch.equal(buffer[:, :columns], four_bit.dequantize(weight, layout, torch.bfloat16))
    assert bool((buffer[:, columns:] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shapes", "kind", "expected"),
    [
        (8192, [(14336, 4096)] * 2, "nf4", True),
        (8192, [(4096, 4096), (1024, 4096), (1024, 4096)], "nf4", False),
        (8192, [(4096, 14336)], "nf4", False),
        (8192, [(14336, 4096)] * 2, "rows", False),
        (512, [(14336, 4096)] * 2, "nf4", False),
    ],
)
def test_serves_where_it_pays(rows: int, shapes: list[tuple[int, int]], kind: Any, expected: bool) -> None:
    layouts = [Layout(kind, *shape, 64) for shape in shapes]
    x = torch.empty((rows, shapes[0][1]), dtype=torch.bfloat16, device="cuda")
    assert widened.serves(x, layouts, torch.bfloat16) == expected
    assert widened.serves(x, layouts, torch.float32) == expected
    assert not widened.serves(x.half(), layouts, torch.float32) and not widened.serves(x.float(), layouts, x.dtype)
