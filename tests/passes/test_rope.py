"""Rotary embedding, however it is spelt, is one operator for q and k; what only looks like one is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.rope import FusePartialRope, FuseRope, PairRope

from ..graphs import cases, check, normal, targets

SINGLE = [FuseRope(), FusePartialRope()]
RULES = [*SINGLE, PairRope()]

HALVES = {
    "slices": lambda x, d: (x[..., : d // 2], x[..., d // 2 :]),
    "slices with ends": lambda x, d: (x[..., 0 : d // 2], x[..., d // 2 : d]),
    "all dimensions": lambda x, d: (x[:, :, :, : d // 2], x[:, :, :, d // 2 :]),
    "negative": lambda x, d: (x[..., : -d // 2], x[..., -d // 2 :]),
    "chunk": lambda x, d: tuple(x.chunk(2, dim=-1)[i] for i in range(2)),
    "split": lambda x, d: tuple(torch.split(x, d // 2, -1)[i] for i in range(2)),
    "split, lengths": lambda x, d: tuple(x.split([d // 2, d // 2], dim=3)[i] for i in range(2)),
    "narrow": lambda x, d: (x.narrow(-1, 0, d // 2), torch.narrow(x, -1, d // 2, d // 2)),
    "tensor_split": lambda x, d: tuple(torch.tensor_split(x, 2, dim=3)[i] for i in range(2)),
    "tensor_split, indices": lambda x, d: tuple(x.tensor_split((d // 2,), -1)[i] for i in range(2)),
    "unflatten": lambda x, d: tuple(x.unflatten(-1, (2, d // 2))[..., i, :] for i in range(2)),
    "unbind": lambda x, d: tuple(x.unflatten(-1, (2, d // 2)).unbind(-2)[i] for i in range(2)),
    "select": lambda x, d: tuple(x.unflatten(3, (2, -1)).select(3, i) for i in range(2)),
    "in front": lambda x, d: tuple(x.unflatten(3, (2, -1)).movedim(-2, 0)[i] for i in range(2)),
}
PAIRS = {
    "steps": lambda x, d: (x[..., ::2], x[..., 1::2]),
    "all dimensions": lambda x, d: (x[:, :, :, 0::2], x[:, :, :, 1::2]),
    "unflatten": lambda x, d: tuple(x.unflatten(-1, (d // 2, 2))[..., i] for i in range(2)),
    "unbind": lambda x, d: tuple(x.unflatten(-1, (d // 2, 2)).unbind(-1)[i] for i in range(2)),
    "select": lambda x, d: tuple(x.unflatten(3, (-1, 2)).select(-1, i) for i in range(2)),
    "in front": lambda x, d: tuple(x.unflatten(3, (-1, 2)).permute(4, 0, 1, 2, 3)[i] for i in range(2)),
}
NEGATIVES = {"-y": lambda y: -y, "neg": torch.neg}
SUMS = {
    "x cos + y sin": lambda x, y, c, s: x * c + y * s,
    "sin y + cos x": lambda x, y, c, s: s * y + c * x,
    "torch.add": lambda x, y, c, s: torch.add(torch.mul(x, c), torch.mul(y, s)),
    "in place": lambda x, y, c, s: (x * c).add_(y * s),
    "minus": lambda x, y, c, s: x * c - (-y) * s,
    "back": lambda x, y, c, s: x * c - y * s,
    "back, a negative": lambda x, y, c, s: x * c + y * (-s),
}
INTERLEAVES = {
    "stack, flatten": lambda a, b: torch.stack((a, b), -1).flatten(-2),
    "stack, flatten to the last": lambda a, b: torch.stack([a, b], dim=-1).flatten(-2, -1),
    "stack, front": lambda a, b: torch.stack((a, b), dim=4).flatten(3),
    "stack, moved": lambda a, b: torch.stack((a, b)).movedim(0, -1).flatten(-2),
}
CATS = {
    "-1": lambda a, b: torch.cat((a, b), -1),
    "3": lambda a, b: torch.cat([a, b], dim=3),
    "stack": lambda a, b: torch.stack((a, b), -2).flatten(-2),
    "stack, moved": lambda a, b: torch.stack((a, b)).permute(1, 2, 3, 0, 4).flatten(3),
}
COMPLEX = {
    "complex": lambda a, b: torch.complex(a.contiguous(), b.contiguous()),
    "stack": lambda a, b: torch.view_as_complex(torch.stack((a, b), -1)),
}
"""Complex numbers of the two parts of x."""
REALS = {
    "view": lambda z: tuple(torch.view_as_real(z)[..., i] for i in range(2)),
    "attributes": lambda z: (z.real, z.imag),
    "functions": lambda z: (torch.real(z), torch.imag(z)),
    "unbind": lambda z: tuple(torch.view_as_real(z).unbind(-1)[i] for i in range(2)),
}
TURNS = {
    "one": lambda a, b, c, s: (a * c - b * s, b * c + a * s),
    "other": lambda a, b, c, s: (c * a - s * b, a * s + b * c),
    "negatives": lambda a, b, c, s: (c * a + b * (-s), a * s + b * c),
    "back": lambda a, b, c, s: (a * c + b * s, b * c - a * s),
    "back, a negative": lambda a, b, c, s: (a * c + b * s, a * (-s) + b * c),
}
FORMS = ("rotate half", "two halves", "rotate pairs", "two of a pair", "complex", "complex halves", "complex pair")
MORE = ("nothing", "rotated", "half")


def rotated(x: Any, cos: Any, sin: Any, s: dict[str, Any], size: int) -> tuple[Any, Any]:
    """``x`` rotated as ``s`` says, and some value inside."""
    form, pairs = s["form"], "pair" in s["form"]
    if form == "complex":
        z = torch.view_as_complex(x.float().unflatten(-1, (size // 2, 2)))
        return torch.view_as_real(z * cos).flatten(3), z.real
    wide = x.float() if s["widen"] or form.startswith("complex") else x
    from_pairs = pairs != (s["sorted"] and form.startswith("two"))
    first, second = (PAIRS[s["pairs"]] if from_pairs else HALVES[s["halves"]])(wide, size)
    join = (INTERLEAVES if pairs else CATS)[s["interleave" if pairs else "cat"]]
    if form.startswith("complex"):
        z = COMPLEX[s["complex"]](first, second) * cos
        return join(*REALS[s["reals"]](z)), z.real
    if form.startswith("rotate"):
        turned = join(NEGATIVES[s["negative"]](second), first)
        return SUMS[s["sum"]](wide, turned, cos, sin), turned
    return join(*TURNS[s["turn"]](first, second, cos, sin)), first


spellings = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "table_dtype": st.sampled_from(("same", "float32")),
        "widen": st.booleans(),
        "narrow": st.booleans(),
        "halves": st.sampled_from(sorted(HALVES)),
        "pairs": st.sampled_from(sorted(PAIRS)),
        "negative": st.sampled_from(sorted(NEGATIVES)),
        "sum": st.sampled_from(sorted(SUMS)),
        "turn": st.sampled_from(sorted(TURNS)),
        "sorted": st.booleans(),
        "interleave": st.sampled_from(sorted(INTERLEAVES)),
        "cat": st.sampled_from(sorted(CATS)),
        "complex": st.sampled_from(("complex", "stack")),
        "reals": st.sampled_from(sorted(REALS)),
        "more": st.sampled_from(MORE),
        "batch": st.sampled_from((1, 2)),
        "length": st.sampled_from((0, 1, 3)),
        "heads": st.sampled_from(((2, 2), (4, 1), (2, 4))),
        "size": st.sampled_from((2, 4, 6, 8)),
        "rest": st.sampled_from((0, 0, 4)),
        "at once": st.booleans(),
        "table": st.sampled_from(("per position", "per row")),
        "table_grad": st.booleans(),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes: q and k rotated by the same tables."""
    size = s["size"]

    def one(x: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        if s["rest"] and s["form"] == "two halves" and s["at once"]:
            first, second = x[..., : size // 2], x[..., size // 2 : size]
            turned = [t.to(s["dtype"]) for t in TURNS[s["turn"]](first, second, cos, sin)]
            return torch.cat((*turned, x[..., size:]), -1), first
        part, rest = (x[..., :size], x[..., size:]) if s["rest"] else (x, None)
        y, inner = rotated(part, cos, sin, s, size)
        y = y.to(s["dtype"]) if s["narrow"] or rest is not None else y
        return (y if rest is None else torch.cat((y, rest), -1)), inner

    def both(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        cos, sin = (t.unsqueeze(1) if s["table"] == "per row" else t for t in (cos, sin))
        cos = torch.complex(cos, sin) if s["form"].startswith("complex") else cos
        (a, inner), (b, _) = one(q, cos, sin), one(k, cos, sin)
        return (a, b, inner) if s["more"] == "rotated" else (a, b)

    return both


def inputs_of(s: dict[str, Any]) -> dict[str, Any]:
    """q, k and tables whose halves differ."""
    size = s["size"] if s["form"].startswith("rotate") else s["size"] // 2
    kind = torch.float32 if s["table_dtype"] == "float32" or s["form"].startswith("complex") else s["dtype"]
    shape = (s["batch"], s["length"], size) if s["table"] == "per row" else (s["length"], size)
    q, k = (
        normal(i, s["batch"], heads, s["length"], s["size"] + s["rest"], dtype=s["dtype"], grad=True)
        for i, heads in enumerate(s["heads"])
    )
    cos, sin = (normal(i, *shape, dtype=kind, grad=s["table_grad"]) for i in (2, 3))
    return {"q": q, "k": k, "cos": cos, "sin": sin}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, terms=16)
    names = targets(module)
    assert 2 * names.count("rope") + names.count("rope_single") == 2, module.graph
    assert s["table_grad"] or names.count("rope") == 1 or "back" in s["turn"] + s["sum"], module.graph


def half(x: Any) -> Any:
    """(−x₂, x₁)"""
    return torch.cat((-x[..., 2:], x[..., :2]), -1)


NEAR = {
    "halves not swapped": lambda x, y, c, s: x * c + torch.cat((-x[..., :2], x[..., 2:]), -1) * s,
    "nothing negated": lambda x, y, c, s: x * c + torch.cat((x[..., 2:], x[..., :2]), -1) * s,
    "one half turned each way": lambda x, y, c, s: torch.cat(
        (x[..., :2] * c[..., :2] - x[..., 2:] * s[..., :2], x[..., 2:] * c[..., :2] - x[..., :2] * s[..., :2]), -1
    ),
    "subtracted from the turned": lambda x, y, c, s: half(x) * s - x * c,
    "all negative": lambda x, y, c, s: x * c + torch.cat((-x[..., 2:], -x[..., :2]), -1) * s,
    "another tensor turned": lambda x, y, c, s: x * c + half(y) * s,
    "unequal parts": lambda x, y, c, s: x * c + torch.cat((-x[..., 1:], x[..., :1]), -1) * s,
    "along another dimension": lambda x, y, c, s: x * c + torch.cat((-x[..., 2:, :], x[..., :2, :]), -2) * s,
    "pairs joined as halves": lambda x, y, c, s: x * c + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * s,
    "halves joined as pairs": lambda x, y, c, s: x * c + torch.stack((-x[..., 2:], x[..., :2]), -1).flatten(-2) * s,
    "stacked the other way": lambda x, y, c, s: x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2) * s,
    "turned through another angle": lambda x, y, c, s: torch.cat(
        (x[..., :2] * c[..., :2] - x[..., 2:] * s[..., :2], x[..., 2:] * c[..., :2] - x[..., :2] * s[..., :2]), -1
    ),
    "tables larger than x": lambda x, y, c, s: x[:1] * c + half(x[:1]) * s,
}
"""None of these is a rotation as it seems; sizes are equal, so that only the spelling tells."""


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left_alone(name: str) -> None:
    x, y, cos, sin = (normal(i, 4, 4, 4, 4, grad=True) for i in range(4))
    check(NEAR[name], {"x": x, "y": y, "cos": cos, "sin": sin}, RULES, count=0, terms=16)


TURNED_BACK = {
    "halves swapped": lambda x, c, s: x * c + torch.cat((x[..., 2:], -x[..., :2]), -1) * s,
    "pairs swapped": lambda x, c, s: x * c + torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2) * s,
    "subtracted": lambda x, c, s: x * c - half(x) * s,
    "by parts": lambda x, c, s: torch.cat(TURNS["back"](x[..., :2], x[..., 2:], c[..., :2], s[..., :2]), -1),
}


@pytest.mark.parametrize("name", TURNED_BACK)
def test_turned_the_other_way(name: str) -> None:
    """q and k share one negative table."""
    inputs = {"q": normal(0, 2, 3, 4, 4), "k": normal(1, 2, 2, 4, 4), "cos": normal(2, 4, 4), "sin": normal(3, 4, 4)}
    turned = TURNED_BACK[name]
    module, _ = check(
        lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin)), inputs, RULES, terms=16, verify=True
    )
    names = targets(module)
    assert names.count("rope") == 1 and names.count("neg") == 1, module.graph


def test_tables_made_anew_for_each_tensor() -> None:
    def one(x: Any, cos: Any, sin: Any) -> Any:
        cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
        return x * cos + half(x) * sin

    inputs = {"q": normal(0, 2, 4, 3, 4, dtype=torch.bfloat16), "k": normal(1, 2, 2, 3, 4, dtype=torch.bfloat16)}
    inputs |= {"cos": normal(2, 2, 3, 4), "sin": normal(3, 2, 3, 4)}
    module, _ = check(lambda q, k, cos, sin: (one(q, cos, sin), one(k, cos, sin)), inputs, SINGLE, count=2)
    assert targets(module).count("rope_single") == 2 and "cat" not in targets(module)


def test_an_odd_size_is_refused() -> None:
    def odd(x: Any, cos: Any, sin: Any) -> Any:
        return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin

    inputs = {"x": normal(0, 1, 2, 3, 5), "cos": normal(1, 3, 5), "sin": normal(2, 3, 5)}
    _, outcome = check(odd, inputs, RULES, count=0)
    assert "even size" in outcome.refusals[0].reason


def test_tensors_that_differ_in_more_than_heads_are_not_paired() -> None:
    def both(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    inputs = {"q": normal(0, 2, 2, 1, 4), "k": normal(1, 1, 3, 1, 4), "cos": normal(2, 1, 4), "sin": normal(3, 1, 4)}
    module, _ = check(both, inputs, RULES, count=2)
    assert targets(module) == ["rope_single", "rope_single"]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_verified(form: str) -> None:
    s: dict[str, Any] = {
        "form": form, "dtype": torch.bfloat16, "table_dtype": "float32", "widen": True, "narrow": True, "halves": "chunk",
        "pairs": "steps", "negative": "-y", "sum": "torch.add", "turn": "one", "interleave": "stack, flatten", "cat": "-1",
        "complex": "stack", "reals": "attributes",
        "sorted": False, "more": "nothing", "batch": 2, "length": 3, "heads": (2, 4), "size": 4, "rest": 0, "table": "per row",
        "table_grad": False,
    }  # fmt: skip
    module, outcome = check(spelt(s), inputs_of(s), RULES, terms=16, verify=True, dynamic=True)
    assert all(r.error is not None for r in outcome.rewrites)
    assert targets(module).count("rope") == 1, module.graph
