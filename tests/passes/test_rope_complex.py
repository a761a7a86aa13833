"""Rotary embedding as a product of complex numbers, as models write it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..graphs import check, normal
from .test_rope import RULES, SINGLE

pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values")


def complex_pairs(x: Any) -> Any:
    """Neighbours as complex numbers."""
    return torch.view_as_complex(x.reshape(2, 3, 4, 2, 2))


def complex_halves(x: Any) -> Any:
    """Halves as complex numbers."""
    return torch.view_as_complex(torch.stack(tuple(x.chunk(2, -1)[i] for i in range(2)), -1))


def columns(z: Any) -> Any:
    """The real parts of all, then the imaginary parts."""
    pairs = torch.view_as_real(z)
    return torch.cat(tuple(pairs.chunk(2, -1)[i] for i in range(2)), -2).reshape(2, 3, 4, 4)


WHOLE = {
    "exponential": lambda x, t: torch.view_as_real(complex_pairs(x) * torch.exp(1j * t)).reshape_as(x),
    "view_as": lambda x, t: torch.view_as_real(complex_pairs(x) * torch.polar(t.abs(), t)).view_as(x),
    "columns": lambda x, t: columns(complex_halves(x) * torch.polar(t.abs(), t)),
    "narrow columns": lambda x, t: columns(complex_halves(x) * torch.polar(t.abs(), t)).half(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_complex_numbers_in_models(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, 4, 4, grad=True), "t": normal(1, 4, 2)}
    check(WHOLE[name], inputs, SINGLE, count=1, terms=16, verify=True)


OTHER_NUMBERS = {
    "imaginary first": lambda x, c: torch.cat(((complex_halves(x) * c).imag, (complex_halves(x) * c).real), -1),
    "conjugate": lambda x, c: torch.cat(((complex_halves(x).conj() * c).real, (complex_halves(x).conj() * c).imag), -1),
    "of two products": lambda x, c: torch.cat(((complex_halves(x) * c).real, (complex_halves(x) * c.conj()).imag), -1),
    "of other parts": lambda x, c: torch.view_as_real(torch.complex(x[..., 1::2], x[..., ::2]) * c).flatten(-2),
}
"""None of these turns pairs."""


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_other_complex_numbers_are_left_alone(name: str) -> None:
    inputs = {"x": normal(0, 2, 3, 4, 4, grad=True), "c": torch.complex(normal(1, 4, 2), normal(2, 4, 2))}
    check(OTHER_NUMBERS[name], inputs, RULES, count=0, terms=16)


def test_complex_numbers_that_are_only_scaled_are_left_alone() -> None:
    def scaled(x: Any, c: Any) -> Any:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * c).flatten(-2)

    _, outcome = check(scaled, {"x": normal(0, 2, 3, 4), "c": normal(1, 3, 2)}, RULES, count=0)
    assert "scaled" in outcome.refusals[0].reason
