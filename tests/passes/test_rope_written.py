"""Rotary embedding whose halves, or pairs, are written into memory of their own, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import weft

from ..graphs import cases, check, normal, targets
from .test_rope import RULES, TURNS
from .test_rope_rolled import Attention
from .test_written_parts import write

WRITTEN: dict[str, Callable[[Any, Any, Any], Any]] = {
    "cat": lambda x, a, b: (write(x, (..., slice(None, 4)), a), write(x, (..., slice(4, None)), b)),
    "second first": lambda x, a, b: (write(x, (..., slice(4, None)), b), write(x, (..., slice(None, 4)), a)),
    "copies": lambda x, a, b: (x[..., :4].copy_(a), x[..., 4:].copy_(b)),
    "interleave": lambda x, a, b: (write(x, (..., slice(0, None, 2)), a), write(x, (..., slice(1, None, 2)), b)),
    "stack": lambda x, a, b: (write(x, (..., 0), a), write(x, (..., 1), b)),
}
rotations = st.fixed_dictionaries(
    {
        "write": st.sampled_from(sorted(WRITTEN)),
        "turn": st.sampled_from(sorted(TURNS)),
        "copy": st.booleans(),
        "rest": st.booleans(),
        "transposed": st.booleans(),
        "dtype": st.sampled_from((torch.float32, torch.bfloat16)),
        "table_dtype": st.sampled_from((torch.float32, torch.bfloat16)),
    }
)


def written_to(x: Any, way: str, combine: Callable[[Any, Any], Any]) -> Any:
    """Memory like ``x`` (..., 8), in whose halves, or pairs, stands what ``combine`` makes of those of ``x``."""
    pairs, halves = (x[..., ::2], x[..., 1::2]), (x[..., :4], x[..., 4:])
    y = torch.empty_like(x.unflatten(-1, (4, 2)) if way == "stack" else x)
    WRITTEN[way](y, *combine(*(pairs if way in ("interleave", "stack") else halves)))
    return y.flatten(-2) if way == "stack" else y


def rotated(x: Any, cos: Any, sin: Any, s: dict[str, Any]) -> Any:
    """``x``, or the first 8 elements of it: each half by itself, or a copy turned by a quarter is written."""
    head, way = x[..., :8] if s["rest"] else x, s["write"]
    if s["copy"]:
        wide = lambda t: t.repeat_interleave(2, -1) if way in ("interleave", "stack") else torch.cat((t, t), -1)  # noqa: E731
        y = head * wide(cos) + written_to(head, way, lambda a, b: (-b, a)) * wide(sin)
    else:
        y = written_to(head, way, lambda a, b: TURNS[s["turn"]](a, b, cos, sin))
    if not s["rest"]:
        return y
    out = torch.zeros_like(x)
    write(out, (..., slice(None, 8)), y)
    write(out, (..., slice(8, None)), x[..., 8:])
    return out


@cases
@given(s=rotations)
def test_rotations_by_writing(s: dict[str, Any]) -> None:
    def both(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q, k = (t.transpose(1, 2) if s["transposed"] else t for t in (q, k))
        return rotated(q, cos, sin, s), rotated(k, cos, sin, s)

    q, k = (normal(i, 2, 3, 3, 12 if s["rest"] else 8, dtype=s["dtype"], grad=True) for i in range(2))
    cos, sin = (normal(i, 3, 4, dtype=s["table_dtype"]) for i in (2, 3))
    module, _ = check(both, {"q": q, "k": k, "cos": cos, "sin": sin}, RULES, terms=16, verify=True)
    names = targets(module)
    assert "written" not in names and 2 * names.count("rope") + names.count("rope_single") == 2, module.graph


NEAR = {
    "nothing negated": lambda a, b, c, s: (a * c + b * s, b * c + a * s),
    "both negated": lambda a, b, c, s: (a * c - b * s, b * c - a * s),
    "halves in each other's place": lambda a, b, c, s: (b * c + a * s, a * c - b * s),
    "tables in each other's place": lambda a, b, c, s: (a * c - b * s, b * s + a * c),
    "one table for another": lambda a, b, c, s: (a * c - b * s, b * c + a * c),
    "one half for another": lambda a, b, c, s: (a * c - b * s, a * c + a * s),
}


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("way", WRITTEN)
def test_near_misses_are_left_alone(way: str, name: str) -> None:
    def function(x: Any, c: Any, s: Any) -> Any:
        return written_to(x, way, lambda a, b: NEAR[name](a, b, c, s))

    given = {"x": normal(0, 2, 3, 4, 8, grad=True), "c": normal(1, 4, 4), "s": normal(2, 4, 4)}
    check(function, given, RULES, count=0, terms=16)


class Writing(Attention):
    """Attention that turns into memory of its own."""

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """``x`` (B, H, T, 8) by ``angles`` (T, 4)"""
        cos, sin, out = angles.cos(), angles.sin(), torch.empty_like(x)
        pairs = self.spelling == "pairs"
        first, second = (slice(0, None, 2), slice(1, None, 2)) if pairs else (slice(None, 4), slice(4, None))
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out


@pytest.mark.parametrize("spelling", ("halves", "pairs"))
def test_attention_of_a_model(spelling: str) -> None:
    torch.manual_seed(0)
    model, x = Writing(spelling), normal(0, 2, 5, 16)
    wanted = model(x)
    report: Any = weft.optimize(model, mode="train", example_inputs={"x": x}).rewrite_report
    assert sum(r.rule == "rope" for r in report.rewrites) == 3, str(report)
    torch.testing.assert_close(model(x), wanted)
    weft.undo(model)
    assert torch.equal(model(x), wanted)
