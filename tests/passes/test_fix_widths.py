"""Widths become numbers, lengths stay symbols; a call of another width is captured anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from weft.passes.common_subexpressions import CommonSubexpressions
from weft.passes.fix_widths import FixWidths
from weft.passes.rope import FusePartialRope, FuseRope, PairRope
from weft.rewrite.capture import annotate
from weft.rewrite.pipeline import Rules
from weft.rewrite.verify import Replayer

from ..graphs import normal, targets

PASSES = (CommonSubexpressions(), FixWidths(), Rules("rope", (FuseRope(), FusePartialRope(), PairRope())))


class Captured:
    """A function behind Dynamo, all sizes symbolic, and the graphs that it was captured as."""

    def __init__(self, function: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        self.graphs: list[fx.GraphModule] = []
        self.call = torch.compile(function, backend=self.compile, dynamic=True)

    def compile(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        annotate(module)
        for each in PASSES:
            each.run(module, Replayer())
        module.recompile()
        self.graphs.append(module)
        return module.forward


def half_turn(x: Any, cos: Any, sin: Any) -> Any:
    """Rotated by halves, as far as the tables reach."""
    width = cos.shape[-1]
    a, rest = x[..., :width], x[..., width:]
    turned = torch.cat((-a[..., a.shape[-1] // 2 :], a[..., : a.shape[-1] // 2]), -1)
    return torch.cat((a * cos + turned * sin, rest), -1)


def pair_turn(x: Any, cos: Any, sin: Any) -> Any:
    """Rotated by pairs, with tables made for halves."""
    cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in (cos, sin))
    a, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = torch.stack((-a[..., 1::2], a[..., ::2]), -1).flatten(-2)
    return torch.cat((a * cos + turned * sin, rest), -1)


def chunk_turn(x: Any, cos: Any, sin: Any) -> Any:
    """Rotated by chunks."""
    a, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = a.chunk(2, -1)
    return torch.cat((a * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def roll_turn(x: Any, cos: Any, sin: Any) -> Any:
    """Rotated by a roll, with the signs in the table."""
    a, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((a * cos + torch.roll(a, a.shape[-1] // 2, dims=-1) * sin, rest), -1)


def arguments(width: int, length: int = 5) -> tuple[Tensor, ...]:
    """Queries, keys and tables."""
    table = normal(2, 1, 1, length, width // 2).repeat(1, 1, 1, 2)
    return normal(0, 2, 4, length, 16), normal(1, 2, 2, length, 16), table.cos(), table.sin()


@pytest.mark.parametrize("turn", (half_turn, pair_turn, chunk_turn, roll_turn))
def test_partial_rotation_by_tables_of_any_width(turn: Callable[..., Any]) -> None:
    def both(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return turn(q, cos, sin), turn(k, cos, sin)

    captured = Captured(both)
    for width, length, graphs in ((8, 5, 1), (8, 7, 1), (12, 7, 2)):
        given = arguments(width, length)
        for found, wanted in zip(captured.call(*given), both(*given), strict=True):
            torch.testing.assert_close(found, wanted)
        assert len(captured.graphs) == graphs
    assert all(targets(module).count("rope") == 1 for module in captured.graphs)


@pytest.mark.parametrize(
    "function",
    (
        lambda x, m: x * m[..., : x.shape[-1]],
        lambda x, m: x[..., ::2] + m[..., : (x.shape[-1] + 1) // 2],
        lambda x, m: x.masked_fill(m[..., : x.shape[-1]] > 0, 0.0).softmax(-1),
        lambda x, m: x.roll(x.shape[-1] // 2, 1) * x.roll(1, -1) + x.roll(x.shape[-1], -1) + m[..., : x.shape[-1]],
        lambda x, m: x * m[..., : x.shape[-1]] + x.roll(1, -1) * m[..., -x.shape[-1] :],
        lambda x, m: torch.cat((x[..., 1:], x[..., :1]), -1) + m[..., : x.shape[-1]],
    ),
)
def test_lengths_stay_symbols(function: Callable[..., Any]) -> None:
    captured = Captured(function)
    for length in (6, 8, 9):
        x, m = normal(0, 2, 3, length), normal(1, 2, 3, 32)
        torch.testing.assert_close(captured.call(x, m), function(x, m))
    assert len(captured.graphs) == 1


def test_whole_numbers_stay_symbols() -> None:
    captured = Captured(lambda ids: ids[..., ::2] + ids[..., 1::2])
    for length in (6, 8, 10):
        captured.call(torch.arange(length))
    assert len(captured.graphs) == 1
