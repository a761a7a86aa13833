"""Rotary embedding by a roll of half a head, whose table or a vector beside it holds the signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import weft

from ..graphs import cases, check, here, normal, targets
from .test_rope import RULES, SINGLE, SUMS

ROLLS = {
    "torch.roll": lambda x, d: torch.roll(x, shifts=d // 2, dims=-1),
    "method": lambda x, d: x.roll(d // 2, -1),
    "the other way": lambda x, d: x.roll(-(d // 2), dims=3),
    "halves flipped": lambda x, d: x.unflatten(-1, (2, d // 2)).flip(-2).flatten(-2),
    "further than around": lambda x, d: torch.roll(x, (d + d // 2,), (-1,)),
}
SIGNS = {
    "in the table": lambda y, s, v: (y, s),
    "on the table": lambda y, s, v: (y, v * s),
    "on the rolled": lambda y, s, v: (y * v, s),
    "on the rolled, first": lambda y, s, v: (v * y, s),
}
spellings = st.fixed_dictionaries(
    {
        "roll": st.sampled_from(sorted(ROLLS)),
        "signs": st.sampled_from(sorted(SIGNS)),
        "computed": st.booleans(),
        "sum": st.sampled_from(sorted(SUMS)),
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "table_dtype": st.sampled_from(("same", "float32")),
        "widen": st.booleans(),
        "narrow": st.booleans(),
        "more": st.booleans(),
        "batch": st.sampled_from((1, 2)),
        "length": st.sampled_from((0, 1, 3)),
        "heads": st.sampled_from(((2, 2), (4, 1), (2, 4))),
        "size": st.sampled_from((2, 4, 6, 8)),
        "rest": st.sampled_from((0, 0, 4)),
        "table_grad": st.booleans(),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes: q and k rotated by the same tables."""
    size = s["size"]

    def one(x: Any, cos: Any, sin: Any, signs: Any) -> tuple[Any, Any]:
        part, rest = (x[..., :size], x[..., size:]) if s["rest"] else (x, None)
        part = part.float() if s["widen"] else part
        if s["computed"]:
            ones = here(x, torch.ones, size // 2)
            signs = torch.cat([-ones, ones])
        turned, sin = SIGNS[s["signs"]](ROLLS[s["roll"]](part, size), sin, signs)
        y = SUMS[s["sum"]](part, turned, cos, sin)
        y = y.to(s["dtype"]) if s["narrow"] or rest is not None else y
        return (y if rest is None else torch.cat((y, rest), -1)), turned

    def both(q: Any, k: Any, cos: Any, sin: Any, signs: Any) -> Any:
        (a, inner), (b, _) = one(q, cos, sin, signs), one(k, cos, sin, signs)
        return (a, b, inner) if s["more"] else (a, b)

    return both


def inputs_of(s: dict[str, Any]) -> dict[str, Tensor]:
    """q, k and tables whose halves differ; signs that are none, for no value of theirs may matter."""
    kind = torch.float32 if s["table_dtype"] == "float32" else s["dtype"]
    q, k = (
        normal(i, s["batch"], heads, s["length"], s["size"] + s["rest"], dtype=s["dtype"], grad=True)
        for i, heads in enumerate(s["heads"])
    )
    cos, sin = (normal(i, s["length"], s["size"], dtype=kind, grad=s["table_grad"]) for i in (2, 3))
    return {"q": q, "k": k, "cos": cos, "sin": sin, "signs": normal(4, s["size"], dtype=kind)}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, terms=16)
    names = targets(module)
    assert 2 * names.count("rope") + names.count("rope_single") == 2, module.graph
    assert s["table_grad"] or names.count("rope") == 1, module.graph
    assert s["more"] or "roll" not in names


EXAMPLE: dict[str, Any] = {
    "roll": "torch.roll", "computed": False, "sum": "x cos + y sin", "dtype": torch.bfloat16, "table_dtype": "float32",
    "widen": True, "narrow": True, "more": False, "batch": 2, "length": 3, "heads": (2, 4), "size": 4, "rest": 0,
    "table_grad": False,
}  # fmt: skip


@pytest.mark.parametrize("sums", ("x cos + y sin", "back"))
@pytest.mark.parametrize("signs", SIGNS)
def test_each_place_of_the_signs_is_verified(signs: str, sums: str) -> None:
    """The second tensor is turned by the table that was made for the first."""
    s = EXAMPLE | {"signs": signs, "sum": sums}
    module, outcome = check(spelt(s), inputs_of(s), RULES, terms=16, verify=True, dynamic=True)
    assert all(r.error is not None for r in outcome.rewrites)
    names = targets(module)
    assert names.count("rope") == 1 and names.count("unsigned") == 1, module.graph


def roll(x: Any) -> Any:
    """The halves of four, swapped."""
    return torch.roll(x, 2, -1)


NEAR = {
    "rolled by a quarter": lambda x, y, c, s: x * c + torch.roll(x, 1, -1) * s,
    "rolled around": lambda x, y, c, s: x * c + torch.roll(x, 4, -1) * s,
    "along another dimension": lambda x, y, c, s: x * c + torch.roll(x, 2, -2) * s,
    "along all dimensions": lambda x, y, c, s: x * c + torch.roll(x, 2) * s,
    "along two dimensions": lambda x, y, c, s: x * c + torch.roll(x, (2, 2), (-1, -2)) * s,
    "another tensor rolled": lambda x, y, c, s: x * c + roll(y) * s,
    "rolled twice": lambda x, y, c, s: x * c + roll(roll(x)) * s,
    "subtracted from the rolled": lambda x, y, c, s: roll(x) * s - x * c,
    "the table rolled": lambda x, y, c, s: x * c + x * roll(s),
    "a number for a table": lambda x, y, c, s: x * c + roll(x) * 0.5,
    "a number for signs": lambda x, y, c, s: x * c + (roll(x) * 0.5) * s,
    "a table for each head": lambda x, y, c, s: x * c[0, 0] + roll(x) * s,
    "signs for each head": lambda x, y, c, s: x * c[0, 0] + roll(x) * y[:, :1, :1] * s[0, 0],
    "one sine for all pairs": lambda x, y, c, s: x * c + roll(x) * s[..., :1],
    "tables larger than x": lambda x, y, c, s: x[:1] * c + roll(x[:1]) * s,
}
"""None of these is a rotation by two tables of one shape."""


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    x, y, cos, sin = (normal(i, 4, 4, 4, 4, grad=True) for i in range(4))
    check(NEAR[name], {"x": x, "y": y, "cos": cos, "sin": sin}, RULES, count=0, terms=16)


def test_why_not() -> None:
    given = {"x": normal(0, 2, 3, 6), "cos": normal(1, 3, 6), "sin": normal(2, 3, 6)}
    _, outcome = check(lambda x, cos, sin: x * cos + torch.roll(x, 2, -1) * sin, given, SINGLE, count=0)
    assert "rolled by 2 of 6, not by half" in outcome.refusals[0].reason
    given["sin"] = given["sin"][:1]
    _, outcome = check(lambda x, cos, sin: x * cos + torch.roll(x, 3, -1) * sin, given, SINGLE, count=0)
    assert "[3, 6] and [1, 6]" in outcome.refusals[0].reason


class Attention(nn.Module):
    """Causal attention over heads of 8 that turns them by its positions, as ``spelling`` says."""

    rates: Tensor
    signs: Tensor

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.projections = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        self.register_buffer("rates", 0.1 ** (torch.arange(4.0) / 4), persistent=False)
        self.register_buffer("signs", torch.tensor([-1.0] * 4 + [1.0] * 4), persistent=False)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """``x`` (B, H, T, 8) by ``angles`` (T, 4)"""
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)
        if self.spelling == "buffer":
            return x * cos + torch.roll(x, shifts=4, dims=-1) * (sin * self.signs)
        if self.spelling == "buffer on the rolled":
            return x * cos + torch.roll(x, 4, -1) * self.signs * sin
        if self.spelling == "computed":
            ones = torch.ones(4, device=x.device)
            return x * cos + torch.cat([-ones, ones]) * x.roll(4, -1) * sin
        return x * cos + torch.roll(x, 4, -1) * torch.cat((-angles.sin(), angles.sin()), -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 16)"""
        q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in list(self.projections)[:3])
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.rates
        mixed = F.scaled_dot_product_attention(self.turn(q, angles), self.turn(k, angles), v, is_causal=True)
        return self.projections[3](mixed.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("spelling", ("buffer", "buffer on the rolled", "computed", "in the table"))
def test_attention_of_a_model(spelling: str) -> None:
    """A buffer may hold other signs later: nothing rests on those that it held."""
    torch.manual_seed(0)
    model, x = Attention(spelling), normal(0, 2, 5, 16)
    report: Any = weft.optimize(model, mode="train", example_inputs={"x": x}).rewrite_report
    assert sum(r.rule == "rope" for r in report.rewrites) == 3, str(report)
    for _ in range(2):
        plain = Attention(spelling)
        plain.load_state_dict(model.state_dict())
        plain.signs.copy_(model.signs)
        torch.testing.assert_close(model(x), plain(x))
        model.signs.neg_()
    weft.undo(model)
