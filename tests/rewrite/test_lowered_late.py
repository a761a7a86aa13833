"""Graphs that are lowered after their capture serve other lengths, also those captured at a length that is a width, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .saving import Captured


class Heads(nn.Module):
    """Of [1, length, 64]: heads of 16, in a form that compares the length with the width."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        split = (x @ self.weight).view(x.shape[0], x.shape[1], -1, 16).transpose(1, 2)
        return torch.sin(split * split).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("first", [4, 16, 64, 65])
def test_what_is_lowered_late_serves_other_lengths(first: int) -> None:
    torch._dynamo.reset()
    model = Heads()
    captured = Captured(model)
    for length in (first, 2, 16, 64, 81):
        for saved in (None, frozenset[str](), frozenset({"mm"})):
            x, model.weight.grad = torch.randn(1, length, 64), None
            captured(x, saved=saved).sum().backward()
            (expected,) = torch.autograd.grad(model(x).sum(), model.weight)
            torch.testing.assert_close(model.weight.grad, expected)
    assert captured.graphs == 1 + (first == 64), "a length that the capture could not tell from a width has its own"


@pytest.mark.parametrize("first", [4, 16, 64, 65])
def test_a_block_whose_input_needs_no_gradient_serves_other_lengths(first: int) -> None:
    torch._dynamo.reset()
    model = Heads()
    captured = Captured(model)
    x = torch.randn(1, first, 64, requires_grad=True)
    torch._dynamo.mark_static(x, 2)
    captured(x)
    at = next(i for i, a in enumerate(captured.args) if isinstance(a, Tensor) and a.dim() == 3)
    frozen = captured.joint.without_gradient(at)
    for length in (first, 2, 16, 64, 81):
        x = torch.randn(1, length, 64)
        sizes = {i: length for i, a in enumerate(captured.args) if isinstance(a, int)}
        args = [sizes.get(i, x if i == at else a) for i, a in enumerate(captured.args)]
        (result,) = frozen.lower()(*args)
        torch.testing.assert_close(result, model(x))
