"""Every product with a parameter is seen, however it is spelt, with its input and how the parameter lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from weft.passes.observe_linears import ObserveLinears

from ..graphs import normal, trace

SPELLINGS: dict[str, tuple[Callable[..., Any], str]] = {
    "linear": (lambda x, w: F.linear(x, w), "rows"),
    "x @ w.T": (lambda x, w: x @ w.T, "rows"),
    "transposed twice": (lambda x, w: x @ w.t().t().t(), "rows"),
    "x @ w": (lambda x, w: torch.matmul(x, w), "columns"),
    "of a cast": (lambda x, w: F.linear(x.double(), w.double()), "rows"),
    "addmm": (lambda x, w: torch.addmm(x.new_zeros(6), x.reshape(-1, 6), w), "columns"),
    "one of a stack": (lambda x, w: F.linear(x, w.view(1, 6, 6)[0]), "rows"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, layout = SPELLINGS[name]
    seen: list[Any] = []
    inputs = {"x": normal(0, 2, 3, 6), "w": normal(1, 6, 6)}
    module = trace(function, inputs)
    expected = module(*inputs.values())
    ObserveLinears(lambda *a: seen.append(a)).run(module, None)
    module.graph.lint()
    module.recompile()
    assert torch.equal(module(*inputs.values()), expected)
    (x, weight, found), *more = seen
    assert not more and weight is inputs["w"] and found == layout and x.shape[-1] == 6


def test_products_without_a_parameter_are_none() -> None:
    seen: list[Any] = []
    module = trace(lambda x, y: (x * 2) @ (y + 1).transpose(-1, -2), {"x": normal(0, 2, 3, 6), "y": normal(1, 2, 3, 6)})
    ObserveLinears(lambda *a: seen.append(a)).run(module, None)
    module.recompile()
    module(normal(0, 2, 3, 6), normal(1, 2, 3, 6))
    assert not seen
