"""Products in parts: the split is exact, every product is what float64 says, and the linears that use them are right."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weft.kernels import lora_update, parallel_linears, split
from weft.kernels.dispatch import Backend, backend

from .drawing import among
from .linear_cases import BACKENDS, DEVICE, MEMORY, cases, lay, normal
from .test_parallel_linears import leaves, operands

TINY = 2.0**-126
SIZES = among((0, 1, 3, 7, 8, 17))


def in_parts(wide: Tensor, dtype: torch.dtype) -> bool:
    """``split.serves`` for any device."""
    return wide.dtype == torch.bfloat16 and dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
@cases
@given(rows=SIZES, cols=SIZES, seed=st.integers(0, 2**20), power=st.integers(-70, 120), memory=among(MEMORY))
def test_the_parts_are_the_number(name: Backend, rows: int, cols: int, seed: int, power: int, memory: str) -> None:
    factor = lay(normal(seed, (rows, cols), torch.float32, 2.0**power), memory)
    with backend(name):
        found = split.parts(factor, (0, 1, 2))
        again = split.parts(factor, (1, 0, 1))
    assert found.shape == (3, rows, cols) and found.dtype == torch.bfloat16 and found.is_contiguous()
    assert torch.equal(found.double().sum(0), factor.double())
    assert torch.equal(again, torch.stack((found[1], found[0], found[1])))


@pytest.mark.parametrize("name", BACKENDS)
@cases
@given(cols=SIZES, seed=st.integers(0, 2**20), power=st.integers(-149, -70))
def test_of_tiny_numbers_no_more_is_lost_than_subnormal_bits(name: Backend, cols: int, seed: int, power: int) -> None:
    """What of a part is below bfloat16's smallest normal number may be flushed, as Triton's interpreter does."""
    factor = normal(seed, (1, cols), torch.float32, 2.0**power)
    with backend(name):
        found = split.parts(factor, (0, 1, 2))
    assert bool((found.double().sum(0) - factor.double()).abs().le(2 * TINY).all())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_in_the_first_part(name: Backend) -> None:
    factor = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 1e-44, 1 + 2**-20]], device=DEVICE)
    with backend(name):
        found = split.parts(factor, (0, 1, 2))
    assert torch.equal(found[0, 0, :2], factor[0, :2].bfloat16()) and found[0, 0, 2].isnan()
    assert not found[1:, 0, :4].any()
    torch.testing.assert_close(found.double().sum(0)[:, 3:], factor.double()[:, 3:], rtol=0, atol=2.0**-133)


@pytest.mark.parametrize("turned", [False, True])
@cases
@given(
    m=SIZES, n=SIZES, k=among((0, 1, 5, 8, 16, 21)), seed=st.integers(0, 2**20),
    memory=among(("plain", "sliced", "columns")), other=among(MEMORY),
)  # fmt: skip
def test_products(turned: bool, m: int, n: int, k: int, seed: int, memory: str, other: str) -> None:
    wide, factor = normal(seed, (m, k), torch.bfloat16), normal(seed + 1, (k, n), torch.float32)
    wide, factor = lay(wide, memory), lay(factor, other)
    with patch.object(split, "TERMS", 8):
        found = split.product(wide, factor, turned=turned)
    exact = wide.double() @ factor.double()
    assert found.is_contiguous() and found.dtype == torch.float32
    bound = 4e-7 * (wide.double().abs() @ factor.double().abs())
    assert bool(((found.t() if turned else found).double() - exact).abs().le(bound).all())


@cases
@given(m=SIZES, n=SIZES, k=st.integers(1, 8), seed=st.integers(0, 2**20), other=among(MEMORY))
def test_a_pair_is_the_product_but_for_its_last_bits(m: int, n: int, k: int, seed: int, other: str) -> None:
    left, right = normal(seed, (m, k), torch.float32), lay(normal(seed + 1, (k, n), torch.float32), other)
    parts = split.pair(left, right)
    assert [p.shape for p in parts] == [(m, 3 * k), (3 * k, n)] and {p.dtype for p in parts} == {torch.bfloat16}
    bound = 2.0**-15 * (left.double().abs() @ right.double().abs())
    assert bool((parts[0].double() @ parts[1].double() - left.double() @ right.double()).abs().le(bound).all())


def mixed(own: tuple[int, ...]) -> dict[str, Any]:
    """Bfloat16 everywhere but in the adapters."""
    inputs = operands(torch.bfloat16, rows=21, own=own)
    inputs["x"] = inputs["x"].detach().bfloat16().requires_grad_()
    for key in ("biases", "x_adapters"):
        inputs[key] = [t if t is None else t.detach().bfloat16().requires_grad_() for t in inputs[key]]
    return inputs | {"adapter_dtype": torch.float32}


@pytest.mark.parametrize("own", [(), (1,), (0, 1)])
def test_linears_in_parts_are_as_right_as_cast_ones(own: tuple[int, ...]) -> None:
    inputs = mixed(own)
    ys: dict[bool, tuple[Tensor, ...]] = {}
    grads: dict[bool, tuple[Tensor, ...]] = {}
    for parted in (True, False):
        with patch.object(split, "serves", in_parts if parted else lambda *_: False), patch.object(split, "TERMS", 8):
            ys[parted] = parallel_linears.parallel_linears(**inputs)
            total = torch.stack([y.float().square().sum() for y in ys[parted]]).sum()
            grads[parted] = torch.autograd.grad(total, leaves(inputs), allow_unused=True)
    for got, plain in zip((*ys[True], *grads[True]), (*ys[False], *grads[False]), strict=True):
        assert got.dtype == plain.dtype and got.shape == plain.shape
        # One y rounded the other way moves every gradient of an adapter by as much as a rounding.
        torch.testing.assert_close(got.float(), plain.float(), rtol=2e-2, atol=2e-2 * float(plain.float().abs().max()))


def test_gradients_of_adapters_in_parts_are_those_of_float32() -> None:
    dy, x, t = (normal(i, shape, torch.bfloat16) for i, shape in enumerate(((21, 12), (21, 10), (21, 3))))
    a, b = normal(3, (3, 10), torch.float32), normal(4, (12, 3), torch.float32)
    arguments: list[Any] = [dy, x, t.float() * 1.001, a, b, 0.7, torch.float32, [True] * 3]
    doubled: list[Any] = [v.double() if isinstance(v, Tensor) else v for v in arguments]
    doubled[6] = torch.float64
    exact = lora_update._lora_update_backward(*doubled)
    with patch.object(split, "serves", in_parts), patch.object(split, "TERMS", 8):
        found = lora_update._lora_update_backward(*arguments)
    for got, true in zip(found, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), true, rtol=2e-6, atol=2e-6 * float(true.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(2048, 4096, 16), (2048, 14336, 32), (4096, 2048, 16), (100, 777, 5)])
def test_on_matrix_units_as_exact_as_float32(turned: bool, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    wide, factor = normal(0, (m, k), torch.bfloat16), normal(1, (k, n), torch.float32)
    exact = wide.double() @ factor.double()

    def error(found: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    found = split.product(wide, factor, turned=turned)
    plain = wide.float() @ factor
    assert split.serves(wide, torch.float32)
    assert error(found.t() if turned else found) <= 2 * error(plain) + 2.0**-24
    strided = split.product(wide.t().contiguous().t(), factor, turned=turned)
    assert error(strided.t() if turned else strided) <= 2 * error(plain) + 2.0**-24
