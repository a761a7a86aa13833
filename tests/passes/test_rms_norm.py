"""RMSNorm, however it is spelt, is one operator; what only looks like one is left alone."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weft.passes.rms_norm import FuseRmsNorm

from ..graphs import cases, check, normal, targets

RULES = [FuseRmsNorm()]
EPS = 1e-3

WIDEN = {
    "not": lambda x: x,
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to, by keyword": lambda x: x.to(dtype=torch.float32),
    "type": lambda x: x.type(torch.float32),
}
SQUARES = {
    "pow": lambda x: x.pow(2),
    "**": lambda x: x**2,
    "x·x": lambda x: x * x,
    "square": torch.square,
    "torch.pow": lambda x: torch.pow(x, 2.0),
}
MEANS = {
    "method": lambda s, n: s.mean(-1, keepdim=True),
    "positional": lambda s, n: s.mean(-1, True),
    "function": lambda s, n: torch.mean(s, dim=-1, keepdim=True),
    "list": lambda s, n: s.mean(dim=[-1], keepdim=True),
    "from the front": lambda s, n: s.mean(2, keepdim=True),
    "sum": lambda s, n: s.sum(-1, keepdim=True) / n,
    "numpy": lambda s, n: torch.mean(s, axis=-1, keepdims=True),
}
FACTORS = {
    "rsqrt(m + e)": lambda m: torch.rsqrt(m + EPS),
    "(e + m).rsqrt()": lambda m: (EPS + m).rsqrt(),
    "rsqrt(add(m, e))": lambda m: torch.rsqrt(torch.add(m, EPS)),
    "(m + e)^-0.5": lambda m: torch.pow(m + EPS, -0.5),
    "1 / sqrt(m + e)": lambda m: 1.0 / torch.sqrt(m + EPS),
    "reciprocal(sqrt(m + e))": lambda m: (m + EPS).sqrt().reciprocal(),
    "1 / (sqrt(m) + e)": lambda m: 1 / (m.sqrt() + EPS),
    "1 / max(sqrt(m), e)": lambda m: 1 / torch.clamp(torch.sqrt(m), min=EPS),
    "rsqrt(max(m, e))": lambda m: torch.clamp_min(m, EPS).rsqrt(),
    "rsqrt(m)": torch.rsqrt,
    "in place": lambda m: m.add_(EPS).rsqrt(),
    "+= in place": lambda m: operator.iadd(m, EPS).rsqrt(),
}
WEIGHTS = {
    "none": None,
    "w": lambda w: w,
    "1 + w": lambda w: 1 + w,
    "w + 1.0": lambda w: w + 1.0,
    "1 + w in float32": lambda w: 1.0 + w.float(),
}
ORDERS = {
    "(x r) w": lambda x, r, w, back: back(x * r) * w,
    "w (x r)": lambda x, r, w, back: w * back(r * x),
    "cast last": lambda x, r, w, back: back(x * r * w),
    "x (r w)": lambda x, r, w, back: back(x * (r * w)),
    "(x w) r": lambda x, r, w, back: back((w * x) * r),
    "in place": lambda x, r, w, back: (x * r).mul_(w) if False else back((x * r) * w),
}
MORE = ("nothing", "square", "mean", "factor", "wide", "unscaled")
"""What else of the norm the graph returns."""

spellings = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        "weight_dtype": st.sampled_from(("same", "float32")),
        "widen": st.sampled_from(sorted(WIDEN)),
        "square": st.sampled_from(sorted(SQUARES)),
        "mean": st.sampled_from(sorted(MEANS)),
        "factor": st.sampled_from(sorted(FACTORS)),
        "weight": st.sampled_from(sorted(WEIGHTS)),
        "order": st.sampled_from(sorted(ORDERS)),
        "narrow": st.booleans(),
        "more": st.sampled_from(MORE),
        "shape": st.sampled_from(((2, 3, 8), (1, 1, 4), (5, 2, 6), (0, 3, 8), (3, 0, 4), (4, 4, 4))),
        "frozen": st.booleans(),
        "dynamic": st.sampled_from((False, False, False, True)),
    }
)


def spelt(s: dict[str, Any]) -> Any:
    """The function that ``s`` describes."""
    size = s["shape"][-1]

    def norm(x: Any, w: Any) -> Any:
        wide = WIDEN[s["widen"]](x)
        square = SQUARES[s["square"]](wide)
        mean = MEANS[s["mean"]](square, size)
        factor = FACTORS[s["factor"]](mean)
        back = (lambda y: y.to(s["dtype"])) if s["narrow"] else (lambda y: y)
        unscaled = back(wide * factor)
        weight = WEIGHTS[s["weight"]]
        y = unscaled if weight is None else ORDERS[s["order"]](wide, factor, weight(w), back)
        more = {"square": square, "mean": mean, "factor": factor, "wide": wide, "unscaled": unscaled}
        return (y, more[s["more"]]) if s["more"] != "nothing" else y

    return norm


def inputs_of(s: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An input and a weight."""
    kind = torch.float32 if s["weight_dtype"] == "float32" else s["dtype"]
    x = normal(0, *s["shape"], dtype=s["dtype"], grad=True)
    return {"x": x, "w": normal(1, s["shape"][-1], dtype=kind, grad=not s["frozen"])}


@cases
@given(s=spellings)
def test_every_spelling_becomes_one_operator(s: dict[str, Any]) -> None:
    module, _ = check(spelt(s), inputs_of(s), RULES, terms=s["shape"][-1], dynamic=s["dynamic"])
    assert targets(module).count("rms_norm") >= 1, module.graph
